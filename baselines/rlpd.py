"""RLPD (Ball, Smith, Kostrikov & Levine, ICML 2023, arXiv 2302.02948): no offline training at all. SAC from scratch
with half of every batch from the dataset, LayerNorm in the critics, ten of them, and twenty updates a step.

    python baselines/rlpd.py --preset demo
    python baselines/rlpd.py --env-id hopper-medium-v2

Its "offline" score is that of networks at random. The first 5,000 environment steps are random actions (the authors'
README; the default of their code is 10,000) and count in the budget. The actor ascends the mean of the ten critics, the
target takes the minimum of two: that is meant. The score is of tanh(mean).
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

import offline
from common import cli, datasets, envs, regime, report, steps
from common.bounds import at_least, between, even
from common.checkpoint import BestPolicy, seed_everything
from common.evaluation import make_evaluator
from common.loop import Loop
from common.nn import (
    Adam,
    EnsembleLinear,
    ensemble_mlp,
    gaussian_log_prob,
    hidden_of,
    in_chunks,
    mlp,
    polyak,
    tanh_log_det,
)
from common.policies import examples_of, range_of
from common.probe import STATES, Probe, fixed_noise
from common.replay import ReplayBuffer
from common.run import Run
from common.stages import Stage

import torch
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", online_steps=10_000, learning_starts=2_000, utd=4),
    "quick": dict(online_steps=20_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_shift=-1.0, hidden=(256, 256, 256), targets=1, backup_entropy=False, online_steps=300_000,
                    eval_every=5_000, eval_episodes=20, final_episodes=100, best_margin=2.0),
    "adroit": dict(hidden=(256, 256, 256), backup_entropy=False, online_steps=300_000, eval_every=5_000,
                    eval_episodes=100, best_margin=2.0),
}  # fmt: skip


@dataclass
class Args(cli.OnlineArgs):
    offline: str = "scratch"
    """there is none: all networks are new"""
    batch_size: Annotated[int, even()] = 256
    """transitions in a minibatch, half of them the dataset's"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics"""
    lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the actor, of the critics and of the temperature"""
    hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256)
    """widths of the hidden layers in every network (AntMaze and Adroit: three)"""
    critics: Annotated[int, at_least(2)] = 10
    """critics in the ensemble"""
    targets: Annotated[int, at_least(1)] = 2
    """how many of them, drawn anew for each update and without replacement, the target takes the minimum of"""
    backup_entropy: bool = True
    """the target holds the entropy (AntMaze and Adroit: not)"""
    online_steps: Annotated[int, at_least(1)] = 100_000
    """environment steps (the authors' on locomotion: 250,000)"""
    learning_starts: Annotated[int, at_least(1)] = 5_000
    """environment steps before the first update, of random actions"""
    utd: Annotated[int, at_least(1)] = 20
    """updates of the critics per environment step; the actor has one"""
    eval_every: Annotated[int, at_least(1)] = 1_000
    """environment steps between evaluations"""

    def check(self) -> None:
        super().check()
        if self.offline != "scratch":
            raise cli.UserError("rlpd starts from scratch; leave --offline out, or take baselines/wsrl.py")
        if self.targets > self.critics:
            raise cli.UserError(f"--targets {self.targets} are more than the --critics {self.critics}")


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Squashed Gaussian policy: (B, S) -> mean and log std of u, (B, A) each; the action is tanh(u)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, 2 * action_dim)
        xavier(self)
        nn.init.ones_(self.net[-1].bias[action_dim:])  # so that log std starts at 0

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, (log_std - 1.0).clamp(-20.0, 2.0)


class Critic(nn.Module):
    """`n` Q networks side by side: (B, S), (B, A) -> (n, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple, n: int):
        super().__init__()
        self.n, self.net = n, ensemble_mlp(n, obs_dim + action_dim, hidden_layers, 1, layer_norm=True)
        xavier(self)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(self.n, *x.shape)).squeeze(-1)


def xavier(module: nn.Module) -> None:
    """Xavier's uniform weights and no biases, in every linear layer."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | EnsembleLinear):
            for weight in layer.weight if isinstance(layer, EnsembleLinear) else [layer.weight]:
                nn.init.xavier_uniform_(weight)
            nn.init.zeros_(layer.bias)


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = tanh(u), u ~ N(mean, std), reparameterised, and log π(a|s): (..., A) and (...)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)


class Agent(nn.Module):
    """All that is learned: π, Q, Q̄ and log α."""

    def __init__(self, args: Args, policy: dict):
        super().__init__()
        obs_dim, action_dim = policy["obs_dim"], policy["action_dim"]
        self.actor = Actor(obs_dim, action_dim, args.hidden)
        self.critic = Critic(obs_dim, action_dim, args.hidden, args.critics)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The most likely action, tanh of the mean."""
        return torch.tanh(self.actor(obs)[0])


class Optimizers(dict):
    """One Adam for each thing that is learned."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.lr),
            alpha_optimizer=Adam([agent.log_alpha], args.lr),
        )


def critic_probe(agent: Agent, held_out: datasets.Dataset) -> Probe:
    """Logged online: Q at states that it does not train on, and how it ranks actions."""
    mean, log_std = in_chunks(agent.actor, held_out.obs)
    u = mean + log_std.exp() * fixed_noise(mean)
    preference = gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)
    return Probe(held_out, lambda *x: agent.critic(*x).amin(0), agent.act, torch.tanh(mean), torch.tanh(u), preference)


# ---------------------------------------------------------------------------------------------- fine-tuning


def experience(args: Args, data: datasets.Dataset) -> ReplayBuffer:
    """What online batches are drawn from."""
    return ReplayBuffer(data, args.online_steps, "half")


def finetuning_step(args: Args, replay: ReplayBuffer, agent: Agent, optimizers: Optimizers):
    """The `utd` updates of the critics of one environment step, then one of actor and temperature."""
    actor, critic, critic_target = agent.actor, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    target_entropy = -replay.action_dim / 2

    def critic_gradients():
        obs, actions, rewards, next_obs, terminations = replay.sample(args.batch_size)
        # y = r + γ (1 - d) [ min_{i ∈ Z} Q̄_i(s', a') - α log π(a'|s') ],  a' ~ π,  Z a subset of the critics
        with torch.no_grad():
            next_actions, next_log_prob = sample_actions(*actor(next_obs))
            subset = torch.rand(args.critics, device=obs.device).argsort()[: args.targets]
            next_v = critic_target(next_obs, next_actions)[subset].amin(0)
            if args.backup_entropy:
                next_v = next_v - agent.log_alpha.exp() * next_log_prob
            y = rewards + args.gamma * (1 - terminations) * next_v
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean()
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach().mean(), "q_target": y.mean()}
        return torch.autograd.grad(critic_loss, critic_params), metrics, obs

    def actor_gradients(obs):
        # actor: α log π(a|s) - mean_i Q_i(s, a),  a ~ π; temperature: α (entropy + A/2)
        alpha = agent.log_alpha.exp()
        actions, log_prob = sample_actions(*actor(obs))
        actor_loss = (alpha.detach() * log_prob - critic(obs, actions).mean(0)).mean()
        alpha_loss = alpha * (-log_prob.detach().mean() - target_entropy)
        metrics = {"actor_loss": actor_loss, "alpha_loss": alpha_loss, "alpha": alpha, "entropy": -log_prob.mean()}
        return (
            torch.autograd.grad(actor_loss, actor_params),
            torch.autograd.grad(alpha_loss, [agent.log_alpha]),
            {name: value.detach() for name, value in metrics.items()},
        )

    critic_gradients = steps.compiled(critic_gradients, args.compile)
    actor_gradients = steps.compiled(actor_gradients, args.compile)

    def step():
        for _ in range(args.utd):
            critic_grads, metrics, obs = critic_gradients()
            optimizers["critic_optimizer"].step(critic_grads)
            polyak(critic_target, critic, args.tau)
        actor_grads, alpha_grads, actor_metrics = actor_gradients(obs)  # on the last of these minibatches
        optimizers["actor_optimizer"].step(actor_grads)
        optimizers["alpha_optimizer"].step(alpha_grads)
        return metrics | actor_metrics

    return step


def finetune(args: Args, run: Run, data, agent: Agent, optimizers: Optimizers, evaluator, probe, best: BestPolicy):
    """Interact, update and evaluate. `best` is the policy at the start, with its score."""
    device = data.obs.device
    replay = experience(args, data)
    step = finetuning_step(args, replay, agent, optimizers)
    stepper = steps.Stepper(step, device, graph=args.compile, steps_per_graph=1)
    env = envs.training(args, data.task, evaluator)
    state = {"agent": agent, **optimizers, "replay": replay, "env": env, "best": best, "stepper": stepper}
    loop = Loop(run, "finetune", args.online_steps, state, device, probe)

    @torch.no_grad()
    def explore(obs):
        mean, log_std = agent.actor(torch.as_tensor(obs, device=device)[None])
        return sample_actions(mean, log_std)[0][0].cpu().numpy()

    for env_step in loop:
        obs = env.obs
        action = explore(obs) if env_step > args.learning_starts else 2 * torch.rand(replay.action_dim).numpy() - 1
        # Updates draw on the transitions before this one, so a GPU does them while the simulator takes this step
        if env_step > args.learning_starts:
            stepper.run(1)
        next_obs, reward, terminated, episodic_return = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)  # the executed action; a truncation is no end
        if episodic_return is not None:
            run.log("finetune", env_step, env.outcome)
        if env_step % args.eval_every == 0 or env_step == args.online_steps:
            loop.evaluate(evaluator)


# ---------------------------------------------------------------------------------------------- the whole run


KIND = "squashed_gaussian"  # of the policy to start from, see common/policies.py
FROM_SCRATCH = True
FINETUNE = Stage("finetune", "online_steps", finetuning_step, "fine-tuned", "eval_every", experience)
STAGES = (FINETUNE,)


def at_random(run: Run, data: datasets.Dataset) -> dict:
    """What stands in a policy's file beside the networks at the start, which see observations as they are."""
    obs_dim, action_dim = data.obs.shape[1], data.actions.shape[1]
    zeros = torch.zeros(obs_dim, device=data.obs.device)
    return dict(
        kind="squashed_gaussian", algorithm="scratch", steps=0, data={}, made_with=run.made_with, obs_dim=obs_dim,
        action_dim=action_dim, state_mean=zeros, state_std=zeros + 1, simulator=data.task.simulator,
        examples=examples_of(data), progress=run.dir / "progress.csv", **range_of(data),
    )  # fmt: skip


def main() -> None:
    args, run, data = report.start_run(Args, offline)
    device = data.obs.device

    seed_everything(args.seed)
    policy = at_random(run, data)
    agent = Agent(args, policy).to(device)
    policy |= dict(hidden_layers=hidden_of(agent.actor.net), actor=copy.deepcopy(agent.actor.state_dict()))
    evaluator = make_evaluator(args, data, policy["state_mean"], policy["state_std"])
    regime.announce(run, data, evaluator, agent.act)
    data.transform_rewards(args.reward_scale, args.reward_shift)
    data, held_out = data.hold_out(args.holdout, STATES)
    probe = critic_probe(agent, held_out)
    optimizers = Optimizers(args, agent)
    policy["score"] = run.last_score = evaluator(agent.act, device, final=True)
    best = BestPolicy(policy["score"], agent.actor, "before the first step", evaluator.last, args.best_margin)

    finetune(args, run, data, agent, optimizers, evaluator, probe, best)

    report.finish(run, policy, agent, best, data, evaluator)


if __name__ == "__main__":
    cli.run(main)
