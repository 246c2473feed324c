"""Play a policy on fresh starts: its score with a standard error, and a video if asked for.

    python play.py runs/hopper-medium-demo__o2sac__td3_bc__0__demo/best.pt --episodes 100 --video
    python play.py CORL-iql/checkpoint_999999.pt --env-id hopper-medium-v2

Any file that --offline takes is played, by its most likely actions. A policy.pt or best.pt says where it belongs; of a
policy from elsewhere --env-id does, with its dataset, which such a policy may be standardised by.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from common import cli, datasets, envs, evaluation, policies, tasks
from common.bounds import at_least
from common.foreign import load_policy
from common.inert import absent, read_tensors

import numpy as np
import tyro

SIDE_BY_SIDE = 10  # episodes at once


@dataclass
class Args:
    policy: tyro.conf.Positional[str]
    """the policy's file"""
    episodes: Annotated[int, at_least(2)] = 100
    """episodes, each from a start state that no training and no evaluation has seen"""
    video: bool = False
    """film an episode into videos/ beside the policy (needs `pip install moviepy`)"""
    env_id: str = ""
    """the dataset's name, which says where to play; none: as the file says"""
    dataset_path: str = ""
    """an HDF5 file in D4RL's layout, with --env-id"""
    max_episode_steps: Annotated[int | None, at_least(1)] = None
    """steps after which an episode is cut, for an environment that has no time limit of its own"""
    trust_checkpoint: bool = False
    """play a policy that is a program (TorchScript, ONNX with loops)"""
    normalize_from: str = ""
    """how a policy from elsewhere saw observations, as of the fine-tuning scripts"""


def read(args: Args) -> tuple[dict, tasks.Task]:
    """The policy and where it is played. Raises UserError."""
    path = Path(args.policy)
    if args.env_id:
        data = datasets.load(args.env_id, args.dataset_path, "cpu", args.max_episode_steps)
        return load_policy(path, data, args.trust_checkpoint, args.normalize_from), data.task
    if args.dataset_path or args.normalize_from:
        raise cli.UserError("--dataset-path and --normalize-from need --env-id, which says where it is played; add it")
    if not path.is_file():
        raise cli.UserError(absent(path))
    if path.suffix in (".onnx", ".zip") or not policies.is_ours(read_tensors(path, "cpu")):
        raise cli.UserError(f"{path} does not say where it is played; give the dataset of its task with --env-id")
    policy = policies.read(path)
    try:
        if ":" in policy["env_id"]:  # no file that came from elsewhere says what is imported
            raise cli.UserError("a module registers it")
        task = tasks.limited(tasks.resolve(policy["env_id"]), args.max_episode_steps)
    except cli.UserError as error:
        words = f"{path} was trained on {policy['env_id']}; give --env-id, and --dataset-path"
        raise cli.UserError(words, error.before) from error
    if task.simulator != policy["simulator"]:
        raise cli.UserError(f"{path} belongs to {policy['simulator']}; give --env-id, and --dataset-path")
    return policy, task


def main() -> None:
    args = cli.read(Args, __doc__)
    if args.video:
        cli.check_video("--video")
    policy, task = read(args)
    mean, std, net = policy["state_mean"], policy["state_std"], policies.player(policy)
    task = replace(task, clip=policy.get("clip", math.inf))
    evaluator = evaluation.Evaluator(task, mean, std, min(args.episodes, SIDE_BY_SIDE))
    returns = evaluator.fresh_returns(net.mode, "cpu", args.episodes)
    scores = np.array([evaluator.score(r) for r in returns])
    trained = f", {policy['steps']:,} steps" if policy["steps"] else ""
    print(f"{policy['algorithm']} ({policy['kind'].replace('_', ' ')}{trained}) in {task.simulator}")
    print(f"{args.episodes} episodes from fresh starts, most likely actions (mean ± standard error):")
    for name, values in {task.measure: scores, "return": returns}.items():
        print(f"  {name} {values.mean():.1f} ± {values.std(ddof=1) / math.sqrt(len(values)):.1f}")
    if args.video:
        folder = Path(args.policy).parent / "videos"
        envs.record_video(task, evaluator.mean, evaluator.std, net.mode, "cpu", folder)
        print(f"{folder} holds the video")


if __name__ == "__main__":
    cli.run(main)
