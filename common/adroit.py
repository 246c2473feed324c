"""D4RL's Adroit hand (Rajeswaran et al., 2018; Fu et al., 2020): what `{pen,door,hammer,relocate}-*-v1` are played in.

The package gymnasium-robotics has D4RL's models as they were, observes them and draws their starts alike. Rewards, ends
and successes are D4RL's, and stand here: there the hand is paid for keeping away from what it should reach, a dropped
pen ends nothing, and what counts as a success is another thing. The physics come from `common.physics.as_d4rl`.
"""

import contextlib
import io

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

with contextlib.redirect_stderr(io.StringIO()):  # which says at every import that its rewards have changed
    from gymnasium_robotics.envs.adroit_hand.adroit_door import AdroitHandDoorEnv
    from gymnasium_robotics.envs.adroit_hand.adroit_hammer import AdroitHandHammerEnv
    from gymnasium_robotics.envs.adroit_hand.adroit_pen import AdroitHandPenEnv
    from gymnasium_robotics.envs.adroit_hand.adroit_relocate import AdroitHandRelocateEnv

norm = np.linalg.norm


class Hand(MujocoEnv):
    """Goes before a class of gymnasium-robotics in the list of bases, and gives it D4RL's rewards, ends and successes.

    Actions (A,) in [-1, 1]. `info["goal_achieved"]` says whether the step was at the goal, `info["success"]` whether
    the episode has had more than `goal_steps` such steps, which is what makes it a success in D4RL.
    """

    goal_steps = 25
    round_actions = False  # D4RL put no action normaliser before its hand
    joints = slice(0, -6)  # those coordinates of qpos that an observation begins with

    def step(self, action):
        """Positions of bodies and sites are read as MuJoCo leaves them, a substep behind qpos; so they were in D4RL."""
        self.do_simulation(self.act_mean + np.clip(action, -1, 1) * self.act_rng, self.frame_skip)
        reward, dropped, at_goal = self.judge()
        self.at_goal += at_goal
        if self.render_mode == "human":
            self.render()
        info = {"goal_achieved": at_goal, "success": self.at_goal > self.goal_steps}
        return self._get_obs(), float(reward), dropped, False, info

    def judge(self) -> tuple[float, bool, bool]:
        """(reward, whether the episode ends here, whether the goal is reached) of the step before."""
        raise NotImplementedError

    def reset_model(self):
        self.at_goal = 0
        return super().reset_model()

    def place(self, obs: np.ndarray, row: np.ndarray, first_obs: np.ndarray, first_row: np.ndarray) -> bool:
        """Put hand and scene into the state `row` (nq + nv + scene,) of a D4RL file; whether it is that of `obs` (S,).

        The scene is the part of the model that is drawn at each reset. `first_…` are those of its episode's first row.
        """
        nq, nv = self.model.nq, self.model.nv
        if len(row) != nq + nv + self.scene.size:
            return False
        self.set_scene(row[nq + nv :], first_obs, first_row[:nq])
        self.set_state(row[:nq], row[nq : nq + nv])
        joints = row[:nq][self.joints]
        return bool((np.abs(joints - obs[: len(joints)]) <= 1e-6 * np.maximum(1, np.abs(joints))).all())

    @property
    def scene(self) -> np.ndarray:
        """What of the model `infos` describe, as a view of it."""
        raise NotImplementedError

    def set_scene(self, scene: np.ndarray, first_obs: np.ndarray, first_qpos: np.ndarray) -> None:
        self.scene[:] = scene


class Pen(Hand, AdroitHandPenEnv):
    """Turn the pen to how the target lies; ends where the pen is dropped. Observations (45,), actions (24,)."""

    goal_steps = 20

    def judge(self):
        d = self.data
        at = d.xpos[self.obj_body_id]
        away = norm(at - d.site_xpos[self.eps_ball_site_id])
        pen = (d.site_xpos[self.obj_t_site_id] - d.site_xpos[self.obj_b_site_id]) / self.pen_length
        target = (d.site_xpos[self.tar_t_site_id] - d.site_xpos[self.tar_b_site_id]) / self.tar_length
        cos, near, dropped = pen @ target, away < 0.075, bool(at[2] < 0.075)
        reward = cos - away + 10 * (near and cos > 0.9) + 50 * (near and cos > 0.95) - 5 * dropped
        return reward, dropped, bool(near and cos > 0.95)

    @property
    def scene(self):
        return self.model.body_quat[self.target_obj_body_id]


class Door(Hand, AdroitHandDoorEnv):
    """Undo the latch and open the door. Observations (39,), actions (28,)."""

    joints = slice(1, -2)

    def judge(self):
        d = self.data
        hinge = d.qpos[self.door_hinge_addrs]
        reach = norm(d.site_xpos[self.grasp_site_id] - d.site_xpos[self.handle_site_id])
        reward = -0.1 * reach - 0.1 * (hinge - 1.57) ** 2 - 1e-5 * (d.qvel @ d.qvel)
        reward += 2 * (hinge > 0.2) + 8 * (hinge > 1.0) + 10 * (hinge > 1.35)
        return reward, False, bool(hinge >= 1.35)

    @property
    def scene(self):
        return self.model.body_pos[self.door_body_id]


class Hammer(Hand, AdroitHandHammerEnv):
    """Pick the hammer up and drive the nail in. Observations (46,), actions (26,)."""

    def judge(self):
        d = self.data
        handle, palm = d.xpos[self.obj_body_id], d.site_xpos[self.S_grasp_site_id]
        head, nail = d.site_xpos[self.tool_site_id], d.site_xpos[self.target_obj_site_id]
        depth = norm(nail - d.site_xpos[self.goal_site_id])
        reward = -0.1 * norm(palm - handle) - norm(head - nail) - 10 * depth - 0.01 * norm(d.qvel)
        reward += 2 * (handle[2] > 0.04 and head[2] > 0.04) + 25 * (depth < 0.02) + 75 * (depth < 0.01)
        return reward, False, bool(depth < 0.01)

    @property
    def scene(self):
        return self.model.body_pos[self.target_body_id]


class Relocate(Hand, AdroitHandRelocateEnv):
    """Take the ball to the target. Observations (39,), actions (30,)."""

    scene = np.zeros(0)  # `infos` hold one place of the ball for the whole file, and so none

    def judge(self):
        d = self.data
        ball, palm = d.xpos[self.obj_body_id], d.site_xpos[self.S_grasp_site_id]
        target = d.site_xpos[self.target_obj_site_id]
        away = norm(ball - target)
        reward = -0.1 * norm(palm - ball) + 10 * (away < 0.1) + 20 * (away < 0.05)
        if ball[2] > 0.04:
            reward += 1 - 0.5 * norm(palm - target) - 0.5 * away
        return reward, False, bool(away < 0.1)

    def set_scene(self, scene, first_obs, first_qpos):
        """Ball and target stand where the palm and an episode's first observation say."""
        self.set_state(first_qpos, np.zeros(self.model.nv))
        palm = self.data.site_xpos[self.S_grasp_site_id].copy()
        ball, target = palm - first_obs[30:33], palm - first_obs[33:36]
        self.model.body_pos[self.obj_body_id] = ball - first_qpos[30:33]
        self.model.site_pos[self.target_obj_site_id] = target
        mujoco.mj_resetData(self.model, self.data)


HANDS = {"pen": Pen, "door": Door, "hammer": Hammer, "relocate": Relocate}
