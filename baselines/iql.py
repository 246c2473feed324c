"""IQL, fine-tuned (Kostrikov, Nair & Levine, ICLR 2022, arXiv 2110.06169): offline and online the loss is the same,
and only the data grow. V, the critics, the policy and their optimisers go on from `offline/iql.py`; the dataset and all
that is played stand in one buffer, and every batch is uniform over it (--buffer all).

    python baselines/iql.py --preset demo
    python baselines/iql.py --env-id hopper-medium-v2

The authors' code (implicit_q_learning) and CORL's differ. As the authors', the actor's learning rate is constant online
(CORL's cosine goes on behind its end, and so begins at 0). As CORL's, states are standardised (the authors': as they
are), V(s') and the advantage are those before V's step (after it), log σ is held in -20…2 (-5…2), and the hand has the
expectile 0.8 and β 3 (0.7 and 0.5); its dropout of 0.1 is both's. Rewards of locomotion are as they are (the authors
multiply their data's, and not their play's, by 1,000 / the range of returns); data and play are transformed alike.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

import offline
from common import cli, datasets, envs, report, steps
from common.bounds import above, at_least, between, even, only_with
from common.checkpoint import BestPolicy, seed_everything
from common.loop import Loop
from common.nn import Adam, ensemble_mlp, gaussian_log_prob, in_chunks, mlp, polyak
from common.policies import go_on
from common.probe import STATES, Probe, fixed_noise
from common.replay import ReplayBuffer, experience
from common.run import Run
from common.stages import Stage

import torch
import torch.nn.functional as F
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", online_steps=10_000),
    "quick": dict(online_steps=20_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_shift=-1.0, expectile=0.9, beta=10.0, online_steps=200_000, eval_every=5_000,
                    eval_episodes=20, final_episodes=100, best_margin=2.0),
    "adroit": dict(expectile=0.8, actor_dropout=0.1, online_steps=200_000, eval_every=5_000, eval_episodes=100,
                   best_margin=2.0),
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
    """learning rate of the actor, of the critics and of the value, constant"""
    expectile: Annotated[float, between(0, 1)] = 0.7
    """the expectile that V regresses on (AntMaze: 0.9, Adroit: 0.8)"""
    beta: Annotated[float, at_least(0)] = 3.0
    """inverse temperature of the advantage weights (AntMaze: 10)"""
    max_weight: Annotated[float, above(0)] = 100.0
    """advantage weights are clipped at this"""
    actor_dropout: Annotated[float, between(0, 0.99)] = 0.0
    """share of the actor's hidden units that its training leaves out (Adroit: 0.1, as CORL has it)"""
    online_steps: Annotated[int, at_least(1)] = 100_000
    """environment steps (the authors': a million)"""
    learning_starts: Annotated[int, at_least(1)] = 1
    """environment steps before the first update"""
    utd: Annotated[int, at_least(1)] = 1
    """updates per environment step"""
    buffer: Literal["half", "all", "part", "none"] = "all"
    """offline data in online batches: all in one buffer, half of each batch, only the best episodes, or none"""
    part_episodes: Annotated[int, at_least(1), only_with(buffer="part")] = 50
    """how many episodes, those of highest return, --buffer part keeps"""
    eval_every: Annotated[int, at_least(1)] = 1_000
    """environment steps between evaluations"""


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Gaussian policy: (B, S) -> mean in (-1, 1) and log std, the latter free of the state; (B, A) and (A,)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: torch.Tensor, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.net[:-1]:
            obs = layer(obs)
            if dropout and isinstance(layer, nn.ReLU):  # in training alone
                obs = F.dropout(obs, dropout)
        return torch.tanh(self.net[-1](obs)), self.log_std.clamp(-20.0, 2.0)


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


class Agent(nn.Module):
    """All that is learned: π, Q, Q̄ and V, as the offline run left them."""

    def __init__(self, args: Args, policy: dict):
        super().__init__()
        obs_dim, action_dim, learner = policy["obs_dim"], policy["action_dim"], policy["learner"]
        hidden_layers = learner["args"]["hidden"]
        self.actor = Actor(obs_dim, action_dim, hidden_layers)
        self.critic = Critic(obs_dim, action_dim, hidden_layers)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = Value(obs_dim, hidden_layers)
        self.load_state_dict(learner["agent"])

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The most likely action, the mean."""
        return self.actor(obs)[0]


class Optimizers(dict):
    """One Adam for each thing that is learned."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.lr),
            value_optimizer=Adam(agent.value.parameters(), args.lr),
        )


def critic_probe(agent: Agent, held_out: datasets.Dataset) -> Probe:
    """Logged online: Q at states that it does not train on, and how far its ranking of actions is log π_off's."""
    anchor = in_chunks(agent.act, held_out.obs)
    log_std = agent.actor.log_std.detach().clamp(-20.0, 2.0)
    sampled = (anchor + log_std.exp() * fixed_noise(anchor)).clamp(-1, 1)
    preference = gaussian_log_prob(sampled, anchor, log_std)
    return Probe(held_out, lambda *x: agent.critic(*x).amin(0), agent.act, anchor, sampled, preference)


# ---------------------------------------------------------------------------------------------- fine-tuning


def finetuning_step(args: Args, replay: ReplayBuffer, agent: Agent, optimizers: Optimizers):
    """The `utd` updates of one environment step."""
    actor, critic, critic_target, value = agent.actor, agent.critic, agent.critic_target, agent.value
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    value_params = list(value.parameters())

    def gradients():
        obs, actions, rewards, next_obs, terminations = replay.sample(args.batch_size)

        # value: |ε - 1[u < 0]| u²,  u = min_i Q̄_i(s, a) - V(s)
        v = value(obs)
        with torch.no_grad():
            q_target = critic_target(obs, actions).amin(0)
            next_v = value(next_obs)
        advantage = q_target - v
        value_loss = ((args.expectile - (advantage < 0).float()).abs() * advantage**2).mean()

        # critics: y = r + γ (1 - d) V(s')
        y = rewards + args.gamma * (1 - terminations) * next_v
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean(1).sum()

        # actor: -min(exp(β u), 100) log π(a|s), over the batch's actions
        weight = (args.beta * advantage.detach()).exp().clamp(max=args.max_weight)
        mean, log_std = actor(obs, args.actor_dropout)
        actor_loss = -(weight * gaussian_log_prob(actions, mean, log_std)).mean()

        metrics = {"critic_loss": critic_loss, "value_loss": value_loss, "actor_loss": actor_loss, "q": q.mean(),
                   "q_target": y.mean(), "v": v.mean(), "advantage_weight": weight.mean(),
                   "log_std": log_std.mean()}  # fmt: skip
        return (
            torch.autograd.grad(value_loss, value_params),
            torch.autograd.grad(critic_loss, critic_params),
            torch.autograd.grad(actor_loss, actor_params),
            {name: metric.detach() for name, metric in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile)

    def step():
        for _ in range(args.utd):
            value_grads, critic_grads, actor_grads, metrics = gradients()
            optimizers["value_optimizer"].step(value_grads)
            optimizers["critic_optimizer"].step(critic_grads)
            optimizers["actor_optimizer"].step(actor_grads)
            polyak(critic_target, critic, args.tau)
        return metrics  # of the last update

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
        mean, log_std = agent.actor(torch.as_tensor(obs, device=device)[None])
        return sample_actions(mean, log_std)[0].cpu().numpy()

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
    go_on(optimizers, policy)
    best = BestPolicy(policy["score"], agent.actor, "offline policy", run.last_returns, args.best_margin)

    finetune(args, run, data, agent, optimizers, evaluator, probe, best)

    report.finish(run, policy, agent, best, data, evaluator)


if __name__ == "__main__":
    cli.run(main)
