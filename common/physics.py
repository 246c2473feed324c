"""D4RL's physics on a current MuJoCo.

D4RL's data were made in MuJoCo 2.0 and 2.1. MuJoCo has changed since, so that one step of Gymnasium's robots from a
state of the data misses the data's next state by 0.01 to 0.15. Here the changes are undone, and one step gives D4RL's
double-precision files to the last bits. It needs numpy, mujoco and gymnasium only:

    from common.physics import as_d4rl
    env = as_d4rl(gymnasium.make("Hopper-v4"))  # v4 has the models, rewards, ends and reset noise of D4RL's v2

Nothing is decided by MuJoCo's version: the probes ask the installed one what it does, and what it does not need is not
done. "Since" is from MuJoCo's changelog; how a change was established stands beside each. `undo_changes` (here) and
`Simulation` (`common/simulation.py`) work for any model: they know no robot.
"""

import functools
import weakref
from pathlib import Path
from xml.etree import ElementTree

import gymnasium
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from common.simulation import Simulation, margins_add_up

CAPSULE = int(mujoco.mjtGeom.mjGEOM_CAPSULE)
SHAPES = {  # geoms whose mass follows from their size
    int(getattr(mujoco.mjtGeom, f"mjGEOM_{kind.upper()}")): kind
    for kind in ("sphere", "capsule", "cylinder", "ellipsoid", "box")
}
TOTAL_MASS = {"half_cheetah.xml": 14.0}  # its settotalmass, for the day on which MuJoCo and so the file drop it
ONE = np.float32(1)
CHANGED = weakref.WeakSet()  # models that `undo_changes` has seen

# ------------------------------------------------------------------------------------------------ environments


class D4RLPhysics(MujocoEnv):
    """Goes before a subclass of Gymnasium's MujocoEnv in the list of bases, and gives it D4RL's physics.

    Contact forces (`cfrc_ext`) stay zero, as they did in D4RL: its MuJoCo computed them for sensors only.
    """

    total_mass: float | None = None  # see `undo_changes`
    round_actions = True  # whether D4RL's action normaliser stood before this environment

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._undo_changes()

    def _undo_changes(self) -> None:
        self._simulation = Simulation(self.model, self.data)
        undo_changes(self.model, self.total_mass)
        low, high = self.action_space.low, self.action_space.high
        self._rounds = self.round_actions and bool((low == -1).all() and (high == 1).all())

    def _step_mujoco_simulation(self, ctrl, n_frames):
        self.data.ctrl[:] = ctrl
        self._simulation.step(n_frames)

    def set_state(self, qpos, qvel):
        """Since 3.2.0, `mj_kinematics` no longer makes the quaternions in qpos unit length in place, so that a new
        episode of a free body starts with one of any length. D4RL's first observations show unit length."""
        qpos = np.array(qpos, np.float64)
        mujoco.mj_normalizeQuat(self.model, qpos)
        super().set_state(qpos, np.asarray(qvel))
        self.data.qacc_warmstart[:] = self.data.qacc  # which `mj_forward` did itself before 3.3.6

    def step(self, action):
        """Not MuJoCo's: D4RL's normaliser maps [-1, 1] to the actuators' range in single precision, which rounds."""
        if self._rounds:  # low + (a + 1) / 2 (high - low), where halving and doubling change nothing
            action = np.add(action, ONE, dtype=np.float32)
            action -= ONE
            np.minimum(np.maximum(action, -ONE, out=action), ONE, out=action)
        return super().step(action)

    def __reduce_ex__(self, protocol):
        """A class made by `as_d4rl` has no importable name, so its parts are stored in place of it."""
        made, (cls, *rest), *state = super().__reduce_ex__(max(protocol, 2))
        parts = vars(cls).get("_parts")
        return (_blank, parts, *state) if parts else (made, (cls, *rest), *state)


def as_d4rl(env: gymnasium.Env, total_mass: float | None = None, round_actions: bool | None = None) -> gymnasium.Env:
    """`env`, a MuJoCo environment of Gymnasium, wrapped or not, changed in place to D4RL's physics. Reset it then.

    A second time changes nothing. `total_mass` is asked for only where the model's file does not say `settotalmass`;
    `round_actions=False` is for environments that had no action normaliser in D4RL, which a class may say itself by an
    attribute of that name. Raises ValueError for models whose old physics cannot be had.
    """
    simulator = env.unwrapped
    if isinstance(simulator, D4RLPhysics):
        return env
    if not isinstance(simulator, MujocoEnv):
        raise ValueError(f"only MuJoCo environments of Gymnasium can get D4RL's physics, and {simulator} is none")
    before = type(simulator)
    if round_actions is None:
        round_actions = getattr(before, "round_actions", True)
    simulator.__class__ = _class(before, total_mass or declared_mass(simulator), round_actions)
    try:
        simulator._undo_changes()
    except ValueError:
        simulator.__class__ = before
        raise
    return env


def declared_mass(env: MujocoEnv) -> float | None:
    """The total mass that the model's file asks for. The compiled model has forgotten it."""
    path = Path(getattr(env, "fullpath", ""))
    compiler = ElementTree.parse(path).find("compiler") if path.suffix == ".xml" else None
    declared = float("-inf") if compiler is None else float(compiler.get("settotalmass", "-inf"))
    return declared if declared > 0 else TOTAL_MASS.get(path.name)


@functools.cache
def _class(base: type, total_mass: float | None, round_actions: bool) -> type:
    parts = (base, total_mass, round_actions)
    members = {"total_mass": total_mass, "round_actions": round_actions, "_parts": parts, "__doc__": base.__doc__}
    return type(f"D4RL{base.__name__}", (D4RLPhysics, base), members)


def _blank(*parts):
    cls = _class(*parts)
    return cls.__new__(cls)


# ------------------------------------------------------------------------------------------------ the model


def undo_changes(model: mujoco.MjModel, total_mass: float | None = None) -> None:
    """Undo in a compiled model what MuJoCo has changed since D4RL, once: the second time raises ValueError.

    `total_mass` is what all bodies shall weigh together, for models whose file says so.
    """
    if model in CHANGED:
        raise ValueError("this model has D4RL's physics already; a second time would halve its margins again")
    margins = old_margins(model)
    undo_capsules(model, total_mass)
    model.geom_margin[:] = margins
    undo_convex_collider(model)
    CHANGED.add(model)


def undo_capsules(model: mujoco.MjModel, total_mass: float | None = None) -> None:
    """Since 2.1.1, capsules weigh and turn as capsules; before, as cylinders longer by half a radius at each end.

    Established by trying four lengths on D4RL's double-precision files: only this one gives them to the last bits.
    """
    moved = []
    for body in range(1, model.nbody):
        geoms = np.flatnonzero(model.geom_bodyid == body)
        kinds = set(model.geom_type[geoms].tolist())
        if CAPSULE not in kinds or not kinds <= SHAPES.keys():
            continue
        now, then = weigh(model, geoms), weigh(model, geoms, capsule="cylinder")
        density = model.body_mass[body] / now.body_mass[1]
        # MuJoCo took the inertia from the geoms, at one density, where that gives what the model has. Other bodies were
        # given an inertia of their own, which did not change
        found, expected = inertia(model, body), density * inertia(now, 1)
        if not np.allclose(model.body_ipos[body], now.body_ipos[1], rtol=0, atol=1e-8) or not np.allclose(
            found, expected, rtol=0, atol=1e-8 * np.abs(found).max()
        ):
            continue
        model.body_mass[body] = density * then.body_mass[1]
        model.body_inertia[body] = density * then.body_inertia[1]
        if not (np.array_equal(now.body_ipos, then.body_ipos) and np.array_equal(now.body_iquat, then.body_iquat)):
            model.body_ipos[body], model.body_iquat[body] = then.body_ipos[1], then.body_iquat[1]
            moved.append(body)
    if moved:  # what MuJoCo keeps of the frame that was there: short cuts, and before 3.17.0 bounding volumes
        model.body_sameframe[moved] = 0
        model.geom_sameframe[np.isin(model.geom_bodyid, moved)] = 0
        model.site_sameframe[np.isin(model.site_bodyid, moved)] = 0
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_MIDPHASE)
    if total_mass:
        factor = total_mass / model.body_mass.sum()
        model.body_mass *= factor
        model.body_inertia *= factor
    mujoco.mj_setConst(model, mujoco.MjData(model))  # what MuJoCo derives from masses; it overwrites the data's state


def weigh(model: mujoco.MjModel, geoms: np.ndarray, capsule: str = "capsule") -> mujoco.MjModel:
    """A model of one body made of these `geoms` at MuJoCo's density of 1000, weighed by MuJoCo itself."""
    text = ""
    for geom in geoms:
        kind, (radius, half, depth) = SHAPES[int(model.geom_type[geom])], model.geom_size[geom].tolist()
        if (kind, capsule) == ("capsule", "cylinder"):
            kind, half = "cylinder", half + radius / 2
        pos, quat = (" ".join(map(repr, vector[geom].tolist())) for vector in (model.geom_pos, model.geom_quat))
        text += f'<geom type="{kind}" size="{radius!r} {half!r} {depth!r}" pos="{pos}" quat="{quat}"/>'
    return mujoco.MjModel.from_xml_string(f"<mujoco><worldbody><body>{text}</body></worldbody></mujoco>")


def inertia(model: mujoco.MjModel, body: int) -> np.ndarray:
    """A body's inertia (3, 3) about its center of mass, in the body's axes."""
    turn = np.empty(9)
    mujoco.mju_quat2Mat(turn, model.body_iquat[body])
    return turn.reshape(3, 3) @ np.diag(model.body_inertia[body]) @ turn.reshape(3, 3).T


def old_margins(model: mujoco.MjModel) -> np.ndarray:
    """Margins (number of geoms,) whose sum is, for all pairs that may touch, the larger one of today's two.

    Since 3.5.0 the margins of two geoms add up; before, the larger one counted. Established by the contacts of
    D4RL's rows, and by 3.4.0 and 3.5.0 side by side. <pair> contacts have a margin of their own, which means what it
    meant. Raises ValueError where no such margins exist.
    """
    if model.geom_gap.any() or model.pair_gap.any():
        raise ValueError(
            "D4RL's physics cannot be had for models with contact gaps: their meaning changed in MuJoCo 3.9.0"
        )
    if not margins_add_up() or not model.geom_margin.any():
        return model.geom_margin.copy()
    kinds = np.column_stack(
        (model.geom_margin, model.geom_contype, model.geom_conaffinity, model.body_weldid[model.geom_bodyid] == 0)
    )
    kinds, kind_of = np.unique(kinds, axis=0, return_inverse=True)
    kind_of = kind_of.reshape(-1)
    rows, wanted = [], []
    for i, (margin, contype, conaffinity, fixed) in enumerate(kinds):
        for j, (margin_j, contype_j, conaffinity_j, fixed_j) in enumerate(kinds[: i + 1]):
            masks = int(contype) & int(conaffinity_j) or int(contype_j) & int(conaffinity)
            alone = i == j and len(np.unique(model.geom_bodyid[kind_of == i])) == 1
            if masks and not (fixed and fixed_j) and not alone:
                rows.append(np.eye(len(kinds))[i] + np.eye(len(kinds))[j])
                wanted.append(max(margin, margin_j))
    if not rows:
        return model.geom_margin.copy()
    solution = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    if not np.allclose(np.array(rows) @ solution, wanted, rtol=0, atol=1e-12) or solution.min() < -1e-12:
        raise ValueError(
            f"D4RL's physics cannot be had for a model that mixes the margins {sorted(set(model.geom_margin.tolist()))}"
            ": no margins that add up give for each pair of geoms the larger one"
        )
    return solution.round(12)[kind_of]


def undo_convex_collider(model: mujoco.MjModel) -> None:
    """Since 3.3.0 a new collider for meshes and convex pairs is on, since 3.8.0 it gives several contacts a pair.

    Established on D4RL's Adroit rows; robots and mazes have no such pair. The flags moved from one group to another.
    """
    for name in ("NATIVECCD", "MULTICCD"):
        if hasattr(mujoco.mjtDisableBit, f"mjDSBL_{name}"):
            model.opt.disableflags |= int(getattr(mujoco.mjtDisableBit, f"mjDSBL_{name}"))
        elif hasattr(mujoco.mjtEnableBit, f"mjENBL_{name}"):
            model.opt.enableflags &= ~int(getattr(mujoco.mjtEnableBit, f"mjENBL_{name}"))
