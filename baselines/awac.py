"""AWAC, fine-tuned (Nair, Dalal, Gupta & Levine, 2020, arXiv 2006.09359): offline and online the loss is the same, and
only the data grow. The critics, the policy and their optimisers go on from `offline/awac.py`; the dataset and all that
is played stand in one buffer, and every batch is uniform over it.

    python baselines/awac.py --preset demo
    python baselines/awac.py --env-id hopper-medium-v2

The authors' code (rlkit) and CORL's differ. Networks and weights are CORL's, exp(A / λ) clipped at 100; `--weights
softmax` offers the authors', whose β is --temperature 2 on locomotion (they take the advantages before the critics'
step, this after it), which offline/awac.py has to be given as well. The mean of the policy goes through a tanh, as in
rlkit. Actions are clipped before they are played and stored.
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
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", online_steps=10_000),
    "quick": dict(online_steps=20_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_shift=-1.0, temperature=0.1, online_steps=200_000, eval_every=5_000,
                    eval_episodes=20, final_episodes=100, best_margin=2.0),
    "adroit": dict(temperature=0.1, online_steps=200_000, eval_every=5_000, eval_episodes=100, best_margin=2.0),
}  # fmt: skip


@dataclass
class Args(cli.OnlineArgs):
    offline: str = "awac"
    """awac (trained first if there is none yet), or the PATH of a policy.pt that it wrote"""
    batch_size: Annotated[int, even()] = 256
    """transitions in a batch"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics"""
    lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the actor and of the critics"""
    temperature: Annotated[float, above(0)] = 1 / 3
    """the paper's λ: advantages are divided by it (AntMaze and Adroit: 0.1)"""
    weights: Literal["exp", "softmax"] = "exp"
    """of the actions in a batch: exp(A / λ), or the share of it in the batch's sum times the batch's size"""
    max_weight: Annotated[float, above(0), only_with(weights="exp")] = 100.0
    """the former are clipped at this"""
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

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.net(obs)), self.log_std.clamp(-20.0, 2.0)


class Critic(nn.Module):
    """Twin Q networks side by side: (B, S), (B, A) -> (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Actions as the environment executes them, (B, A) in [-1, 1]."""
    return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)


class Agent(nn.Module):
    """All that is learned: π, Q and Q̄, as the offline run left them."""

    def __init__(self, args: Args, policy: dict):
        super().__init__()
        obs_dim, action_dim, learner = policy["obs_dim"], policy["action_dim"], policy["learner"]
        hidden_layers = learner["args"]["hidden"]
        self.actor = Actor(obs_dim, action_dim, hidden_layers)
        self.critic = Critic(obs_dim, action_dim, hidden_layers)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
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
    actor, critic, critic_target = agent.actor, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())

    def critic_gradients():
        obs, actions, rewards, next_obs, terminations = replay.sample(args.batch_size)
        # y = r + γ (1 - d) min_i Q̄_i(s', a'),  a' ~ π
        with torch.no_grad():
            next_q = critic_target(next_obs, sample_actions(*actor(next_obs))).amin(0)
            y = rewards + args.gamma * (1 - terminations) * next_q
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean(1).sum()
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach().mean(), "q_target": y.mean()}
        return torch.autograd.grad(critic_loss, critic_params), metrics, obs, actions

    def actor_gradients(obs, actions):
        # -w log π(a|s) over the batch's actions,  A = min_i Q_i(s, a) - min_i Q_i(s, a_π),  a_π ~ π
        mean, log_std = actor(obs)
        with torch.no_grad():
            advantage = critic(obs, actions).amin(0) - critic(obs, sample_actions(mean, log_std)).amin(0)
            if args.weights == "softmax":
                weight = len(advantage) * (advantage / args.temperature).softmax(0)
            else:
                weight = (advantage / args.temperature).exp().clamp(max=args.max_weight)
        actor_loss = -(weight * gaussian_log_prob(actions, mean, log_std)).mean()
        metrics = {"actor_loss": actor_loss, "advantage": advantage.mean(), "advantage_weight": weight.mean(),
                   "log_std": log_std.mean()}  # fmt: skip
        metrics = {name: metric.detach() for name, metric in metrics.items()}
        return torch.autograd.grad(actor_loss, actor_params), metrics

    critic_gradients = steps.compiled(critic_gradients, args.compile)
    actor_gradients = steps.compiled(actor_gradients, args.compile)

    def step():
        for _ in range(args.utd):
            critic_grads, metrics, obs, actions = critic_gradients()
            optimizers["critic_optimizer"].step(critic_grads)
            actor_grads, actor_metrics = actor_gradients(obs, actions)  # with the new critics
            optimizers["actor_optimizer"].step(actor_grads)
            polyak(critic_target, critic, args.tau)
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
