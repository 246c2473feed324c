"""Transitions of the four robots in D4RL's physics, for `tests/test_physics.py`.

    python -m tests.physics_rows        writes tests/data/physics_rows.npz anew

They were made once, where D4RL's own rows came out to the last bits. A MuJoCo that gives others has changed.
"""

from pathlib import Path

import gymnasium
import numpy as np

from common.physics import as_d4rl

FILE = Path(__file__).parent / "data" / "physics_rows.npz"
ROBOTS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
KEYS = ("qpos", "qvel", "actions", "next_qpos", "next_qvel", "rewards")


def play(env, qpos, qvel, action) -> tuple[np.ndarray, np.ndarray, float]:
    """(qpos, qvel, reward) one step after a state that was set."""
    env.reset(seed=0)
    env.set_state(qpos, qvel)
    _, reward, *_ = env.step(action)
    return env.data.qpos.copy(), env.data.qvel.copy(), float(reward)


def touches_itself(env) -> bool:
    bodies = env.model.geom_bodyid[env.data.contact.geom]  # (number of contacts, 2)
    return bool((bodies > 0).all(1).any())


def transitions(simulator: str, n: int = 200) -> dict[str, np.ndarray]:
    """`n` transitions on the ground, in the air and fallen; every second state was pushed at random.

    Left out are states at the edge of a contact, where rounding decides what happens: a change of the state by 1e-15
    moves the outcome by 1e-13; and those of a robot that touches itself, as only a fallen hopper can, for there some
    contacts are found once or twice by rounding.
    """
    env, player = (as_d4rl(gymnasium.make(simulator)).unwrapped for _ in range(2))
    rng, rows, step = np.random.default_rng(0), [], 0
    while len(rows) < n:
        if step % 120 == 0:  # whether or not the robot has fallen by then
            player.reset(seed=step)
        if step % 10 == 0:
            held = rng.uniform(-1, 1, player.action_space.shape)
        action = np.clip(held + rng.normal(0, 0.3, held.shape), -1, 1).astype(np.float32)
        if step % 3 == 0:
            qpos, qvel = player.data.qpos.copy(), player.data.qvel.copy()
            if step % 2:
                qvel += rng.normal(0, 2, qvel.shape)
            row = play(env, qpos, qvel, action)
            jitters = [(1e-15 * rng.normal(size=qpos.shape), 1e-15 * rng.normal(size=qvel.shape)) for _ in range(3)]
            others = [play(env, qpos + dq, qvel + dv, action) for dq, dv in jitters]
            moved = max(np.abs(a - b).max() for other in others for a, b in zip(row, other, strict=True))
            if moved < 1e-13 and not touches_itself(player) and not touches_itself(env):
                rows.append((qpos, qvel, action, *row))
        player.step(action)
        step += 1
    return {key: np.array(column) for key, column in zip(KEYS, zip(*rows, strict=True), strict=True)}


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    found = {name: transitions(simulator) for name, simulator in ROBOTS.items()}
    np.savez_compressed(FILE, **{f"{name}/{key}": x for name, columns in found.items() for key, x in columns.items()})
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
