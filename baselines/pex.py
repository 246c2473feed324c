"""PEX, policy expansion (Zhang, Xu & Yu, ICLR 2023, arXiv 2302.00935): the offline policy stays as it is and remains
one of two candidates in every state; a new policy, at random at first, is the other, and Q chooses between them. Q, V
and Q̄ go on from `offline/iql.py` by IQL's losses, with new optimisers; half of every batch is the dataset's.

    python baselines/pex.py --preset demo
    python baselines/pex.py --env-id hopper-medium-v2

Constants online are the defaults of the authors' code, the offline policy is offline/iql.py's (with β = 3 but on
AntMaze, theirs with 10); their README runs halfcheetah-random and AntMaze with the expectile 0.9. Nothing is published
for Adroit, where the expectile is IQL's. It evaluates at random (see `Composition.mode`), and so does this;
charts/greedy is the last score without that. Unlike in the authors' code states are standardised as offline/iql.py has
them, actions are clipped before they are played, stored and learned from, evaluation has an environment of its own, and
online rows are drawn with replacement. policy.pt and best.pt hold the new policy alone, without its score, for the
whole is no single network.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

import offline
from common import cli, datasets, envs, report, steps
from common.bounds import above, at_least, between, even
from common.checkpoint import BestPolicy, seed_everything
from common.loop import Loop
from common.nn import Adam, ensemble_mlp, gaussian_log_prob, hidden_of, in_chunks, mlp, polyak
from common.probe import STATES, Probe, fixed_noise
from common.replay import ReplayBuffer
from common.run import Run
from common.stages import Stage

import torch
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", online_steps=10_000, learning_starts=2_000),
    "quick": dict(online_steps=20_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_shift=-1.0, expectile=0.9, online_steps=200_000, eval_every=5_000,
                    eval_episodes=20, final_episodes=100, best_margin=2.0),
    "adroit": dict(expectile=0.8, online_steps=200_000, eval_every=5_000, eval_episodes=100, best_margin=2.0),
}  # fmt: skip


@dataclass
class Args(cli.OnlineArgs):
    offline: str = "iql"
    """iql (trained first if there is none yet), or the PATH of a policy.pt that it wrote"""
    batch_size: Annotated[int, even()] = 256
    """transitions in a batch"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics"""
    lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the new policy, of the critics and of the value"""
    expectile: Annotated[float, between(0, 1)] = 0.7
    """the expectile that V regresses on (AntMaze: 0.9, Adroit: 0.8)"""
    beta: Annotated[float, at_least(0)] = 10.0
    """inverse temperature of the advantage weights"""
    max_weight: Annotated[float, above(0)] = 100.0
    """advantage weights are clipped at this"""
    inv_temperature: Annotated[float, at_least(0)] = 10.0
    """the paper's κ, by which Q is multiplied where it chooses between the two policies"""
    eval_greedy: Annotated[float, between(0, 1)] = 0.9
    """in evaluation, the share of most likely actions of the new policy, and of choices of the higher Q"""
    online_steps: Annotated[int, at_least(1)] = 100_000
    """environment steps (the authors': a million)"""
    learning_starts: Annotated[int, at_least(1)] = 5_000
    """environment steps before the first update"""
    utd: Annotated[int, at_least(1)] = 1
    """updates per environment step"""
    eval_every: Annotated[int, at_least(1)] = 1_000
    """environment steps between evaluations"""


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Gaussian policy: (B, S) -> mean in (-1, 1) and log std, the latter free of the state; (B, A) and (A,)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.net(obs)), self.log_std.clamp(-5.0, 2.0)


class Critic(nn.Module):
    """Twin Q networks side by side: (B, S), (B, A) -> (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


class Value(nn.Module):
    """V network: (B, S) -> (B,)."""

    def __init__(self, obs_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, 1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.net(obs).squeeze(-1)


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Actions as the environment executes them, (B, A) in [-1, 1]."""
    return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)


class Composition(nn.Module):
    """The frozen offline policy, the new one, and the critics that choose between their actions."""

    def __init__(self, offline: Actor, new: Actor, critic: Critic, inv_temperature: float, greedy: float):
        super().__init__()
        self.offline, self.new, self.critic = offline, new, critic
        self.inv_temperature, self.greedy = inv_temperature, greedy
        self.register_buffer("played", torch.zeros((), dtype=torch.int64))  # evaluation steps

    def preference(self, obs: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """κ (Q_2 - Q_1) (B,), Q_j = min_i Q_i(s, a_j): the logit of taking the second action, p of the paper."""
        return self.inv_temperature * (self.critic(obs, second).amin(0) - self.critic(obs, first).amin(0))

    def sample(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions to be played (B, A), and the probability (B,) of the new policy's, a sample; else π_off's mean."""
        first, second = self.offline(obs)[0], sample_actions(*self.new(obs))
        p = torch.sigmoid(self.preference(obs, first, second))
        return torch.where((torch.rand_like(p) < p)[:, None], second, first), p

    def mode(self, obs: torch.Tensor) -> torch.Tensor:
        """As the authors evaluate: mostly the new policy's mean, else a sample; mostly the higher Q, else drawn."""
        generator = torch.Generator(obs.device).manual_seed(int(self.played))
        self.played += 1
        first, (mean, log_std) = self.offline(obs)[0], self.new(obs)
        noise = torch.randn(mean.shape, generator=generator, device=obs.device)
        draws = torch.rand(3, len(obs), generator=generator, device=obs.device)
        second = torch.where(draws[0, :, None] < self.greedy, mean, (mean + log_std.exp() * noise).clamp(-1, 1))
        preference = self.preference(obs, first, second)
        higher, drawn = preference > 0, draws[2] < torch.sigmoid(preference)
        return torch.where(torch.where(draws[1] < self.greedy, higher, drawn)[:, None], second, first)

    def exported(self) -> dict:
        """What a policy file holds of this."""
        return {"hidden_layers": hidden_of(self.new.net), "actor": self.new.state_dict(), "score": math.nan}


class Agent(nn.Module):
    """All that is learned: the new policy, Q, Q̄ and V; the latter three as the offline run left them."""

    def __init__(self, args: Args, policy: dict):
        super().__init__()
        obs_dim, action_dim, learner = policy["obs_dim"], policy["action_dim"], policy["learner"]
        hidden_layers = learner["args"]["hidden"]
        self.actor = Actor(obs_dim, action_dim, hidden_layers)
        self.critic = Critic(obs_dim, action_dim, hidden_layers)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = Value(obs_dim, hidden_layers)
        self.load_state_dict(learner["agent"])
        new = Actor(obs_dim, action_dim, hidden_layers)
        for layer in new.net[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        offline = self.actor.requires_grad_(False)
        self.actor = Composition(offline, new, self.critic, args.inv_temperature, args.eval_greedy)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        return self.actor.mode(obs)

    def act_greedily(self, obs: torch.Tensor) -> torch.Tensor:
        """Of the two most likely actions that of higher Q."""
        first, second = self.actor.offline(obs)[0], self.actor.new(obs)[0]
        return torch.where((self.actor.preference(obs, first, second) > 0)[:, None], second, first)


class Optimizers(dict):
    """One Adam for each thing that is learned, all of them new."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.new.parameters(), args.lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.lr),
            value_optimizer=Adam(agent.value.parameters(), args.lr),
        )


def critic_probe(agent: Agent, held_out: datasets.Dataset) -> Probe:
    """Logged online: Q at states that it does not train on, and how far its ranking of actions is log π_off's."""
    policy = agent.actor.offline
    anchor = in_chunks(lambda obs: policy(obs)[0], held_out.obs)
    log_std = policy.log_std.clamp(-20.0, 2.0)
    sampled = (anchor + log_std.exp() * fixed_noise(anchor)).clamp(-1, 1)
    preference = gaussian_log_prob(sampled, anchor, log_std)
    return Probe(held_out, lambda *x: agent.critic(*x).amin(0), agent.act_greedily, anchor, sampled, preference)


# ---------------------------------------------------------------------------------------------- fine-tuning


def experience(args: Args, data: datasets.Dataset) -> ReplayBuffer:
    """What online batches are drawn from."""
    return ReplayBuffer(data, args.online_steps, "half")


def finetuning_step(args: Args, replay: ReplayBuffer, agent: Agent, optimizers: Optimizers):
    """The `utd` updates of one environment step."""
    actor, critic, critic_target, value = agent.actor, agent.critic, agent.critic_target, agent.value
    actor_params, critic_params = list(actor.new.parameters()), list(critic.parameters())
    value_params = list(value.parameters())

    def critic_gradients():
        obs, actions, rewards, next_obs, terminations = replay.sample(args.batch_size)

        # value: |ε - 1[u < 0]| u²,  u = min_i Q̄_i(s, a) - V(s)
        v = value(obs)
        with torch.no_grad():
            q_target = critic_target(obs, actions).amin(0)
            next_v = value(next_obs)
        u = q_target - v
        value_loss = ((args.expectile - (u < 0).float()).abs() * u**2).mean()

        # critics: y = r + γ (1 - d) V(s')
        y = rewards + args.gamma * (1 - terminations) * next_v
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean(1).sum()

        metrics = {"critic_loss": critic_loss, "value_loss": value_loss, "q": q.mean(), "q_target": y.mean(),
                   "v": v.mean()}  # fmt: skip
        return (
            torch.autograd.grad(value_loss, value_params),
            torch.autograd.grad(critic_loss, critic_params),
            {name: metric.detach() for name, metric in metrics.items()},
            obs,
        )

    def actor_gradients(obs):
        # the new policy: -min(exp(β (min_i Q̄_i(s, ã) - V(s))), 100) log π(ã|s),  ã as the composition plays
        with torch.no_grad():
            actions, p = actor.sample(obs)
            weight = (args.beta * (critic_target(obs, actions).amin(0) - value(obs))).exp().clamp(max=args.max_weight)
        mean, log_std = actor.new(obs)
        actor_loss = -(weight * gaussian_log_prob(actions, mean, log_std)).mean()
        metrics = {"actor_loss": actor_loss, "advantage_weight": weight.mean(), "new_policy": p.mean(),
                   "log_std": log_std.mean()}  # fmt: skip
        metrics = {name: metric.detach() for name, metric in metrics.items()}
        return torch.autograd.grad(actor_loss, actor_params), metrics

    critic_gradients = steps.compiled(critic_gradients, args.compile)
    actor_gradients = steps.compiled(actor_gradients, args.compile)

    def step():
        for _ in range(args.utd):
            value_grads, critic_grads, metrics, obs = critic_gradients()
            optimizers["value_optimizer"].step(value_grads)
            optimizers["critic_optimizer"].step(critic_grads)
            polyak(critic_target, critic, args.tau)
            actor_grads, actor_metrics = actor_gradients(obs)
            optimizers["actor_optimizer"].step(actor_grads)
        return metrics | actor_metrics  # of the last update

    return step


def finetune(args: Args, run: Run, data, agent: Agent, optimizers: Optimizers, evaluator, probe, best: BestPolicy):
    """Interact, update and evaluate. `best` is the offline policy, with its score."""
    device = data.obs.device
    replay = experience(args, data)
    step = finetuning_step(args, replay, agent, optimizers)
    stepper = steps.Stepper(step, device, graph=args.compile, steps_per_graph=1)
    env = envs.training(args, data.task, evaluator)
    state = {"agent": agent, **optimizers, "replay": replay, "env": env, "best": best, "stepper": stepper}
    loop = Loop(run, "finetune", args.online_steps, state, device, probe)

    @torch.no_grad()
    def explore(obs):
        return agent.actor.sample(torch.as_tensor(obs, device=device)[None])[0][0].cpu().numpy()

    for env_step in loop:
        obs, action = env.obs, explore(env.obs)
        # Updates draw on the transitions before this one, so a GPU does them while the simulator takes this step
        if env_step > args.learning_starts:
            stepper.run(1)
        next_obs, reward, terminated, episodic_return = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)  # the executed action; a truncation is no end
        if episodic_return is not None:
            run.log("finetune", env_step, env.outcome)
        if env_step % args.eval_every == 0 or env_step == args.online_steps:
            loop.evaluate(evaluator)
            if env_step == args.online_steps:
                greedy = evaluator.scalars(agent.act_greedily, device, final=True)
                run.log("finetune", env_step, {"charts/greedy": greedy["score"]})


# ---------------------------------------------------------------------------------------------- the whole run


KIND = "gaussian"  # of the policy to start from, see common/policies.py
GOES_ON = True  # with all that the offline run learned
FINETUNE = Stage("finetune", "online_steps", finetuning_step, "fine-tuned", "eval_every", experience)
STAGES = (FINETUNE,)


def main() -> None:
    args, run, data = report.start_run(Args, offline)
    device = data.obs.device

    policy, evaluator = offline.policy(args, run, data)
    seed_everything(args.seed)
    data, held_out = data.hold_out(args.holdout, STATES)
    agent = Agent(args, policy).to(device)
    probe = critic_probe(agent, held_out)
    optimizers = Optimizers(args, agent)
    start = evaluator(agent.act, device, final=True)
    best = BestPolicy(start, agent.actor, "before the first step", evaluator.last, args.best_margin)

    finetune(args, run, data, agent, optimizers, evaluator, probe, best)

    report.finish(run, policy, agent, best, data, evaluator, start)


if __name__ == "__main__":
    cli.run(main)
