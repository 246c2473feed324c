"""Policies as programs, from raw observations to an environment's own actions: ONNX, as of d3rlpy, and TorchScript.

An ONNX file of plain layers is data; one that loops, branches or asks for memory by numbers is a program, as any
TorchScript file is, and those run with --trust-checkpoint alone.
"""

import math
from pathlib import Path

import numpy as np
import torch

from common.cli import UserError
from common.foreign.build import Function, View, misfit, wrap
from common.policies import range_of, to_unit

# What networks of layers compute: no loop, no branch, no shape that is computed or given as a number
LAYERS = """
    Abs Add And ArgMax BatchNormalization Cast Ceil Celu Clip Concat Constant Cos Div Dropout Elu Equal Erf Exp Flatten
    Floor Gather Gelu Gemm Greater GreaterOrEqual HardSigmoid HardSwish Identity LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax MatMul Max Min Mish Mul Neg Not Or PRelu Pow Reciprocal ReduceMax ReduceMean ReduceMin
    ReduceSum Relu Reshape Round Selu Shape Sigmoid Sign Sin Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum
    Swish Tanh Transpose Unsqueeze Where
"""
MOST_NUMBERS = 1 << 24  # that one observation may become within a program


def program(path: Path, data, call, view: View) -> dict:
    """The policy that `call` computes, (B, S) -> (B, A), from what `view` makes of observations. Raises UserError.

    It is asked about single observations twice: whoever answers differently draws lots. Asked about several at once it
    has to answer the same; where it cannot, it is played row by row.
    """
    mean, std = data.statistics()
    action_range = range_of(data).get("action_range")
    unit = 1 if action_range is None else (action_range[1] - action_range[0]) / 2
    rows = view(data.obs[:: max(1, len(data) // 32)][:32])
    alone, again = (torch.cat([tried(path, data, call, row) for row in rows.split(1)]) for _ in range(2))
    if not alone.isfinite().all():
        raise UserError(f"{path} gives actions that are NaN or infinite; train it again, or take another policy")
    if ((alone - again) / unit).abs().max() > 1e-4:
        raise UserError(
            f"{path} gives two different actions for one observation: dropout is still active in it, or it samples; "
            "export its most likely action in evaluation mode (module.eval())"
        )
    try:
        together = call(rows)
        batched = together.shape == alone.shape
    except Exception:  # whatever it says: it was made for one observation
        batched = False
    if batched and ((alone - together) / unit).abs().max() > 1e-3:
        raise UserError(
            f"{path} acts on one observation as its neighbours say, as batch normalisation does in training; export "
            "its most likely action in evaluation mode (module.eval())"
        )

    def act(obs):  # standardised
        x = view(obs * std + mean)
        return to_unit(call(x) if batched else torch.cat([call(row) for row in x.split(1)]), action_range)

    return wrap(data, Function(act), path.stem)


def tried(path: Path, data, call, row: torch.Tensor) -> torch.Tensor:
    """The action (1, A) that a program gives for one observation (1, S). Raises UserError where it gives none."""
    try:
        action = call(row)
    except UserError:
        raise
    except Exception as error:  # as many kinds as there are programs
        last = ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
        raise misfit(path, data, f"does not take an observation of this environment ({last.strip()[:200]})") from error
    if action.shape != (1, data.actions.shape[1]):
        raise misfit(
            path, data, f"gives actions of shape {tuple(action.shape)} for an observation of {row.shape[1]} numbers"
        )
    return action


def first_of(path: Path, output: object, like: torch.Tensor) -> torch.Tensor:
    """A program's action: what it returns, or the first thing of several."""
    while isinstance(output, (tuple, list)) and len(output):
        output = output[0]
    if not isinstance(output, (torch.Tensor, np.ndarray)):
        raise UserError(f"{path} returns a {type(output).__name__}, not an action or a tuple that begins with it")
    return torch.as_tensor(output).to(like)


def check_inputs(path: Path, names: list[str]) -> None:
    if len(names) != 1:
        raise UserError(
            f"{path} takes {len(names)} inputs ({', '.join(names)}), not the observation alone: a policy that needs "
            "more, as a Decision Transformer needs its history, cannot be played here"
        )


# ---------------------------------------------------------------------------------------------- TorchScript


def torchscript(path: Path, data, view: View) -> dict:
    """The policy of a TorchScript file. Raises UserError."""
    try:
        module = torch.jit.load(str(path), map_location=data.obs.device).eval()
        arguments = module.forward.schema.arguments[1:]
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(
            f"{path} is no whole TorchScript file ({str(error).splitlines()[0]}); export it again"
        ) from error
    check_inputs(path, [x.name for x in arguments if not x.has_default_value()] or [x.name for x in arguments])
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    @torch.no_grad()
    def call(obs):
        return first_of(path, module(obs.to(dtype)), obs)

    return program(path, data, call, view)


# ---------------------------------------------------------------------------------------------- ONNX


def onnx(path: Path, data, view: View, trust: bool) -> dict:
    """The policy of an ONNX file. Raises UserError."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs two packages; install them with: pip install onnx onnxruntime") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # its parser's exceptions have no common class
        raise UserError(f"{path} is no whole ONNX file ({str(error)[:100]}); copy it again") from error
    check_files(path, model)
    if not trust:
        check_layers(path, model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"{path} is no ONNX model that can be run ({str(error)[:200]}); export it again") from error
    check_inputs(path, [x.name for x in session.get_inputs()])
    [source], targets = session.get_inputs(), session.get_outputs()
    if not targets:
        raise UserError(f"{path} has no output, which the action would be; export it again")
    types = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
    if source.type not in types:
        raise UserError(f"{path} takes {source.type}, no real numbers; export it again")
    if len(source.shape or (1, 1)) != 2:  # None: of any shape
        raise UserError(
            f"{path} takes an array of {len(source.shape)} dimensions, not observations one below the other; export it "
            f"with an input of the shape (batch, {data.obs.shape[1]})"
        )
    if source.shape and isinstance(source.shape[-1], int) and source.shape[-1] != data.obs.shape[1]:
        raise misfit(path, data, f"takes observations of {source.shape[-1]} dimensions")

    fixed = source.shape[0] if source.shape and isinstance(source.shape[0], int) else None  # d3rlpy's exports: 1

    def call(obs):
        x = obs.cpu().numpy().astype(types[source.type])
        n = fixed or len(x)
        parts = [x[i : i + n] for i in range(0, len(x), n)]
        full = [np.resize(part, (n, x.shape[1])) for part in parts]  # the last one filled up with its own rows
        actions = [first_of(path, session.run([targets[0].name], {source.name: part}), obs) for part in full]
        return torch.cat([action[: len(part)] for action, part in zip(actions, parts, strict=True)])

    return program(path, data, call, view)


def check_files(path: Path, model) -> None:
    """Refuse a model whose weights are in other files that are not beside it. Raises UserError."""
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                file = (path.parent / entry.value).resolve()
                if not file.is_file() or path.parent.resolve() not in file.parents:
                    raise UserError(
                        f"{path} has its weights in a second file, {entry.value}, which has to lie beside it"
                    )


def check_layers(path: Path, model) -> None:
    """Refuse a model that is more than layers, or that makes much of little. Raises UserError."""
    import onnx

    unknown = {
        node.op_type
        for node in model.graph.node
        if node.op_type not in LAYERS.split() or node.domain not in ("", "ai.onnx")
    }
    if unknown or len(model.functions):
        what = ", ".join(sorted(unknown)) or "functions of its own"
        raise UserError(f"{path} is a program ({what}); pass --trust-checkpoint to run it if you know its origin")
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:
        raise UserError(f"{path} is no ONNX model that can be run ({str(error)[:200]}); export it again") from error
    for value in (*graph.value_info, *graph.output):
        size = math.prod(max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim)
        if size > MOST_NUMBERS:
            raise UserError(
                f"{path} computes {size:,} numbers for an observation ({value.name}); no policy needs so many"
            )
