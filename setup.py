"""For `pip install .`, which has nothing to install: scripts are read, copied and run where they are."""

import sys

sys.exit("o2rl is not installed: its scripts are run from this folder, after `pip install -r requirements.txt`")
