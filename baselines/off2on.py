"""Off2On (Lee et al., CoRL 2021, arXiv 2107.00591): balanced replay and a pessimistic ensemble. Five CQL agents of five
seeds become one: its policy is the Gaussian of their mixture's moments, its value the mean over members of each one's
lower twin. Fine-tuning is SAC. Rows of data and play are drawn by how much they look like play, as a network's estimate
of the ratio of their densities says.

    python baselines/off2on.py --preset demo
    python baselines/off2on.py --env-id hopper-medium-v2

Those of the five CQL runs that are missing are trained first, with the seeds --seed + 0, 1000, …, 4000 (the authors': +
0, 4, …, 16, so runs with seeds 4 apart share four of five): that is most of its cost. The authors' code is for
locomotion alone, and their CQL and its constants are not in it: offline/cql.py is taken, with their two hidden layers;
its log σ and its standardised states come with it. They play 1,000 steps before the first 5,000 to 10,000 updates, all
at once; here as many follow during the next 1,000 steps, so that a run can stop anywhere. policy.pt and best.pt hold
the mixture's most likely action, as one deterministic network.
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

import offline
from common import cli, datasets, envs, regime, report, steps
from common.bounds import above, at_least, between, even
from common.checkpoint import BestPolicy, seed_everything
from common.loop import Loop
from common.nn import Adam, ensemble_mlp, gaussian_log_prob, in_chunks, mlp, polyak, tanh_log_det
from common.probe import STATES, Probe, fixed_noise
from common.replay import PrioritisedBuffer
from common.run import Run
from common.stages import Stage

import torch
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", online_steps=10_000, members=3),
    "quick": dict(online_steps=20_000),
}

# Other defaults for a family of data. Nothing is published for any but locomotion; rewards are as CQL has them there
FAMILIES = {
    "antmaze": dict(reward_scale=10.0, reward_shift=-5.0, online_steps=200_000, eval_every=5_000,
                    eval_episodes=20, final_episodes=100, best_margin=2.0),
    "adroit": dict(online_steps=200_000, eval_every=5_000, eval_episodes=100, best_margin=2.0),
}  # fmt: skip


@dataclass
class Args(cli.OnlineArgs):
    offline: str = "cql"
    """cql: its runs of several seeds (each trained first if there is none yet)"""
    members: Annotated[int, at_least(1)] = 5
    """how many of them"""
    batch_size: Annotated[int, even()] = 256
    """transitions in a batch"""
    utd: ClassVar[int] = 1  # updates after an environment step, as other methods' --utd, but for the first 1,000
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics"""
    critic_lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the critics"""
    actor_lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the policies and of the temperature"""
    ratio_lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the density ratio"""
    ratio_temperature: Annotated[float, above(0)] = 5.0
    """the paper's T: priorities are the ratio to the power of 1 / T"""
    new_fraction: Annotated[float, between(0, 0.99)] = 0.5
    """the share of all priorities that the first 1,000 online rows have (the authors' halfcheetah-medium: 0.75)"""
    online_steps: Annotated[int, at_least(1)] = 100_000
    """environment steps (the authors': 251,000)"""
    learning_starts: Annotated[int, at_least(1)] = 1_000
    """environment steps before the first update"""
    first_steps: Annotated[int, at_least(0)] = 1_000
    """environment steps with --first-updates each, the first of those that have any"""
    first_updates: Annotated[int, at_least(1)] = 10
    """updates in each of these (the authors' halfcheetah-medium: 5); later there is one"""
    eval_every: Annotated[int, at_least(1)] = 1_000
    """environment steps between evaluations"""

    def offline_changes(self, task) -> dict:
        return dict(hidden=(256, 256), critic_hidden=(256, 256))

    def check(self) -> None:
        super().check()
        if (last := seeds(self)[-1].seed + self.num_seeds - 1) >= 2**32:
            words = f"--seed {self.seed} with --members {self.members} needs the seed {last} for the last one's CQL run"
            raise cli.UserError(f"{words}, beyond 2**32 - 1; choose a smaller --seed")
        if self.offline not in offline.ALGORITHMS:
            raise cli.UserError("off2on needs an algorithm by its name, as --offline cql, to train several seeds of it")


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """`n` squashed Gaussian policies as one: (B, S) -> mean and log std of u, (B, A) each; the action is tanh(u)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple, n: int):
        super().__init__()
        self.n, self.net = n, ensemble_mlp(n, obs_dim, hidden_layers, 2 * action_dim)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means, log_stds = self.net(obs.expand(self.n, *obs.shape)).chunk(2, dim=-1)
        return mixture(means, (log_stds - 1.0).clamp(-20.0, 2.0))

    def exported(self) -> dict:
        """What a policy file holds of this: tanh of the members' mean, which is one network, n times as wide."""
        layers = [layer for layer in self.net if hasattr(layer, "bias")]
        action_dim = layers[-1].bias.shape[-1] // 2
        net, merged = [], {}
        for i, layer in enumerate(layers):
            weights, biases = layer.weight.transpose(1, 2), layer.bias[:, 0]  # (n, outputs, inputs), (n, outputs)
            if layer is layers[-1]:
                weight, bias = torch.cat(list(weights[:, :action_dim] / self.n), 1), biases[:, :action_dim].mean(0)
            else:
                weight, bias = torch.block_diag(*weights) if i else weights.flatten(0, 1), biases.flatten()
                net += [len(bias), "ReLU"]
            merged |= {f"net.{2 * i}.weight": weight.detach().clone(), f"net.{2 * i}.bias": bias.detach().clone()}
        return {"kind": "deterministic", "hidden_layers": net, "actor": merged}


def mixture(means: torch.Tensor, log_stds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log std of the mixture of Gaussians (n, B, A): μ = mean μ_n,  σ² = mean (μ_n² + σ_n²) - μ²."""
    mean = means.mean(0)
    variance = (means**2 + (2 * log_stds).exp()).mean(0) - mean**2
    return mean, 0.5 * variance.clamp(math.exp(-40), math.exp(4)).log()


class Critic(nn.Module):
    """The twins of `n` members side by side: (B, S), (B, A) -> (n, 2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple, n: int):
        super().__init__()
        self.n, self.net = n, ensemble_mlp(2 * n, obs_dim + action_dim, hidden_layers, 1)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2 * self.n, *x.shape)).view(self.n, 2, -1)


class Ratio(nn.Module):
    """Density of play over that of the data, w(s, a) ≥ 0: (B, S), (B, A) -> (B,)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim + action_dim, 2, 1)
        nn.init.ones_(self.net[-1].bias)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.net(torch.cat([obs, actions], dim=-1)).squeeze(-1))


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = tanh(u), u ~ N(mean, std), reparameterised, and log π(a|s): (B, A) and (B,)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)


class Agent(nn.Module):
    """All that is learned: π, Q, Q̄, log α and w; π and Q as the offline runs of these `members` left them."""

    def __init__(self, args: Args, *members: dict):
        super().__init__()
        members = members if len(members) > 1 else members * args.members  # one stands for all where sizes count
        obs_dim, action_dim, shape = members[0]["obs_dim"], members[0]["action_dim"], members[0]["learner"]["args"]
        left, n = [member["learner"]["agent"] for member in members], len(members)
        self.actor = Actor(obs_dim, action_dim, shape["hidden"], n)
        self.critic = Critic(obs_dim, action_dim, shape["critic_hidden"], n)
        stacked = {name: torch.stack([agent[f"actor.{name}"] for agent in left]) for name in self.actor.state_dict()}
        self.actor.load_state_dict(  # a linear layer's weights are (outputs, inputs), its biases (outputs,)
            {name: x.transpose(1, 2) if x.ndim == 3 else x[:, None] for name, x in stacked.items()}
        )
        self.critic.load_state_dict(
            {name: torch.cat([agent[f"critic.{name}"] for agent in left]) for name in self.critic.state_dict()}
        )
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.ratio = Ratio(obs_dim, action_dim)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """The most likely action, tanh of the mean."""
        return torch.tanh(self.actor(obs)[0])


class Optimizers(dict):
    """One Adam for each thing that is learned, all of them new."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.actor_lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.critic_lr),
            alpha_optimizer=Adam([agent.log_alpha], args.actor_lr),
            ratio_optimizer=Adam(agent.ratio.parameters(), args.ratio_lr),
        )


def critic_probe(agent: Agent, held_out: datasets.Dataset) -> Probe:
    """Logged online: Q at states that it does not train on, and how far its ranking of actions is log π_off's."""
    mean, log_std = in_chunks(agent.actor, held_out.obs)
    u = mean + log_std.exp() * fixed_noise(mean)
    preference = gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)

    def q(obs, actions):
        return agent.critic(obs, actions).amin(1).mean(0)

    return Probe(held_out, q, agent.act, torch.tanh(mean), torch.tanh(u), preference)


# ---------------------------------------------------------------------------------------------- fine-tuning


def new_priority(args: Args, rows: int) -> float:
    """p_0 = M f / ((1 - f) 1000): beside M rows of data at 1, the first 1,000 online rows are the share f."""
    return rows * args.new_fraction / ((1 - args.new_fraction) * 1_000)


def experience(args: Args, data: datasets.Dataset) -> PrioritisedBuffer:
    """What online batches are drawn from."""
    return PrioritisedBuffer(data, args.online_steps, new_priority(args, len(data)))


def finetuning_step(args: Args, replay: PrioritisedBuffer, agent: Agent, optimizers: Optimizers):
    """One update of everything on one batch, and of that batch's priorities."""
    actor, critic, critic_target, ratio = agent.actor, agent.critic, agent.critic_target, agent.ratio
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    ratio_params, target_entropy = list(ratio.parameters()), -float(replay.action_dim)

    def gradients():
        (obs, actions, rewards, next_obs, terminations), rows = replay.sample(args.batch_size)
        alpha = agent.log_alpha.exp().detach()

        # critics: y_n = r + γ (1 - d) [ min_k Q̄_{n,k}(s', a') - α log π(a'|s') ],  a' ~ π, for each member n
        with torch.no_grad():
            next_actions, next_log_prob = sample_actions(*actor(next_obs))
            next_v = critic_target(next_obs, next_actions).amin(1) - alpha * next_log_prob
            y = rewards + args.gamma * (1 - terminations) * next_v  # (n, B)
        q = critic(obs, actions)
        critic_loss = ((q - y[:, None]) ** 2).mean(-1).sum()

        # policies: α log π(a|s) - mean_n min_k Q_{n,k}(s, a),  a ~ π; temperature towards the entropy -A
        new_actions, log_prob = sample_actions(*actor(obs))
        actor_loss = (alpha * log_prob - critic(obs, new_actions).amin(1).mean(0)).mean()
        alpha_loss = -agent.log_alpha * (log_prob.detach() + target_entropy).mean()

        # ratio, at uniform rows of data and of play: -log 2 / (w_off + 1) - log 2 w_on / (w_on + 1)
        (data_obs, data_actions, *_), (play_obs, play_actions, *_) = replay.either(args.batch_size)
        w_off, w_on = ratio(data_obs, data_actions), ratio(play_obs, play_actions)
        ratio_loss = -((2 / (w_off + 1) + 1e-10).log() + (2 * w_on / (w_on + 1) + 1e-10).log()).mean()

        # priorities of the batch: w^{1/T} over the data's mean of it
        with torch.no_grad():
            mean_off = (w_off ** (1 / args.ratio_temperature)).mean()
            priorities = ratio(obs, actions) ** (1 / args.ratio_temperature) / (mean_off + 1e-10)
        replay.update(rows, priorities.clamp(0.001, 1_000.0))

        metrics = {"critic_loss": critic_loss, "actor_loss": actor_loss, "ratio_loss": ratio_loss, "q": q.mean(),
                   "q_target": y.mean(), "alpha": alpha, "entropy": -log_prob.mean(), "ratio_data": w_off.mean(),
                   "ratio_play": w_on.mean(), "play_in_batch": (rows >= replay.start).double().mean()}  # fmt: skip
        return (
            torch.autograd.grad(alpha_loss, [agent.log_alpha]),
            torch.autograd.grad(actor_loss, actor_params),
            torch.autograd.grad(critic_loss, critic_params),
            torch.autograd.grad(ratio_loss, ratio_params),
            {name: value.detach() for name, value in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile)

    def step():
        alpha_grads, actor_grads, critic_grads, ratio_grads, metrics = gradients()
        optimizers["alpha_optimizer"].step(alpha_grads)
        optimizers["actor_optimizer"].step(actor_grads)
        optimizers["critic_optimizer"].step(critic_grads)
        optimizers["ratio_optimizer"].step(ratio_grads)
        polyak(critic_target, critic, args.tau)
        return metrics

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
        return sample_actions(*agent.actor(torch.as_tensor(obs, device=device)[None]))[0][0].cpu().numpy()

    for env_step in loop:
        obs, action = env.obs, explore(env.obs)
        # Updates draw on the transitions before this one, so a GPU does them while the simulator takes this step
        if env_step > args.learning_starts:
            stepper.run(args.first_updates if env_step <= args.learning_starts + args.first_steps else 1)
        next_obs, reward, terminated, episodic_return = env.step(action)
        replay.add(obs, action, reward, next_obs, terminated)  # the executed action; a truncation is no end
        if episodic_return is not None:
            run.log("finetune", env_step, env.outcome)
        if env_step % args.eval_every == 0 or env_step == args.online_steps:
            loop.evaluate(evaluator)


# ---------------------------------------------------------------------------------------------- the whole run


def seeds(args: Args) -> list[Args]:
    """The arguments with the seed of each member (the authors' are seed + 4 i, so seeds 0 and 4 share all but one)."""
    return [replace(args, seed=args.seed + 1_000 * i) for i in range(args.members)]


KIND = "squashed_gaussian"  # of the policy to start from, see common/policies.py
GOES_ON = True  # with all that the offline run learned
FINETUNE = Stage("finetune", "online_steps", finetuning_step, "fine-tuned", "eval_every", experience)
STAGES = (FINETUNE,)


def main() -> None:
    args, run, data = report.start_run(Args, offline)
    device = data.obs.device

    files = [offline.file_of(member, data) for member in seeds(args)[1:]]
    others = [offline.read(args, file, data) for file in files]
    policy, evaluator = offline.policy(args, run, data, *files, alone=False)
    seed_everything(args.seed)
    agent = Agent(args, policy, *others).to(device)
    policy |= agent.actor.exported()  # all of them as one
    offline_score = policy["score"] = run.last_score = evaluator(agent.act, device, final=True)
    print(f"the {args.members} policies as one: {data.task.measure} {offline_score:.1f}")
    regime.announce(run, data, evaluator, agent.act)
    data, held_out = data.hold_out(args.holdout, STATES)
    probe = critic_probe(agent, held_out)
    optimizers = Optimizers(args, agent)
    best = BestPolicy(offline_score, agent.actor, "offline policies", evaluator.last, args.best_margin)

    finetune(args, run, data, agent, optimizers, evaluator, probe, best)

    report.finish(run, policy, agent, best, data, evaluator)


if __name__ == "__main__":
    cli.run(main)
