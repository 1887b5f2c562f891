"""Ctrl-C and SIGTERM: the first one asks a script to end, a second one ends it at once."""
from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS: list[int] = []  # SIGINT and SIGTERM that came to this process since its script began


class Stopped(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM asks this process to end; its argument is the signal's number."""


@contextmanager
def handle_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Within it the first SIGINT or SIGTERM goes to the handler, and into SIGNALS; a second one ends the process at
    once. In a thread it does nothing: signals come to a process's main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
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
        elif not same:
            os._exit(128 + number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def raise_stopped(number: int) -> None:
    raise Stopped(number)


def ignore_signals(_: int) -> None:
    """A DataLoader's worker_init_fn: its workers leave Ctrl-C and SIGTERM to the process that they work for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
