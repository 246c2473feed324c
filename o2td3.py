"""O2TD3: fine-tune any offline policy with TD3, without the collapse that usually follows.

Optimistic Critic Reconstruction and Constrained Fine-Tuning (Luo, Xie, Wang & Huang, NeurIPS 2024, arXiv 2412.18855):
1. reevaluate - new critics by fitted Q evaluation of the frozen offline policy, in TD3's own Bellman equation;
2. align      - make their ranking of actions agree with the distance to the policy's own action;
3. finetune   - TD3, with a Lagrangian constraint on the distance from the best policy so far.

    python o2td3.py --preset demo
    python o2td3.py --env-id hopper-medium-v2 --offline td3_bc
"""

import copy
import itertools
from dataclasses import dataclass
from typing import Annotated, Literal

import offline
from common import cli, datasets, envs, report, steps
from common.bounds import above, at_least, between, even, only_with
from common.checkpoint import BestPolicy, seed_everything
from common.loop import Loop
from common.nn import Adam, clip_grad_norm, ensemble_mlp, in_chunks, mlp, polyak
from common.probe import STATES, Probe, fixed_noise
from common.reference import Outplayed
from common.replay import ReplayBuffer, experience, sample
from common.run import Run
from common.stages import Schedules, Stage, train
from common.tasks import Task

import torch
from torch import nn

PRESETS = {
    # The demo is 1/5 to 1/100 of the paper's stages, so what moves slowly there moves faster here: the targets of
    # re-evaluation and the threshold, which reaches its end with the run.
    "demo": dict(
        env_id="hopper-medium-demo", reevaluate_steps=25_000, reevaluate_tau=0.05, align_steps=5_000,
        online_steps=20_000, learning_starts=2_000, mse_threshold_steps=20_000, log_every=500, align_eval_every=5_000,
    ),
    "quick": dict(
        reevaluate_steps=100_000, align_steps=50_000, online_steps=50_000, learning_starts=2_000, log_every=1_000,
        align_eval_every=10_000,
    ),
}  # fmt: skip

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_shift=-1.0, critic_layer_norm=False, align_steps=1_000_000, online_steps=200_000,
                    eval_every=5_000, eval_episodes=20, final_episodes=100, best_margin=2.0),
    "adroit": dict(online_steps=200_000, eval_every=5_000, eval_episodes=100, best_margin=2.0),
}  # fmt: skip

NEW_CRITICS = only_with(reevaluate=True, critic_init="random")  # else they are the offline algorithm's, in its shape


@dataclass
class Args(cli.OnlineArgs):
    offline: str = "td3_bc"

    # every stage
    batch_size: Annotated[int, even()] = 256
    """transitions in a batch, with --buffer half as many of either kind"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    critic_lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the critics"""
    actor_lr: Annotated[float, at_least(0)] = 1e-4
    """learning rate of the actor"""
    critic_hidden: Annotated[tuple[int, ...], at_least(1), NEW_CRITICS] = (256, 256)
    """widths of the hidden layers in each critic"""
    critic_layer_norm: Annotated[bool, NEW_CRITICS] = True
    """layer normalisation in the critics (AntMaze: off)"""
    policy_noise: Annotated[float, at_least(0)] = 0.2
    """standard deviation of the noise on target actions"""
    noise_clip: Annotated[float, at_least(0)] = 0.5
    """that noise is clipped at this"""
    lagrange_init: Annotated[float, above(0), only_with(constrain=True, align_constrain=True)] = 1.0
    """λ at the start, of fine-tuning and, with --align-constrain, in alignment"""
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
    align_distance: Annotated[float, at_least(0)] = 1.0
    """the paper's k: how fast the aligned Q falls with the squared distance from the anchor"""
    align_max_distance: Annotated[float, at_least(0)] = 0.2
    """that distance is clipped at this"""
    align_radius: Literal["fixed", "uniform"] = "fixed"
    """length of the noise there: TD3's; or times U(0, 1.5) for each action, for in many dimensions all are alike"""

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
    utd: Annotated[int, at_least(1)] = 1
    """updates per environment step"""
    policy_freq: Annotated[int, at_least(1)] = 2
    """critic updates per update of the actor, of the targets and of λ"""
    exploration_noise: Annotated[float | None, at_least(0)] = None
    """standard deviation of the Gaussian noise on executed actions; None: 0.1, on (medium-)expert data 0.05"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the targets (the paper's τ is --mse-threshold-…)"""
    buffer: Literal["half", "all", "part", "none"] = "half"
    """offline data in online batches: half of each batch, all in one buffer, only the best episodes, or none"""
    part_episodes: Annotated[int, at_least(1), only_with(buffer="part")] = 50
    """how many episodes, those of highest return, --buffer part keeps"""
    lagrange_lr: Annotated[float, at_least(0), only_with(constrain=True)] = 5e-5
    """learning rate of log λ"""
    lagrange_expectile: Annotated[float, between(0, 1), only_with(constrain=True)] = 0.7
    """asymmetry of λ's loss: weight of violated states (0.7) against satisfied ones (0.3)"""
    mse_threshold_start: Annotated[float | None, at_least(0), only_with(constrain=True)] = None
    """the paper's τ at the first step; None: 0.0025, on (medium-)expert data 2.5e-5"""
    mse_threshold_end: Annotated[float | None, at_least(0), only_with(constrain=True)] = None
    """τ after --mse-threshold-steps; None: 0.04, on (medium-)expert data 6.25e-4; --reference interval: a quarter"""
    mse_threshold_steps: Annotated[int, at_least(1), only_with(constrain=True)] = 100_000
    """environment steps over which the threshold grows linearly"""
    reference: Annotated[Literal["best", "interval", "adaptive"], only_with(constrain=True)] = "best"
    """move π_ref to π when an evaluation beats the best so far; every --reference-interval steps; or, needing none,
    when the last training episodes beat the first since π_ref moved by a margin (experiments/reference.py)"""
    reference_interval: Annotated[int | None, at_least(1), only_with(reference="interval")] = None
    """environment steps between moves of π_ref; None: 1,000; hopper's (medium-)expert, walker2d's expert data 10,000"""
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
        values = dict(
            exploration_noise=0.1, mse_threshold_start=0.0025, mse_threshold_end=0.04, reference_interval=1_000
        )
        if task.expert:
            values |= dict(exploration_noise=0.05, mse_threshold_start=2.5e-5, mse_threshold_end=6.25e-4)
        if self.reference == "interval":
            values["mse_threshold_end"] /= 4
            if (task.robot == "hopper" and task.expert) or (task.robot, task.quality) == ("walker2d", "expert"):
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
    """Deterministic policy: (B, S) -> (B, A) in (-1, 1)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: list | tuple = (256, 256)):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, action_dim)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.net(obs))


class Critic(nn.Module):
    """Twin Q networks side by side: (B, S), (B, A) -> (2, B); the first `n` alone give (n, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple = (256, 256), layer_norm: bool = True):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1, layer_norm)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor, n: int = 2) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(n, *x.shape)).squeeze(-1)


def smoothed(actions: torch.Tensor, args: Args, radius: torch.Tensor | float = 1.0) -> torch.Tensor:
    """TD3's target policy smoothing: clip(a + clip(N(0, 0.2²), ±0.5), ±1), (B, A); the noise times `radius` (B, 1)."""
    noise = (torch.randn_like(actions) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
    return (actions + radius * noise).clamp(-1, 1)


class Agent(nn.Module):
    """π, π̄, Q, Q̄, log λ, which are learned, and π_off and π_ref, copies of π that are not."""

    def __init__(self, args: Args, policy: dict):
        super().__init__()
        obs_dim, action_dim = policy["obs_dim"], policy["action_dim"]
        self.actor = Actor(obs_dim, action_dim, policy["hidden_layers"])
        self.actor.load_state_dict(policy["actor"])
        self.actor_offline = copy.deepcopy(self.actor).requires_grad_(False)
        self.actor_reference = copy.deepcopy(self.actor_offline)
        self.actor_target = copy.deepcopy(self.actor_offline)
        if args.reevaluate or args.critic_init == "random":
            self.critic = Critic(obs_dim, action_dim, args.critic_hidden, args.critic_layer_norm)
        else:  # the offline algorithm's critics, in that algorithm's shape, as in the naive switch
            theirs = policy["critic"]
            self.critic = Critic(obs_dim, action_dim, theirs["hidden_layers"], theirs["layer_norm"])
            self.critic.load_state_dict(theirs["critic"])
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_lagrange = nn.Parameter(torch.tensor(args.lagrange_init).log())

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The action without exploration noise."""
        return self.actor(obs)

    def move_reference(self) -> None:
        """π_ref ← π."""
        self.actor_reference.load_state_dict(self.actor.state_dict())


def critic_probe(args: Args, agent: Agent, held_out: datasets.Dataset) -> Probe:
    """Logged in every stage: Q at states that none trains on, and how far it falls with the distance from π_off(s)."""
    anchor = in_chunks(agent.actor_offline, held_out.obs)
    noise = (args.policy_noise * fixed_noise(anchor)).clamp(-args.noise_clip, args.noise_clip)
    actions = (anchor + noise).clamp(-1, 1)
    preference = -torch.linalg.vector_norm(actions - anchor, dim=-1)
    return Probe(held_out, lambda *x: agent.critic(*x).amin(0), agent.act, anchor, actions, preference)


class Optimizers(dict):
    """One Adam for each thing that is learned; actor's and critics' moments carry over from stage to stage."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.actor_lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.critic_lr),
            lagrange_optimizer=Adam([agent.log_lagrange], args.lagrange_lr),
        )


# ---------------------------------------------------------------------------------------------- 1. re-evaluation
# ALGO LOGIC: each stage's losses and targets; all that is in `metrics` is logged


def reevaluation_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """Fitted Q evaluation of the frozen π_off in TD3's Bellman equation, on the dataset (the paper's Eq. 4)."""
    critic, critic_target = agent.critic, agent.critic_target
    critic_params = list(critic.parameters())
    # π_off never changes, so its action at every next state of the data is computed once, not once a step
    offline_next_actions = in_chunks(agent.actor_offline, data.next_obs)

    def gradients():
        obs, actions, rewards, next_obs, terminations, rows = sample(data, args.batch_size)
        # y = r + γ (1 - d) min_i Q̄_i(s', a'),  a' = clip(π_off(s') + clipped noise)
        with torch.no_grad():
            next_q = critic_target(next_obs, smoothed(offline_next_actions[rows], args)).amin(0)
            y = rewards + args.gamma * (1 - terminations) * next_q
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
    """Make the critic rank actions by their distance from π_off's action ȧ, the anchor (Eq. 7)."""
    actor, critic, critic_target = agent.actor, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())

    # π_off and Q̄ are frozen here: the anchor ȧ and Q̄(s, ȧ) of every state are computed once
    anchor_actions = in_chunks(agent.actor_offline, data.obs)
    anchor_q = in_chunks(lambda *x: critic_target(*x).amin(0), data.obs, anchor_actions)

    def gradients():
        obs, *_, rows = sample(data, args.batch_size)
        anchors, q_anchor_target = anchor_actions[rows], anchor_q[rows]
        new_actions = actor(obs)
        # Q'_i(s, ã) = min{ Q̄(s, ȧ) / (1 + k δ²),  Q̄_i(s, ã) },  ã = π(s) + noise,  δ = ‖ã - ȧ‖ / √A, clipped
        with torch.no_grad():
            # in many dimensions all noise is about equally long; with another radius for each action, distances vary
            radius = 1.5 * torch.rand_like(new_actions[:, :1]) if args.align_radius == "uniform" else 1.0
            noisy_actions = smoothed(new_actions, args, radius)
            distance = (noisy_actions - anchors).norm(dim=1) / anchors.shape[1] ** 0.5
            shrink = 1 + args.align_distance * distance.clamp(max=args.align_max_distance) ** 2
            # dividing a negative Q would raise it, so there it is multiplied
            ceiling = torch.where(q_anchor_target < 0, q_anchor_target * shrink, q_anchor_target / shrink)
            q_aligned = torch.minimum(ceiling, critic_target(obs, noisy_actions))
        # (Q_i(s, ã) - Q'_i(s, ã))² + (Q_i(s, ȧ) - Q̄(s, ȧ))²
        q, q_anchor = critic(obs, noisy_actions), critic(obs, anchors)
        aligned_loss = ((q - q_aligned) ** 2).mean(1).sum()
        anchor_loss = ((q_anchor - q_anchor_target) ** 2).mean(1).sum()
        # TD3's actor loss: -Q_1(s, π(s))
        new_q = critic(obs, new_actions, n=1)[0]
        actor_loss = -new_q.mean()
        if args.align_constrain:  # -Q_1 / mean|Q_1| + λ f(s),  f(s) = ‖π(s) - ȧ‖² / A
            f = ((new_actions - anchors) ** 2).mean(1)
            actor_loss = actor_loss / new_q.abs().mean().detach() + args.lagrange_init * f.mean()
        metrics = {"aligned_loss": aligned_loss, "anchor_loss": anchor_loss, "actor_loss": actor_loss, "q": q.mean(),
                   "q_anchor": q_anchor.mean(), "distance": distance.mean()}  # fmt: skip
        return (
            torch.autograd.grad(aligned_loss + anchor_loss, critic_params),
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
    start, end, over = args.mse_threshold_start, args.mse_threshold_end, args.mse_threshold_steps
    return {"mse_threshold": lambda step: start + (end - start) * min(step / over, 1.0)}


def lagrange_loss(log_lagrange: torch.Tensor, slack: torch.Tensor, expectile: float) -> torch.Tensor:
    """λ mean(|0.7 - 1[u > 0]| u), u = τ - f (B,): a violated state counts more, so one batch cannot drop λ."""
    return log_lagrange.exp() * ((expectile - (slack > 0).float()).abs() * slack).mean()


def finetuning_step(args: Args, replay: ReplayBuffer, agent: Agent, optimizers, scheduled: dict, warming_up=False):
    """TD3's updates of one environment step, under E‖π(s) - π_ref(s)‖² / A < τ (Eq. 10 and 11)."""
    threshold = scheduled["mse_threshold"]  # the paper's τ, a tensor that the caller fills
    actor, actor_target, reference = agent.actor, agent.actor_target, agent.actor_reference
    critic, critic_target = agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())

    def lagrange():
        return agent.log_lagrange.exp().detach() if args.constrain else torch.zeros_like(threshold)

    def critic_gradients():
        obs, actions, rewards, next_obs, terminations = replay.sample(args.batch_size)
        # y = r + γ (1 - d) [ min_i Q̄_i(s', a') - λ f(s') ],  a' = clip(π̄(s') + clipped noise)
        with torch.no_grad():
            next_q = critic_target(next_obs, smoothed(actor_target(next_obs), args)).amin(0)
            next_f = ((actor(next_obs) - reference(next_obs)) ** 2).mean(1)
            y = rewards + args.gamma * (1 - terminations) * (next_q - lagrange() * next_f)
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean(1).sum()
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach().mean(), "q_target": y.mean()}
        return torch.autograd.grad(critic_loss, critic_params), metrics, obs

    def actor_gradients(obs):
        # actor: -Q_1(s, π(s)) / mean|Q_1| + λ f(s),  f(s) = ‖π(s) - π_ref(s)‖² / A
        new_actions = actor(obs)
        f = ((new_actions - reference(obs)) ** 2).mean(1)
        q = critic(obs, new_actions, n=1)[0]
        actor_loss = -q.mean() / q.abs().mean().detach() + lagrange() * f.mean()
        # multiplier: at rest where τ is f's 0.7-expectile, which is above E f
        multiplier_loss = lagrange_loss(agent.log_lagrange, threshold - f.detach(), args.lagrange_expectile)
        return (
            clip_grad_norm(torch.autograd.grad(actor_loss, actor_params), args.actor_grad_norm),
            torch.autograd.grad(multiplier_loss, [agent.log_lagrange]),
            {"actor_loss": actor_loss.detach(), "mse": f.detach().mean()},
        )

    critic_gradients = steps.compiled(critic_gradients, args.compile)
    actor_gradients = steps.compiled(actor_gradients, args.compile)
    updates = itertools.count(int(optimizers["critic_optimizer"].steps[0]) + 1)  # a resumed run goes on in turn

    def step():
        actor_metrics = {}
        for _ in range(args.utd):
            critic_grads, metrics, obs = critic_gradients()
            optimizers["critic_optimizer"].step(critic_grads)
            if next(updates) % args.policy_freq == 0:
                actor_grads, lagrange_grads, actor_metrics = actor_gradients(obs)
                if not warming_up:  # else the critics alone learn
                    optimizers["actor_optimizer"].step(actor_grads)
                    if args.constrain:
                        optimizers["lagrange_optimizer"].step(lagrange_grads)
                polyak(critic_target, critic, args.tau)
                polyak(actor_target, actor, args.tau)
        return metrics | actor_metrics | {"lagrange": lagrange()}

    return step


def finetune(args: Args, run: Run, data, agent: Agent, optimizers: Optimizers, evaluator, probe, best: BestPolicy):
    """Interact, update, evaluate, and move π_ref. `best` is the best policy of the stages before, with its score."""
    device = data.obs.device
    replay, schedule = experience(args, data), Schedules(schedules(args), device)
    stepper = steps.Stepper(None, device, graph=args.compile, steps_per_graph=1, phases=args.policy_freq)
    env = envs.training(args, data.task, evaluator)
    outplayed = Outplayed(args.reference_window, args.reference_margin)
    # TRY NOT TO MODIFY: what changes in this stage and is not named here starts anew when a run is resumed
    state = {"agent": agent, **optimizers, "replay": replay, "env": env, "best": best, "outplayed": outplayed,
             "stepper": stepper}  # fmt: skip
    loop = Loop(run, "finetune", args.online_steps, state, device, probe)

    @torch.no_grad()
    def explore(actor, obs):
        action = actor(torch.as_tensor(obs, device=device)[None])[0]
        return (action + args.exploration_noise * torch.randn_like(action)).clamp(-1, 1).cpu().numpy()

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

KIND = "deterministic"  # of the policy to start from, see common/policies.py
REEVALUATE = Stage("reevaluate", "reevaluate_steps", reevaluation_step, "re-evaluated", plateau="probe/q_policy")
ALIGN = Stage("align", "align_steps", alignment_step, "aligned", "align_eval_every", plateau="probe/rank_correlation")
FINETUNE = Stage("finetune", "online_steps", finetuning_step, "fine-tuned", "eval_every", experience, schedules)
STAGES = (REEVALUATE, ALIGN, FINETUNE)
ABLATIONS = ("reevaluate", "align", "constrain")  # --no-… leaves that part of the method out
FINETUNING_ARGS = (  # what fine-tuning alone reads: runs that differ in nothing else share the stages before it
    "constrain", "online_steps", "learning_starts", "warmup_steps", "utd", "policy_freq", "tau", "buffer",
    "part_episodes", "exploration_noise", "lagrange_lr", "lagrange_expectile", "mse_threshold_start",
    "mse_threshold_end", "mse_threshold_steps", "reference", "reference_interval", "actor_grad_norm",
    "reference_window", "reference_margin", "eval_every", "probe_every", "align_restore",
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
        agent.actor_target.load_state_dict(agent.actor.state_dict())
    if best.update(run.last_score, agent.actor, "aligned policy", run.last_returns) or args.reference == "adaptive":
        agent.move_reference()  # else π_off stays the reference
    start = run.last_score
    finetune(args, run, data, agent, optimizers, evaluator, probe, best)

    report.finish(run, policy, agent, best, data, evaluator, start)


if __name__ == "__main__":
    cli.run(main)
