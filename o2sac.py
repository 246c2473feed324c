"""O2SAC: fine-tune any offline policy with SAC, without the collapse that usually follows.

Optimistic Critic Reconstruction and Constrained Fine-Tuning (Luo, Xie, Wang & Huang, NeurIPS 2024, arXiv 2412.18855):
1. reevaluate - new critics by fitted Q evaluation of the frozen offline policy, in SAC's own Bellman equation;
2. align      - make their ranking of actions agree with the policy's log-probabilities;
3. finetune   - SAC, with a Lagrangian constraint on the divergence from the best policy so far.

    python o2sac.py --preset demo
    python o2sac.py --env-id hopper-medium-v2 --offline cql
"""

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import offline
from common import cli, datasets, envs, report, steps
from common.bounds import above, at_least, between, even, finite, only_with
from common.checkpoint import BestPolicy, seed_everything
from common.loop import Loop
from common.nn import Adam, clip_grad_norm, ensemble_mlp, gaussian_log_prob, in_chunks, mlp, polyak, tanh_log_det
from common.probe import STATES, Probe, fixed_noise
from common.reference import Outplayed
from common.replay import ReplayBuffer, experience, sample
from common.run import Run
from common.stages import Schedules, Stage, train
from common.tasks import Task

import torch
from torch import nn

PRESETS = {
    # 1/80 to 1/250 of the paper's gradient steps, so re-evaluation's targets and λ move faster; τ is tighter, for
    # critics that have seen so little are to be trusted less. It lies below the noise of f, a violation to
    # `lagrange_loss`, so λ's learning rate bounds its growth: here to e^1.8 times its start (the paper's to e^5)
    "demo": dict(
        env_id="hopper-medium-demo", offline="td3_bc", reevaluate_steps=6_000, reevaluate_tau=0.05,
        align_steps=2_000, online_steps=8_000, learning_starts=2_000, utd=2, lagrange_lr=3e-4, kl_threshold_start=0.01,
        kl_threshold_end=0.05, kl_threshold_steps=10_000, log_every=500, align_eval_every=2_000,
    ),
    "quick": dict(
        reevaluate_steps=50_000, align_steps=20_000, online_steps=20_000, learning_starts=2_000, utd=4, log_every=1_000,
        align_eval_every=5_000,
    ),
    "demo adroit": dict(eval_every=2_000),
}  # fmt: skip

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_scale=10.0, reward_shift=-5.0, critics=1, critic_hidden=(256,) * 5, align_steps=1_000_000,
                    online_steps=200_000, learning_starts=5_000, eval_every=5_000, eval_episodes=20,
                    final_episodes=100, best_margin=2.0),
    "adroit": dict(online_steps=200_000, eval_every=5_000, eval_episodes=100, best_margin=2.0),
    "antmaze-medium": dict(alpha=0.5, lagrange_init=2.0),
    "antmaze-large": dict(alpha=0.5, lagrange_init=2.0),
}  # fmt: skip

NEW_CRITICS = only_with(reevaluate=True, critic_init="random")  # else they are the offline algorithm's, in its shape


@dataclass
class Args(cli.OnlineArgs):
    # every stage
    batch_size: Annotated[int, even()] = 256
    """transitions in a batch, with --buffer half as many of either kind"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    critic_lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the critics"""
    actor_lr: Annotated[float, at_least(0)] = 1e-4
    """learning rate of the actor"""
    critic_hidden: Annotated[tuple[int, ...], at_least(1), NEW_CRITICS] = (256, 256, 256)
    """widths of the hidden layers in each critic"""
    critic_layer_norm: Annotated[bool, NEW_CRITICS] = True
    """layer normalisation in the critics"""
    critics: Annotated[int, at_least(1), NEW_CRITICS] = 2
    """how many critics there are; the lowest of their values counts"""
    lagrange_init: Annotated[float, above(0), only_with(constrain=True, align_constrain=True)] = 1.0
    """λ at the start, of fine-tuning and, with --align-constrain, in alignment"""
    alpha: Annotated[float | None, at_least(0)] = None
    """temperature, fixed in stages 1 and 2, tuned from it in 3 (0 stays 0); None: 0.2, on (medium-)expert data 0.5"""
    log_every: Annotated[int, at_least(1), only_with(reevaluate=True, align=True)] = 5_000
    """gradient steps between logged means in re-evaluation and alignment; with auto steps a hundredth of the limit"""

    # 1. re-evaluation
    reevaluate: bool = True
    """re-evaluate the critic; without it another one goes on, see --critic-init"""
    critic_init: Literal["offline", "random"] = "offline"
    """without re-evaluation: the offline algorithm's own critic, or a new one that nothing has trained"""
    reevaluate_steps: Annotated[int | Literal["auto"], at_least(1)] = 500_000
    """gradient steps of fitted Q evaluation; auto: until Q rests on held-out states, at most as many as without it"""
    reevaluate_tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor there; with few steps a larger one is needed for Q to reach its fixed point"""

    # 2. alignment
    align: bool = True
    """align the critic with the policy"""
    align_steps: Annotated[int | Literal["auto"], at_least(1)] = 500_000
    """gradient steps of alignment; auto: until the rank correlation rests there, with the same limit"""
    align_eval_every: Annotated[int, at_least(1)] = 50_000
    """gradient steps between evaluations of the actor that is being aligned"""
    align_actor_lr: Annotated[float | None, at_least(0)] = None
    """learning rate of the actor there; 0: it stands still, and the critics alone are aligned; None: --actor-lr"""
    align_constrain: bool = False
    """add fine-tuning's penalty λ f there, of the distance from π_off and with λ at its start"""

    # 3. constrained fine-tuning
    constrain: bool = True
    """constrain the policy to the reference policy"""
    align_restore: bool = False
    """fine-tune from π_off, with the aligned critics"""
    online_steps: Annotated[int, at_least(1)] = 100_000
    """environment steps"""
    learning_starts: Annotated[int, at_least(1)] = 1_000
    """environment steps before the first update"""
    warmup_steps: Annotated[int, at_least(0)] = 0
    """environment steps that π_off plays before π does, while the critics alone learn (after --learning-starts)"""
    utd: Annotated[int, at_least(1)] = 10
    """updates per environment step"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics (the paper's τ is --kl-threshold-…)"""
    buffer: Literal["half", "all", "part", "none"] = "half"
    """offline data in online batches: half of each batch, all in one buffer, only the best episodes, or none"""
    part_episodes: Annotated[int, at_least(1), only_with(buffer="part")] = 50
    """how many episodes, those of highest return, --buffer part keeps"""
    alpha_lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the temperature"""
    target_entropy: Annotated[float | None, finite()] = None
    """entropy that the temperature is tuned to; None: minus the number of action dimensions"""
    lagrange_lr: Annotated[float, at_least(0), only_with(constrain=True)] = 5e-5
    """learning rate of log λ"""
    lagrange_expectile: Annotated[float, between(0, 1), only_with(constrain=True)] = 0.7
    """asymmetry of λ's loss: weight of violated states (0.7) against satisfied ones (0.3)"""
    log_prob_floor: Annotated[float, finite(), only_with(constrain=True)] = -50.0
    """log π_ref(a|s) is clamped from below at this"""
    per_dimension: Annotated[bool, only_with(constrain=True)] = False
    """for each action dimension τ / 6, as on halfcheetah and walker2d, and a third of that floor, as on hopper"""
    kl_threshold_start: Annotated[float | None, at_least(0), only_with(constrain=True)] = None
    """the paper's τ at the first step; None: 0.125, on (medium-)expert data 0.005"""
    kl_threshold_end: Annotated[float | None, at_least(0), only_with(constrain=True)] = None
    """τ after --kl-threshold-steps; None: 2.0, on (medium-)expert data 0.125; --reference interval: a quarter"""
    kl_threshold_steps: Annotated[int, at_least(1), only_with(constrain=True)] = 100_000
    """environment steps over which the threshold grows linearly"""
    reference: Annotated[Literal["best", "interval", "adaptive"], only_with(constrain=True)] = "best"
    """move π_ref to π when an evaluation beats the best so far; every --reference-interval steps; or, needing none,
    when the last training episodes beat the first since π_ref moved by a margin (experiments/reference.py)"""
    reference_interval: Annotated[int | None, at_least(1), only_with(reference="interval")] = None
    """environment steps between moves of π_ref; None: 1,000, on hopper's (medium-)expert data 10,000"""
    actor_grad_norm: Annotated[float | None, above(0)] = None
    """the actor's gradient is clipped at this norm; None: 0.25 with --reference interval's 10,000, else not"""
    reference_window: Annotated[int, at_least(2), only_with(reference="adaptive")] = 10
    """adaptive: training episodes on either side of that comparison"""
    reference_margin: Annotated[float, at_least(0), only_with(reference="adaptive")] = 1.0
    """adaptive: standard errors by which their mean return has to be higher"""
    eval_every: Annotated[int, at_least(1)] = 1_000
    """environment steps between evaluations"""

    def constants(self, task: Task) -> dict:
        """The paper's for each kind of data (see `Task.expert`)."""
        values = dict(alpha=0.2, kl_threshold_start=0.125, kl_threshold_end=2.0, reference_interval=1_000)
        if task.expert:
            values |= dict(alpha=0.5, kl_threshold_start=0.005, kl_threshold_end=0.125)
        if self.reference == "interval":
            values["kl_threshold_end"] /= 4
            if task.expert and task.robot == "hopper":
                values |= dict(reference_interval=10_000)
                if self.reference_interval in (None, 10_000):
                    values |= dict(actor_grad_norm=0.25)
        return values

    def check(self) -> None:
        super().check()
        if self.reevaluate and self.critic_init == "random":
            raise cli.UserError("--critic-init random means a run without re-evaluation; add --no-reevaluate")
        if self.align_constrain and self.align_actor_lr == 0:
            raise cli.UserError("--align-constrain is about the actor, which --align-actor-lr 0 stops; leave one out")
        if self.warmup_steps > (n := self.online_steps):
            raise cli.UserError(f"--warmup-steps is {self.warmup_steps}, but has to be at most --online-steps ({n})")


# ---------------------------------------------------------------------------------------------- networks
# ALGO LOGIC: an actor in another layout than its KIND's (common/policies.py) writes a policy.pt that others cannot read


class Actor(nn.Module):
    """Squashed Gaussian policy: (B, S) -> mean and log std of u, (B, A) each; the action is tanh(u)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: list | tuple = (256, 256, 256)):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, 2 * action_dim)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, (log_std - 1.0).clamp(-20.0, 2.0)


class Critic(nn.Module):
    """`n` Q networks side by side: (B, S), (B, A) -> (n, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple = (256, 256, 256), layer_norm=True, n=2):
        super().__init__()
        self.n, self.net = n, ensemble_mlp(n, obs_dim + action_dim, hidden_layers, 1, layer_norm)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(self.n, *x.shape)).squeeze(-1)


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a = tanh(u), u ~ N(mean, std), reparameterised: a (B, A), u (B, A), log π(a|s) (B,)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), u, log_prob_of(u, mean, log_std)


def log_prob_of(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log π(tanh(u)|s) (B,). Taking u, not the action, leaves no atanh near ±1 to go wrong."""
    return gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)


class Agent(nn.Module):
    """All that is learned: π, π_off, π_ref, Q, Q̄, log α, log λ. The offline and reference policies are copies."""

    def __init__(self, args: Args, policy: dict):
        super().__init__()
        obs_dim, action_dim = policy["obs_dim"], policy["action_dim"]
        self.actor = Actor(obs_dim, action_dim, policy["hidden_layers"])
        self.actor.load_state_dict(policy["actor"])
        self.actor_offline = copy.deepcopy(self.actor).requires_grad_(False)
        self.actor_reference = copy.deepcopy(self.actor_offline)
        if args.reevaluate or args.critic_init == "random":
            self.critic = Critic(obs_dim, action_dim, args.critic_hidden, args.critic_layer_norm, args.critics)
        else:  # the naive switch: the offline algorithm's critics, in that algorithm's shape
            theirs = policy["critic"]
            self.critic = Critic(obs_dim, action_dim, theirs["hidden_layers"], theirs["layer_norm"])
            self.critic.load_state_dict(theirs["critic"])
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha).log())
        self.log_lagrange = nn.Parameter(torch.tensor(args.lagrange_init).log())

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The most likely action, tanh of the mean."""
        return torch.tanh(self.actor(obs)[0])

    def move_reference(self) -> None:
        """π_ref ← π."""
        self.actor_reference.load_state_dict(self.actor.state_dict())


def critic_probe(args: Args, agent: Agent, held_out: datasets.Dataset) -> Probe:
    """Logged in every stage: Q at states that none trains on, and how far its ranking of actions is log π_off's."""
    mean, log_std = in_chunks(agent.actor_offline, held_out.obs)
    u = mean + log_std.exp() * fixed_noise(mean)
    preference = log_prob_of(u, mean, log_std)
    return Probe(held_out, lambda *x: agent.critic(*x).amin(0), agent.act, torch.tanh(mean), torch.tanh(u), preference)


class Optimizers(dict):
    """One Adam for each thing that is learned; actor's and critics' moments carry over from stage to stage."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.actor_lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.critic_lr),
            alpha_optimizer=Adam([agent.log_alpha], args.alpha_lr),
            lagrange_optimizer=Adam([agent.log_lagrange], args.lagrange_lr),
        )


# ---------------------------------------------------------------------------------------------- 1. re-evaluation
# ALGO LOGIC: each stage's losses and targets; all that is in `metrics` is logged


def reevaluation_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """Fitted Q evaluation of the frozen π_off in SAC's Bellman equation, on the dataset (the paper's Eq. 4)."""
    critic, critic_target = agent.critic, agent.critic_target
    critic_params = list(critic.parameters())
    # π_off never changes, so its Gaussian at every next state of the data is computed once, not once a step
    next_mean, next_log_std = in_chunks(agent.actor_offline, data.next_obs)

    def gradients():
        obs, actions, rewards, next_obs, terminations, rows = sample(data, args.batch_size)
        # y = r + γ (1 - d) [ min_i Q̄_i(s', a') - α log π_off(a'|s') ],  a' ~ π_off
        with torch.no_grad():
            next_actions, _, next_log_prob = sample_actions(next_mean[rows], next_log_std[rows])
            next_v = critic_target(next_obs, next_actions).amin(0) - args.alpha * next_log_prob
            y = rewards + args.gamma * (1 - terminations) * next_v
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean(1).sum()
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach().mean(), "q_target": y.mean()}
        return torch.autograd.grad(critic_loss, critic_params), metrics

    gradients = steps.compiled(gradients, args.compile)

    def step():
        critic_grads, metrics = gradients()
        optimizers["critic_optimizer"].step(critic_grads)
        polyak(critic_target, critic, args.reevaluate_tau)
        return metrics

    return step


# ---------------------------------------------------------------------------------------------- 2. alignment


def alignment_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """Make the critic rank actions as π_off does, with π_off's most likely action ȧ as the anchor (Eq. 6)."""
    actor, critic, critic_target = agent.actor, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())

    # π_off and Q̄ are frozen here: the anchor ȧ, log π_off(ȧ|s) and Q̄(s, ȧ) of every state are computed once
    offline_mean, offline_log_std = in_chunks(agent.actor_offline, data.obs)
    anchor_actions, anchor_log_prob = torch.tanh(offline_mean), log_prob_of(offline_mean, offline_mean, offline_log_std)
    anchor_q = in_chunks(lambda *x: critic_target(*x).amin(0), data.obs, anchor_actions)

    def gradients():
        obs, *_, rows = sample(data, args.batch_size)
        actions, u, log_prob = sample_actions(*actor(obs))
        # Q'(s, a) = min{ Q̄(s, ȧ) - α [log π_off(ȧ|s) - log π_off(a|s)],  Q̄(s, a) },  a ~ π
        with torch.no_grad():
            offline_log_prob = log_prob_of(u, offline_mean[rows], offline_log_std[rows])
            ceiling = anchor_q[rows] - args.alpha * (anchor_log_prob[rows] - offline_log_prob)
            q_aligned = torch.minimum(ceiling, critic_target(obs, actions).amin(0))
        # (Q_i(s, a) - Q'(s, a))² + (Q_i(s, ȧ) - Q̄(s, ȧ))²
        q, q_anchor = critic(obs, actions), critic(obs, anchor_actions[rows])
        aligned_loss = ((q - q_aligned) ** 2).mean(1).sum()
        anchor_loss = ((q_anchor - anchor_q[rows]) ** 2).mean(1).sum()
        # SAC's actor loss, α fixed: α log π(a|s) - min_i Q_i(s, a)
        actor_loss = (args.alpha * log_prob - q.amin(0)).mean()
        if args.align_constrain:  # + λ f(s, a),  f = log π(a|s) - log π_off(a|s)
            f = log_prob - log_prob_of(u, offline_mean[rows], offline_log_std[rows])
            actor_loss = actor_loss + args.lagrange_init * f.mean()
        metrics = {"aligned_loss": aligned_loss, "anchor_loss": anchor_loss, "actor_loss": actor_loss, "q": q.mean(),
                   "q_anchor": q_anchor.mean(), "entropy": -log_prob.mean()}  # fmt: skip
        return (
            torch.autograd.grad(aligned_loss + anchor_loss, critic_params, retain_graph=True),
            torch.autograd.grad(actor_loss, actor_params),
            {name: value.detach() for name, value in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile)
    optimizers["actor_optimizer"].lr.fill_(args.actor_lr if args.align_actor_lr is None else args.align_actor_lr)

    def step():
        critic_grads, actor_grads, metrics = gradients()
        if args.align_actor_lr != 0:  # else it stands still, and its moments with it
            optimizers["actor_optimizer"].step(actor_grads)
        optimizers["critic_optimizer"].step(critic_grads)
        return metrics  # the targets stay where re-evaluation left them

    return step


# ---------------------------------------------------------------------------------------------- 3. fine-tuning


def schedules(args: Args) -> dict:
    """What changes with the environment step, and reaches it as a tensor: the paper's τ, linear from start to end."""
    start, end, over = args.kl_threshold_start, args.kl_threshold_end, args.kl_threshold_steps
    return {"kl_threshold": lambda step: start + (end - start) * min(step / over, 1.0)}


def lagrange_loss(log_lagrange: torch.Tensor, slack: torch.Tensor, expectile: float) -> torch.Tensor:
    """λ mean(|0.7 - 1[u > 0]| u), u = τ - f (B,): a violated state counts more, so one batch cannot drop λ."""
    return log_lagrange.exp() * ((expectile - (slack > 0).float()).abs() * slack).mean()


def finetuning_step(args: Args, replay: ReplayBuffer, agent: Agent, optimizers, scheduled: dict, warming_up=False):
    """SAC's `utd` updates of one environment step, under E[log π(a|s) - log π_ref(a|s)] < τ (Eq. 10 and 11)."""
    threshold = scheduled["kl_threshold"]  # the paper's τ, a tensor that the caller fills
    # with --per-dimension both are as large for each dimension as with halfcheetah's and walker2d's 6, and hopper's 3
    times_threshold = replay.action_dim / 6 if args.per_dimension else 1.0
    times_floor = replay.action_dim / 3 if args.per_dimension else 1.0
    actor, critic, critic_target, reference = agent.actor, agent.critic, agent.critic_target, agent.actor_reference
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    target_entropy = -float(replay.action_dim) if args.target_entropy is None else args.target_entropy

    def gradients():
        obs, actions, rewards, next_obs, terminations = replay.sample(args.batch_size)
        alpha = agent.log_alpha.exp().detach()
        lagrange = agent.log_lagrange.exp().detach() if args.constrain else torch.zeros_like(alpha)

        def divergence(states, u, log_prob):  # f(s, a) = log π(a|s) - log π_ref(a|s)
            reference_log_prob = log_prob_of(u, *reference(states))
            return log_prob - reference_log_prob.clamp(min=times_floor * args.log_prob_floor)

        # critic: y = r + γ (1 - d) [ min_i Q̄_i(s', a') - α log π(a'|s') - λ f(s', a') ]
        with torch.no_grad():
            next_actions, next_u, next_log_prob = sample_actions(*actor(next_obs))
            next_f = divergence(next_obs, next_u, next_log_prob)
            next_q = critic_target(next_obs, next_actions).amin(0)
            y = rewards + args.gamma * (1 - terminations) * (next_q - alpha * next_log_prob - lagrange * next_f)
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean(1).sum()

        # actor: α log π(a|s) - min_i Q_i(s, a) + λ f(s, a)
        new_actions, u, log_prob = sample_actions(*actor(obs))
        f = divergence(obs, u, log_prob)
        actor_loss = (alpha * log_prob - critic(obs, new_actions).amin(0) + lagrange * f).mean()

        # temperature towards the target entropy; multiplier: at rest where τ is f's 0.7-expectile, which is above E f
        alpha_loss = -agent.log_alpha * (log_prob.detach() + target_entropy).mean()
        slack = times_threshold * threshold - f.detach()
        multiplier_loss = lagrange_loss(agent.log_lagrange, slack, args.lagrange_expectile)

        metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "q": q.mean(), "q_target": y.mean(),
                   "alpha": alpha, "entropy": -log_prob.mean(), "kl": f.mean(), "lagrange": lagrange}  # fmt: skip
        return (
            torch.autograd.grad(critic_loss, critic_params),
            clip_grad_norm(torch.autograd.grad(actor_loss, actor_params), args.actor_grad_norm),
            torch.autograd.grad(alpha_loss, [agent.log_alpha]),
            torch.autograd.grad(multiplier_loss, [agent.log_lagrange]),
            {name: value.detach() for name, value in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile)

    def step():
        for update in range(args.utd):
            critic_grads, actor_grads, alpha_grads, lagrange_grads, metrics = gradients()
            if not warming_up:  # else the critics alone learn, of π all the same, which does not play yet
                if update == 0 and args.constrain:  # λ moves on the first of the ten only
                    optimizers["lagrange_optimizer"].step(lagrange_grads)
                optimizers["alpha_optimizer"].step(alpha_grads)
                optimizers["actor_optimizer"].step(actor_grads)
            optimizers["critic_optimizer"].step(critic_grads)
            polyak(critic_target, critic, args.tau)
        return metrics  # of the last update

    return step


def finetune(args: Args, run: Run, data, agent: Agent, optimizers: Optimizers, evaluator, probe, best: BestPolicy):
    """Interact, update, evaluate, and move π_ref. `best` is the best policy of the stages before, with its score."""
    device = data.obs.device
    replay, schedule = experience(args, data), Schedules(schedules(args), device)
    stepper = steps.Stepper(None, device, graph=args.compile, steps_per_graph=1)
    env = envs.training(args, data.task, evaluator)
    outplayed = Outplayed(args.reference_window, args.reference_margin)
    # TRY NOT TO MODIFY: what changes in this stage and is not named here starts anew when a run is resumed
    state = {"agent": agent, **optimizers, "replay": replay, "env": env, "best": best, "outplayed": outplayed,
             "stepper": stepper}  # fmt: skip
    loop = Loop(run, "finetune", args.online_steps, state, device, probe)

    @torch.no_grad()
    def explore(actor, obs):
        mean, log_std = actor(torch.as_tensor(obs, device=device)[None])
        return sample_actions(mean, log_std)[0][0].cpu().numpy()

    # TRY NOT TO MODIFY: the order of what happens in a step, which a resumed run repeats
    for env_step in loop:
        warming_up = env_step <= args.warmup_steps
        obs, action = env.obs, explore(agent.actor_offline if warming_up else agent.actor, env.obs)
        schedule.fill(env_step)
        if env_step in (loop.start + 1, args.warmup_steps + 1):  # at the start, and once the warm-up is over
            stepper.change(finetuning_step(args, replay, agent, optimizers, schedule.tensors, warming_up))
        # Updates draw on the transitions before this one, so a GPU does them while the simulator takes this step
        if env_step > args.learning_starts:
            stepper.run(1)
        next_obs, reward, terminated, episodic_return = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)  # the executed action; a truncation is no end
        improved = outplays = False
        if episodic_return is not None:
            run.log("finetune", env_step, env.outcome)
            outplays = not warming_up and outplayed.add(episodic_return)
        if env_step % args.eval_every == 0 or env_step == args.online_steps:
            improved = loop.evaluate(evaluator, schedule.scalars())
        moves = {"best": improved, "adaptive": outplays, "interval": env_step % args.reference_interval == 0}
        if moves[args.reference]:
            agent.move_reference()


# ---------------------------------------------------------------------------------------------- the whole run
# TRY NOT TO MODIFY: from these names all else finds out what the script is made of (common/stages.py)

KIND = "squashed_gaussian"  # of the policy to start from, see common/policies.py
REEVALUATE = Stage("reevaluate", "reevaluate_steps", reevaluation_step, "re-evaluated", plateau="probe/q_policy")
ALIGN = Stage("align", "align_steps", alignment_step, "aligned", "align_eval_every", plateau="probe/rank_correlation")
FINETUNE = Stage("finetune", "online_steps", finetuning_step, "fine-tuned", "eval_every", experience, schedules)
STAGES = (REEVALUATE, ALIGN, FINETUNE)
ABLATIONS = ("reevaluate", "align", "constrain")  # --no-… leaves that part of the method out
FINETUNING_ARGS = (  # what fine-tuning alone reads: runs that differ in nothing else share the stages before it
    "constrain", "online_steps", "learning_starts", "warmup_steps", "utd", "tau", "buffer", "part_episodes", "alpha_lr",
    "target_entropy", "lagrange_lr", "lagrange_expectile", "kl_threshold_start", "kl_threshold_end",
    "kl_threshold_steps", "log_prob_floor", "per_dimension", "reference", "reference_interval", "reference_window",
    "reference_margin", "actor_grad_norm", "eval_every", "probe_every", "align_restore",
)  # fmt: skip


def main() -> None:
    args, run, data = report.start_run(Args, offline)
    policy, evaluator = offline.policy(args, run, data)
    seed_everything(args.seed)
    data, held_out = data.hold_out(args.holdout, STATES)
    agent = Agent(args, policy).to(data.obs.device)
    probe, optimizers = critic_probe(args, agent, held_out), Optimizers(args, agent)
    best = BestPolicy(policy["score"], agent.actor, "offline policy", run.last_returns, args.best_margin)

    if args.reevaluate:
        train(run, REEVALUATE, data, agent, optimizers, probe)
    if args.align:
        train(run, ALIGN, data, agent, optimizers, probe, evaluator)
        optimizers["actor_optimizer"].lr.fill_(args.actor_lr)
        if args.align_restore:  # of all that alignment did the critics alone are kept
            agent.actor.load_state_dict(agent.actor_offline.state_dict())
            optimizers["actor_optimizer"] = Adam(agent.actor.parameters(), args.actor_lr)
            run.last_score, run.last_returns = best.score, best.returns
        agent.critic_target.load_state_dict(agent.critic.state_dict())
    if best.update(run.last_score, agent.actor, "aligned policy", run.last_returns) or args.reference == "adaptive":
        agent.move_reference()  # else π_off stays the reference
    start = run.last_score
    finetune(args, run, data, agent, optimizers, evaluator, probe, best)

    report.finish(run, policy, agent, best, data, evaluator, start)


if __name__ == "__main__":
    cli.run(main)
