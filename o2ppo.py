"""O2PPO: fine-tune any offline policy with PPO, without the collapse that usually follows.

Optimistic Critic Reconstruction and Constrained Fine-Tuning (Luo, Xie, Wang & Huang, NeurIPS 2024, arXiv 2412.18855):
1. reevaluate - a value function of the offline policy, from the data alone;
2. align      - PPO has no Q to align: an auxiliary advantage prefers the actions that the reference policy prefers;
3. finetune   - PPO on the mixture of both advantages; its clipping and the auxiliary one keep it near the best policy
                so far.

    python o2ppo.py --preset demo
    python o2ppo.py --env-id hopper-medium-v2 --offline iql
"""

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import offline
from common import cli, datasets, envs, report, steps
from common.bounds import above, at_least, between, only_with
from common.checkpoint import BestPolicy, seed_everything
from common.loop import Loop
from common.nn import Adam, clip_grad_norm, ensemble_mlp, gaussian_entropy, gaussian_log_prob, mlp, polyak
from common.probe import STATES, spread
from common.reference import Outplayed
from common.replay import sample
from common.rewards import RewardScale, discounted_tails, scaled
from common.run import Run
from common.stages import Schedules, Stage, train
from common.tasks import Task

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

PRESETS = {
    # The demo is 1/1.7 to 1/200 of the paper's stages, so the learning rates are larger and the anchor is weaker
    "demo": dict(
        env_id="hopper-medium-demo", reevaluate_steps=5_000, value_lr=1e-3, online_steps=150_000, actor_lr=3e-4,
        beta_start=0.2, beta_steps=150_000, eval_every=5_000, log_every=500, compile=False,
    ),
    "demo antmaze": dict(
        env_id="antmaze-umaze-demo", offline="bc", reevaluate_steps=3_000, online_steps=153_600, eval_every=10_240,
    ),
    "quick": dict(reevaluate_steps=100_000, value_lr=3e-4, online_steps=100_352, beta_steps=100_000, log_every=1_000),
}  # fmt: skip

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(eval_episodes=20, final_episodes=100, best_margin=2.0),
    "adroit": dict(eval_episodes=100, best_margin=2.0),
}


@dataclass
class Args(cli.OnlineArgs):
    offline: str = "iql"

    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    value_hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256, 256)
    """widths of the hidden layers in the value network, of tanh units"""
    max_std_start: Annotated[float | None, above(0)] = None
    """upper limit of the policy's std at the start; None: 0.05 on hopper's (medium-)expert data, else none"""
    scale_rewards: bool | None = None
    """divide rewards by the running standard deviation of the discounted return; None: on halfcheetah alone"""
    log_every: Annotated[int, at_least(1), only_with(reevaluate=True)] = 5_000
    """gradient steps between logged means in re-evaluation; with auto steps a hundredth of the limit"""

    # 1. re-evaluation
    reevaluate: bool = True
    """learn the value of the offline policy first; without it the value network starts at random"""
    value_init: Annotated[Literal["returns", "fqe"], only_with(reevaluate=True)] = "returns"
    """returns: V is fitted to the data's discounted returns (the paper); fqe: to E Q(s, a) of fitted Q evaluation"""
    reevaluate_steps: Annotated[int | Literal["auto"], at_least(1)] = 1_000_000
    """gradient steps; auto: until V rests on held-out states, at most as many as without it"""
    reevaluate_batch_size: Annotated[int, at_least(1)] = 512
    """transitions in a batch"""
    value_lr: Annotated[float, at_least(0), only_with(reevaluate=True)] = 1e-4
    """learning rate of V, the value network, there"""
    critic_hidden: Annotated[tuple[int, ...], at_least(1), only_with(value_init="fqe")] = (256, 256)
    """widths of the hidden layers in each Q with --value-init fqe"""
    fqe_lr: Annotated[float, at_least(0), only_with(value_init="fqe")] = 3e-4
    """learning rate of Q with --value-init fqe"""
    tau: Annotated[float, between(0, 1), only_with(value_init="fqe")] = 0.005
    """Polyak factor of the target critics with --value-init fqe"""

    # 2. and 3. constrained fine-tuning
    constrain: bool = True
    """mix the auxiliary advantage in; without it this is PPO that starts from the offline policy"""
    online_steps: Annotated[int, at_least(1)] = 250_000
    """environment steps, over all environments together"""
    num_envs: Annotated[int, at_least(1)] = 8
    """environments side by side"""
    rollout_steps: Annotated[int, at_least(2)] = 2_048
    """environment steps between updates, over all environments together"""
    minibatch_size: Annotated[int, at_least(1)] = 128
    """transitions in a minibatch"""
    update_epochs: Annotated[int | None, at_least(1)] = None
    """passes over each rollout; None: 10, on hopper's (medium-)expert data 5"""
    actor_lr: Annotated[float, at_least(0)] = 3e-5
    """learning rate of the actor, annealed to zero"""
    critic_lr: Annotated[float, at_least(0)] = 2e-4
    """learning rate of V, annealed to zero"""
    anneal_steps: Annotated[int | None, at_least(1)] = None
    """environment steps over which both rates fall linearly to zero; None: those of this run"""
    gae_lambda: Annotated[float, between(0, 1)] = 0.95
    """λ of generalised advantage estimation"""
    clip_coef: Annotated[float, above(0)] = 0.2
    """PPO's clipping of the ratio"""
    ent_coef: Annotated[float, at_least(0)] = 0.01
    """weight of the entropy bonus"""
    max_grad_norm: Annotated[float, above(0)] = 0.5
    """each network's gradient is clipped at this norm"""
    adam_eps: Annotated[float, above(0)] = 1e-5
    """Adam's ε in fine-tuning"""
    reference_alpha: Annotated[float, at_least(0), only_with(constrain=True)] = 2.0
    """the paper's α: scale of the auxiliary advantage"""
    beta_start: Annotated[float, at_least(0), only_with(constrain=True)] = 1.0
    """the paper's β at the first step: weight of the auxiliary advantage"""
    beta_steps: Annotated[int | None, at_least(1), only_with(constrain=True)] = None
    """environment steps over which β falls linearly to zero; None: 250,000, on (medium-)expert data 500,000"""
    reference: Annotated[Literal["best", "interval", "adaptive"], only_with(constrain=True)] = "best"
    """move π_ref to π when an evaluation beats the best so far; every --reference-interval steps; or, needing none,
    when the last training episodes beat the first since π_ref moved by a margin (experiments/reference.py)"""
    reference_interval: Annotated[int | None, at_least(1), only_with(reference="interval")] = None
    """steps between moves of π_ref, in whole rollouts; None: 2,500, on hopper's (medium-)expert data 10,000"""
    reference_window: Annotated[int, at_least(2), only_with(reference="adaptive")] = 10
    """adaptive: training episodes on either side of that comparison"""
    reference_margin: Annotated[float, at_least(0), only_with(reference="adaptive")] = 1.0
    """adaptive: standard errors by which their mean return has to be higher"""
    eval_every: Annotated[int, at_least(1)] = 2_500
    """environment steps between evaluations, rounded up to whole rollouts"""

    def constants(self, task: Task) -> dict:
        """The paper's for each kind of data (see `Task.expert`)."""
        values = dict(beta_steps=250_000, update_epochs=10, reference_interval=2_500)
        values |= dict(scale_rewards=task.robot == "halfcheetah")
        if task.expert:
            values |= dict(beta_steps=500_000)
            if task.robot == "hopper":
                values |= dict(update_epochs=5, max_std_start=0.05, reference_interval=10_000)
        return values

    def check(self) -> None:
        super().check()
        n, parts = self.rollout_steps, f"--num-envs ({self.num_envs}) and of --minibatch-size ({self.minibatch_size})"
        if n % self.num_envs or n % self.minibatch_size:
            raise cli.UserError(f"--rollout-steps is {n}, but has to be a multiple of {parts}")
        if self.online_steps < n:
            raise cli.UserError(f"--online-steps is {self.online_steps}, but has to be at least --rollout-steps ({n})")

    def whole_rollouts(self) -> int:
        """Environment steps of fine-tuning, the last rollout whole."""
        return self.online_steps // self.rollout_steps * self.rollout_steps


# ---------------------------------------------------------------------------------------------- networks
# ALGO LOGIC: an actor in another layout than its KIND's (common/policies.py) writes a policy.pt that others cannot read


class Actor(nn.Module):
    """Gaussian policy: (B, S) -> mean in (-1, 1) and log std, the latter free of the state; (B, A) and (A,)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: list | tuple = (256, 256)):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.net(obs)), self.log_std.clamp(-20.0, 2.0)


class Value(nn.Module):
    """V network: (B, S) -> (B,)."""

    def __init__(self, obs_dim: int, hidden_layers: tuple = (256, 256, 256)):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, 1, activation=nn.Tanh)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.net(obs).squeeze(-1)


class Critic(nn.Module):
    """Twin Q networks side by side, for --value-init fqe: (B, S), (B, A) -> (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple = (256, 256)):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1, layer_norm=True)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


class Agent(nn.Module):
    """All that is learned: π, V, and Q, Q̄ for FQE; π_off and π_ref are copies of the policy."""

    def __init__(self, args: Args, policy: dict):
        super().__init__()
        obs_dim, action_dim = policy["obs_dim"], policy["action_dim"]
        self.actor = Actor(obs_dim, action_dim, policy["hidden_layers"])
        self.actor.load_state_dict(policy["actor"])
        if args.max_std_start is not None:  # for π_off too, so that this is what --value-init fqe evaluates
            self.actor.log_std.data.clamp_(max=math.log(args.max_std_start))
        self.actor_offline = copy.deepcopy(self.actor).requires_grad_(False)
        self.actor_reference = copy.deepcopy(self.actor_offline)
        self.value = Value(obs_dim, args.value_hidden)
        self.critic = Critic(obs_dim, action_dim, args.critic_hidden)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The most likely action."""
        return self.actor(obs)[0]

    def move_reference(self) -> None:
        """π_ref ← π."""
        self.actor_reference.load_state_dict(self.actor.state_dict())


def value_probe(agent: Agent, held_out: datasets.Dataset):
    """Logged in every stage: V at states that none trains on."""

    @torch.no_grad()
    def measure():
        return spread("v", agent.value(held_out.obs))

    return measure


class Optimizers(dict):
    """One Adam for each thing that is learned; V has another one in each stage."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.actor_lr, args.adam_eps),
            value_optimizer=Adam(agent.value.parameters(), args.critic_lr, args.adam_eps),
            reevaluate_optimizer=Adam(agent.value.parameters(), args.value_lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.fqe_lr),
        )


def executed(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """A sampled action as the environment executes it: a ~ N(mean, std), clipped to [-1, 1]."""
    return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------- 1. re-evaluation
# ALGO LOGIC: each stage's losses and targets; all that is in `metrics` is logged


def reevaluation_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """V of the offline policy, by regression on the data's returns or by fitted Q evaluation."""
    actor, value, critic, critic_target = agent.actor_offline, agent.value, agent.critic, agent.critic_target
    value_params, critic_params = list(value.parameters()), list(critic.parameters())
    if not (fqe := args.value_init == "fqe"):
        tails, coefficients, ends = discounted_tails(data, args.gamma)

    def returns_gradients():
        obs, *_, rows = sample(data, args.reevaluate_batch_size)
        # (V(s) - R)², the tail that the data do not show bootstrapped
        with torch.no_grad():
            y = tails[rows] + coefficients[rows] * value(data.next_obs[ends[rows]])
        v = value(obs)
        value_loss = ((v - y) ** 2).mean()
        metrics = {"value_loss": value_loss.detach(), "v": v.detach().mean(), "v_target": y.mean()}
        return torch.autograd.grad(value_loss, value_params), metrics

    def fqe_gradients():
        obs, actions, rewards, next_obs, terminations, _ = sample(data, args.reevaluate_batch_size)
        # Q: y = r + γ (1 - d) mean_i Q̄_i(s', a'),  a' ~ π_off;  V: E_{a ~ π_off} mean_i Q_i(s, a)
        with torch.no_grad():
            y = rewards + args.gamma * (1 - terminations) * critic_target(next_obs, executed(*actor(next_obs))).mean(0)
            v_target = critic(obs, executed(*actor(obs))).mean(0)
        q, v = critic(obs, actions), value(obs)
        critic_loss, value_loss = ((q - y) ** 2).mean(1).sum(), ((v - v_target) ** 2).mean()
        metrics = {"value_loss": value_loss.detach(), "v": v.detach().mean(), "v_target": v_target.mean(),
                   "critic_loss": critic_loss.detach(), "q": q.detach().mean()}  # fmt: skip
        return torch.autograd.grad(value_loss, value_params), torch.autograd.grad(critic_loss, critic_params), metrics

    gradients = steps.compiled(fqe_gradients if fqe else returns_gradients, args.compile)

    def step():
        value_grads, *critic_grads, metrics = gradients()
        optimizers["reevaluate_optimizer"].step(value_grads)
        if fqe:
            optimizers["critic_optimizer"].step(*critic_grads)
            polyak(critic_target, critic, args.tau)
        return metrics

    return step


# ---------------------------------------------------------------------------------------------- 2. advantages


def gae(rewards, values, next_values, terminated, ended, gamma: float, gae_lambda: float) -> np.ndarray:
    """Generalised advantage estimation; all arrays (T, num_envs). A truncation bootstraps, a termination does not.

    δ_t = r_t + γ (1 - d_t) V(s'_t) - V(s_t),  A_t = δ_t + γ λ (1 - ended_t) A_{t+1}
    """
    deltas = rewards + gamma * (1 - terminated) * next_values - values
    advantages, following = np.zeros_like(deltas), np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = following = deltas[t] + gamma * gae_lambda * (1 - ended[t]) * following
    return advantages


def reference_advantage(args: Args, reference: Actor, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """α [softplus(log π_ref(a|s) + H(π_ref(·|s)) + 4A) - 4A] / A, (B,): high where π_ref would act likewise (Eq. 8)."""
    mean, log_std = reference(obs)
    shift = 4 * actions.shape[1]
    likeness = gaussian_log_prob(actions, mean, log_std) + gaussian_entropy(log_std)
    return args.reference_alpha * (F.softplus(likeness + shift) - shift) / actions.shape[1]


# ---------------------------------------------------------------------------------------------- 3. fine-tuning


def schedules(args: Args) -> dict:
    """What changes with the steps before a rollout, at first 0, and reaches it as a tensor: β and learning rates."""
    beta, total = args.beta_start if args.constrain else 0.0, args.anneal_steps or args.whole_rollouts()
    return {
        "beta": lambda step: beta * max(1 - step / args.beta_steps, 0.0),
        "actor_lr": lambda step: args.actor_lr * max(1 - step / total, 0.0),
        "critic_lr": lambda step: args.critic_lr * max(1 - step / total, 0.0),
    }


def update_epoch(args: Args, batch: dict, agent: Agent, optimizers: Optimizers, scheduled: dict):
    """One pass over the rollout in minibatches; `batch` (rollout_steps, …) and `scheduled` are filled by the caller."""
    actor, value = agent.actor, agent.value
    actor_params, value_params = list(actor.parameters()), list(value.parameters())

    def gradients(rows):
        obs, actions, advantages = batch["obs"][rows], batch["actions"][rows], batch["advantages"][rows]
        # actor: -E min{ ratio A', clip(ratio, 1 ± 0.2) A' } - 0.01 H
        mean, log_std = actor(obs)
        log_ratio = gaussian_log_prob(actions, mean, log_std) - batch["log_probs"][rows]
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        entropy = gaussian_entropy(log_std)
        actor_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean() - args.ent_coef * entropy
        # value: (V(s) - (A_GAE + V_old(s)))²
        v = value(obs)
        value_loss = ((v - batch["returns"][rows]) ** 2).mean()
        metrics = {"actor_loss": actor_loss, "value_loss": value_loss, "entropy": entropy, "v": v.mean(),
                   "approx_kl": (ratio - 1 - log_ratio).mean(),
                   "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean()}  # fmt: skip
        return (
            clip_grad_norm(torch.autograd.grad(actor_loss, actor_params), args.max_grad_norm),
            clip_grad_norm(torch.autograd.grad(value_loss, value_params), args.max_grad_norm),
            {name: metric.detach() for name, metric in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile)

    def epoch():
        optimizers["actor_optimizer"].lr.copy_(scheduled["actor_lr"])
        optimizers["value_optimizer"].lr.copy_(scheduled["critic_lr"])
        order = torch.rand(args.rollout_steps, device=batch["obs"].device).argsort()
        for rows in order.split(args.minibatch_size):
            actor_grads, value_grads, metrics = gradients(rows)
            optimizers["actor_optimizer"].step(actor_grads)
            optimizers["value_optimizer"].step(value_grads)
        return metrics  # of the last minibatch

    return epoch


@torch.no_grad()
def rollout(actor: Actor, env: envs.VectorEpisodes, steps_each: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """`steps_each` steps of every environment: arrays (steps_each, num_envs, …), and returns of finished episodes.

    The actions kept are the policy's, not clipped: it is those that log π(a|s) belongs to.
    """
    rows, finished = [], []
    for _ in range(steps_each):
        obs = env.obs
        mean, log_std = actor(torch.as_tensor(obs))
        actions = (mean + log_std.exp() * torch.randn_like(mean)).numpy()
        next_obs, rewards, terminated, ended, returns = env.step(actions.clip(-1, 1))
        row = dict(obs=obs, actions=actions, next_obs=next_obs, rewards=rewards, terminated=terminated, ended=ended)
        rows.append(row)
        finished += returns
    return {name: np.stack([row[name] for row in rows]) for name in row}, finished


@torch.no_grad()
def fill(args: Args, batch: dict, collected: dict, agent: Agent, beta: torch.Tensor) -> torch.Tensor:
    """Turn a rollout into what the update needs, in place; the mean auxiliary advantage."""
    device = batch["obs"].device
    rewards, terminated, ended = (collected[name] for name in ("rewards", "terminated", "ended"))
    obs, next_obs, actions = (torch.as_tensor(collected[name], device=device).flatten(0, 1)
                              for name in ("obs", "next_obs", "actions"))  # fmt: skip
    values, next_values = (agent.value(x).view(rewards.shape).cpu().numpy() for x in (obs, next_obs))
    advantages = gae(rewards, values, next_values, terminated, ended, args.gamma, args.gae_lambda)
    returns = torch.as_tensor(advantages + values, device=device).flatten()
    advantages = torch.as_tensor(advantages, device=device).flatten()
    # A' = (A_GAE + β A_ref) / (1 + β), A_ref on the scale of A_GAE; then normalised
    auxiliary = reference_advantage(args, agent.actor_reference, obs, actions) * advantages.std()
    advantages = (advantages + beta * auxiliary) / (1 + beta)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    # with the products of the update (--matmul): else its first ratio would not be 1
    log_probs = steps.compiled(lambda: gaussian_log_prob(actions, *agent.actor(obs)), False)()
    new = dict(obs=obs, actions=actions, advantages=advantages, returns=returns, log_probs=log_probs)
    for name, tensor in new.items():
        batch[name].copy_(tensor)
    return auxiliary.mean()


def empty_batch(args: Args, data: datasets.Dataset) -> dict[str, torch.Tensor]:
    n, device = args.rollout_steps, data.obs.device
    batch = {name: torch.zeros(n, device=device) for name in ("advantages", "returns", "log_probs")}
    return batch | {name: torch.zeros(n, getattr(data, name).shape[1], device=device) for name in ("obs", "actions")}


def finetune(args: Args, run: Run, data, agent: Agent, optimizers: Optimizers, evaluator, probe, best: BestPolicy,
             scale: RewardScale):  # fmt: skip
    """Roll out, update, evaluate, and move π_ref. `best` is the best policy of the stages before, with its score."""
    device, per_rollout = data.obs.device, args.rollout_steps
    batch, schedule = empty_batch(args, data), Schedules(schedules(args), device)
    epoch = update_epoch(args, batch, agent, optimizers, schedule.tensors)
    stepper = steps.Stepper(epoch, device, graph=args.compile, steps_per_graph=1)
    env = envs.side_by_side(args, data.task, evaluator)
    outplayed = Outplayed(args.reference_window, args.reference_margin)
    # TRY NOT TO MODIFY: what changes in this stage and is not named here starts anew when a run is resumed
    state = {"agent": agent, **optimizers, "env": env, "best": best, "outplayed": outplayed, "scale": scale,
             "stepper": stepper}  # fmt: skip
    total = args.whole_rollouts()
    loop = Loop(run, "finetune", total, state, device)
    if not loop.start:
        run.log("finetune", 0, probe())
    player = copy.deepcopy(agent.actor).cpu()  # a network this small acts faster beside the environments than on a GPU

    def reached(every, step):  # whether the last rollout came to a multiple of it
        return step // every > (step - per_rollout) // every

    # TRY NOT TO MODIFY: the order of what happens in a rollout, which a resumed run repeats
    for env_step, _ in loop.blocks(per_rollout):
        schedule.fill(env_step - per_rollout)
        player.load_state_dict(agent.actor.state_dict())
        collected, finished = rollout(player, env, per_rollout // args.num_envs)
        if args.scale_rewards:
            collected["rewards"] = scale(collected["rewards"], collected["ended"])
        auxiliary = fill(args, batch, collected, agent, schedule.tensors["beta"])
        stepper.run(args.update_epochs)

        scalars, improved = env.outcomes(), False
        if reached(args.eval_every, env_step) or env_step == total:
            more = schedule.scalars() | {"losses/reference_advantage": auxiliary.item()}
            improved = loop.evaluate(evaluator, more)
        outplays = any([outplayed.add(value) for value in finished])
        moves = {"best": improved, "adaptive": outplays, "interval": reached(args.reference_interval, env_step)}
        if moves[args.reference]:
            agent.move_reference()
        probed = probe() if reached(args.probe_every, env_step) or env_step == total else {}
        run.log("finetune", env_step, scalars | probed)


# ---------------------------------------------------------------------------------------------- the whole run
# TRY NOT TO MODIFY: from these names all else finds out what the script is made of (common/stages.py)

KIND = "gaussian"  # of the policy to start from, see common/policies.py
TAKES_CRITIC = False  # no offline algorithm has learned these V and Q: --no-reevaluate starts with new ones
REEVALUATE = Stage("reevaluate", "reevaluate_steps", reevaluation_step, "re-evaluated", plateau="probe/v")
FINETUNE = Stage("finetune", "online_steps", update_epoch, "fine-tuned", "eval_every", empty_batch, schedules,
                 per_step=lambda args: args.rollout_steps / args.update_epochs)  # fmt: skip
STAGES = (REEVALUATE, FINETUNE)
ABLATIONS = ("reevaluate", "constrain")  # --no-… leaves that part of the method out
FINETUNING_ARGS = (  # what fine-tuning alone reads: runs that differ in nothing else share the stages before it
    "constrain", "online_steps", "num_envs", "rollout_steps", "minibatch_size", "update_epochs", "actor_lr",
    "critic_lr", "anneal_steps", "gae_lambda", "clip_coef", "ent_coef", "max_grad_norm", "adam_eps", "reference_alpha",
    "beta_start", "beta_steps", "reference", "reference_interval", "reference_window", "reference_margin", "eval_every",
    "probe_every",
)  # fmt: skip


def main() -> None:
    args, run, data = report.start_run(Args, offline)
    policy, evaluator = offline.policy(args, run, data)
    seed_everything(args.seed)
    scale = RewardScale(args.gamma)
    if args.scale_rewards:
        data = scaled(data, scale)
    data, held_out = data.hold_out(args.holdout, STATES)
    agent = Agent(args, policy).to(data.obs.device)
    probe, optimizers = value_probe(agent, held_out), Optimizers(args, agent)
    best = BestPolicy(policy["score"], agent.actor, "offline policy", run.last_returns, args.best_margin)

    if args.reevaluate:
        train(run, REEVALUATE, data, agent, optimizers, probe)
    finetune(args, run, data, agent, optimizers, evaluator, probe, best, scale)

    report.finish(run, policy, agent, best, data, evaluator)


if __name__ == "__main__":
    cli.run(main)
