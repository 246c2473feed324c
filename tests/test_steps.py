"""The order in which steps run inside captured graphs, with a stand-in for CUDA that records and replays."""

import contextlib
import dataclasses
import itertools
import sysconfig
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import o2ppo
import o2sac
from benchmarks import steps as benchmark
from common import steps
from common.cli import UserError
from common.steps import Stepper
from offline import cal_ql, cql


@pytest.fixture
def cuda(monkeypatch):
    """Graphs that remember which variants of the step ran while they were captured, and run these when replayed."""
    executed, capturing = [], []

    class Graph:
        def __init__(self):
            self.recorded = []

        def replay(self):
            executed.extend(self.recorded)

    @contextlib.contextmanager
    def capture(graph):
        capturing.append(graph)
        yield
        capturing.pop()

    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)

    def note(variant):
        (capturing[-1].recorded if capturing else executed).append(variant)

    return SimpleNamespace(executed=executed, note=note, capturing=capturing)


@pytest.mark.parametrize("phases", [1, 2, 3])
@pytest.mark.parametrize("steps_per_graph", [1, 10])
@pytest.mark.parametrize("calls", [[1] * 40, [10, 10, 7, 10, 3, 25], [4, 30, 30, 1, 30]])
def test_every_phase_of_a_step_comes_in_turn(cuda, phases, steps_per_graph, calls):
    counter = itertools.count()

    def step():
        cuda.note(next(counter) % phases)
        return {"loss": torch.ones(())}

    stepper = steps.Stepper(step, SimpleNamespace(type="cuda"), True, steps_per_graph, phases)
    for n in calls:
        stepper.run(n)
    assert cuda.executed == [i % phases for i in range(sum(calls))]


def test_another_gpu_than_the_first_is_made_the_current_one(monkeypatch):
    """Streams and graphs are the current device's: on another one, a graph would be captured that holds nothing."""
    current, precision = [], torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    steps.setup(torch.device("cuda:1"), seed=0)
    torch.set_float32_matmul_precision(precision)
    assert current == [torch.device("cuda:1")]


def test_nothing_is_captured_that_has_not_run_before(cuda):
    """What runs for the first time inside a capture would be compiled and tuned there, which CUDA forbids."""
    counter, seen = itertools.count(), set()

    def step():
        phase = next(counter) % 5
        assert phase in seen or not cuda.capturing
        seen.add(phase)
        return {"loss": torch.ones(())}

    steps.Stepper(step, SimpleNamespace(type="cuda"), True, steps_per_graph=10, phases=5).run(50)
    assert len(seen) == 5


def test_a_step_that_takes_over_is_captured_anew(cuda):
    """Nothing of the one before is replayed, and its own first steps run before they are captured."""
    first, second = (lambda name=name: cuda.note(name) or {"loss": torch.ones(())} for name in ("first", "second"))
    stepper = steps.Stepper(first, SimpleNamespace(type="cuda"), True, steps_per_graph=1)
    stepper.run(7)
    captured = len(stepper.graphs)
    stepper.change(second)
    assert captured == 1 and not stepper.graphs
    stepper.run(3)
    assert not stepper.graphs
    stepper.run(4)
    assert cuda.executed == ["first"] * 7 + ["second"] * 7
    assert stepper.counts == {("loss",): 14}


def test_captured_steps_count_what_each_of_them_returned(cuda):
    """A graph holds steps of several kinds: each name is averaged over those that returned it."""
    counter = itertools.count()

    def step():  # recorded once, replayed often: the values stand still, the counts must not
        always = {"loss": torch.tensor(2.0)}
        return always | {"actor_loss": torch.tensor(6.0)} if next(counter) % 2 else always

    stepper = steps.Stepper(step, SimpleNamespace(type="cuda"), True, steps_per_graph=4, phases=2)
    stepper.run(3 + 4 * 5 + 1)
    assert stepper.counts == {("loss",): 12, ("loss", "actor_loss"): 12}


class OnDevice(TorchDispatchMode):
    """Refuses every operation that touches a tensor elsewhere than on `meta`, a device whose values cannot be read."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        fused = func is torch.ops.aten._fused_adam_.tensor_lr  # the one kernel that knows no such device
        out = None if fused else func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, f"{func} touches a {tensor.device} tensor"
        return out


@pytest.mark.parametrize("stage", benchmark.STAGES)
def test_a_step_stays_on_its_device_and_reads_nothing_back(stage, monkeypatch):
    """A number read back stops a GPU's queue, and in a captured graph it is the first step's for ever."""
    monkeypatch.setattr(torch.Tensor, "__int__", lambda _: 0)  # optimisers' counts, read when a step is made
    dtypes = (torch.float32, torch.float32, torch.int64)
    tails = [torch.empty(1_000, dtype=dtype, device="meta") for dtype in dtypes]
    monkeypatch.setattr(o2ppo, "discounted_tails", lambda *_: tails)  # a loop on the CPU, once, before the steps
    monkeypatch.setattr(cal_ql, "returns_to_go", lambda rewards, *_: rewards)  # as is this one
    data = benchmark.random_data(benchmark.Args(transitions=1_000), torch.device("cpu"))
    for field, value in vars(data).items():
        if isinstance(value, torch.Tensor):
            setattr(data, field, value.to("meta"))
    step = benchmark.make_step(stage, data, compile=False)
    with OnDevice():
        for _ in range(2):
            metrics = step()
    assert metrics and all(value.is_meta and value.ndim == 0 for value in metrics.values())


def test_a_step_that_is_made_again_is_compiled_again():
    def make(n, factor):
        x = torch.arange(10.0)
        return steps.compiled(lambda: x[:n] * factor, enabled=True)

    first, second = make(3, 2.0), make(4, 5.0)
    assert first().tolist() == [0, 2, 4]
    assert second().tolist() == [0, 5, 10, 15]
    assert first().tolist() == [0, 2, 4]


def test_a_number_that_a_compiled_step_has_read_is_not_frozen_without_a_word():
    settings, scale, factor = SimpleNamespace(offset=1.0), torch.ones(()), 2.0

    def set_factor(value):
        nonlocal factor
        factor = value

    step = steps.compiled(lambda: scale * factor + settings.offset, enabled=True)
    assert step() == 3.0
    scale.fill_(10.0)  # as a schedule is written
    assert step() == 21.0
    set_factor(3.0)
    with pytest.raises(UserError, match="it was factor == 2.0.*docs/extend.md"):
        step()
    set_factor(2.0)
    settings.offset = 0.0
    with pytest.raises(UserError, match="it was settings.offset == 1.0"):
        step()


@pytest.mark.parametrize("script", [o2sac, cql])
def test_arguments_stay_as_they_were_set(script):
    args = script.Args(alpha=1.0)
    with pytest.raises(UserError, match="args.alpha .*docs/extend.md"):
        args.alpha = 2.0
    assert args.alpha == 1.0 and dataclasses.replace(args, alpha=2.0).alpha == 2.0


def test_what_compiling_lacks_is_named(monkeypatch, tmp_path, capsys):
    cpu = torch.device("cpu")
    monkeypatch.delenv("CXX", raising=False)
    assert steps.can_compile(cpu) and capsys.readouterr().out == ""
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: str(tmp_path))  # as without python3-dev
    assert not steps.can_compile(cpu) and "python3-dev" in capsys.readouterr().out
    (tmp_path / "Python.h").touch()
    assert steps.can_compile(cpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not steps.can_compile(cpu) and "the C++ compiler" in capsys.readouterr().out
    (tmp_path / "c++").touch(0o755)  # not the one that PyTorch uses
    assert not steps.can_compile(cpu)
    monkeypatch.setenv("CXX", "c++")
    assert steps.can_compile(cpu)


def test_means_are_over_the_steps_since_the_last_call():
    values = iter(range(100))
    stepper = steps.Stepper(lambda: {"loss": torch.tensor(float(next(values)))}, torch.device("cpu"))
    stepper.run(4)
    assert stepper.means() == {"loss": 1.5}
    stepper.run(2)
    assert stepper.means() == {"loss": 4.5}


def test_a_metric_that_is_no_number_is_named():
    """`torch.stack` would say of which shapes, and not whose."""
    stepper = steps.Stepper(lambda: {"q": torch.tensor(1.0), "far": torch.ones(256)}, torch.device("cpu"))
    with pytest.raises(UserError, match="the metric far has to be a tensor of shape"):
        stepper.run(1)


@pytest.mark.parametrize("name", ["score", "success"])
def test_a_metric_is_not_called_as_what_an_evaluation_measures(name):
    stepper = Stepper(lambda: {"q": torch.zeros(()), name: torch.zeros(())}, torch.device("cpu"))
    with pytest.raises(UserError, match=f"the metric {name} is called as what an evaluation measures"):
        stepper.run(1)
