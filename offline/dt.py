"""Decision Transformer (Chen et al., NeurIPS 2021), distilled into a policy of one state.
Writes that policy to runs/<env_id>__dt__<seed>/policy.pt. There is no critic.

    python offline/dt.py --env-id hopper-medium-v2

A sequence model predicts a_t from the last K returns to go, observations and actions, and is asked for a high return.
Fine-tuning wants a policy of a single observation: a small network learns, beside it, the actions that the transformer
would take on the data's own histories if it were asked for that return. Evaluations score both.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, datasets, pretrain, steps
from common.bounds import above, at_least, between, finite
from common.nn import Adam, clip_grad_norm, mlp
from common.tasks import Task

import torch
import torch.nn.functional as F
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", steps=2_000, warmup=500, log_every=200, eval_every=1_000),
    "quick": dict(steps=20_000, warmup=2_000, eval_every=10_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(return_scale=1.0, eval_every=50_000, eval_episodes=20, final_episodes=100),
    "adroit": dict(eval_every=50_000, eval_episodes=100),
}


@dataclass
class Args(pretrain.PretrainArgs):
    steps: Annotated[int, at_least(1)] = 100_000
    """gradient steps"""
    batch_size: Annotated[int, at_least(1)] = 64
    """sequences in a batch"""
    context: Annotated[int, at_least(1)] = 20
    """K, the steps of a sequence, each of which is three tokens"""
    width: Annotated[int, at_least(1)] = 128
    """features of a token"""
    blocks: Annotated[int, at_least(1)] = 3
    """layers of attention"""
    heads: Annotated[int, at_least(1)] = 1
    """heads of each"""
    dropout: Annotated[float, between(0, 1)] = 0.1
    """share of the features and of the attention that is dropped in training"""
    lr: Annotated[float, at_least(0)] = 1e-4
    """learning rate of the transformer, after the warm-up"""
    warmup: Annotated[int, at_least(1)] = 10_000
    """steps over which it grows linearly"""
    max_grad_norm: Annotated[float, above(0)] = 0.25
    """the transformer's gradient is clipped at this norm"""
    target_return: Annotated[float | None, finite()] = None
    """the return that is asked for; None: the paper's, on hopper 3600, halfcheetah 6000, walker2d 5000, elsewhere the
    expert's"""
    return_scale: Annotated[float, above(0)] = 1_000.0
    """returns are divided by this before the transformer sees them"""
    longest: Annotated[int, at_least(1)] = 1_000
    """time steps that are told apart; later ones count as the last of them"""
    hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256)
    """widths of the hidden layers in the policy of one state"""
    distil_sequences: Annotated[int, at_least(1)] = 16
    """sequences of the batch, on all of whose steps that policy is fitted"""
    distil_lr: Annotated[float, at_least(0)] = 3e-4
    """its learning rate"""

    def constants(self, task: Task) -> dict:
        """The paper's for each robot."""
        expert = task.references[1] if task.references else None
        returns = {"hopper": 3600.0, "halfcheetah": 6000.0, "walker2d": 5000.0}
        return super().constants(task) | dict(target_return=returns.get(task.robot, expert))

    def check(self) -> None:
        if self.target_return is None:
            raise cli.UserError("nobody knows a good return here; say with --target-return which one to ask for")
        if (self.reward_scale, self.reward_shift) != (1.0, 0.0):
            raise cli.UserError(
                "a Decision Transformer asks for returns as the environment pays them, which --return-scale divides; "
                "leave --reward-scale and --reward-shift out"
            )
        if self.width % self.heads:
            raise cli.UserError(f"--width {self.width} cannot be shared by {self.heads} heads; take a multiple of them")


# ---------------------------------------------------------------------------------------------- networks


class Block(nn.Module):
    """Causal self-attention and a two-layer network, each behind a LayerNorm and beside an identity: (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor, dropout: float) -> torch.Tensor:
        heads = (*x.shape[:2], self.heads, -1)  # (B, T, heads, D / heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), dropout)
        return x + F.dropout(self.mlp(self.norm2(x)), dropout)


class Transformer(nn.Module):
    """(R_1, s_1, a_1, …, R_K, s_K, a_K) -> the actions that follow each s_t, (B, K, A) in (-1, 1).

    `returns` (B, K) are the returns to go, `obs` (B, K, S), `actions` (B, K, A), `times` (B, K) the steps since the
    episode's start. Where `valid` (B, K) is false there is nothing yet, and nothing else sees it.
    """

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        width, self.longest = args.width, args.longest
        self.embed_return, self.embed_obs = nn.Linear(1, width), nn.Linear(obs_dim, width)
        self.embed_action, self.embed_time = nn.Linear(action_dim, width), nn.Embedding(args.longest, width)
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, args.heads) for _ in range(args.blocks))
        self.head = nn.Linear(width, action_dim)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, returns, obs, actions, times, valid, dropout: float = 0.0) -> torch.Tensor:
        time = self.embed_time(times.clamp(max=self.longest - 1))
        tokens = [self.embed_return(returns[..., None]), self.embed_obs(obs), self.embed_action(actions)]
        x = torch.stack([token + time for token in tokens], dim=2).flatten(1, 2)  # (B, 3 K, D)
        n = x.shape[1]
        # A token attends to itself and to those before it that are there
        before = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        mask = before & valid.repeat_interleave(3, dim=1)[:, None, :]
        mask = (mask | torch.eye(n, dtype=torch.bool, device=x.device))[:, None]
        x = F.dropout(self.norm_in(x), dropout)
        for block in self.blocks:
            x = block(x, mask, dropout)
        return torch.tanh(self.head(self.norm_out(x)[:, 1::3]))  # from the tokens of the observations


class Actor(nn.Module):
    """The policy of one state: (B, S) -> a (B, A) in (-1, 1)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, action_dim)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.net(obs))


# ---------------------------------------------------------------------------------------------- training


class Agent(nn.Module):
    kind = "deterministic"

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args, self.obs_dim, self.action_dim = args, obs_dim, action_dim
        self.transformer = Transformer(args, obs_dim, action_dim)
        self.actor = Actor(obs_dim, action_dim, args.hidden)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        return self.actor(obs)

    def evaluate(self, evaluator, device: torch.device, last: bool) -> dict[str, float]:
        """The "score" of the policy of one state, and "score_with_history", the transformer's own."""
        history = History(self, device)
        returns = evaluator.returns(history.act, device, observe=history.observe)
        return evaluator.scalars(self.act, device, last) | {"score_with_history": evaluator.score(returns)}


class History:
    """The transformer's memory while episodes are played side by side: the last K steps of each."""

    def __init__(self, agent: Agent, device: torch.device):
        self.agent, self.device, self.time = agent, device, 0

    @torch.no_grad()
    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """Actions (B, A) for the observations (B, S) of the next step."""
        args, agent, n = self.agent.args, self.agent, len(obs)
        if self.time == 0:
            self.asked = torch.full((n,), args.target_return, device=obs.device)
            self.returns = obs.new_zeros(n, args.context)
            self.obs = obs.new_zeros(n, args.context, agent.obs_dim)
            self.actions = obs.new_zeros(n, args.context, agent.action_dim)
        self.returns = torch.cat([self.returns[:, 1:], self.asked[:, None] / args.return_scale], dim=1)
        self.obs = torch.cat([self.obs[:, 1:], obs[:, None]], dim=1)
        self.actions = torch.cat([self.actions[:, 1:], torch.zeros_like(self.actions[:, :1])], dim=1)
        times = torch.arange(self.time - args.context + 1, self.time + 1, device=obs.device).expand(n, -1)
        valid = times >= 0
        found = agent.transformer(self.returns, self.obs, self.actions, times.clamp(min=0), valid)[:, -1]
        self.actions[:, -1] = found
        self.time += 1
        return found

    def observe(self, rewards) -> None:
        """What is still to come is what was asked for without the rewards (B,) of the step."""
        self.asked = self.asked - torch.as_tensor(rewards, dtype=self.asked.dtype, device=self.asked.device)


class Optimizers(dict):
    """One Adam for the transformer and one for the policy. The paper's weight decay, 1e-4, is left out: times a rate
    of 1e-4 and 100,000 steps it takes a thousandth off a weight."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            transformer_optimizer=Adam(agent.transformer.parameters(), args.lr),
            actor_optimizer=Adam(agent.actor.parameters(), args.distil_lr),
        )


def histories(args: Args, data: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """What sequences are made of beside the data's own columns: returns to go (N, 2), those that came and those that
    would be asked for, divided by their scale, and the steps (N,) since the episode's start.

    R_t = Σ_{i ≥ t} r_i to the episode's end or a terminal row; R̂_t = R̂ - Σ_{i < t} r_i. Raises UserError where the rows
    do not follow one another.
    """
    data.need_order("a Decision Transformer")
    rows = torch.arange(len(data), device=data.rewards.device)
    last = torch.ones_like(rows, dtype=torch.bool)
    last[:-1] = data.episode[1:] != data.episode[:-1]
    start = torch.where(last.roll(1), rows, 0).cummax(0).values
    stop = torch.where(last | (data.terminations > 0), rows, len(data)).flip(0).cummin(0).values.flip(0)
    total = F.pad(data.rewards.double().cumsum(0), (1, 0))
    returns = torch.stack([total[stop + 1] - total[rows], args.target_return - (total[rows] - total[start])], dim=1)
    return (returns / args.return_scale).float(), rows - start


def training_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """One update of the transformer on sequences of the data, and of the policy on what it would do there."""
    transformer, actor = agent.transformer, agent.actor
    transformer_params, actor_params = list(transformer.parameters()), list(actor.parameters())
    transformer_optimizer = optimizers["transformer_optimizer"]
    returns, time = histories(args, data)
    back = torch.arange(args.context - 1, -1, -1, device=returns.device)

    def gradients():
        # the K steps that end in rows drawn at random; some have not begun yet
        end = torch.randint(len(data), (args.batch_size, 1), device=returns.device)
        valid = time[end] >= back
        rows = (end - back).clamp(min=0)
        obs, actions, times = data.obs[rows], data.actions[rows], time[rows]

        # transformer: |a_t - f(R_1, s_1, a_1, …, R_t, s_t)|², averaged over what is there
        found = transformer(returns[rows, 0], obs, actions, times, valid, args.dropout)
        error = ((found - actions) ** 2).mean(2)
        transformer_loss = (error * valid).sum() / valid.sum()

        # policy: |π(s_t) - f(R̂_1, s_1, a_1, …, R̂_t, s_t)|², R̂ what is left of the return that is asked for
        few = slice(args.distil_sequences)
        with torch.no_grad():
            asked = transformer(returns[rows[few], 1], obs[few], actions[few], times[few], valid[few])
        distance = actor(obs[few]) - asked
        there = valid[few].sum()
        actor_loss = ((distance**2).mean(2) * valid[few]).sum() / there

        lr = args.lr * ((transformer_optimizer.steps[0] + 1) / args.warmup).clamp(max=1.0)
        metrics = {"transformer_loss": transformer_loss, "actor_loss": actor_loss,
                   "distillation_error": (distance.abs().mean(2) * valid[few]).sum() / there}  # fmt: skip
        return (
            clip_grad_norm(torch.autograd.grad(transformer_loss, transformer_params), args.max_grad_norm),
            torch.autograd.grad(actor_loss, actor_params),
            lr,
            {name: metric.detach() for name, metric in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile)

    def step():
        transformer_grads, actor_grads, lr, metrics = gradients()
        transformer_optimizer.lr.copy_(lr)
        transformer_optimizer.step(transformer_grads)
        optimizers["actor_optimizer"].step(actor_grads)
        return metrics

    return step


def train(args: Args, data: datasets.Dataset) -> Path:
    """Train on `data` and return the policy's path; see `pretrain.train`."""
    return pretrain.train(args, data, Agent, Optimizers, training_step)


if __name__ == "__main__":
    cli.run(lambda: pretrain.main(Args, PRESETS, FAMILIES, train))
