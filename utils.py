"""What several scripts share: errors in one line, files that appear whole, processes, checkpoints, embeddings."""
from __future__ import annotations

import argparse
import ctypes
import glob
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHECKPOINT_FORMAT = 1
SIGNALS: list[int] = []  # SIGINT and SIGTERM that came to this process since its script began
SPECIAL_WORDS = ("<start>", "<end>", "<pad>", "<unk>")


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do."""


class UsageError(InputError):
    """Flags that cannot be meant, whatever the files hold."""


class Stopped(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM asks this process to end; its argument is the signal's number."""


def run_script(main: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser,
               go_on: Callable[[argparse.Namespace], str] = lambda _: "stopped") -> None:
    """Runs a script. A failure is one line and exit status 1, a wrong flag one line and 2; Ctrl-C exits with 130,
    SIGTERM with 143.

    Args:
        go_on: what to say when the script was stopped.
    """
    parser.add_argument("--debug", action="store_true", help="show where in the code a failure arose")
    parser.error = lambda message: parser.exit(2, printable(f"{parser.prog}: {message} (--help tells the flags)\n"))
    args = parser.parse_args()
    debug = vars(args).pop("debug")
    SIGNALS.clear()
    unraisable = sys.unraisablehook  # called of what is raised in destructors: a stop is in SIGNALS still
    sys.unraisablehook = lambda lost: None if lost.exc_type is Stopped else unraisable(lost)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it is None where nobody listens
    try:
        with signals_to(raise_stopped):
            main(args)
            sys.stdout.flush()  # fails here, if at all, and not at Python's own end
            if dist.is_initialized():  # a process that failed just ends, and torchrun stops the others
                dist.destroy_process_group()
    except (KeyboardInterrupt, Exception) as error:
        drop_what_cannot_be_printed()
        if SIGNALS or isinstance(error, KeyboardInterrupt):  # any failure after a signal is its consequence
            if os.environ.get("RANK", "0") == "0":           # one line from all processes
                print(printable(f"\n{parser.prog}: {go_on(args)}"), file=sys.stderr)
            sys.exit(128 + (error.args[0] if isinstance(error, Stopped) else [*SIGNALS, signal.SIGINT][0]))
        if debug:
            traceback.print_exc()
        if isinstance(error, UsageError):
            parser.error(str(error))
        sys.exit(printable(f"{parser.prog}: {in_one_line(error, args)}"))
    finally:
        sys.unraisablehook = unraisable
        for bar in list(getattr(tqdm, "_instances", [])):
            bar.close()  # or the line would stand behind a half-drawn bar


def drop_what_cannot_be_printed() -> None:
    """Where standard output is closed or full, Python would complain of it once more at its own end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reason(error: Exception) -> str:
    """An error of another library in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def printable(text: str) -> str:
    """The text with what a terminal would obey, and what it cannot show, as escapes; a stranger's file may hold it."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
                  lambda found: f"\\u{ord(found[0]):04x}", text)


def in_one_line(error: Exception, args: argparse.Namespace) -> str:
    """What to say of a failure: what the user can do, or, of one that was not to be expected, where it arose."""
    text = str(error)
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(
        "ALLOC_FAILED|an(no|')t allocate memory", text)
    if full and not isinstance(error, InputError):
        sizes = getattr(args, "batch_size", 1)
        sizes = sizes if isinstance(sizes, list) else [sizes]
        if max(sizes) == 1:
            return "the memory is too small; end other programs, or take a larger machine"
        return (f"the memory is too small for --batch_size {' '.join(map(str, sizes))}; try --batch_size "
                f"{' '.join(str(max(1, size // 2)) for size in sizes)}")
    if isinstance(error, (InputError, OSError, ImportError)):
        # Of what went wrong in a DataLoader's process, the text is the whole traceback there.
        return text.splitlines()[-1].removeprefix("utils.InputError: ") if "Original Traceback" in text else text
    if "DataLoader worker" in text:
        return (f"a process that reads pictures died ({text.splitlines()[0]}); often memory ran out: try fewer "
                "--workers, 0 at the least")
    if isinstance(error, RuntimeError) and "onnection" in text and dist.is_initialized():
        return "another process ended, and so does this one"
    ours = [f"{Path(file).name}:{line}" for file, line, *_ in traceback.extract_tb(error.__traceback__)[1:]
            if Path(__file__).parent in Path(file).parents and "site-packages" not in file]
    return f"a fault of this program, please report it ({reason(error)}; {' '.join(ours)}); --debug shows more"


# ---- signals ---------------------------------------------------------------------------------------------------------

@contextmanager
def signals_to(handler: Callable[[int], None]) -> Iterator[None]:
    """Within it the first SIGINT or SIGTERM goes to the handler, and into SIGNALS. A second one ends the process at
    once."""
    since: list[float] = []
    owner = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:
            return  # a DataLoader's process that has just begun, see `ignore_signals`
        since.append(time.monotonic())
        SIGNALS.append(number)  # as what the handler raises can get lost, in a destructor for instance
        # torchrun passes on to each of its processes what the system may have sent to all of them already.
        same = "TORCHELASTIC_RUN_ID" in os.environ and since[-1] - since[0] < 1
        if len(SIGNALS) == 1:
            handler(number)
        elif not same:
            os._exit(128 + number)

    before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, former in before.items():
            signal.signal(each, former)


def raise_stopped(number: int) -> None:
    raise Stopped(number)


def ignore_signals(_: int) -> None:
    """Makes a DataLoader's process (its worker_init_fn) leave Ctrl-C and SIGTERM to the process that it works for."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)


# ---- files that appear whole -----------------------------------------------------------------------------------------

@contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Opens a file that appears under its name only when it was written to the end and is safely on the disk."""
    path = Path(path)
    if path.parent == Path("/dev") or (path.exists() and not path.is_file() and not path.is_dir()):  # a device or pipe
        with open(path, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        return
    path = path.resolve() if path.is_symlink() else path  # the link stays, and leads to the new file
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        try:
            with open_held(temporary, mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, that need not be there yet; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=next(each for each in (folder, *folder.parents) if each.exists())):
            return None
    except OSError as error:
        return f"{folder}: nothing can be written there ({error.strerror}); name another folder"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Names the file, and says what was wrong, where the disk is full or the folder may not be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save and h5py hide it
        if not isinstance(cause, OSError):
            raise
        why = os.strerror(cause.errno) if cause.errno else cause
        raise InputError(f"{path} could not be written ({why}); what stood there before is as it was") from error


def hold(file: Any, wait: bool = True) -> bool:
    """Locks a file or folder until it is closed, or its process ends in whatever way. False where another process
    holds it, and it was not waited for."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def open_held(path: Path, mode: str) -> IO[Any]:
    """Opens a file anew and holds it."""
    file = open(path, mode, encoding=None if "b" in mode else "utf-8")
    hold(file)
    return file if os.fstat(file.fileno()).st_nlink else open_held(path, mode)  # `sweep` of another came in between


def sweep(path: Path) -> None:
    """Removes the temporary files and folders of this name that killed processes left: those that nobody holds."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                if fcntl:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where somebody holds it
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(descriptor)


def progress(iterable: Any, description: str, unit: str, show: bool = True, **options: Any) -> tqdm:
    """A progress bar, redrawn rarely where nobody watches (a log file)."""
    return tqdm(iterable, desc=description, unit=unit, disable=not show, leave=False, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 60, **options)


# ---- processes and devices -------------------------------------------------------------------------------------------

class Processes(NamedTuple):
    """This process among those that torchrun started (or alone), and its device."""

    rank: int
    world_size: int
    device: torch.device


def setup_processes(device: str | None, precision: str | None) -> tuple[Processes, str]:
    """Joins the other processes, if torchrun started several, and chooses device and precision.

    The precision is bfloat16 on a GPU that has it and float32 elsewhere, unless the user says otherwise.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if chosen.type == "cuda":
            if chosen.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
                raise InputError(f"--device {device}: each process takes a GPU of its own; leave the flag out")
            chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
            torch.cuda.set_device(chosen)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        instead = "leave the flag out" if device else "take --device cpu, or fewer processes"
        raise InputError(f"--device {device or chosen}: PyTorch cannot use it here ({why}); {instead}") from error
    if chosen.type == "cpu":
        keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
                                timeout=timedelta(minutes=30))  # while the first fetches weights, say
    native = chosen.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = precision or ("bfloat16" if native else "float32")
    torch.set_float32_matmul_precision("high" if precision == "bfloat16" else "highest")  # TF32 or not
    torch.backends.cudnn.allow_tf32 = precision == "bfloat16"
    return Processes(rank, world_size, chosen), precision


def loader_workers(workers: int | None, device: torch.device) -> int:
    """Processes that read pictures, if the user names no number: on a CPU they would only disturb the arithmetic."""
    return int(device.type == "cuda") if workers is None else workers


def keep_freed_memory() -> None:
    """Tells glibc to keep large blocks for the next layer instead of giving them back to the system each time.

    On a CPU, fetching and clearing those pages anew takes longer than the convolutions themselves.
    """
    with suppress(OSError, AttributeError):  # another system, another allocator
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)             # M_MMAP_MAX in malloc.h
        libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which matrix products run in bfloat16, or in which nothing changes (float32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def gather(values: Any, processes: Processes) -> list[Any]:
    """What each process has, as a list on every process, in order of rank."""
    gathered = [values] * processes.world_size
    if processes.world_size > 1:
        dist.all_gather_object(gathered, values)
    return gathered


def broadcast(value: Any, processes: Processes) -> Any:
    """The first process's value, on every process."""
    values = [value]
    if processes.world_size > 1:
        dist.broadcast_object_list(values, 0)
    return values[0]


def broadcast_tensors(tensors: list[Tensor], processes: Processes) -> None:
    """Overwrites the tensors of all processes by those of the first."""
    if processes.world_size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def first_signal(processes: Processes) -> int:
    """The number of a signal that any process was sent, or 0; the same on every process, so that all stop together."""
    number = torch.tensor(max(SIGNALS, default=0))
    if processes.world_size > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)  # on the CPU: the GPU is not waited for
    return int(number)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes state_dicts and plain Python, so that `torch.load(path, weights_only=True)` reads it."""
    with whole_file(path, "wb") as file:
        torch.save({"format": CHECKPOINT_FORMAT, **state}, file)


def load_checkpoint(path: str | Path, word_map: dict[str, int] | None = None) -> dict[str, Any]:
    """Reads a checkpoint of ours, or one that the original tutorial pickled, onto the CPU. Runs nothing of it.

    Args:
        word_map: for the original tutorial's checkpoints, which do not hold it.

    Returns:
        A dict with `encoder` and `decoder` (state_dicts), `word_map`, `model` (arguments that rebuild both),
        `preprocessing`, `scores`, and `training` (for a resume; None in the original tutorial's).

    Raises:
        InputError: no such file, not a checkpoint, or one that names code other than the fixed list.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; name one that train.py made with --checkpoint")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
                    raise zipfile.BadZipFile("it is compressed, as PyTorch's files never are")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what the file's maker did
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads what is used
        except Exception:  # not one of ours: the original tutorial's, or no checkpoint
            from legacy.old_checkpoints import load_pickled_modules
            state = {"format": CHECKPOINT_FORMAT, **load_pickled_modules(path)}
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path}: refused, this is no checkpoint that can be read whole and safely ({reason(error)}); "
                         "get the file again, or name another") from error
    if (not isinstance(state, dict) or not {"format", "encoder", "decoder", "word_map", "model"} <= state.keys()
            or type(state["format"]) is not int):
        raise InputError(f"{path}: not a captioning checkpoint; name one that train.py made with --checkpoint")
    if state["format"] != CHECKPOINT_FORMAT:
        raise InputError(f"{path}: made by a newer version of this project (format {state['format']}); update it")
    for part in ("encoder", "decoder"):
        if not isinstance(state[part], dict) or not all(map(_is_whole, state[part].values())):
            raise InputError(f"{path}: refused, its {part} is not of plain tensors that are whole in the file; get "
                             "the file again, or name another")
    if not isinstance(state["word_map"], dict | None):
        check_word_map(state["word_map"], path)  # which says that it is none
    state["word_map"] = state["word_map"] or word_map
    if not state["word_map"]:
        raise InputError(f"{path}: this checkpoint holds no word map; give it with --word_map WORDMAP_....json")
    if not isinstance(state["model"], dict) or type(state["model"].get("vocab_size")) is not int:
        raise InputError(f"{path}: not a captioning checkpoint, it does not tell its model's sizes; name another")
    if len(state["word_map"]) != state["model"]["vocab_size"]:
        raise InputError(f"{path}: the model knows {state['model']['vocab_size']} words, the word map has "
                         f"{len(state['word_map'])}; give the word map that the model was trained with")
    check_word_map(state["word_map"], path)
    return state | {name: state.get(name, nothing)  # what was stripped from it for publishing
                    for name, nothing in (("preprocessing", None), ("scores", {}), ("training", None))}


def _is_whole(value: Any) -> bool:
    """Whether it is an ordinary tensor with all its numbers in memory: one number can pass for a trillion of them."""
    return (type(value) is Tensor and value.layout == torch.strided and value.device.type == "cpu"
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def check_word_map(word_map: Any, path: str | Path) -> None:
    """A word map's indices must be 0 to V - 1, the special words among them."""
    if not isinstance(word_map, dict) or not set(SPECIAL_WORDS) <= word_map.keys():
        raise InputError(f"{path}: not a word map, it lacks one of {' '.join(SPECIAL_WORDS)}")
    if not all(type(word) is str and type(index) is int for word, index in word_map.items()):
        raise InputError(f"{path}: not a word map, its indices are not 0 to {len(word_map) - 1} for a word each")
    if set(word_map.values()) != set(range(len(word_map))):
        raise InputError(f"{path}: not a word map, its indices are not 0 to {len(word_map) - 1}, each once")


# ---- training aids ---------------------------------------------------------------------------------------------------

def load_embeddings(path: str | Path, word_map: dict[str, int]) -> tuple[Tensor, int]:
    """Pretrained word vectors (V, E) in GloVe's text format, a word and its numbers a line; and how many were found.

    Words that are not in the file get uniform random numbers of GloVe-like variance.
    """
    rows: dict[int, list[float]] = {}
    size = line_number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                line_number += 1
                word, *values = line.rstrip().split(" ")
                if not word or (not size and len(values) < 2):
                    continue  # an empty line, or the two counts with which word2vec's text format begins
                size = size or len(values)
                if len(values) > size and not values[0].lstrip("-")[:1].isdigit():
                    continue  # a word with a space in it: GloVe's largest file has some
                if len(values) != size:
                    raise ValueError(f"{len(values)} numbers where the lines before have {size}")
                if word in word_map:
                    rows[word_map[word]] = [float(value) for value in values]
                    if not all(map(math.isfinite, rows[word_map[word]])):
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


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Adds up the gradients of all processes: with losses divided by global counts, those of the whole batch."""
    gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in parameters]
    flat = torch.cat([each.flatten() for each in gradients])
    dist.all_reduce(flat)
    for parameter, piece in zip(parameters, flat.split([each.numel() for each in gradients]), strict=True):
        parameter.grad = torch.empty_like(parameter).copy_(piece.view_as(parameter))  # in the parameter's own layout
