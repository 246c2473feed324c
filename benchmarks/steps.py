"""Steps per second of every offline algorithm and of every stage of the online ones, on random data of hopper's size.

    python benchmarks/steps.py                  # this machine's GPU, else its CPU: eager and compiled
    python benchmarks/steps.py --device cpu

The two are timed in turns, so that a machine whose speed drifts does not favour either; the medians are printed. The
floor is the best that this machine could do: a step's matrix products at the rate that a large one reaches here, or on
a GPU its kernels, each at the latency of an empty one inside a graph, whichever takes longer.
"""

import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import offline
from common import cli, datasets, report, stages, steps, tasks, timing
from common.bounds import above, at_least

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

ONLINE = ("o2sac", "o2td3", "o2ppo")


def stages_of(script: str) -> list[str]:
    """A fine-tuning script's stages, as --stages names them."""
    return [f"{script}-{stage.name}" for stage in stages.online(script).STAGES]


STAGES = (*offline.ALGORITHMS, *(stage for script in ONLINE for stage in stages_of(script)))


@dataclass
class Args:
    device: str = "auto"
    """cpu, cuda, …; auto takes the GPU where there is one"""
    stages: tuple[str, ...] = STAGES
    """the stages to time, as o2sac-align, iql, or a script's name or path for all of its stages; in finetune a step is
    an update, for o2ppo a pass over one rollout in 16 minibatches"""
    seconds: Annotated[float, above(0)] = 2.0
    """length of one turn"""
    turns: Annotated[int, at_least(1)] = 5
    """turns of each"""
    transitions: Annotated[int, at_least(100)] = 100_000
    """size of the random dataset"""
    obs_dim: Annotated[int, at_least(1)] = 11
    """hopper's"""
    action_dim: Annotated[int, at_least(1)] = 3
    """hopper's"""
    compile: bool = True
    """time the compiled steps too"""
    matmul: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: and once more with --matmul bfloat16"""


def random_data(args: Args, device: torch.device) -> datasets.Dataset:
    n = args.transitions
    obs, next_obs = torch.randn(2, n, args.obs_dim, device=device)
    actions, next_actions = torch.rand(2, n, args.action_dim, device=device) * 2 - 1
    ends = (torch.rand(n, device=device) < 0.002).float()
    return datasets.Dataset(
        obs=obs, actions=actions, next_actions=next_actions, rewards=torch.randn(n, device=device), next_obs=next_obs,
        terminations=ends, episode=ends.cumsum(0).long(), returns=torch.zeros(int(ends.sum()) + 1),
        task=tasks.resolve(tasks.DEMO), source="random",
    )  # fmt: skip


def make_step(stage: str, data: datasets.Dataset, compile: bool):
    """One gradient step of `stage` (of fine-tuning: one online update), with the paper's sizes."""
    if offline.is_algorithm(stage):
        script = offline.algorithm(stage)
        args = cli.complete(script.Args(compile=compile))
        agent = script.Agent(args, data.obs.shape[1], data.actions.shape[1]).to(data.obs.device)
        return script.training_step(args, data, agent, script.Optimizers(args, agent))
    name, _, stage = stage.rpartition("-")
    script = stages.online(name)
    args = script.Args(compile=compile)
    args = cli.complete(replace(args, utd=1) if hasattr(args, "utd") else args)
    agent, optimizers = timing.untrained(args, data, offline.hidden_layers(args))
    [stage] = [declared for declared in script.STAGES if declared.name == stage]
    return stage.example(args, data, agent, optimizers)


def chosen(name: str) -> list[str]:
    """The stages that a name in --stages means. Raises UserError where there are none."""
    if name in offline.ALGORITHMS:
        return [name]
    try:
        return stages_of(name)
    except cli.UserError:
        script = name.rpartition("-")[0]
        if script and name in stages_of(script):
            return [name]
        raise


def turn(stepper: steps.Stepper, seconds: float, device: torch.device) -> float:
    """Steps per second over about `seconds`."""
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        stepper.run(10)
        n += 10
        if device.type == "cuda":
            torch.cuda.synchronize()
    return n / (time.perf_counter() - start)


def seconds_of(fn, device: torch.device, turns: int = 7) -> float:
    """The shortest time of a call."""
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product."""
    n = 8_192 if device.type == "cuda" else 1_024
    x, y = torch.randn(2, n, n, device=device)
    return 2 * n**3 / seconds_of(lambda: x @ y, device)


def kernel_latency() -> float:
    """Seconds that a kernel which does next to nothing takes inside a CUDA graph, after another one."""
    x, graph = torch.zeros((), device="cuda"), torch.cuda.CUDAGraph()
    x.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(1_000):
            x.add_(1)
    return seconds_of(graph.replay, torch.device("cuda")) / 1_000


def count_flops(step) -> int:
    """Floating-point operations of the matrix products of one eager step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def count_kernels(stepper: steps.Stepper) -> float:
    """CUDA kernels in a step as it is run."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        stepper.run(20)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events()) / 20


def main() -> None:
    args = cli.read(Args, __doc__)
    device = cli.resolve_device(args.device)
    steps.setup(device, seed=0)
    data = random_data(args, device)
    compile = args.compile and steps.can_compile(device)
    kinds = {"eager": (False, torch.float32)} | ({"compiled": (True, torch.float32)} if compile else {})
    if args.matmul != "float32":
        kinds[args.matmul] = compile, getattr(torch, args.matmul)
    columns = ["eager", *(column for kind in [*kinds][1:] for column in (kind, "ratio"))]  # to the kind before it
    table = Table(title=f"steps/s, {report.hardware(device)}, PyTorch {torch.__version__}")
    cuda = device.type == "cuda"
    rate, latency = matrix_rate(device), kernel_latency() if cuda else 0.0
    for column in ("stage", *columns, "GFLOP", *["kernels"] * cuda, "floor", "of floor", *["peak MB"] * cuda):
        table.add_column(column, justify="left" if column == "stage" else "right")
    rows = []
    for stage in [stage for name in args.stages for stage in chosen(name)]:
        rate = max(rate, matrix_rate(device))  # the best of the whole run, for a busy moment is no floor
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        steppers = []
        for fast, dtype in kinds.values():
            steps.products = dtype
            steppers.append(steps.Stepper(make_step(stage, data, fast), device, graph=fast, phases=2))
            steppers[-1].run(3 if stage == "cql" else 20)  # compiles, warms up, captures
        plain = steppers[0].step
        flops = (count_flops(plain) + count_flops(plain)) / 2  # every second step of some updates the actor too
        rates = [[turn(stepper, args.seconds, device) for stepper in steppers] for _ in range(args.turns)]
        medians = [statistics.median(column) for column in zip(*rates, strict=True)]
        found = [f"{medians[0]:,.1f}"]
        for i, median in enumerate(medians[1:], start=1):
            found += [f"{median:,.1f}", f"{statistics.median(row[i] / row[i - 1] for row in rates):.2f}"]
        exact = medians[1 if compile else 0]  # in float32, as the floor is
        kernels = count_kernels(steppers[-1]) if cuda else 0.0
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        rows.append((stage, found, exact, flops, kernels, peak))
    for stage, found, exact, flops, kernels, peak in rows:
        floor = 1 / max(flops / rate, kernels * latency)
        table.add_row(stage, *found, f"{flops / 1e9:.2f}",
                      *[f"{kernels:.0f}"] * cuda, f"{floor:,.0f}", f"{exact / floor:.0%}",
                      *[f"{peak / 1e6:,.0f}"] * cuda)  # fmt: skip
    Console(width=120).print(table)
    print(
        f"matrix products: {rate / 1e9:,.0f} GFLOP/s" + f"; kernels in a graph: {latency * 1e6:.1f} µs" * bool(latency)
    )
    if not cuda:
        unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes on Linux
        print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:,.0f} MB")


if __name__ == "__main__":
    cli.run(main)
