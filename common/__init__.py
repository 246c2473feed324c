"""What is not the algorithm. Scripts import it before PyTorch, so that what PyTorch reads when it is loaded stands."""

import os

# Threads that wait for each other at every matrix product would otherwise spin, and where other processes run on the
# same cores they spin away the time of the very thread that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
