"""Evaluation side by side equals episodes played one after another; scores; averages of a stage's metrics."""

import itertools

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common import cli, envs, evaluation, steps
from common.checkpoint import BestPolicy
from common.policies import Policy
from common.tasks import DEMO, resolve

HOPPER = resolve(DEMO)


def test_evaluation_equals_single_episodes():
    torch.manual_seed(1)
    weights = torch.randn(11, 3) * 0.5
    mean, std = torch.full((11,), 0.1), torch.full((11,), 0.7)
    evaluator = evaluation.Evaluator(HOPPER, mean, std, episodes=4)

    def policy(obs):
        return torch.tanh(obs @ weights)

    expected, lengths = [], []
    for i in range(4):  # episodes of different lengths: those that end early are not played on into their next one
        env = envs.make_env(HOPPER)
        obs, _ = env.reset(seed=evaluator.seeds[i])
        total, done, n = 0.0, False, 0
        while not done:
            standardised = torch.as_tensor(((obs - 0.1) / 0.7).astype(np.float32))
            obs, reward, terminated, truncated, _ = env.step(policy(standardised).numpy())
            total, done, n = total + reward, terminated or truncated, n + 1
        expected.append(total)
        lengths.append(n)
    assert len(set(lengths)) > 1
    np.testing.assert_allclose(evaluator.returns(policy, "cpu"), expected, rtol=1e-3)
    np.testing.assert_array_equal(evaluator.returns(policy, "cpu"), evaluator.returns(policy, "cpu"))


@pytest.fixture
def workers():
    evaluator = evaluation.Evaluator(HOPPER, torch.zeros(11), torch.ones(11), episodes=7, workers=2)
    yield evaluator
    evaluator.pool.shutdown()


def test_workers_play_the_same_episodes_to_the_last_bit(workers):
    alone = evaluation.Evaluator(HOPPER, torch.zeros(11), torch.ones(11), episodes=7)
    torch.set_num_threads(2)  # of this process, not of an evaluation in it
    for _ in range(3):  # another policy each time, in the same processes
        policy = Policy("gaussian", 11, 3, 2)
        np.testing.assert_array_equal(workers.returns(policy.mode, "cpu"), alone.returns(policy.mode, "cpu"))
    assert not workers.envs and torch.get_num_threads() == 2  # all of them were played elsewhere
    np.testing.assert_array_equal(  # what cannot be handed on is played here
        workers.returns(lambda obs: obs[:, :3], "cpu"), alone.returns(lambda obs: obs[:, :3], "cpu")
    )


def test_fresh_starts_are_those_of_no_evaluation(workers):
    policy, played = Policy("gaussian", 11, 3, 2), []
    alone = evaluation.Evaluator(HOPPER, torch.zeros(11), torch.ones(11), episodes=7)
    usual = alone.returns(policy.mode, "cpu")
    for env in alone.envs:
        env.reset = lambda seed, reset=env.reset: (played.append(seed), reset(seed=seed))[1]
    fresh = alone.fresh_returns(policy.mode, "cpu")
    assert len(fresh) == len(set(played)) == 70 and not set(played) & set(alone.seeds)
    assert not set(fresh) & set(usual)
    np.testing.assert_array_equal(workers.fresh_returns(policy.mode, "cpu"), fresh)


def test_ctrl_c_leaves_the_workers_alone_and_a_dead_worker_is_named(workers):
    policy = Policy("deterministic", 11, 3, 2)
    expected = workers.returns(policy.mode, "cpu")
    processes = list(workers.pool._processes.values())
    assert len(processes) == 2
    for process in processes:  # as a terminal sends it to every process of its foreground group
        os.kill(process.pid, signal.SIGINT)
    np.testing.assert_array_equal(workers.returns(policy.mode, "cpu"), expected)
    processes[0].kill()
    with pytest.raises(cli.UserError, match="--eval-workers 0"):
        workers.returns(policy.mode, "cpu")


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Even if that is killed, which leaves it no time to end them."""
    script = tmp_path / "train.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "import torch\n"
        "from common.evaluation import Evaluator\n"
        "from common.policies import Policy\n"
        "from common.tasks import resolve\n"
        "if __name__ == '__main__':\n"
        "    mean, std = torch.zeros(11), torch.ones(11)\n"
        "    evaluator = Evaluator(resolve('hopper-medium-demo'), mean, std, episodes=2, workers=2)\n"
        "    evaluator.returns(Policy('deterministic', 11, 3, 2).mode, 'cpu')\n"
        "    print(*evaluator.pool._processes, flush=True)\n"
        "    input()\n"
    )
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(running(pid) for pid in workers)


def running(pid: int) -> bool:
    """Whether a process is there, and not a zombie that nobody has collected yet."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_score_is_d4rls():
    evaluator = evaluation.Evaluator(HOPPER, torch.zeros(11), torch.ones(11), episodes=1)
    assert evaluator.score(np.array([-20.272305])) == pytest.approx(0)
    assert evaluator.score(np.array([3234.3, 3234.3])) == pytest.approx(100)
    evaluator.reference = None  # an environment that D4RL does not know
    assert evaluator.score(np.array([1.0, 2.0])) == 1.5


def test_stepper_averages_all_steps_since_the_last_reading():
    count = torch.zeros(())

    def step():
        count.add_(1)
        return {"n": count.clone(), "twice": 2 * count}

    stepper = steps.Stepper(step, torch.device("cpu"))
    stepper.run(3)
    half = steps.Stepper(step, torch.device("cpu"))
    half.load_state_dict(stepper.state_dict())  # as after an interruption
    half.run(1)
    assert half.means() == {"n": 2.5, "twice": 5.0}
    half.run(2)
    assert half.means() == {"n": 5.5, "twice": 11.0}


def test_what_was_read_before_an_interruption_is_no_mean_after_it():
    """A step that returned something else before: nothing is divided by the number of times that it did."""
    names = iter(["rare", "often"])
    stepper = steps.Stepper(lambda: {next(names): torch.tensor(2.0)}, torch.device("cpu"))
    stepper.run(1)
    assert stepper.means() == {"rare": 2.0}
    rest = steps.Stepper(lambda: {next(names): torch.tensor(3.0)}, torch.device("cpu"))
    rest.load_state_dict(stepper.state_dict())
    rest.run(1)
    assert rest.means() == {"often": 3.0}


def test_what_is_computed_every_third_time_is_averaged_over_those_times_across_interruptions():
    def stepper_at(done: int):
        count = itertools.count(done + 1)

        def step():
            n = next(count)
            always = {"n": torch.tensor(float(n))}
            return always | {"third": torch.tensor(float(10 * n))} if n % 3 == 0 else always

        return steps.Stepper(step, torch.device("cpu"))

    whole = stepper_at(0)
    whole.run(2)
    assert whole.means() == {"n": 1.5}  # no zero for what has not been computed
    whole.run(5)
    for stop in range(1, 5):
        first = stepper_at(2)
        first.run(stop)
        rest = stepper_at(2 + stop)
        rest.load_state_dict(first.state_dict())
        rest.run(5 - stop)
        assert rest.means() == {"n": 5.0, "third": 45.0}
    assert whole.means() == {"n": 5.0, "third": 45.0} and whole.means() == {}


def test_final_evaluations_have_the_others_episodes_and_more_and_successes_are_counted():
    class Reaches:
        """A success in its second step, where the first action is above 0; a return that tells the seed."""

        def reset(self, seed):
            self.seed, self.n = seed, 0
            return np.zeros(1), {}

        def step(self, action):
            self.n += 1
            there = self.n == 2 and self.seed % 2
            return np.zeros(1), self.seed / 2, self.n == 3, False, {"success": bool(there)} if self.says else {}

    evaluator = evaluation.Evaluator(HOPPER, torch.zeros(1), torch.ones(1), episodes=3, final=8)
    evaluator.envs, evaluator.reference = [Reaches() for _ in range(8)], None
    for Reaches.says in (True, False):
        few = evaluator.scalars(lambda obs: obs, "cpu")
        assert evaluator.last.tolist() == [1.5 * seed for seed in range(10_000, 10_003)]
        many = evaluator.scalars(lambda obs: obs, "cpu", final=True)
        assert evaluator.last.tolist() == [1.5 * seed for seed in range(10_000, 10_008)]
        assert (few["score"], many["score"]) == (1.5 * 10_001, 1.5 * 10_003.5)
        assert few.get("success") == (pytest.approx(1 / 3) if Reaches.says else None)
        assert many.get("success") == (0.5 if Reaches.says else None)


def test_the_best_policy_moves_on_what_is_more_than_chance():
    def offered(returns, margin, starting=(0, 0, 1, 0), score=25.0):
        best = BestPolicy(score, torch.nn.Linear(1, 1), "first", starting, margin)
        return best.update(100 * float(np.mean(returns)), torch.nn.Linear(1, 1), "second", returns)

    # gains 0, 1, 0, 0: mean 0.25 and standard error 0.25
    assert offered([0, 1, 1, 0], 0.0) and offered([0, 1, 1, 0], 0.99) and not offered([0, 1, 1, 0], 1.0)
    assert offered([1, 1, 1, 1], 2.0) and offered([1, 1, 1, 1], 2.9) and not offered([1, 1, 1, 1], 3.0)
    assert not offered([0, 0, 1, 0], 0.0) and not offered([0, 0, 1, 0], 2.0)
    # as it was saved, whatever the policy that it is made with again; its weights are a copy
    policy = torch.nn.Linear(1, 1)
    best, again = (BestPolicy(25.0, policy, "first", returns, 2.0) for returns in ((0, 0, 1, 0), (9, 9, 9, 9)))
    again.load_state_dict(best.state_dict())
    kept = policy.weight.clone()
    policy.weight.data.add_(1.0)
    assert torch.equal(best.weights["weight"], kept) and again.update(100.0, policy, "second", [1, 1, 1, 1])
    # start by start: what was played from more starts is judged on those of both
    assert offered([0.5, 0.5, 1, 0.5], 2.0, (0, 0, 1, 0, 1, 1, 1, 1, 1), 600 / 9)  # a lower score, of harder ones
    assert offered([1, 1, 1, 1], 2.0, (0, 0, 1, 0, 1, 1, 1, 1, 1)) and not offered([0, 0, 1, 0, 1, 1, 1], 2.0)
