"""ACA, actor-critic alignment (Yu & Zhang, ICML 2023): fine-tuning without the offline critics. The offline policy π_0
becomes a part of the critics, Q_i(s, a) = R_i(s, a) + ℓ(s, a), ℓ being its clipped log-density, and R_i starts from the
baseline Z_i(s) of offline/sac_ml.py: at first Q ranks actions as π_0 does. Then it is SAC, while ℓ's weight falls.

    python baselines/aca.py --preset demo
    python baselines/aca.py --env-id hopper-medium-v2

The offline critics are left behind, the temperature starts again from 1, and the policy's optimiser goes on. The
authors' code loads the moments of the offline critics' optimiser for R, too; here they are new. There, as in d3rlpy, on
which it builds, temperature, critics and policy take their steps one after another; here all three gradients are of the
networks before them. States are as they are.
On AntMaze the authors' policy is an unsquashed Gaussian, with the density of the clipped sample in ℓ; here it is a
squashed one everywhere.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

import offline
from common import cli, datasets, envs, report, steps
from common.bounds import above, at_least, between, even, finite, only_with
from common.checkpoint import BestPolicy, seed_everything
from common.loop import Loop
from common.nn import (
    Adam,
    before_tanh,
    clip_grad_norm,
    ensemble_mlp,
    gaussian_log_prob,
    in_chunks,
    mlp,
    polyak,
    tanh_log_det,
)
from common.policies import go_on
from common.probe import STATES, Probe, fixed_noise
from common.replay import ReplayBuffer, experience
from common.run import Run
from common.stages import Schedules, Stage
from common.tasks import Task

import torch
import torch.nn.functional as F
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", online_steps=10_000),
    "quick": dict(online_steps=20_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_shift=-1.0, target_entropy=-0.5, width=3.0, prior_steps=200_000, online_steps=200_000,
                    eval_every=5_000, eval_episodes=20, final_episodes=100, best_margin=2.0),
    "adroit": dict(online_steps=200_000, eval_every=5_000, eval_episodes=100, best_margin=2.0),
}  # fmt: skip


@dataclass
class Args(cli.OnlineArgs):
    offline: str = "sac_ml"
    """sac_ml (trained first if there is none yet), or the PATH of a policy.pt that it wrote"""
    batch_size: Annotated[int, even()] = 256
    """transitions in a batch"""
    utd: ClassVar[int] = 1  # updates after an environment step, as other methods' --utd
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics"""
    lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of everything"""
    target_entropy: Annotated[float, finite()] = -1.0
    """entropy that the temperature is tuned to, for each action dimension (AntMaze: -0.5)"""
    actor_grad_norm: Annotated[float, above(0)] = 0.25
    """the actor's gradient is clipped at this norm"""
    width: Annotated[float | None, at_least(0)] = None
    """the paper's β: log π_0 has a soft floor where it is so many standard deviations away; None: 7, on expert and
    medium-expert data 15"""
    prior_start: Annotated[float, at_least(0)] = 1.0
    """the paper's ω, the weight of ℓ, at the first update"""
    prior_end: Annotated[float | None, at_least(0)] = None
    """and where it stays; None: 0.5, on random data 0, on expert and medium-expert data 1"""
    prior_steps: Annotated[int | None, at_least(1)] = None
    """updates in which it would fall to 0, 1,000 times the authors' K; None: 40,000, on random data 10,000"""
    buffer: Literal["half", "all", "part", "none"] | None = None
    """offline data in online batches: half of each batch, all in one buffer, only the best episodes, or none; None:
    none, on medium-replay, expert and medium-expert data part"""
    part_episodes: Annotated[int, at_least(1), only_with(buffer="part")] = 50
    """how many episodes, those of highest return, --buffer part keeps"""
    online_steps: Annotated[int, at_least(1)] = 100_000
    """environment steps"""
    learning_starts: Annotated[int | None, at_least(1)] = None
    """environment steps before the first update; None: 256, a batch, or 1 where --buffer starts with offline data"""
    eval_every: Annotated[int, at_least(1)] = 1_000
    """environment steps between evaluations"""

    def constants(self, task: Task) -> dict:
        """The authors' for each kind of data (see `Task.quality`)."""
        values = dict(width=7.0, prior_end=0.5, prior_steps=40_000, buffer="none")
        if task.quality == "random":
            values |= dict(prior_end=0.0, prior_steps=10_000)
        if task.expert:
            values |= dict(width=15.0, prior_end=1.0)
        if task.expert or task.quality == "medium-replay":
            values |= dict(buffer="part")
        return values | dict(learning_starts=256 if (self.buffer or values["buffer"]) == "none" else 1)


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Squashed Gaussian policy: (B, S) -> mean and log std of u, (B, A) each; the action is tanh(u)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, 2 * action_dim)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, (log_std - 1.0).clamp(-20.0, 2.0)


class Remainder(nn.Module):
    """R, what Q holds apart from ℓ, twins side by side: (B, S), (B, A) -> (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)

    @torch.no_grad()
    def start_from(self, baseline: dict[str, torch.Tensor], obs_dim: int) -> None:
        """R_i(s, a) = Z_i(s): Z's weights throughout, and 0 for the actions in the first layer."""
        mine = self.net.state_dict()
        for name, theirs in baseline.items():
            mine[name].copy_(theirs if name != "0.weight" else F.pad(theirs, (0, 0, 0, mine[name].shape[1] - obs_dim)))


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a = tanh(u), u ~ N(mean, std), reparameterised: a (B, A), u (B, A), log π(a|s) (B,)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), u, log_prob_of(u, mean, log_std)


def log_prob_of(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log π(tanh(u)|s) (B,). Taking u, not the action, leaves no atanh near ±1 to go wrong."""
    return gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)


def clipped_log_prob(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, width: float) -> torch.Tensor:
    """softplus(log π_0 - c) + c (B,): log π_0 of tanh(u) with a soft floor c.

    c is the lower of log π_0 at the mean of u plus and minus `width` standard deviations in all dimensions at once.
    """
    far = width * log_std.exp()
    c = torch.minimum(log_prob_of(mean - far, mean, log_std), log_prob_of(mean + far, mean, log_std)).detach()
    return F.softplus(log_prob_of(u, mean, log_std) - c) + c


class Agent(nn.Module):
    """All that is learned, π, R, R̄ and log α, and π_0: the policies as the offline run left them, R as its Z."""

    def __init__(self, args: Args, policy: dict):
        super().__init__()
        obs_dim, action_dim, learner = policy["obs_dim"], policy["action_dim"], policy["learner"]
        hidden_layers, left = learner["args"]["hidden"], learner["agent"]
        self.actor = Actor(obs_dim, action_dim, hidden_layers)
        self.actor.load_state_dict(part(left, "actor."))
        self.actor_offline = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = Remainder(obs_dim, action_dim, hidden_layers)
        self.critic.start_from(part(left, "baseline.net."), obs_dim)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The most likely action, tanh of the mean."""
        return torch.tanh(self.actor(obs)[0])


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin so, without that."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Optimizers(dict):
    """One Adam for each thing that is learned; the actor's goes on from the offline run."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.lr),
            alpha_optimizer=Adam([agent.log_alpha], args.lr),
        )


def critic_probe(args: Args, agent: Agent, held_out: datasets.Dataset, prior: torch.Tensor) -> Probe:
    """Logged online: Q at states that it does not train on, and how far its ranking of actions is log π_0's."""
    mean, log_std = in_chunks(agent.actor_offline, held_out.obs)
    u = mean + log_std.exp() * fixed_noise(mean)

    def q(obs, actions):
        return agent.critic(obs, actions).amin(0) + prior * clipped_log_prob(
            before_tanh(actions), mean, log_std, args.width
        )

    return Probe(held_out, q, agent.act, torch.tanh(mean), torch.tanh(u), log_prob_of(u, mean, log_std))


# ---------------------------------------------------------------------------------------------- fine-tuning


def schedules(args: Args) -> dict:
    """ω falls linearly with the updates, one a step, from `prior_start`, and stays at `prior_end`."""
    slope = args.prior_start / args.prior_steps

    def prior(env_step: int) -> float:
        updates = max(env_step - args.learning_starts - 1, 0)  # before this step's
        return max(args.prior_start - slope * updates, args.prior_end)

    return {"prior": prior}


def finetuning_step(args: Args, replay: ReplayBuffer, agent: Agent, optimizers: Optimizers, scheduled: dict):
    """The update of one environment step. `scheduled` holds what `schedules` names, as scalar tensors."""
    actor, critic, critic_target, prior = agent.actor, agent.critic, agent.critic_target, scheduled["prior"]
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    target_entropy, batch_size = args.target_entropy * replay.action_dim, args.batch_size

    def gradients():
        obs, actions, rewards, next_obs, terminations = replay.sample(batch_size)
        alpha = agent.log_alpha.exp().detach()
        with torch.no_grad():
            offline_mean, offline_log_std = agent.actor_offline(torch.cat([obs, next_obs]))

        def ell(u, half):  # ℓ(s, a) = ω (softplus(log π_0(a|s) - c(s)) + c(s))
            return prior * clipped_log_prob(u, offline_mean[half], offline_log_std[half], args.width)

        here, following = slice(None, batch_size), slice(batch_size, None)

        # critics: y = r + γ (1 - d) [ min_i R̄_i(s', a') + ℓ(s', a') - α log π(a'|s') ],  a' ~ π;  (R_i + ℓ - y)²
        with torch.no_grad():
            next_actions, next_u, next_log_prob = sample_actions(*actor(next_obs))
            next_q = critic_target(next_obs, next_actions).amin(0) + ell(next_u, following)
            y = rewards + args.gamma * (1 - terminations) * (next_q - alpha * next_log_prob)
            ell_data = ell(before_tanh(actions), here)
        q = critic(obs, actions) + ell_data
        critic_loss = ((q - y) ** 2).mean(1).sum()

        # actor: α log π(a|s) - min_i R_i(s, a) - ℓ(s, a),  a ~ π; temperature towards the target entropy
        new_actions, u, log_prob = sample_actions(*actor(obs))
        ell_policy = ell(u, here)
        actor_loss = (alpha * log_prob - critic(obs, new_actions).amin(0) - ell_policy).mean()
        alpha_loss = -agent.log_alpha * (log_prob.detach() + target_entropy).mean()

        metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "q": q.mean(), "q_target": y.mean(),
                   "prior_data": ell_data.mean(), "prior_policy": ell_policy.mean(), "alpha": alpha,
                   "entropy": -log_prob.mean()}  # fmt: skip
        return (
            torch.autograd.grad(critic_loss, critic_params),
            clip_grad_norm(torch.autograd.grad(actor_loss, actor_params), args.actor_grad_norm),
            torch.autograd.grad(alpha_loss, [agent.log_alpha]),
            {name: value.detach() for name, value in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile)

    def step():
        critic_grads, actor_grads, alpha_grads, metrics = gradients()
        optimizers["alpha_optimizer"].step(alpha_grads)
        optimizers["critic_optimizer"].step(critic_grads)
        optimizers["actor_optimizer"].step(actor_grads)
        polyak(critic_target, critic, args.tau)
        return metrics

    return step


def finetune(args: Args, run: Run, data, held_out, agent: Agent, optimizers: Optimizers, evaluator, best: BestPolicy):
    """Interact, update and evaluate. `best` is the offline policy, with its score."""
    device = data.obs.device
    replay, schedule = experience(args, data), Schedules(schedules(args), device)
    step = finetuning_step(args, replay, agent, optimizers, schedule.tensors)
    probe = critic_probe(args, agent, held_out, schedule.tensors["prior"])
    stepper = steps.Stepper(step, device, graph=args.compile, steps_per_graph=1)
    env = envs.training(args, data.task, evaluator)
    state = {"agent": agent, **optimizers, "replay": replay, "env": env, "best": best, "stepper": stepper}
    loop = Loop(run, "finetune", args.online_steps, state, device, probe)
    schedule.fill(max(loop.start, 1))  # for the probe, which comes before the next step

    @torch.no_grad()
    def explore(obs):
        mean, log_std = agent.actor(torch.as_tensor(obs, device=device)[None])
        return sample_actions(mean, log_std)[0][0].cpu().numpy()

    for env_step in loop:
        schedule.fill(env_step)
        obs, action = env.obs, explore(env.obs)
        # Updates draw on the transitions before this one, so a GPU does them while the simulator takes this step
        if env_step > args.learning_starts:
            stepper.run(1)
        next_obs, reward, terminated, episodic_return = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)  # the executed action; a truncation is no end
        if episodic_return is not None:
            run.log("finetune", env_step, env.outcome)
        if env_step % args.eval_every == 0 or env_step == args.online_steps:
            loop.evaluate(evaluator, schedule.scalars())


# ---------------------------------------------------------------------------------------------- the whole run


KIND = "squashed_gaussian"  # of the policy to start from, see common/policies.py
GOES_ON = True  # with all that the offline run learned
FINETUNE = Stage("finetune", "online_steps", finetuning_step, "fine-tuned", "eval_every", experience, schedules)
STAGES = (FINETUNE,)


def main() -> None:
    args, run, data = report.start_run(Args, offline)
    device = data.obs.device

    policy, evaluator = offline.policy(args, run, data)
    seed_everything(args.seed)
    data, held_out = data.hold_out(args.holdout, STATES)
    agent = Agent(args, policy).to(device)
    optimizers = Optimizers(args, agent)
    go_on(optimizers, policy, "actor_optimizer")
    best = BestPolicy(policy["score"], agent.actor, "offline policy", run.last_returns, args.best_margin)

    finetune(args, run, data, held_out, agent, optimizers, evaluator, best)

    report.finish(run, policy, agent, best, data, evaluator)


if __name__ == "__main__":
    cli.run(main)
