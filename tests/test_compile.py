"""Compiled steps compute what eager ones do, on every processor."""

import copy
import dataclasses

import pytest
import torch

import o2sac
from common import cli, steps
from common.replay import ReplayBuffer
from offline import cql


def make(stage, data, compile, dtype=torch.float32):
    """The step of `stage`, with its agent and optimisers by name: the same in both precisions, but for rounding."""
    torch.manual_seed(0)
    columns = ("obs", "actions", "next_actions", "rewards", "next_obs", "terminations")
    data = dataclasses.replace(data, **{name: getattr(data, name).to(dtype) for name in columns})
    if stage == "cql":
        args = cql.Args(compile=compile, batch_size=32, n_actions=2)
        agent = cql.Agent(args, 11, 3).to(dtype)
        optimizers = cql.Optimizers(args, agent)
        return cql.training_step(args, data, agent, optimizers), {"agent": agent, **optimizers}
    args = cli.complete(o2sac.Args(compile=compile, batch_size=32, utd=1))
    actor = o2sac.Actor(11, 3).state_dict()
    agent = o2sac.Agent(args, dict(obs_dim=11, action_dim=3, hidden_layers=3, actor=actor)).to(dtype)
    optimizers = o2sac.Optimizers(args, agent)
    if stage == "reevaluate":
        step = o2sac.reevaluation_step(args, data, agent, optimizers)
    elif stage == "align":
        step = o2sac.alignment_step(args, data, agent, optimizers)
    else:
        buffer = ReplayBuffer(data, 100, "half")
        buffer.size.fill_(100)
        step = o2sac.finetuning_step(args, buffer, agent, optimizers, {"kl_threshold": torch.tensor(0.1, dtype=dtype)})
    return step, {"agent": agent, **optimizers}


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", ["cql", "reevaluate", "align", "finetune"])
def test_compiling_moves_gradients_no_further_than_rounding_does(stage, products, data, monkeypatch):
    """Twenty steps, each from where an eager run stands, beside the same step in double precision as the yardstick.

    A whole run has no yardstick that holds on every processor: training is chaotic, and how far it carries a rounding
    is luck. Medians, for here and there a unit lies so close to zero that a rounding switches it on or off.
    """
    monkeypatch.setattr(steps, "products", products)
    eager, fast = make(stage, data, compile=False), make(stage, data, compile=True)
    monkeypatch.setattr(steps, "products", torch.float32)
    exact = make(stage, data, compile=False, dtype=torch.float64)
    normal, found = torch.randn_like, {}
    for _ in range(20):
        start = copy.deepcopy({name: thing.state_dict() for name, thing in eager[1].items()})
        random_state, ends = torch.get_rng_state(), []
        for step, state in (exact, eager, fast):
            torch.set_rng_state(random_state)
            for name, thing in state.items():
                thing.load_state_dict(start[name])
            with monkeypatch.context() as patch:
                if step is exact[0]:  # the same noise: in double precision other numbers would be drawn
                    patch.setattr(torch, "randn_like", lambda x: normal(x.float()).double())
                values = step()
            for name, optimizer in state.items():
                if name != "agent":
                    values[name] = torch.cat([gradient.flatten() for gradient in optimizer.exp_avg])
            for name, value in values.items():
                found.setdefault(name, []).append(value.flatten().double().clone())
            ends.append(torch.get_rng_state())
        assert torch.equal(ends[1], ends[2])  # it drew as many numbers
    for name, values in found.items():
        right, plain, compiled = torch.stack(values).unflatten(0, (20, 3)).unbind(1)
        size, rounding, error = (x.norm(dim=1).median() for x in (right, plain - right, compiled - right))
        assert error <= 3 * rounding + 1e-6 * size, (name, error, rounding, size)
