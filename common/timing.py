"""How long a run will take, from a few steps of each stage on networks that are thrown away."""

import dataclasses
import time
from collections.abc import Sequence

from common import envs, steps
from common.nn import ensemble_mlp, hidden_of
from common.policies import Policy
from common.stages import declared, stages_of


def untrained(args, data, hidden_layers: int | Sequence[int] = 2, more: dict | None = None) -> tuple:
    """Agent and optimisers of the script of these arguments, from a random policy of the size of `data`'s.

    `more`: other fields of that policy.
    """
    script, obs_dim, action_dim = declared(args), data.obs.shape[1], data.actions.shape[1]
    actor = Policy(script.KIND, obs_dim, action_dim, hidden_layers)
    critic = {f"net.{name}": x for name, x in ensemble_mlp(2, obs_dim + action_dim, 2, 1).state_dict().items()}
    policy = dict(
        kind=script.KIND, obs_dim=obs_dim, action_dim=action_dim, hidden_layers=hidden_of(actor.net),
        actor=actor.state_dict(),
        critic=dict(layer_norm=False, hidden_layers=2, critic=critic),
    ) | (more or {})  # fmt: skip
    agent = script.Agent(args, policy).to(data.obs.device)
    return agent, script.Optimizers(args, agent)


def seconds(args, data, hidden_layers: int | Sequence[int] = 2, more: dict | None = None) -> dict[str, float]:
    """Seconds of each stage of the script of these arguments; evaluations are left out."""
    plain, data, device = dataclasses.replace(args, compile=False), data.head(10_000), data.obs.device
    found = {}
    for stage in stages_of(args):
        if n := stage.number(args):
            step = stage.example(plain, data, *untrained(plain, data, hidden_layers, more))
            found[stage.name] = n * steps.seconds_per_step(step, device)
    last = stages_of(args)[-1]
    found[last.name] += getattr(args, last.steps) * seconds_per_env_step(data.task)
    return found


def seconds_per_env_step(task, n: int = 100) -> float:
    env = envs.make_env(task)
    env.action_space.seed(0)
    env.reset(seed=0)
    start = time.perf_counter()
    for _ in range(n):
        *_, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()
    return (time.perf_counter() - start) / n
