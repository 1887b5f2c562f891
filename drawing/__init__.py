"""Where the model looked, as files: matplotlib opens no windows for us, so what MPLBACKEND names need not be there."""
import os
import sys

if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", "")):  # else nobody need wait for it
    import matplotlib
    try:
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"] = backend  # as matplotlib itself does
    except ValueError:  # of a notebook, say, of which nothing is installed here
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"] = "agg"
