"""Signals that ask a script to end: the first one lets it save, a second Ctrl-C or SIGTERM does not."""
from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

# Ctrl-C, the system, a terminal that goes away, and what Slurm and others send before time is up; Windows has two.
POLITE = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
               if hasattr(signal, name))
URGENT = {signal.SIGINT, signal.SIGTERM}
SIGNALS: list[int] = []  # all of these that came since the outermost `handle_signals` began
HANDLERS: list[Callable[[int], None]] = []  # of those that are under way


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end; its argument is the signal's number."""


@contextmanager
def handle_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Within it the first signal goes to the handler, and all of them into SIGNALS. A second SIGINT or SIGTERM raises
    Stopped at once; the others hurry nobody, as a terminal's end comes twice, from the system and from the shell. In a
    thread it does nothing: signals come to a process's main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not HANDLERS:
        SIGNALS.clear()
    HANDLERS.append(handler)
    since: list[float] = []
    owner = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:
            return  # a DataLoader worker that has just been forked, see `ignore_signals`
        since.append(time.monotonic())
        SIGNALS.append(number)  # as what the handler raises can get lost, in a destructor for instance
        # torchrun passes on to each of its processes what the system may have sent to all of them already.
        same = "TORCHELASTIC_RUN_ID" in os.environ and since[-1] - since[0] < 1
        if len(SIGNALS) == 1:
            handler(number)
        elif number in URGENT and sum(each in URGENT for each in SIGNALS) > 1 and not same:
            raise_stopped(number)  # and not os._exit, which would end a notebook with all that is in it

    before = {number: signal.signal(number, handle) for number in POLITE
              if number in URGENT or signal.getsignal(number) not in (signal.SIG_IGN, None)}  # nohup's SIGHUP stays
    try:
        yield
    finally:
        HANDLERS.pop()
        for number, former in before.items():
            signal.signal(number, former)


def raise_stopped(number: int) -> None:
    raise Stopped(number)


def unbroken(call: Callable[[], T]) -> T:
    """What `call` returns. A signal that comes meanwhile has its effect after that."""
    came: list[int] = []
    with handle_signals(came.append):
        result = call()
    for number in came:
        (HANDLERS[-1] if HANDLERS else raise_stopped)(number)
    return result


def ignore_signals(_: int) -> None:
    """A DataLoader's worker_init_fn: its workers leave these signals to the process that they work for."""
    for number in POLITE:
        signal.signal(number, signal.SIG_IGN)
