"""The order in which steps run inside captured graphs, with a stand-in for CUDA that records and replays."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from common import steps


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

    return SimpleNamespace(executed=executed, note=note)


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


def test_a_step_that_is_made_again_is_compiled_again():
    def make(n, factor):
        x = torch.arange(10.0)
        return steps.compiled(lambda: x[:n] * factor, enabled=True)

    first, second = make(3, 2.0), make(4, 5.0)
    assert first().tolist() == [0, 2, 4]
    assert second().tolist() == [0, 5, 10, 15]
    assert first().tolist() == [0, 2, 4]


def test_means_are_over_the_steps_since_the_last_call():
    values = iter(range(100))
    stepper = steps.Stepper(lambda: {"loss": torch.tensor(float(next(values)))}, torch.device("cpu"))
    stepper.run(4)
    assert stepper.means() == {"loss": 1.5}
    stepper.run(2)
    assert stepper.means() == {"loss": 4.5}
