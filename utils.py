"""What several scripts share: one process among several and its device, word vectors, a progress bar."""
from __future__ import annotations

import ctypes
import io
import math
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from safety.devices import unusable_device
from safety.errors import InputError, UsageError
from safety.processes import Place, cores, place_among_processes, waiting_for_others
from safety.signals import SIGNALS  # the numbers of those that came
from safety.vectors import check_text, fields
from safety.words import normal

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  # of --precision


class World(NamedTuple):
    """This process among those that torchrun started (or alone), and its device."""

    rank: int
    size: int
    device: torch.device


def setup_world(device: str | None, precision: str | None, join: bool = True) -> tuple[World, str]:
    """Joins the other processes, if torchrun started several, and chooses device and precision.

    Args:
        join: False where one process is all that is needed, whatever the environment says.
    """
    place = place_among_processes() if join else Place()
    chosen = choose_device(device, place)
    world = World(place.rank, place.size, chosen)
    if chosen.type == "cpu":
        keep_freed_memory()
    if world.size > 1 and not dist.is_initialized():
        import_module("torch.distributed.nn")  # if DDP is the first to, its default arguments hold the group for good
        with waiting_for_others(place):
            dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",  # gloo: on the CPU
                                    timeout=timedelta(minutes=30))  # while rank 0 downloads weights, say
    precision = choose_precision(chosen, precision)
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")  # TF32 or not
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    return world, precision


def choose_device(device: str | None, place: Place) -> torch.device:
    """The device of that name, by default a GPU of this process's own or the CPU, once it is known to work."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type not in {"cuda", "cpu"}:
            raise UsageError(f"--device {device}: not tried yet, only cuda and cpu; leave the flag out")
        if chosen.type == "cuda":
            if chosen.index is not None and place.local_size > 1:
                raise InputError(f"--device {device}: each process takes a GPU of its own; leave the flag out")
            chosen = torch.device("cuda", place.local_rank if chosen.index is None else chosen.index)
            torch.cuda.set_device(chosen)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device or chosen}: PyTorch cannot use it here "
                         f"{unusable_device(str(error), device)}") from error
    return chosen


def choose_precision(device: torch.device, precision: str | None) -> str:
    """The precision of matrix products that the user asks for, or the device's own: bfloat16 or float16 on a GPU that
    has it, float32 elsewhere.

    Raises:
        UsageError: no such precision, or bfloat16 on a GPU that only emulates it, which is slower than float32.
    """
    if precision not in {None, *PRECISIONS}:  # from Python
        raise UsageError(f"--precision {precision}: there are {', '.join(PRECISIONS)}")
    if device.type == "cpu":
        return precision or "float32"
    native = torch.cuda.is_bf16_supported(including_emulation=False)            # from capability 8.0 on
    half = "float16" if torch.cuda.get_device_capability(device) >= (7, 0) else "float32"  # tensor cores, or none
    if precision == "bfloat16" and not native:
        raise UsageError(f"--precision bfloat16: {torch.cuda.get_device_name(device)} has no arithmetic for it, and "
                         f"would emulate it slowly; use --precision {half}, this card's default")
    return precision or ("bfloat16" if native else half)


def add_device_flags(add: Callable[..., Any]) -> None:
    """--device and --precision, the same in every script; `add` is a parser's `add_argument`."""
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=tuple(PRECISIONS),
        help="of matrix products (default: on a GPU the first of bfloat16, float16 and float32 that it has arithmetic "
        "for, on a CPU float32)")


def keep_freed_memory() -> None:
    """Speed alone: tells glibc to keep large blocks for the next layer instead of giving them back to the system.

    On a CPU, fetching and clearing those pages anew takes longer than the convolutions themselves.
    """
    with suppress(OSError, AttributeError):  # another system, another allocator
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)             # M_MMAP_MAX in malloc.h
        libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which matrix products run in 16 bits, or in which nothing changes (float32)."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "float32")


def loader_workers(workers: int | None, device: torch.device) -> int:
    """How many DataLoader workers, if the user does not say: on a CPU they would only disturb the arithmetic."""
    if workers is not None:
        return workers
    return min(4, max(1, cores() // place_among_processes().local_size)) if device.type == "cuda" else 0


def gather(value: Any, world: World) -> list[Any]:
    """The values of all ranks in order, on every rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def gather_in_order(items: list[Any], world: World) -> list[Any]:
    """The items of all ranks, in their own order again: of W ranks, rank r has items r, r + W, r + 2W, ..."""
    shares = gather(items, world)
    ordered: list[Any] = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        ordered[rank::world.size] = share
    return ordered


def broadcast(value: Any, world: World) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def sum_over(tensor: Tensor, world: World) -> Tensor:
    """The sum of all ranks' tensors, on every rank; in place."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def any_signal(world: World) -> int:
    """The number of a signal that some process was sent, or 0; the same on every rank, so that all stop together."""
    number = torch.tensor(max(SIGNALS, default=0))
    if world.size > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)  # on the CPU: the GPU is not waited for
    return int(number)


def progress_bar(iterable: Any, description: str, unit: str, show: bool = True, **options: Any) -> tqdm:
    """A progress bar, redrawn rarely where nobody watches (a log file)."""
    return tqdm(iterable, desc=description, unit=unit, disable=not show, leave=False, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 60, **options)


# ---- training aids ---------------------------------------------------------------------------------------------------

def load_embeddings(path: str | Path, word_map: dict[str, int]) -> tuple[Tensor, int]:
    """Pretrained word vectors (V, E) in GloVe's text format, a word and its numbers a line; and how many were found.

    Words that are not in the file get uniform random values. Of a word that is there twice the first line counts, and
    whatever is wrong with lines of words that are not ours does not.
    """
    ours: list[tuple[int, int, str]] = []  # where, which word, and the line
    sizes: Counter[int] = Counter()
    rows: dict[int, list[float]] = {}
    line_number = 0
    try:
        with open(path, "rb") as file:
            check_text(file.peek(), path)
            for line_number, line in enumerate(io.TextIOWrapper(file, "utf-8-sig", errors="replace"), 1):
                word, *values = fields(line)
                if len(values) > 1:  # one: the counts with which word2vec's text format begins
                    sizes[len(values)] += 1
                index = word_map.get(word, word_map.get(normal(word)))
                if index is not None and (len(values) > 1 or line_number > 1):
                    ours.append((line_number, index, line))
        size = max(sizes, key=sizes.__getitem__, default=0)
        for each in ours if size else ():
            line_number, index, line = each  # the number is for the error below
            word, *values = fields(line)
            if index in rows or (len(values) > size and not values[0].lstrip("-")[:1].isdigit()):
                continue  # a word with a space in it: GloVe's largest file has some
            if len(values) != size:
                raise ValueError(f"{len(values)} numbers where most lines have {size}")
            rows[index] = [float(value) for value in values]
            if not all(map(math.isfinite, rows[index])):
                raise ValueError(f"a number of {word!r} is not finite")
        if not rows:
            raise ValueError("no word of the vocabulary up to here")
    except (OSError, ValueError) as error:
        raise InputError(f"--embeddings {path}, line {line_number}: {error}; GloVe's text format is a word and its "
                         "numbers a line") from error
    bound = math.sqrt(3 / size)
    embeddings = torch.empty(len(word_map), size).uniform_(-bound, bound)
    embeddings[list(rows)] = torch.tensor(list(rows.values()))
    return embeddings, len(rows)


def adjust_learning_rate(optimizer: torch.optim.Optimizer, shrink_factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= shrink_factor
