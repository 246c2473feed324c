"""What only a GPU can show: captured steps are the plain ones, TF32 moves Q as little as rounding, runs repeat."""

import pytest
import torch

import o2sac
from benchmarks import steps as benchmark
from common import cli, steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda")


def after(stage: str, n: int, fast: bool) -> dict[str, float]:
    """Means of everything that a stage logs over `n` steps from seed 0, compiled and captured or plain."""
    torch.manual_seed(0)
    data = benchmark.random_data(benchmark.Args(transitions=2_000), DEVICE)
    step = benchmark.make_step(stage, data, compile=fast)
    torch.manual_seed(1)
    stepper = steps.Stepper(step, DEVICE, graph=fast, phases=2)
    stepper.run(n)
    return stepper.means()


@pytest.mark.parametrize("stage", benchmark.STAGES)
def test_captured_steps_are_the_plain_ones(stage):
    """Over warm-up, two whole graphs and a rest. Another batch in one of these steps would show in the third digit."""
    torch.set_float32_matmul_precision("highest")
    plain, fast = after(stage, 27, fast=False), after(stage, 27, fast=True)
    assert fast == pytest.approx(plain, rel=1e-3, abs=1e-4)


def test_tf32_moves_q_no_further_than_rounding_does():
    """Over 1,000 steps, beside a run that starts as far away as TF32 rounds: 2^-11."""

    def q_after(precision: str, nudge: float = 0.0) -> torch.Tensor:
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(0)
        data = benchmark.random_data(benchmark.Args(transitions=2_000), DEVICE)
        args = cli.complete(o2sac.Args(compile=False))
        policy = dict(obs_dim=11, action_dim=3, hidden_layers=3, actor=o2sac.Actor(11, 3).state_dict())
        agent = o2sac.Agent(args, policy).to(DEVICE)
        with torch.no_grad():
            for param in [*agent.critic.parameters(), *agent.critic_target.parameters()]:
                param.mul_(1 + nudge)
        step = o2sac.reevaluation_step(args, data, agent, o2sac.Optimizers(args, agent))
        for _ in range(1_000):
            step()
        torch.set_float32_matmul_precision("highest")
        return agent.critic(data.obs, data.actions).detach()

    exact, tf32, nudged = q_after("highest"), q_after("high"), q_after("highest", nudge=2**-11)
    assert (tf32 - exact).std() < 2 * (nudged - exact).std() < exact.std()


@pytest.mark.parametrize("stage", ["o2sac-reevaluate", "o2sac-finetune", "o2td3-finetune"])
def test_deterministic_runs_repeat_bitwise(stage):
    steps.setup(DEVICE, 0, deterministic=True)
    try:
        assert after(stage, 200, fast=True) == after(stage, 200, fast=True)
    finally:
        steps.setup(DEVICE, 0)
