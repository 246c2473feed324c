"""WSRL, warm start RL (Zhou et al., 2024, arXiv 2412.07762): fine-tuning without the offline data. SAC with ten critics
goes on from the networks that Cal-QL (on locomotion CQL) has left; the first 5,000 environment steps only collect what
the offline policy plays, and take the dataset's place.

    python baselines/wsrl.py --preset demo
    python baselines/wsrl.py --env-id hopper-medium-v2

It needs an offline run of its own, with ten critics and LayerNorm, which is trained where there is none. The warm-up
counts in the budget. α is a softplus, and goes on from the offline temperature (with new moments of Adam; the others'
go on). The minimum over all ten critics drives the actor (RLPD takes the mean). LayerNorm is in the critics only (the
authors': in the actor, too). Weights at the start, log σ and the conservative multiplier are those of offline/cal_ql.py
(the authors': on AntMaze log σ is free of the state, and the multiplier, from 1, is not multiplied by --alpha).
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

import offline
from common import cli, datasets, envs, report, steps
from common.bounds import at_least, between, even
from common.checkpoint import BestPolicy, seed_everything
from common.loop import Loop
from common.nn import Adam, ensemble_mlp, gaussian_log_prob, in_chunks, mlp, polyak, tanh_log_det
from common.policies import go_on
from common.probe import STATES, Probe, fixed_noise
from common.replay import ReplayBuffer
from common.run import Run
from common.stages import Stage

import torch
import torch.nn.functional as F
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", online_steps=10_000, learning_starts=2_000, utd=4),
    "quick": dict(online_steps=20_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_scale=10.0, reward_shift=-5.0, best_of=10, online_steps=500_000, eval_every=5_000,
                    eval_episodes=20, final_episodes=100, best_margin=2.0),
    "adroit": dict(online_steps=500_000, eval_every=5_000, eval_episodes=100, best_margin=2.0),
}  # fmt: skip


@dataclass
class Args(cli.OnlineArgs):
    offline: str = "cal_ql"
    """cal_ql (trained first if there is none yet), or the PATH of a policy.pt that it wrote, with ten critics"""
    batch_size: Annotated[int, even()] = 256
    """transitions in a minibatch"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics"""
    actor_lr: Annotated[float, at_least(0)] = 1e-4
    """learning rate of the actor and of the temperature"""
    critic_lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the critics"""
    best_of: Annotated[int, at_least(1)] = 1
    """actions that the policy draws at s' for the target, which takes the one of highest value (AntMaze: 10)"""
    online_steps: Annotated[int, at_least(1)] = 100_000
    """environment steps (the authors': 500,000)"""
    learning_starts: Annotated[int, at_least(1)] = 5_000
    """environment steps before the first update, played by the offline policy"""
    utd: Annotated[int, at_least(1)] = 4
    """updates of the critics per environment step, a minibatch each; the actor has one, on all of these"""
    eval_every: Annotated[int, at_least(1)] = 1_000
    """environment steps between evaluations"""

    def offline_changes(self, task) -> dict:
        changes = dict(critics=10, layer_norm=True)
        if task.matches("antmaze"):
            return changes | dict(critic_hidden=(256,) * 4)
        if task.matches("adroit"):
            return changes | dict(hidden=(512, 512), critic_hidden=(512,) * 3)
        changes |= dict(calibrate=False, alpha=5.0, hidden=(256, 256), critic_hidden=(256, 256))  # CQL
        return changes | dict(steps=250_000) if self.preset == "none" else changes


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Squashed Gaussian policy: (B, S) -> mean and log std of u, (B, A) each; the action is tanh(u)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, 2 * action_dim)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, (log_std - 1.0).clamp(-20.0, 2.0)


class Critic(nn.Module):
    """`n` Q networks side by side: (B, S), (B, A) -> (n, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple, n: int, layer_norm: bool):
        super().__init__()
        self.n, self.net = n, ensemble_mlp(n, obs_dim + action_dim, hidden_layers, 1, layer_norm)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(self.n, *x.shape)).squeeze(-1)


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = tanh(u), u ~ N(mean, std), reparameterised, and log π(a|s): (..., A) and (...)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)


class Agent(nn.Module):
    """All that is learned: π, Q and Q̄ as the offline run left them, and p of the temperature α = softplus(p)."""

    def __init__(self, args: Args, policy: dict):
        super().__init__()
        obs_dim, action_dim, learner = policy["obs_dim"], policy["action_dim"], policy["learner"]
        shape, left = learner["args"], dict(learner["agent"])
        self.actor = Actor(obs_dim, action_dim, shape["hidden"])
        self.critic = Critic(obs_dim, action_dim, shape["critic_hidden"], shape["critics"], shape["layer_norm"])
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        del left["log_multiplier"]
        alpha = left.pop("log_temperature").exp()
        self.load_state_dict(left)
        self.alpha_parameter = nn.Parameter(alpha + (-(-alpha).expm1()).log())  # log(e^α - 1)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The most likely action, tanh of the mean."""
        return torch.tanh(self.actor(obs)[0])


class Optimizers(dict):
    """One Adam for each thing that is learned; the actor's and the critics' go on, too."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.actor_lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.critic_lr),
            alpha_optimizer=Adam([agent.alpha_parameter], args.actor_lr),
        )


def critic_probe(agent: Agent, held_out: datasets.Dataset) -> Probe:
    """Logged online: Q at states that it does not train on, and how far its ranking of actions is log π_off's."""
    mean, log_std = in_chunks(agent.actor, held_out.obs)
    u = mean + log_std.exp() * fixed_noise(mean)
    preference = gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)
    return Probe(held_out, lambda *x: agent.critic(*x).amin(0), agent.act, torch.tanh(mean), torch.tanh(u), preference)


# ---------------------------------------------------------------------------------------------- fine-tuning


def experience(args: Args, data: datasets.Dataset) -> ReplayBuffer:
    """What online batches are drawn from."""
    return ReplayBuffer(data, args.online_steps, "none")


def finetuning_step(args: Args, replay: ReplayBuffer, agent: Agent, optimizers: Optimizers):
    """The `utd` updates of the critics of one environment step, then one of actor and temperature on all of it."""
    actor, critic, critic_target = agent.actor, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    target_entropy, m = -float(replay.action_dim), args.best_of

    def critic_gradients(obs, actions, rewards, next_obs, terminations):
        # y = r + γ (1 - d) max_a' min_{i ∈ Z} Q̄_i(s', a'),  m actions a' ~ π,  Z two, drawn, may be one
        with torch.no_grad():
            mean, log_std = actor(next_obs)
            next_actions, _ = sample_actions(mean.expand(m, -1, -1), log_std.expand(m, -1, -1))
            subset = torch.randint(critic.n, (2,), device=obs.device) if critic.n > 2 else slice(None)
            next_q = critic_target(next_obs.expand(m, -1, -1).flatten(0, 1), next_actions.flatten(0, 1))[subset]
            y = rewards + args.gamma * (1 - terminations) * next_q.amin(0).view(m, -1).amax(0)
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean()
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach().mean(), "q_target": y.mean()}
        return torch.autograd.grad(critic_loss, critic_params), metrics

    def actor_gradients(obs, next_obs):
        # actor: α log π(a|s) - min_i Q_i(s, a),  a ~ π; temperature: α (entropy at s' + A)
        alpha = F.softplus(agent.alpha_parameter)
        actions, log_prob = sample_actions(*actor(obs))
        actor_loss = (alpha.detach() * log_prob - critic(obs, actions).amin(0)).mean()
        with torch.no_grad():
            _, next_log_prob = sample_actions(*actor(next_obs))
        alpha_loss = alpha * (-next_log_prob.mean() - target_entropy)
        metrics = {"actor_loss": actor_loss, "alpha_loss": alpha_loss, "alpha": alpha, "entropy": -log_prob.mean()}
        return (
            torch.autograd.grad(actor_loss, actor_params),
            torch.autograd.grad(alpha_loss, [agent.alpha_parameter]),
            {name: value.detach() for name, value in metrics.items()},
        )

    critic_gradients = steps.compiled(critic_gradients, args.compile)
    actor_gradients = steps.compiled(actor_gradients, args.compile)

    def step():
        batch = replay.sample(args.utd * args.batch_size)
        for minibatch in zip(*(column.split(args.batch_size) for column in batch), strict=True):
            critic_grads, metrics = critic_gradients(*minibatch)
            optimizers["critic_optimizer"].step(critic_grads)
            polyak(critic_target, critic, args.tau)
        actor_grads, alpha_grads, actor_metrics = actor_gradients(batch[0], batch[3])
        optimizers["actor_optimizer"].step(actor_grads)
        optimizers["alpha_optimizer"].step(alpha_grads)
        return metrics | actor_metrics

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
        return sample_actions(mean, log_std)[0][0].cpu().numpy()

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


KIND = "squashed_gaussian"  # of the policy to start from, see common/policies.py
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
    go_on(optimizers, policy, "actor_optimizer", "critic_optimizer")
    best = BestPolicy(policy["score"], agent.actor, "offline policy", run.last_returns, args.best_margin)

    finetune(args, run, data, agent, optimizers, evaluator, probe, best)

    report.finish(run, policy, agent, best, data, evaluator)


if __name__ == "__main__":
    cli.run(main)
