import os

os.environ["MPLBACKEND"] = "agg"  # pictures are drawn to files, and what a notebook leaves there may not exist here
