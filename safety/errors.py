"""How a script ends: one line on standard error and an exit status, whatever went wrong."""
from __future__ import annotations

import argparse
import atexit
import codecs
import errno
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from safety.flags import STAGE_3, misread
from safety.signals import SIGNALS, Stopped, handle_signals, raise_stopped

REPOSITORY = Path(__file__).parent.parent


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do."""


class UsageError(InputError):
    """Flags that make no sense, whatever the files hold."""


def run_script(main: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser,
               resume_hint: Callable[[argparse.Namespace], str] = lambda _: "stopped") -> None:
    """Runs a script. A failure is one line and exit status 1, a wrong flag one line and 2; a signal ends it with 128
    and the signal's number (Ctrl-C: 130).

    Args:
        resume_hint: what to say when the script was stopped.
    """
    lost, before = make_everything_printable()
    parser.add_argument("--debug", action="store_true", help="show where in the code a failure arose")
    parser.error = lambda message: parser.exit(2, printable(f"{parser.prog}: {message} (--help tells the flags)\n"))
    if refusal := misread(sys.argv[1:], parser):
        parser.error(refusal)
    args = parser.parse_args()
    debug = vars(args).pop("debug")
    others = {child.pid for child in multiprocessing.active_children()}  # of a host, such as a notebook
    unraisable = sys.unraisablehook  # called with what is raised in destructors; a stop is in SIGNALS all the same
    sys.unraisablehook = lambda lost: None if lost.exc_type is Stopped else unraisable(lost)
    try:
        with handle_signals(raise_stopped):
            main(args)
            sys.stdout.flush()  # fails here, if at all, and not at Python's own end
            if lost:
                raise InputError(f"what was printed could not be written ({lost[0].strerror}); all else is done")
            if dist.is_initialized():
                dist.destroy_process_group()
    except (KeyboardInterrupt, Exception) as error:
        drop_what_cannot_be_printed(before)
        if SIGNALS or isinstance(error, KeyboardInterrupt):  # any failure after a signal is its consequence
            if not dist.is_initialized() or dist.get_rank() == 0:  # one line from all processes
                with suppress(OSError):                      # a terminal that went away
                    print(printable(f"\n{parser.prog}: {resume_hint(args)}"), file=sys.stderr)
            release_frames(error)
            sys.exit(128 + (error.args[0] if isinstance(error, Stopped) else [*SIGNALS, signal.SIGINT][0]))
        if debug:
            traceback.print_exc()
        line = in_one_line(error, args)
        release_frames(error)
        if isinstance(error, UsageError):
            parser.error(line)
        sys.exit(printable(f"{parser.prog}: {line}"))
    finally:
        for child in multiprocessing.active_children():
            if child.pid not in others:
                child.kill()  # a DataLoader's worker takes no SIGTERM, and Python's end would wait for it
        sys.unraisablehook = unraisable
        for bar in list(getattr(tqdm, "_instances", [])):
            with suppress(OSError):
                bar.close()  # or the line would stand behind a half-drawn bar
        put_back(before)
        if dist.is_initialized():  # a process that failed just ends, and torchrun stops the others
            code = getattr(sys.exc_info()[1], "code", 1)
            atexit.register(end_at_once, code if isinstance(code, int) else 1)


def end_at_once(status: int) -> None:
    """Without Python's own end, which now and then aborts (SIGABRT) where a process group's threads are left."""
    flush_streams()
    os._exit(status)


def release_frames(error: BaseException | None) -> None:
    """Lets go of what the functions that failed were using. A DataLoader that is still held when Python ends waits for
    ever for its workers, which nobody tells to stop."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def make_everything_printable() -> tuple[list[OSError], dict[int, int]]:
    """Whatever a stream's encoding lacks is printed as JSON's escape (\\u03b3), so that printed JSON stays JSON. And
    where a terminal goes away, or a disk is full, what is printed from then on is lost, and nothing else.

    Returns:
        A list to which the errors of standard output will be added, except a terminal's end, which nobody sees; and a
        dict of the descriptors that will lead nowhere, each with a copy of what it was.
    """
    codecs.register_error("json", lambda error: (json.dumps(error.object[error.start:error.end])[1:-1], error.end))
    lost: list[OSError] = []
    before: dict[int, int] = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # where nobody listens
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):  # a notebook's is none, and UTF-8
            stream.reconfigure(errors="json")
            for method in ("write", "flush"):
                setattr(stream, method, partial(print_or_lose, stream, method, before,
                                                lost if name == "stdout" else []))
    return lost, before


def print_or_lose(stream: io.TextIOWrapper, method: str, before: dict[int, int], lost: list[OSError],
                  *args: Any) -> Any:
    """Calls a stream's own `write` or `flush`. A reader that ends, such as `head`, still ends the command."""
    try:
        return getattr(type(stream), method)(stream, *args)  # not the attribute, which this function stands for
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        to_nowhere(stream, before)
        lost += [error] if error.errno != errno.EIO else []
        return len(*args) if args else None  # as if it had been written


def drop_what_cannot_be_printed(before: dict[int, int]) -> None:
    """Where standard output is closed, Python would complain once more at its own end."""
    try:
        sys.stdout.flush()
    except OSError:
        to_nowhere(sys.stdout, before)


def to_nowhere(stream: io.TextIOWrapper, before: dict[int, int]) -> None:
    if stream.fileno() not in before:
        before[stream.fileno()] = os.dup(stream.fileno())
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def put_back(before: dict[int, int]) -> None:
    """Gives a host, such as a notebook, its streams as they were, without what could not be written."""
    flush_streams()
    while before:
        descriptor, copy = before.popitem()
        os.dup2(copy, descriptor)
        os.close(copy)


def flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # it may be closed
            stream.flush()


def reason(error: Exception) -> str:
    """Another library's error in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def printable(text: str) -> str:
    """The text with what a terminal would obey, and what it cannot show, as escapes; a stranger's file may hold it."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
                  lambda found: f"\\u{ord(found[0]):04x}", text)


def in_one_line(error: Exception, args: argparse.Namespace) -> str:
    """What to say of a failure: what the user can do or, of an unexpected one, where it arose."""
    text = str(error)
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(
        "ALLOC_FAILED|an(no|')t allocate memory|out of memory|CUDA calloc", text)
    if out_of_memory and not isinstance(error, InputError):
        sizes = getattr(args, "batch_size", 1)
        sizes = sizes if isinstance(sizes, list) else [sizes]
        if getattr(args, "stage", None) == "3":
            sizes = [*(sizes * 2)[:2], STAGE_3["batch_size"]] if len(sizes) < 3 else sizes
        if max(sizes) == 1:
            return "out of memory; end other programs, or use a machine with more"
        return (f"out of memory with --batch_size {' '.join(map(str, sizes))}; try --batch_size "
                f"{' '.join(str(max(1, size // 2)) for size in sizes)}")
    if isinstance(error, (InputError, OSError, ImportError)):
        if "Original Traceback" in text:  # it was raised in a DataLoader worker
            return text.splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: ")
        return text
    if "Bus error" in text or "out of shared memory" in text:
        return ("the workers that read pictures have too little shared memory; start a container with --shm-size=8g or "
                "--ipc=host, or use --workers 0")
    if "DataLoader worker" in text:
        return (f"a worker that reads pictures died ({text.splitlines()[0]}); often memory ran out: try fewer "
                "--workers, 0 at the least")
    if re.search("working (triton|C\\+\\+ compiler)", text):
        return f"--compile cannot work here ({reason(error)}); leave it out"
    if isinstance(error, RuntimeError) and "onnection" in text and dist.is_initialized():
        return "another process ended, and so does this one"
    ours = [f"{Path(file).name}:{line}" for file, line, *_ in traceback.extract_tb(error.__traceback__)[1:]
            if REPOSITORY in Path(file).parents and "site-packages" not in file]
    return f"a fault of this program, please report it ({reason(error)}; {' '.join(ours)}); --debug shows more"
