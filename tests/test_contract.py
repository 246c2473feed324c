"""Environments that do not answer as Gymnasium has it: taken where that is harmless, else named before any training."""

import functools
import pickle
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import play
from common import agreement, envs, evaluation, spaces, specs, tasks
from common.cli import UserError


class Point(gym.Env):
    """A point that moves; `answer` changes what a step returns, `begin` takes the seed of a reset."""

    def __init__(self, low=-1.0, high=1.0, dtype=np.float32, answer=None, begin=None, wrapper=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(dtype(low), dtype(high), (2,), dtype)
        self.answer, self.begin, self.played = answer or (lambda *found: found), begin, []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if self.begin:
            self.begin(seed)
        self.at = self.np_random.normal(size=2)
        return self.at.copy(), {}

    def step(self, action):
        self.played.append(action.copy())
        self.at += 0.1 * action
        action *= 0.5  # as some do
        return self.answer(self.at.copy(), -float(self.at @ self.at), False, False, {})


def task_of(make=Point, **kwargs) -> tasks.Task:
    spec = gym.envs.registration.EnvSpec("Point-v0", make, max_episode_steps=9, kwargs=kwargs)
    return tasks.Task("gymnasium", "Point-v0", "mine", "Point-v0", spec)


def test_an_action_that_is_changed_in_place_is_kept_as_it_was_chosen():
    episodes, action = envs.Episodes(envs.make_env(task_of()), 0), np.float32([0.25, -1])
    episodes.step(action)
    again = envs.Episodes(envs.make_env(task_of()), 0)
    again.load_state_dict(episodes.state_dict())
    assert action.tolist() == [0.25, -1] == episodes.actions[0].tolist() and (again.obs == episodes.obs).all()


def test_rescaled_actions_are_inside_the_bounds_and_of_their_type():
    for low, high, dtype in ((-0.9, 2.5, np.float32), (-0.4, 0.4, np.float32), (-0.1, 0.3, np.float64)):
        env = envs.make_env(task_of(low=low, high=high, dtype=dtype))
        env.reset(seed=0)
        for action in (-1, 1, 0.3):
            env.step(np.full(2, action, np.float32))
            assert env.unwrapped.action_space.contains(env.unwrapped.played[-1])
    env = envs.make_env(task_of())  # which are not touched where there is nothing to rescale
    env.reset(seed=0)
    env.step(np.full(2, -1.5))
    assert env.unwrapped.played[-1].tolist() == [-1.5, -1.5] and env.unwrapped.played[-1].dtype == np.float64


def test_generators_of_32_bits_are_given_seeds_of_as_many():
    old, new = (envs.make_env(task_of(begin=begin)) for begin in (np.random.RandomState, None))
    for seed in (3, (1 << 32) - 1):
        assert (old.reset(seed=seed)[0] == new.reset(seed=seed)[0]).all()
    starts = [old.reset(seed=evaluation.FRESH + i)[0].tolist() for i in (0, 1, 0)]
    assert starts[0] == starts[2] != starts[1]
    assert (new.reset(seed=evaluation.FRESH)[0] == np.random.default_rng(evaluation.FRESH).normal(size=2)).all()
    evaluator = evaluation.Evaluator(task_of(begin=np.random.RandomState), torch.zeros(2), torch.ones(2), 2)
    assert len(evaluator.fresh_returns(lambda obs: obs, "cpu", 3)) == 3


def changed(**changes):
    names = ("obs", "reward", "terminated", "truncated", "info")
    return lambda *found: tuple((dict(zip(names, found, strict=True)) | changes).values())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (changed(reward=None), "returns None as the reward, which has to be one number"),
        (changed(reward=np.ones(2)), r"returns array\(\[1., 1.\]\) as the reward"),
        (changed(reward=torch.ones(2)), r"returns tensor\(\[1., 1.\]\) as the reward, which has to be one number"),
        (changed(reward=float("nan")), "pays the reward nan"),
        (changed(reward=-1e39), r"pays the reward -1e\+39"),
        (changed(info=None), "returns None as its info, which has to be a dictionary"),
        (changed(info={"success": "no"}), r"returns 'no' as info\['success'\]"),
        (
            changed(info={"is_success": np.ones(2, bool)}),
            r"returns .* as info\['is_success'\], which has to be one number",
        ),
        (changed(obs=np.zeros(3)), r"shows an observation of the shape \(3,\), where its space has \(2,\)"),
        (changed(obs=np.array([0, np.inf])), "shows inf as number 1 of its observation"),
        (changed(obs=np.array([0, -1e39])), r"shows -1e\+39 as number 1 of its observation"),
    ],
)
def test_what_is_no_answer_is_named_before_anything_is_trained(answer, words):
    with pytest.raises(
        UserError, match=f"^Point-v0 {words}.*, in step 1 of the episode with the seed 0; mend it there$"
    ):
        agreement.repeats(task_of(answer=answer))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(answer=lambda *found: found[:-1]), "ValueError: not enough values to unpack"),
        (dict(begin=lambda: None), "TypeError: .* takes 0 positional arguments but 1 was given, test_contract.py line"),
    ],
)
def test_what_fails_is_named_with_its_place(kwargs, words):
    with pytest.raises(UserError, match=rf"^Point-v0 cannot be played \({words}.*; mend it") as error:
        agreement.repeats(task_of(**kwargs))
    theirs = "test_contract.py line" in str(error.value)  # else no line of the user's own has to do with it
    assert error.value.before.startswith("Traceback") == theirs and "gymnasium" not in error.value.before


def raises(error: BaseException):
    def answer(*_, **__):
        raise error

    return answer


def test_what_is_missing_or_not_the_environments_keeps_its_remedy():
    with pytest.raises(UserError, match=r"ModuleNotFoundError: no goggles, .*; install what it needs or mend"):
        agreement.repeats(task_of(answer=raises(ModuleNotFoundError("no goggles"))))
    for error in (SystemExit(0), SystemExit("window closed")):  # which would end the run as if it were done
        with pytest.raises(
            UserError, match=f"cannot be played .SystemExit: {error}, test_contract.py line .* in step 1"
        ):
            agreement.repeats(task_of(answer=raises(error)))
    env = envs.make_env(task_of(answer=raises(MemoryError())))
    env.reset(seed=0)
    with pytest.raises(MemoryError):  # see `cli.run`
        env.step(np.zeros(2, np.float32))
    with pytest.raises(MemoryError):  # where it is made as well
        envs.make_env(task_of(lambda **_: raises(MemoryError())()))


def test_memory_that_is_short_while_an_episode_is_filmed_is_called_so(monkeypatch):
    monkeypatch.setattr(envs, "make_env", raises(MemoryError()))
    with pytest.raises(MemoryError):
        envs.record_video(task_of(), None, None, None, "cpu", "nowhere")


def test_what_fails_where_it_is_made_is_shown_as_the_environments(run_script, monkeypatch):
    """By all that plays, also where a policy's own task is not made out."""
    policy = tasks.SHIPPED / "policies" / "hopper-medium-demo__iql.pt"
    monkeypatch.setitem(gym.registry, "Short-v0", replace(task_of(lambda: {}[3]).spec, id="Short-v0"))

    def shown(*flags):
        code, _, err = run_script(play, policy, *flags)
        first, *lines, last = err.splitlines()
        assert code == 2 and first.startswith("Traceback") and lines[-1] == "KeyError: 3"
        assert "test_contract.py" in lines[0] and "envs.py" not in err
        return last

    told = shown("--env-id", "Short-v0", "--dataset-path", "mine.hdf5")
    words = r"\(KeyError: 3, test_contract.py line \d+\); mend it, or register it with what it needs"
    assert re.fullmatch(f"error: Short-v0 cannot be made here {words}", told)
    made = tasks.Task("gymnasium", "Short-v0", "mine", "Short-v0", gym.spec("Short-v0"))
    monkeypatch.setattr(tasks, "resolve", lambda env_id: envs.observed(made))
    assert shown() == f"error: {policy} was trained on {tasks.DEMO}; give --env-id, and --dataset-path"


def falls(after: int):
    """A step that fails once there were as many."""
    taken = []

    def answer(*found):
        taken.append(found)
        return {}[len(taken)] if len(taken) > after else found

    return answer


def test_what_fails_in_training_is_shown_as_the_environments(run_script):
    """Its traceback from its own code on, and one sentence; the same from another process."""
    episodes = envs.Episodes(envs.make_env(task_of(answer=falls(11))), 2)
    for _ in range(11):
        episodes.step(np.zeros(2, np.float32))
    with pytest.raises(UserError) as found:
        episodes.step(np.zeros(2, np.float32))
    error = pickle.loads(pickle.dumps(found.value))
    place = f"line {falls.__code__.co_firstlineno + 6}"

    def main():
        raise error

    code, _, err = run_script(SimpleNamespace(main=main, __file__="mine.py"))
    first, *lines, last = err.splitlines()
    assert code == 2 and first.startswith("Traceback") and lines[-1] == "KeyError: 12"
    assert f'test_contract.py", {place}, in answer' in err and "envs.py" not in err
    assert last == (
        f"error: Point-v0 cannot be played (KeyError: 12, test_contract.py {place}), in step 3 of the episode with the "
        "seed 2000007; mend it there"
    )


def test_one_number_in_an_array_and_no_word_of_a_success_are_taken():
    for said, success in ((None, None), (np.array([True]), 1.0), (False, 0.0)):
        episodes = envs.Episodes(envs.make_env(task_of(answer=changed(reward=np.ones(1), info={"success": said}))), 0)
        for _ in range(9):
            episodes.step(np.zeros(2, np.float32))
        outcome = {"charts/episodic_return": 9.0, "charts/episodic_length": 9}
        outcome |= {} if success is None else {"charts/episodic_success": success}
        assert episodes.outcome == outcome


def test_a_reward_that_is_no_number_is_the_environments_fault_in_training_too():
    env = envs.make_env(task_of())
    episodes = envs.Episodes(env, 2)
    episodes.step(np.zeros(2, np.float32))
    env.unwrapped.answer = changed(reward=float("nan"))
    with pytest.raises(UserError, match="pays the reward nan, in step 2 of the episode with the seed 2000006"):
        episodes.step(np.zeros(2, np.float32))


def test_actions_that_are_no_numbers_are_not_the_environments_fault():
    env = envs.make_env(task_of(low=-2, high=2))
    env.reset(seed=3)
    env.step(np.zeros(2, np.float32))
    with pytest.raises(UserError, match="^the policy gives nan as an action, in step 2 .* seed 3; .* learning rate"):
        env.step(np.array([0, np.nan], np.float32))


def test_arguments_without_a_name_are_the_same_in_every_process():
    class Config:
        pass

    words = [
        specs.in_words(task_of(low=lambda: 0, high=[Config()], answer=functools.partial(changed, 1)).spec)
        for _ in range(2)
    ]
    assert words[0] == words[1] and "Config object>" in words[0] and "0x" not in words[0]
    with pytest.raises(UserError, match="add --eval-workers 0"):
        evaluation.Evaluator(task_of(answer=lambda *_: 0), torch.zeros(2), torch.ones(2), 2, workers=1)


def test_what_cannot_be_used_or_made_is_named_with_what_helps():
    with pytest.raises(UserError, match=r"Point-v0 has whole numbers as actions \(Box\(0, 10"):
        envs.make_env(task_of(low=0, high=10, dtype=np.int32))
    wrapped = task_of(lambda: gym.wrappers.TimeLimit(gym.wrappers.NormalizeObservation(Point()), 5))
    with pytest.raises(UserError, match="has the wrapper NormalizeObservation, whose .*; leave it out of both"):
        envs.make_env(wrapped)
    with pytest.raises(
        UserError, match=r"cannot be made here \(ZeroDivisionError: .*, test_contract.py line \d+\); mend"
    ):
        envs.make_env(task_of(lambda: Point(low=1 / 0)))
    with pytest.raises(UserError, match=r"cannot be made here \(SystemExit: 1, .*; mend"):
        envs.make_env(task_of(lambda: sys.exit(1)))
    with pytest.raises(UserError, match=r"\(ModuleNotFoundError: No module named 'missing_package'\); install"):
        envs.make_env(replace(wrapped, spec=replace(wrapped.spec, entry_point="missing_package:Point")))


def test_a_goal_that_is_shown_is_found_in_arrays_that_are_filled_anew():
    class Goal(gym.Env):
        """Whose observation shows what was achieved in the last of the steps alone."""

        action_space = gym.spaces.Box(-1, 1, (1,))
        observation_space = gym.spaces.Dict({key: gym.spaces.Box(-np.inf, np.inf, (1,)) for key in spaces.GOAL})

        def reset(self, seed=None, options=None):
            self.parts, self.n = {key: np.zeros(1) for key in spaces.GOAL}, 0
            return self.parts, {}

        def step(self, action):
            self.n += 1
            self.parts["achieved_goal"][:] = self.n
            self.parts["observation"][:] = self.n if self.n == spaces.STEPS else 0
            return self.parts, 0.0, False, False, {}

    assert not spaces.is_shown(Goal())
