"""D4RL's ant in D4RL's mazes (Fu et al., 2020): what `antmaze-*-v2` are played in, the physics apart.

The ant is D4RL's own model file, which comes with the package `d4rl`; the maze is put round it here. With
`common.physics.as_d4rl`, one step from a state of D4RL's files gives their next state to single precision.
"""

from xml.etree import ElementTree

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box
from gymnasium.utils import EzPickle

from common.tasks import d4rl_file

# '#' is a wall, 'r' where an episode starts and the origin, 'g' where the goal is. Rows run along y, columns along x.
MAZES = {
    "umaze": """
        #####
        #r..#
        ###.#
        #g..#
        #####""",
    "medium": """
        ########
        #r.##..#
        #..#...#
        ##...###
        #..#...#
        #.#..#.#
        #...#.g#
        ########""",
    "large": """
        ############
        #r...#.....#
        #.##.#.#.#.#
        #......#...#
        #.####.###.#
        #..#.#.....#
        ##.#.#.#.###
        #..#...#.g.#
        ############""",
}
CELL, HEIGHT = 4.0, 2.0  # of a wall: its base is CELL x CELL
REACHED = 0.5  # the largest distance from the goal that counts as having reached it
TORQUE = np.float32(30)  # of an action of 1


def cells(maze: str, kind: str) -> list[tuple[float, float]]:
    """The centers (x, y) of a maze's cells of that kind."""
    rows = MAZES[maze].split()
    return [
        ((column - 1) * CELL, (row - 1) * CELL)
        for row, line in enumerate(rows) for column, cell in enumerate(line) if cell == kind
    ]  # fmt: skip


class AntMazeEnv(MujocoEnv, EzPickle):
    """An ant that has to come to a goal which it does not observe; a reward of 1 is paid there and ends the episode.

    Observations (29,): qpos (15) with x and y, qvel (14). Actions (8,) in [-1, 1]. `info["success"]` says whether the
    goal is reached, `info["goal"]` after a reset where it is. The goal is drawn at each reset, from `np_random`.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 10}

    def __init__(self, maze: str = "umaze", **kwargs):
        EzPickle.__init__(self, maze, **kwargs)
        self.maze, self.goal = maze, np.full(2, np.nan)
        camera = {"distance": 40.0, "elevation": -70.0}
        observations = Box(-np.inf, np.inf, (29,), np.float64)
        super().__init__(
            str(d4rl_file("locomotion/assets/ant.xml")), 5, observations, default_camera_config=camera, **kwargs
        )

    def _initialize_simulation(self):
        model = mujoco.MjModel.from_xml_string(with_walls(self.fullpath, self.maze))
        model.vis.global_.offwidth, model.vis.global_.offheight = self.width, self.height
        return model, mujoco.MjData(model)

    def _set_action_space(self):
        self.action_space = Box(-1, 1, (self.model.nu,), np.float32)
        return self.action_space

    def step(self, action):
        """The torques are made from the action as D4RL's normaliser did, in single precision: -30 + (a + 1) 30."""
        torques = np.add(action, 1, dtype=np.float32)
        torques *= TORQUE
        torques -= TORQUE
        self.do_simulation(np.clip(torques, -TORQUE, TORQUE, out=torques), self.frame_skip)
        x, y = self.data.qpos[:2] - self.goal
        reached = bool(x * x + y * y <= REACHED**2)
        if self.render_mode == "human":
            self.render()
        return self._get_obs(), float(reached), reached, False, {"success": reached}

    def reset_model(self):
        """The ant in the start cell, every coordinate and speed of it disturbed; the goal in the upper half of its
        cell, which is how D4RL draws it: the center + U(0, 1) + U(0, 0.5) along each axis."""
        (center,) = cells(self.maze, "g")
        self.goal = center + self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)
        qpos = self.init_qpos + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        qvel = self.init_qvel + 0.1 * self.np_random.standard_normal(self.model.nv)
        self.set_state(qpos, qvel)
        return self._get_obs()

    def _get_obs(self):
        return np.concatenate((self.data.qpos, self.data.qvel))

    def _get_reset_info(self):
        return {"goal": self.goal.copy()}


def with_walls(path: str, maze: str) -> str:
    """The model of a file, as text, with a box for each wall of the maze."""
    model = ElementTree.parse(path)
    for x, y in cells(maze, "#"):
        ElementTree.SubElement(
            model.find("worldbody"), "geom", type="box", pos=f"{x} {y} {HEIGHT / 2}", conaffinity="1", contype="1",
            size=f"{CELL / 2} {CELL / 2} {HEIGHT / 2}", rgba="0.7 0.5 0.3 1",
        )  # fmt: skip
    return ElementTree.tostring(model.getroot(), encoding="unicode")
