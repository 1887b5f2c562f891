"""Where the model looked, as files: matplotlib opens no windows for us, so what MPLBACKEND names need not be there."""
import importlib.util
import os
import sys


def is_there(module: str) -> bool:
    """Whether it could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its package is not there
        return False


if "matplotlib" in sys.modules:
    pass
elif os.environ.get("MPLBACKEND", "").startswith("module://"):  # a notebook's, where captions need not wait for it
    if not is_there(os.environ["MPLBACKEND"].removeprefix("module://")):
        os.environ["MPLBACKEND"] = "agg"
elif backend := os.environ.pop("MPLBACKEND", ""):  # while it is set, wrongly maybe, matplotlib cannot be imported
    import matplotlib
    try:
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"] = backend  # as matplotlib itself does
    except ValueError:  # there is no such backend
        matplotlib.rcParams["backend"] = os.environ["MPLBACKEND"] = "agg"
