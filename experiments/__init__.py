import os
import sys
from importlib.util import find_spec

os.environ["MPLBACKEND"] = "agg"  # pictures are drawn to files, and what a notebook leaves there may not exist here

NEEDED = ("rliable", "scipy")
if missing := [name for name in NEEDED if find_spec(name) is None]:  # before any of them is imported
    print(f"error: this needs {' and '.join(missing)}: pip install -r requirements-experiments.txt", file=sys.stderr)
    sys.exit(2)
