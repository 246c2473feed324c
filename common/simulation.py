"""Steps of a MuJoCo model as D4RL's MuJoCo made them: by the installed one, where a probe finds that it does the same.

Works for any model and its data, and needs numpy and mujoco only. See `common/physics.py`.
"""

import functools

import mujoco
import numpy as np

SPHERE, CAPSULE, BOX = (int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}")) for name in ("SPHERE", "CAPSULE", "BOX"))
FREE, BALL = int(mujoco.mjtJoint.mjJNT_FREE), int(mujoco.mjtJoint.mjJNT_BALL)
EULER, RK4 = int(mujoco.mjtIntegrator.mjINT_EULER), int(mujoco.mjtIntegrator.mjINT_RK4)
WEIGHTS = np.array([1, 2, 2, 1]) / 6  # of the four stages of RK4
SKIP_NOTHING, SKIP_POSITION = int(mujoco.mjtStage.mjSTAGE_NONE), int(mujoco.mjtStage.mjSTAGE_POS)


class Simulation:
    """`step(n)` moves `data` on by `n` timesteps of `model`, from the `ctrl` that stands in it."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData):
        self.model, self.data = model, data
        self.deep = DeepContacts(model, data) if deep_contacts_are_true() else None
        if self.deep and not self.deep.possible:
            self.deep = None
        turns = bool(np.isin(model.jnt_type, (FREE, BALL)).any())
        rk4 = model.opt.integrator == RK4
        self.by_hand = rk4 and turns and rk4_turns_to_fourth_order()
        self.runge_kutta = RungeKutta(model, data, self.deep) if self.by_hand or (rk4 and self.deep) else None

    def __reduce__(self):
        return Simulation, (self.model, self.data)  # the views of `data` are made anew

    def step(self, n: int) -> None:
        if self.by_hand:
            for _ in range(n):
                self.runge_kutta.step()
        elif self.deep is None:
            mujoco.mj_step(self.model, self.data, nstep=n)
        elif self.runge_kutta:
            for _ in range(n):
                self._step_and_look_back()
        else:
            for _ in range(n):
                mujoco.mj_step1(self.model, self.data)
                if self.deep.cut():
                    mujoco.mj_fwdVelocity(self.model, self.data)
                mujoco.mj_step2(self.model, self.data)

    def _step_and_look_back(self) -> None:
        """A native step shows the contacts of its last stage alone; where one of them is nearly too deep, one of the
        other stages may have been, and the step is taken again by hand."""
        d = self.data
        kept = d.qpos.copy(), d.qvel.copy(), d.qacc_warmstart.copy(), d.time
        mujoco.mj_step(self.model, d)
        if self.deep.find(within=0.03) is not None:
            d.qpos[:], d.qvel[:], d.qacc_warmstart[:], d.time = kept
            self.runge_kutta.step()


class RungeKutta:
    """Since 4.0.0, RK4 turns ball and free joints to fourth order; before, all four stages turned from the first one.

    Established on D4RL's ant (the same step by hand in 4.0.0 gives the files' last bits) and on 3.17.0 beside 4.0.0.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData, deep: "DeepContacts | None" = None):
        if model.na:
            raise ValueError("D4RL's physics cannot be had for models with RK4, free joints and actuators with a state")
        self.model, self.data, self.deep = model, data, deep
        self.qpos, self.qvel, self.qacc, self.warmstart = data.qpos, data.qvel, data.qacc, data.qacc_warmstart
        self.qpos0 = np.empty(model.nq)
        self.velocities, self.accelerations = np.empty((2, 4, model.nv))  # of the four stages
        self.qvel0, self.mean = self.velocities[0], np.empty((2, model.nv))

    def step(self) -> None:
        """q' = q + h (v1 + 2 v2 + 2 v3 + v4) / 6, v' = v + h (a1 + 2 a2 + 2 a3 + a4) / 6; views and few allocations."""
        m, d, h, time = self.model, self.data, self.model.opt.timestep, self.data.time
        mujoco.mj_checkPos(m, d)
        mujoco.mj_checkVel(m, d)
        mujoco.mj_forward(m, d)
        self._solved(0)
        mujoco.mj_checkAcc(m, d)
        np.copyto(self.qpos0, self.qpos)
        for stage, ahead in ((1, h / 2), (2, h / 2), (3, h)):
            self._advance(self.qvel, self.qacc, ahead)
            d.time = time + ahead
            mujoco.mj_forwardSkip(m, d, SKIP_NOTHING, 1)
            self._solved(stage)
        velocity, acceleration = self.mean
        np.dot(WEIGHTS, self.velocities, out=velocity)
        np.dot(WEIGHTS, self.accelerations, out=acceleration)
        self._advance(velocity, acceleration, h)
        d.time = time + h

    def _advance(self, velocity: np.ndarray, acceleration: np.ndarray, ahead: float) -> None:
        """The state that `velocity` and `acceleration` give `ahead` of the step's first one."""
        np.copyto(self.qpos, self.qpos0)
        mujoco.mj_integratePos(self.model, self.qpos, velocity, ahead)
        np.multiply(acceleration, ahead, self.qvel)
        np.add(self.qvel, self.qvel0, self.qvel)

    def _solved(self, stage: int) -> None:
        """Keep what the solver found."""
        if self.deep and self.deep.cut():
            mujoco.mj_forwardSkip(self.model, self.data, SKIP_POSITION, 1)
        np.copyto(self.velocities[stage], self.qvel)
        np.copyto(self.accelerations[stage], self.qacc)
        np.copyto(self.warmstart, self.qacc)  # the next stage's solver starts here, as it did before 3.3.6


class DeepContacts:
    """Since 3.2.7, the contact of a box and a sphere or capsule whose center (axis) is inside it has its true depth;
    before, its depth was the radius.

    Established on D4RL's mazes and Adroit files (rows in which legs and fingers press into boxes), and on 3.2.0 beside
    3.2.7.
    """

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData):
        self.model, self.data = model, data
        round_, box = np.isin(model.geom_type, (SPHERE, CAPSULE)), model.geom_type == BOX
        depth = np.where(round_, -model.geom_size[:, 0], -np.inf)
        self.deepest = np.full((model.ngeom, model.ngeom), -np.inf)  # distance at which a pair's contact ended then
        self.deepest[np.ix_(round_, box)] = depth[round_, None]
        self.deepest[np.ix_(box, round_)] = depth[None, round_]
        masks = model.geom_contype[:, None] & model.geom_conaffinity[None]
        pairs = np.isfinite(self.deepest) & ((masks | masks.T) != 0)
        fixed = model.body_weldid[model.geom_bodyid] == 0
        pairs &= ~(fixed[:, None] & fixed[None])
        self.possible = bool(pairs.any() or model.npair)
        self.shallowest = depth[round_].max(initial=-np.inf)

    def find(self, within: float = 0.0) -> np.ndarray | None:
        """Numbers of the contacts that are deeper than they could be then, or `within` reach of it; None for none."""
        if not self.data.ncon:
            return None
        distances = self.data.contact.dist
        if distances.min() >= self.shallowest + within:
            return None
        first, second = self.data.contact.geom.T
        deep = np.flatnonzero(distances < self.deepest[first, second] + within)
        return deep if len(deep) else None

    def cut(self) -> bool:
        """After the position stage: contacts as they were then, and the constraints made from them; whether any."""
        deep = self.find()
        if deep is None:
            return False
        m, d = self.model, self.data
        mujoco.mj_collision(m, d)  # frees the constraints that were made, for which MuJoCo has no other way
        for i in deep.tolist():
            contact = d.contact[i]
            contact.dist = self.deepest[contact.geom1, contact.geom2]
        mujoco.mj_makeConstraint(m, d)
        mujoco.mj_island(m, d)
        mujoco.mj_projectConstraint(m, d)
        mujoco.mj_transmission(m, d)
        return True


# ------------------------------------------------------------------------------------------------ probes


def probe(text: str, timestep: float = 0.01, integrator: str = "Euler", **vectors) -> tuple:
    """A small model (its <worldbody>) and its data in the state that `vectors` name, after `mj_forward`."""
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><option gravity="0 0 0" timestep="{timestep}" integrator="{integrator}"/>'
        f"<worldbody>{text}</worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    for name, value in vectors.items():
        getattr(data, name)[:] = value
    mujoco.mj_forward(model, data)
    return model, data


@functools.cache
def rk4_turns_to_fourth_order() -> bool:
    """Whether a tumbling box takes another step than by hand."""
    tumbling = '<body><freejoint/><geom type="box" size=".1 .2 .3"/></body>', 0.02, "RK4"
    (native_model, native), (model, data) = (probe(*tumbling, qvel=[0, 0, 0, 3, 1, 2]) for _ in range(2))
    mujoco.mj_step(native_model, native)
    RungeKutta(model, data).step()
    return bool(np.abs(native.qpos - data.qpos).max() > 1e-10)


@functools.cache
def deep_contacts_are_true() -> bool:
    """Whether a sphere of radius 0.1 whose center is 0.1 inside a box is 0.2 deep in it, and not 0.1."""
    _, data = probe(
        '<geom type="box" size=".5 .5 .5"/><body pos="0 0 .4"><freejoint/><geom type="sphere" size=".1"/></body>'
    )
    return bool(data.contact.dist.min() < -0.15)


@functools.cache
def margins_add_up() -> bool:
    """Whether a plane and a sphere 0.015 above it touch, with margins of 0.01 each."""
    _, data = probe(
        '<geom type="plane" size="1 1 1" margin=".01"/>'
        '<body pos="0 0 .115"><freejoint/><geom type="sphere" size=".1" margin=".01"/></body>'
    )
    return data.ncon > 0
