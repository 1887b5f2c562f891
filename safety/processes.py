"""What torchrun tells each of its processes by the environment, which is checked like flags: it may be a leftover."""
from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch.distributed import DistError

from safety.errors import InputError, UsageError, reason
from safety.flags import integer
from safety.signals import URGENT


class Place(NamedTuple):
    """A process among those that torchrun started; alone by default."""

    rank: int = 0
    size: int = 1        # how many there are
    local_rank: int = 0  # among those of this machine
    local_size: int = 1


def cores() -> int:
    """Those that this process may use; in a container, or under Slurm, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def place_among_processes() -> Place:
    """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

    Raises:
        UsageError: they do not fit together, or the others could not be found.
    """
    size = number("WORLD_SIZE", 1)
    if size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):  # by which PyTorch finds the others
            if not os.environ.get(name):
                raise UsageError(f"WORLD_SIZE={size} in the environment, but no {name}; {remedy()}")
        number("MASTER_PORT", 1, 65535)
    return Place(number("RANK", 0, size - 1), size, number("LOCAL_RANK", 0, size - 1),
                 number("LOCAL_WORLD_SIZE", 1, size))


@contextmanager
def waiting_for_others(place: Place) -> Iterator[None]:
    """Within it the other processes are waited for. Where it was not torchrun that started this one, they may not
    exist: so the wait is announced, and Ctrl-C ends it as if there were no Python, which PyTorch keeps waiting."""
    others = f"{place.size - 1} other process{'es' * (place.size > 2)} at " + ":".join(
        os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    handlers = {}
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        print(f"waiting for {others}, because of WORLD_SIZE={place.size} in the environment; {remedy()}",
              file=sys.stderr)
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.signal(number, signal.SIG_DFL) for number in URGENT}
    try:
        yield
    except DistError as error:
        raise InputError(f"{others} could not be found ({reason(error)}); {remedy()}") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def number(name: str, low: int, high: int | None = None) -> int:
    """A variable's value; the lowest, where there is none."""
    text = os.environ.get(name, str(low))
    try:
        return integer(low, high)(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{name}={error} expected in the environment; {remedy()}") from error


def remedy() -> str:
    there = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in os.environ]
    return f"torchrun sets it; without torchrun: unset {' '.join(there)}"
