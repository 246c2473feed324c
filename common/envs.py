"""Environments, and training episodes that can be saved."""

import contextlib
import logging
import sys
import warnings
from dataclasses import replace

import gymnasium as gym
import mujoco
import numpy as np
import torch

from common import spaces
from common.cli import UserError
from common.errors import is_out_of_memory, reason_of, remedy_of, traceback_of
from common.physics import as_d4rl
from common.tasks import Task

warnings.filterwarnings("ignore", message=".*is out of date.*")  # v4 is meant: v5 changed the reward
logging.getLogger("absl").setLevel(logging.ERROR)
# MuJoCo's own warnings go to stderr as ever, but for those that call Gymnasium's model files old, one for every model
mujoco.set_mju_user_warning(lambda text: "deprecated" in text or print(f"MuJoCo: {text}", file=sys.stderr))

LARGEST = float(np.finfo(np.float32).max)  # in which everything is learned


class ZeroForces(gym.ObservationWrapper):
    """D4RL's ant observes 84 contact forces that its MuJoCo left at zero; Gymnasium's Ant-v4 leaves them out."""

    def __init__(self, env: gym.Env, forces: int):
        super().__init__(env)
        self.zeros = np.zeros(forces)
        size = env.observation_space.shape[0] + forces
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.concatenate([observation, self.zeros])


class Standardised(gym.ObservationWrapper):
    """Observations as the networks see them: (obs - mean) / std, held within ± clip, float32."""

    def __init__(self, env: gym.Env, mean: np.ndarray, std: np.ndarray, clip: float = np.inf):
        super().__init__(env)
        self.mean, self.std, self.clip = mean, std, clip
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, mean.shape, np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return standardised(observation, self.mean, self.std, self.clip)


def standardised(obs: np.ndarray, mean: np.ndarray, std: np.ndarray, clip: float) -> np.ndarray:
    """(obs - mean) / std, held within ± clip, float32."""
    return np.minimum(np.maximum((obs - mean) / std, -clip), clip).astype(np.float32)


class Sound(gym.Wrapper):
    """An environment that is asked and answers as Gymnasium has it: what networks, buffers and checkpoints count on.

    It has an action of its own, which it may change in place, and answers with numbers: a reward or a success that is
    an array of one of them is taken for it. Raises UserError where it does not, where its code fails, and for numbers
    that are not finite, which training would else be blamed for.
    """

    def reset(self, **kwargs):
        self.seed, self.steps = kwargs.get("seed"), 0
        try:
            try:
                found = self.env.reset(**kwargs)
            except (ValueError, OverflowError):  # NumPy's older generators take 32 bits
                if self.seed is None or self.seed < 1 << 32:
                    raise
                found = self.env.reset(**kwargs | {"seed": int(np.random.SeedSequence(self.seed).generate_state(1)[0])})
        except (Exception, SystemExit) as error:  # the latter where a window was closed, and would pass for an end
            raise self.failure(error) from error
        if not isinstance(found, tuple) or len(found) != 2:
            raise self.fault("returns no pair of an observation and a dictionary")
        return self.sound(found[0]), found[1]

    def step(self, action):
        self.steps += 1
        if not np.isfinite(action).all():  # what comes of it is not the environment's fault
            raise UserError(
                f"the policy gives {action[~np.isfinite(action)][0]} as an action, in step {self.steps:,} of the "
                f"episode with the seed {self.seed}; look at the losses in TensorBoard, and try a smaller learning "
                "rate, or another policy"
            )
        try:
            obs, reward, terminated, truncated, info = self.env.step(np.array(action))
        except (Exception, SystemExit) as error:
            raise self.failure(error) from error
        if not isinstance(info, dict):
            raise self.fault(f"returns {info!r:.80} as its info, which has to be a dictionary")
        if said := [key for key in ("success", "is_success") if key in info]:
            info = info | {
                key: np.nan if info[key] is None else self.number(info[key], f"info[{key!r}]") for key in said
            }
        reward = self.number(reward, "the reward")
        if not abs(reward) <= LARGEST:  # NaN is not, either
            raise self.fault(f"pays the reward {reward}")
        return self.sound(obs), reward, bool(terminated), bool(truncated), info

    def sound(self, obs) -> np.ndarray:
        obs, shape = np.asarray(obs), self.env.observation_space.shape
        if obs.shape != shape:
            raise self.fault(f"shows an observation of the shape {obs.shape}, where its space has {shape}")
        if not (sound := np.abs(obs) <= LARGEST).all():
            raise self.fault(f"shows {obs[~sound][0]} as number {sound.argmin()} of its observation")
        return obs

    def number(self, value, name: str) -> float:
        try:
            return float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError):  # the last: of a tensor
            raise self.fault(f"returns {value!r:.80} as {name}, which has to be one number") from None

    def failure(self, error: BaseException) -> BaseException:
        """What its own code raised, with the traceback from there on; what is not its fault stays what it is."""
        if is_not_theirs(error):
            return error
        return self.fault(f"cannot be played ({reason_of(error)})", remedy_of(error), traceback_of(error))

    def fault(self, what: str, remedy: str = "mend it there", before: str = "") -> UserError:
        where = f"step {self.steps:,} of" if self.steps else "the reset of"
        return UserError(f"{self.spec.id} {what}, in {where} the episode with the seed {self.seed}; {remedy}", before)


class Within(gym.ActionWrapper):
    """Actions inside the bounds and of their type: mapped from [-1, 1], they may be a rounding outside them."""

    def action(self, action: np.ndarray) -> np.ndarray:
        space = self.env.action_space
        return np.clip(action, space.low, space.high).astype(space.dtype)


def is_not_theirs(error: BaseException) -> bool:
    """Whether what was raised is no environment's fault: it is said already, or memory is short."""
    return isinstance(error, (UserError, torch.cuda.OutOfMemoryError)) or is_out_of_memory(error)


@contextlib.contextmanager
def blamed(name: str, what: str):
    """Turn what the environment `name` raises meanwhile, of any kind, into a UserError that says where it did."""
    try:
        yield
    except (Exception, SystemExit) as error:  # they fail in many ways: missing packages, arguments, code
        if is_not_theirs(error):
            raise
        remedy = remedy_of(error, "mend it, or register it with what it needs")
        raise UserError(f"{name} {what} ({reason_of(error)}); {remedy}", traceback_of(error)) from error


def unscaled_env(task: Task, evaluation: bool = False, **kwargs) -> gym.Env:
    """One environment of a task with its own range of actions. Raises UserError where it cannot be had or used."""
    spec = task.eval_spec if evaluation and task.eval_spec else task.spec
    with blamed(spec.id, "cannot be made here"):
        env = gym.make(spec, disable_env_checker=True, **kwargs)  # the checker costs as much as a step
    if task.d4rl:
        env = as_d4rl(env)
    if task.forces:
        env = ZeroForces(env, task.forces)
    fault = spaces.fault_of_observations(env.observation_space) or spaces.fault_of_actions(env.action_space)
    if fault:
        raise UserError(
            f"{spec.id} has {fault}, which cannot be used here; wrap it so that it has numbers as observations, in a "
            "Box or a Dict of such, and a finite box of actions of one dimension, which are floats, and register it"
        )
    if running := spaces.running_statistics(env):
        raise UserError(
            f"{spec.id} has the wrapper {running}, whose running statistics are others in each environment of a run "
            "and in the data; leave it out of both, for observations are standardised here by the data's own"
        )
    with blamed(spec.id, "cannot be played"):
        keys = task.keys or spaces.order_of(env)
    return spaces.Flat(env, keys) if keys or len(env.observation_space.shape) != 1 else env


def is_unit(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether these bounds of actions are ±1, those of policies."""
    return bool((low == -1).all() and (high == 1).all())


def observed(task: Task) -> Task:
    """`task` with its range of actions, and the order in which the parts of its observations come, with a note on it.
    Raises UserError."""
    env = unscaled_env(task)
    env.close()
    check_evaluation(task, env)
    low, high = env.action_space.low, env.action_space.high
    if not is_unit(low, high):
        task = replace(task, action_range=(tuple(low.tolist()), tuple(high.tolist())))
    if not isinstance(env, spaces.Flat) or not env.keys:
        return task
    found = spaces.sizes(env.env.observation_space, env.keys)
    order = ", ".join(f"{key} ({size})" for key, size in found.items())
    left_out = "" if "achieved_goal" in env.keys or "desired_goal" not in env.keys else "; achieved_goal is in there"
    return replace(task, keys=env.keys, notes=(*task.notes, f"observations are {order}, in this order{left_out}"))


def check_evaluation(task: Task, env: gym.Env) -> None:
    """Refuse a dataset whose evaluation environment takes other actions than `env`, or does not show what `env` does.
    Raises UserError."""
    if not task.eval_spec:
        return
    other = unscaled_env(task, evaluation=True)
    other.close()
    bounds = [np.float32([space.low, space.high]).tolist() for space in (env.action_space, other.action_space)]
    if bounds[0] != bounds[1] or not parts_of(env).items() <= parts_of(other).items():
        raise UserError(
            f"{task.env_id} is to be scored in {task.eval_spec.id}, its evaluation environment, whose actions or "
            f"observations are not those of {task.spec.id}; create the dataset again with another eval_env=…"
        )


def parts_of(env: gym.Env) -> dict[str, int]:
    """How many numbers each part of an environment's observations has."""
    space = (env.env if isinstance(env, spaces.Flat) else env).observation_space
    return spaces.sizes(space, tuple(space) if isinstance(space, gym.spaces.Dict) else ())


def make_env(task: Task, mean=None, std=None, evaluation: bool = False, **kwargs) -> gym.Env:
    """One environment of a task, for training or for `evaluation`; its actions are [-1, 1], as policies give them.

    Observations are standardised where `mean` and `std` (S,) are given, and held within ± the task's `clip` then.
    """
    env = Sound(unscaled_env(task, evaluation, **kwargs))
    if not is_unit(env.action_space.low, env.action_space.high):
        env = gym.wrappers.RescaleAction(Within(env), np.float32(-1), np.float32(1))
    if mean is not None:
        env = Standardised(env, np.asarray(mean, np.float64), np.asarray(std, np.float64), task.clip)
    return env


class Episodes:
    """A training environment that can be saved in the middle of an episode.

    Every episode starts from a seed of its own, so that seed and the actions taken so far are its whole state: loading
    it resets the environment and plays them again. Rewards come as training takes them, times `scale` plus `shift`;
    an episode's return is that of the environment's own. `outcome` is what is logged of the episode that ended last:
    its return, its length in steps and, where the environment says so in any step, whether it was a success.
    """

    def __init__(self, env: gym.Env, seed: int, scale: float = 1.0, shift: float = 0.0):
        self.env, self.first_seed, self.episode = env, seed * 1_000_003, 0
        self.scale, self.shift, self.outcome = scale, shift, {}
        self._reset()

    def _reset(self) -> None:
        self.obs, _ = self.env.reset(seed=self.first_seed + self.episode)
        self.actions, self.total, self.success = [], 0.0, np.nan

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, float | None]:
        """(next_obs (S,), reward, whether it really terminated, the episode's return if this was its last step).

        `obs` is then the observation to act on next: that of a new episode after the last step of one.
        """
        next_obs, reward, terminated, truncated, info = self.env.step(action)
        self.obs = next_obs
        self.actions.append(action)
        self.total += float(reward)
        self.success = np.fmax(self.success, info.get("success", info.get("is_success", np.nan)))
        total = self.total
        if terminated or truncated:
            self.outcome = {"charts/episodic_return": total, "charts/episodic_length": len(self.actions)}
            if not np.isnan(self.success):
                self.outcome["charts/episodic_success"] = float(self.success)
            self.episode += 1
            self._reset()
        reward = self.scale * float(reward) + self.shift
        return next_obs, reward, terminated, total if terminated or truncated else None

    def state_dict(self) -> dict:
        return {"episode": self.episode, "actions": torch.tensor(np.array(self.actions))}

    def load_state_dict(self, state: dict) -> None:
        self.episode = state["episode"]
        self._reset()
        for action in state["actions"].cpu().numpy():
            self.step(action)


def training(args, task: Task, evaluator) -> Episodes:
    """The episodes of a run's training, with observations as the policy sees them."""
    env = make_env(task, evaluator.mean, evaluator.std)
    return Episodes(env, args.seed, args.reward_scale, args.reward_shift)


class VectorEpisodes:
    """`n` such environments side by side: `obs` (n, S), and `step` takes (n, A) and gives arrays of n."""

    def __init__(self, task: Task, mean, std, n: int, seed: int, scale: float = 1.0, shift: float = 0.0):
        self.all = [Episodes(make_env(task, mean, std), seed * n + i, scale, shift) for i in range(n)]
        self.ended: list[dict] = []

    @property
    def obs(self) -> np.ndarray:
        return np.stack([episodes.obs for episodes in self.all])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[float]]:
        """(next_obs (n, S), rewards, terminated, ended (terminated or truncated), returns of those that ended)."""
        results = [episodes.step(action) for episodes, action in zip(self.all, actions, strict=True)]
        next_obs, rewards, terminated, returns = zip(*results, strict=True)
        ended = np.array([value is not None for value in returns])
        self.ended += [episodes.outcome for episodes, end in zip(self.all, ended, strict=True) if end]
        return (
            np.stack(next_obs), np.array(rewards, np.float32), np.array(terminated), ended,
            [value for value in returns if value is not None],
        )  # fmt: skip

    def outcomes(self) -> dict[str, float]:
        """The means of `outcome` over the episodes that ended since the last call, each over those that have it, and
        their number; nothing where none did."""
        ended, self.ended = self.ended, []
        names = dict.fromkeys(name for outcome in ended for name in outcome)  # not each may say whether it succeeded
        means = {name: float(np.mean([outcome[name] for outcome in ended if name in outcome])) for name in names}
        return means | ({"charts/episodes": len(ended)} if ended else {})

    def state_dict(self) -> dict:
        return {str(i): episodes.state_dict() for i, episodes in enumerate(self.all)}

    def load_state_dict(self, state: dict) -> None:
        for i, episodes in enumerate(self.all):
            episodes.load_state_dict(state[str(i)])


def side_by_side(args, task: Task, evaluator) -> VectorEpisodes:
    """The same of `--num-envs` environments."""
    seen = evaluator.mean, evaluator.std
    return VectorEpisodes(task, *seen, args.num_envs, args.seed, args.reward_scale, args.reward_shift)


def record_video(task: Task, mean, std, policy, device, folder) -> None:
    """Film one episode of `policy` into `folder`. Raises UserError where what it needs is missing."""
    try:
        env = gym.wrappers.RecordVideo(make_env(task, mean, std, evaluation=True, render_mode="rgb_array"), str(folder))
        obs, _ = env.reset(seed=0)
        done = False
        while not done:
            with torch.no_grad():
                action = policy(torch.as_tensor(obs, device=device)[None])[0].cpu().numpy()
            obs, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
        env.close()
    except Exception as error:  # rendering depends on the machine's graphics stack and fails in many ways
        if is_not_theirs(error):
            raise
        raise UserError(
            f"filming failed ({error}), everything else is done and saved; try the environment "
            "variable MUJOCO_GL=egl, osmesa or glfw"
        ) from error
