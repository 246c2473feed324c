"""Cal-QL, fine-tuned (Nakamoto et al., NeurIPS 2023, arXiv 2303.05479): offline and online the loss is the same, CQL(H)
whose critics are pushed down on the policy's actions to the return of the data, and no further. Critics, policy,
temperature and optimisers go on from `offline/cal_ql.py`; half of every batch is the dataset's.

    python baselines/cal_ql.py --preset demo
    python baselines/cal_ql.py --env-id hopper-medium-v2

As in the authors' code (JaxCQL), calibration goes on online, with the returns of finished episodes: the running one's
rows are drawn when it has ended, and updates begin with the first that has. CORL's gives online rows a return of 0 and
switches calibration off (--no-calibrate-online). There is an update a step, as in CORL; the authors play an episode and
then do as many. Nothing is published for locomotion: offline/cal_ql.py says what is taken there, and of the networks.
"""

import copy
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

import offline
from common import cli, datasets, envs, report, steps
from common.bounds import at_least, between, even, finite, only_with
from common.checkpoint import BestPolicy, seed_everything
from common.loop import Loop
from common.nn import Adam, ensemble_mlp, gaussian_log_prob, in_chunks, mlp, polyak, tanh_log_det
from common.policies import go_on
from common.probe import STATES, Probe, fixed_noise
from common.replay import EpisodeBuffer, returns_to_go
from common.run import Run
from common.stages import Stage

import torch
from torch import nn

PRESETS = {
    # the loss and the actor's rate are those of offline/cal_ql.py's presets
    "demo": dict(env_id="hopper-medium-demo", online_steps=10_000, n_actions=4, actor_lr=3e-4),
    "quick": dict(online_steps=20_000, actor_lr=3e-4),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_scale=10.0, reward_shift=-5.0, failure_reward=0.0, alpha=5.0, lagrange=True,
                    online_steps=200_000, eval_every=5_000, eval_episodes=20, final_episodes=100, best_margin=2.0),
    "adroit": dict(calibrate_to_end=True, alpha=1.0, online_steps=200_000, eval_every=5_000, eval_episodes=100,
                   best_margin=2.0),
}  # fmt: skip


@dataclass
class Args(cli.OnlineArgs):
    offline: str = "cal_ql"
    """cal_ql (trained first if there is none yet), or the PATH of a policy.pt that it wrote"""
    batch_size: Annotated[int, even()] = 256
    """transitions in a batch, half of them the dataset's"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics"""
    actor_lr: Annotated[float, at_least(0)] = 1e-4
    """learning rate of the actor and of the temperature"""
    critic_lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the critics and of the multiplier"""
    calibrate_online: bool = True
    """count the policy's actions at the return of the batch's action where their Q is lower"""
    failure_reward: Annotated[float | None, finite(), only_with(calibrate_online=True)] = None
    """the environment's reward in every step until a task succeeds (AntMaze: 0); None: rewards are dense"""
    calibrate_to_end: Annotated[bool, only_with(calibrate_online=True)] = False
    """calibrate the last 1 / (1 - γ) rows of an episode that the time limit cut off too, as if nothing came behind it
    (Adroit: yes, its episodes are hardly longer than that); no: their return is unknown. With --failure-reward it is
    known of all, and this changes nothing"""
    alpha: Annotated[float, at_least(0)] = 10.0
    """weight of the conservative term (AntMaze: 5, Adroit: 1)"""
    lagrange: bool = False
    """multiply that weight by a factor that is tuned until the conservative gap is --target-gap (AntMaze)"""
    target_gap: Annotated[float, finite(), only_with(lagrange=True)] = 0.8
    """what the conservative gap of a critic is brought to then"""
    min_gap: Annotated[float | None, finite()] = None
    """the conservative gap of a state is clipped from below at this; None: it is not (CORL's: -200)"""
    best_of: Annotated[int, at_least(1)] = 10
    """actions that the policy draws at s' for the target, which takes the one of highest value"""
    n_actions: Annotated[int, at_least(1)] = 10
    """actions sampled from each of: uniform, policy at s, policy at s'"""
    online_steps: Annotated[int, at_least(1)] = 100_000
    """environment steps"""
    utd: Annotated[int, at_least(1)] = 1
    """updates per environment step"""
    eval_every: Annotated[int, at_least(1)] = 1_000
    """environment steps between evaluations"""


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
    """Twin Q networks side by side: (B, S), (B, A) -> (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple, layer_norm: bool):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1, layer_norm)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = tanh(u), u ~ N(mean, std), reparameterised, and log π(a|s): (..., A) and (...)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)


class Agent(nn.Module):
    """All that is learned: π, Q, Q̄, the logs of the temperature and of the multiplier, as the offline run left them."""

    def __init__(self, args: Args, policy: dict):
        super().__init__()
        obs_dim, action_dim, learner = policy["obs_dim"], policy["action_dim"], policy["learner"]
        shape = learner["args"]
        self.actor = Actor(obs_dim, action_dim, shape["hidden"])
        self.critic = Critic(obs_dim, action_dim, shape["critic_hidden"], shape["layer_norm"])
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.log_multiplier = nn.Parameter(torch.ones(()))
        self.load_state_dict(learner["agent"])

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The most likely action, tanh of the mean."""
        return torch.tanh(self.actor(obs)[0])


class Optimizers(dict):
    """One Adam for each thing that is learned."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.actor_lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.critic_lr),
            temperature_optimizer=Adam([agent.log_temperature], args.actor_lr),
            multiplier_optimizer=Adam([agent.log_multiplier], args.critic_lr),
        )


def critic_probe(agent: Agent, held_out: datasets.Dataset) -> Probe:
    """Logged online: Q at states that it does not train on, and how far its ranking of actions is log π_off's."""
    mean, log_std = in_chunks(agent.actor, held_out.obs)
    u = mean + log_std.exp() * fixed_noise(mean)
    preference = gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)
    return Probe(held_out, lambda *x: agent.critic(*x).amin(0), agent.act, torch.tanh(mean), torch.tanh(u), preference)


# ---------------------------------------------------------------------------------------------- fine-tuning


def follow(args: Args, rewards: torch.Tensor, terminations: torch.Tensor, episode=None) -> torch.Tensor:
    """The discounted return that follows each row (N,), by which Q is calibrated."""
    failure = None if args.failure_reward is None else args.failure_reward * args.reward_scale + args.reward_shift
    return returns_to_go(rewards, terminations, args.gamma, episode, failure, args.calibrate_to_end)


def experience(args: Args, data: datasets.Dataset) -> EpisodeBuffer:
    """What online batches are drawn from."""
    returns = torch.zeros_like(data.rewards)  # which nobody asks for without calibration
    if args.calibrate_online:
        data.need_order("calibration by returns")
        returns = follow(args, data.rewards, data.terminations, data.episode)
    return EpisodeBuffer(data, args.online_steps, "half", returns)


def finetuning_step(args: Args, replay: EpisodeBuffer, agent: Agent, optimizers: Optimizers):
    """The `utd` updates of one environment step."""
    actor, critic, critic_target = agent.actor, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    action_dim, n, m, batch_size = replay.action_dim, args.n_actions, args.best_of, args.batch_size
    min_gap = -math.inf if args.min_gap is None else args.min_gap
    chunk = batch_size if replay.table.is_cuda else 64

    def gradients():
        obs, actions, rewards, next_obs, terminations, returns = replay.sample(batch_size)
        temperature = agent.log_temperature.exp().detach()

        # SAC's target, without the entropy term: y = r + γ (1 - d) max_a' min_i Q̄_i(s', a'), of m actions
        with torch.no_grad():
            next_mean, next_log_std = actor(next_obs)
            next_actions, _ = sample_actions(next_mean.expand(m, -1, -1), next_log_std.expand(m, -1, -1))
            next_states = next_obs.expand(m, -1, -1)
            next_q = critic_target(next_states.flatten(0, 1), next_actions.flatten(0, 1)).amin(0).view(m, -1).amax(0)
            y = rewards + args.gamma * (1 - terminations) * next_q

        # 3 n other actions at s (3 n, B, A), with the log density that each was drawn with
        mean, log_std = actor(obs)
        with torch.no_grad():
            uniform = torch.empty(n, batch_size, action_dim, device=obs.device).uniform_(-1, 1)
            current, current_log_prob = sample_actions(mean.expand(n, -1, -1), log_std.expand(n, -1, -1))
            following, following_log_prob = sample_actions(next_mean.expand(n, -1, -1), next_log_std.expand(n, -1, -1))
            candidates = torch.cat([actions[None], uniform, current, following])
            uniform_log_prob = torch.full_like(current_log_prob, action_dim * math.log(0.5))
            log_density = torch.cat([uniform_log_prob, current_log_prob, following_log_prob])

        # of the policy's actions the value is max(Q, G), G being the return that followed the batch's action
        bound = torch.full_like(log_density, -math.inf)
        if args.calibrate_online:
            bound[n:] = returns

        # critic, some states at a time, so that a CPU's cache holds the activations of all their actions
        multiplier = agent.log_multiplier.exp().clamp(max=1e6)
        weight = args.alpha * multiplier.detach() if args.lagrange else args.alpha
        parts = []
        for start in range(0, batch_size, chunk):
            part = slice(start, start + chunk)
            a = candidates[:, part]  # (1 + 3 n, states, A)
            s = obs[part].expand(*a.shape[:2], -1)
            q_all = critic(s.flatten(0, 1), a.flatten(0, 1)).view(2, *a.shape[:2])
            q, q_others = q_all[:, 0], q_all[:, 1:]
            td_loss = ((q - y[part]) ** 2).sum() / batch_size
            # R(s) = log Σ_a [exp Q(s, a) / density(a)] - Q(s, a_data): CQL(H) with importance sampling
            gaps = torch.logsumexp(torch.maximum(q_others, bound[:, part]) - log_density[:, part], dim=1) - q
            gap = gaps.clamp(min=min_gap).sum() / batch_size
            grads = torch.autograd.grad(td_loss + weight * gap, critic_params)
            parts.append((td_loss.detach(), gap.detach() / 2, q.detach().sum() / (2 * batch_size), *grads))
        td_loss, gap, q, *critic_grads = [sum(part) for part in zip(*parts, strict=True)]

        # multiplier towards a gap of the target's size: it rises while the gap is wider
        multiplier_loss = -args.alpha * multiplier * (gap - args.target_gap)

        # actor: temperature log π - min_i Q_i, and the temperature towards the entropy -A
        new_actions, log_prob = sample_actions(mean, log_std)
        actor_loss = (temperature * log_prob - critic(obs, new_actions).amin(0)).mean()
        temperature_loss = -agent.log_temperature * (log_prob.detach() - action_dim).mean()

        metrics = {"critic_loss": td_loss, "conservative_gap": gap, "q_target": y.mean(), "actor_loss": actor_loss,
                   "q": q, "temperature": temperature, "entropy": -log_prob.mean()}  # fmt: skip
        if args.lagrange:
            metrics["multiplier"] = multiplier
        return (
            critic_grads,
            torch.autograd.grad(actor_loss, actor_params),
            torch.autograd.grad(temperature_loss, [agent.log_temperature]),
            torch.autograd.grad(multiplier_loss, [agent.log_multiplier]),
            {name: value.detach() for name, value in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile, long_sums=True)  # over every sampled action of every state

    def step():
        for _ in range(args.utd):
            critic_grads, actor_grads, temperature_grads, multiplier_grads, metrics = gradients()
            optimizers["temperature_optimizer"].step(temperature_grads)
            optimizers["actor_optimizer"].step(actor_grads)
            optimizers["critic_optimizer"].step(critic_grads)
            if args.lagrange:
                optimizers["multiplier_optimizer"].step(multiplier_grads)
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
        return sample_actions(mean, log_std)[0][0].cpu().numpy()

    for env_step in loop:
        obs, action = env.obs, explore(env.obs)
        # Updates draw on the transitions before this one, so a GPU does them while the simulator takes this step
        if replay.ended:
            stepper.run(1)
        next_obs, reward, terminated, episodic_return = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)  # the executed action; a truncation is no end
        if episodic_return is not None:
            run.log("finetune", env_step, env.outcome)
            replay.end_episode(functools.partial(follow, args))
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
    go_on(optimizers, policy)
    best = BestPolicy(policy["score"], agent.actor, "offline policy", run.last_returns, args.best_margin)

    finetune(args, run, data, agent, optimizers, evaluator, probe, best)

    report.finish(run, policy, agent, best, data, evaluator)


if __name__ == "__main__":
    cli.run(main)
