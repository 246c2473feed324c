"""What is not the algorithm. Scripts import it before PyTorch, so that what PyTorch reads when it is loaded stands."""

import os
import sys

# Threads that wait for each other at every matrix product would otherwise spin, and where other processes run on the
# same cores they spin away the time of the very thread that they wait for. A thousand turns, some ten microseconds,
# cost little there, and save most of the sleeps where cores are free. (The second variable is GNU's
# OpenMP's, which PyTorch has on Linux.)
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# MuJoCo loads the graphics library that MUJOCO_GL names with itself, and training draws nothing
try:
    import mujoco  # noqa: F401
except Exception as error:
    if (name := os.environ.pop("MUJOCO_GL", None)) is None:
        raise
    import mujoco  # noqa: F401

    print(f"warning: MUJOCO_GL={name} does not work here ({error}), so nothing can be filmed", file=sys.stderr)
