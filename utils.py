"""What several scripts share: errors in one line, files that appear whole, processes, checkpoints, embeddings."""
from __future__ import annotations

import argparse
import collections
import ctypes
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

CHECKPOINT_FORMAT = 1


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do."""


def run_script(main: Callable[[argparse.Namespace], Any], parser: argparse.ArgumentParser) -> None:
    """Runs a script: an expected failure is one line and exit status 1, Ctrl-C exits with 130."""
    args = parser.parse_args()
    try:
        main(args)
    except (InputError, OSError, ImportError) as error:
        sys.exit(f"{parser.prog}: {error}")
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Opens a file that appears under its name only when it was written to the end and is safely on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def progress(iterable: Any, description: str, unit: str, show: bool = True, **options: Any) -> tqdm:
    """A progress bar, redrawn rarely where nobody watches (a log file)."""
    interval = 0.5 if sys.stderr.isatty() else 60
    return tqdm(iterable, desc=description, unit=unit, disable=not show, leave=False, mininterval=interval,
                dynamic_ncols=True, **options)


# ---- processes and devices -------------------------------------------------------------------------------------------

class Processes(NamedTuple):
    """This process among those that torchrun started (or alone), and its device."""

    rank: int
    world_size: int
    device: torch.device


def setup_processes(device: str | None, precision: str | None) -> tuple[Processes, str]:
    """Joins the other processes, if torchrun started several, and chooses device and precision.

    Returns:
        The processes, and the precision: bfloat16 on CUDA unless the user says otherwise, else float32.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default
                                    in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"--device {device}: no such device; say cuda, cuda:1 or cpu") from error
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: PyTorch sees no GPU here; leave the flag out to use the CPU")
        if chosen.index is None:
            chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    precision = precision or ("bfloat16" if chosen.type == "cuda" else "float32")
    torch.set_float32_matmul_precision("high" if precision == "bfloat16" else "highest")  # TF32 or not
    torch.backends.cudnn.allow_tf32 = precision == "bfloat16"
    return Processes(rank, world_size, chosen), precision


def keep_freed_memory() -> None:
    """Tells glibc to keep large blocks for the next layer instead of giving them back to the system each time.

    On a CPU, fetching and clearing those pages anew takes longer than the convolutions themselves.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # another system, another allocator
    m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2 ** 31 - 1)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which matrix products run in bfloat16, or in which nothing changes (float32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def gather(values: Any, processes: Processes) -> list[Any]:
    """What each process has, as a list on every process, in order of rank."""
    if processes.world_size == 1:
        return [values]
    gathered: list[Any] = [None] * processes.world_size
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
        raise InputError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        state = _load_pickled_modules(path)
    if not isinstance(state, dict) or not {"encoder", "decoder", "word_map", "model"} <= state.keys():
        raise InputError(f"{path}: not a captioning checkpoint")
    if state["format"] > CHECKPOINT_FORMAT:
        raise InputError(f"{path}: made by a newer version of this project (format {state['format']}); update it")
    state["word_map"] = state["word_map"] or word_map
    if not state["word_map"]:
        raise InputError(f"{path}: this checkpoint holds no word map; give it with --word_map WORDMAP_....json")
    if len(state["word_map"]) != state["model"]["vocab_size"]:
        raise InputError(f"{path}: the model knows {state['model']['vocab_size']} words, the word map has "
                         f"{len(state['word_map'])}; give the word map that the model was trained with")
    return state


class _Inert:
    """Stands for every class of an old checkpoint: holds what was pickled and can do nothing."""

    def __init__(self, *_: Any) -> None:
        pass


STORAGES = {"FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
MODULES = ("models.Encoder", "models.Attention", "models.DecoderWithAttention",
           "torch.nn.modules.container.Sequential", "torch.nn.modules.conv.Conv2d",
           "torch.nn.modules.batchnorm.BatchNorm2d", "torch.nn.modules.pooling.MaxPool2d",
           "torch.nn.modules.pooling.AdaptiveAvgPool2d", "torch.nn.modules.linear.Linear",
           "torch.nn.modules.sparse.Embedding", "torch.nn.modules.rnn.LSTMCell", "torch.nn.modules.dropout.Dropout",
           "torch.nn.modules.activation.ReLU", "torch.nn.modules.activation.Sigmoid",
           "torch.nn.modules.activation.Softmax", "torch.nn.modules.activation.Tanh",
           "torchvision.models.resnet.Bottleneck", "torchvision.models.resnet.BasicBlock",
           "torch.optim.adam.Adam", "torch.nn.backends.thnn._get_thnn_function_backend")


class _OldUnpickler(pickle.Unpickler):
    """Reads the original tutorial's pickles; every name outside a fixed list is refused before anything is made.

    What the list gives are stand-ins made anew for each file, so that a hostile pickle has nothing lasting to change.
    """

    def __init__(self, file: BinaryIO, storage: Callable[[torch.dtype, str, int], Tensor]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storage = storage

        def tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
            return storage.as_strided(size, stride, offset)  # refuses what lies outside the storage

        def parameter(data: Tensor, *_: Any) -> Tensor:
            return data

        self.allowed: dict[str, Any] = {name: type("Inert", (_Inert,), {}) for name in MODULES}
        self.allowed |= {f"torch.{name}": dtype for name, dtype in STORAGES.items()}
        self.allowed |= {"collections.OrderedDict": collections.OrderedDict, "builtins.set": set, "builtins.dict": dict,
                         "collections.defaultdict": type("Defaults", (dict,), {"__init__": lambda self, *_: None}),
                         "torch._utils._rebuild_tensor": tensor, "torch._utils._rebuild_tensor_v2": tensor,
                         "torch._utils._rebuild_parameter": parameter, "torch.nn.parameter.Parameter": parameter}

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("__builtin__", "builtins")  # Python 2's name, kept by pickle's protocol 2
        try:
            return self.allowed[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no captioning checkpoint needs") from None

    def persistent_load(self, saved_id: tuple[Any, ...]) -> Any:
        if saved_id[0] == "module":  # ("module", class, source file, source): PyTorch 0.4 kept the source beside it
            return saved_id[1]
        _, dtype, key, _, count, *view = saved_id
        storage = self.storage(dtype, key, count)
        if view and view[0] is not None:
            _, offset, size = view[0]
            return storage[offset:offset + size]
        return storage


def _load_pickled_modules(path: str | Path) -> dict[str, Any]:
    """The original tutorial's checkpoint, a pickle of whole modules in either of PyTorch's containers, as ours."""
    try:
        pickled = (_read_zip if zipfile.is_zipfile(path) else _read_stream)(path)
        encoder, decoder = pickled["encoder"], pickled["decoder"]
        weights = {"encoder": _state_dict(encoder), "decoder": _state_dict(decoder)}
        return {"format": CHECKPOINT_FORMAT, **weights, "word_map": None, "preprocessing": None, "training": None,
                "model": _model_arguments(weights["encoder"], weights["decoder"], encoder.enc_image_size),
                "scores": {"bleu4_teacher_forced": 100 * float(pickled.get("bleu-4", math.nan))}}
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise InputError(f"{path}: refused, this is not a checkpoint that can be read safely: {error}") from error


def _read_zip(path: str | Path) -> Any:
    """PyTorch 1.6's container: an uncompressed zip of `*/data.pkl` and one file for each storage."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise InputError(f"{path}: refused, its contents are compressed, as PyTorch's never are")
        root = next(name for name in archive.namelist() if name.endswith("data.pkl")).removesuffix("data.pkl")
        storages: dict[str, Tensor] = {}

        def storage(dtype: torch.dtype, key: str, _: int) -> Tensor:
            if key not in storages:
                storages[key] = _from_bytes(archive.read(f"{root}data/{key}"), dtype)
            return storages[key]

        with archive.open(f"{root}data.pkl") as file:
            return _OldUnpickler(file, storage).load()


def _read_stream(path: str | Path) -> Any:
    """PyTorch 0.4's container: pickles (magic number, version, system, data, storage keys), then the storages."""
    size = Path(path).stat().st_size
    storages: dict[str, Tensor] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in storages:
            if sum(each.nbytes for each in storages.values()) + count * dtype.itemsize > size:
                raise pickle.UnpicklingError("its tensors are larger than the file")
            storages[key] = torch.empty(count, dtype=dtype)
        return storages[key]

    with open(path, "rb") as file:
        _, _, _, pickled, keys = [_OldUnpickler(file, storage).load() for _ in range(5)]
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            if count != storages[key].numel():
                raise pickle.UnpicklingError(f"storage {key} has {count} numbers, not {storages[key].numel()}")
            storages[key].copy_(_from_bytes(file.read(storages[key].nbytes), storages[key].dtype))
    return pickled


def _from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _state_dict(module: _Inert, prefix: str = "") -> dict[str, Tensor]:
    """What `module.state_dict()` would have been."""
    held = vars(module)
    state = {prefix + name: value for name, value in {**held["_parameters"], **held["_buffers"]}.items()
             if value is not None}
    for name, child in held["_modules"].items():
        if child is not None:
            state |= _state_dict(child, f"{prefix}{name}.")
    return state


def _model_arguments(encoder: dict[str, Tensor], decoder: dict[str, Tensor], encoded_image_size: int) -> dict[str, Any]:
    """The arguments that an old checkpoint does not hold, from the shapes of its weights."""
    blocks = tuple(len({key.split(".")[2] for key in encoder if key.startswith(f"resnet.{layer}.")})
                   for layer in (4, 5, 6, 7))
    middle = "resnet50" if "resnet.4.0.conv3.weight" in encoder else "resnet34"
    resnets = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): middle, (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
    if blocks not in resnets:
        raise pickle.UnpicklingError(f"its encoder, with blocks {blocks}, is none of torchvision's ResNets")
    vocab_size, embed_dim = decoder["embedding.weight"].shape
    attention_dim, encoder_dim = decoder["attention.encoder_att.weight"].shape
    return {"encoder": resnets[blocks], "encoded_image_size": encoded_image_size, "attention_dim": attention_dim,
            "embed_dim": embed_dim, "decoder_dim": decoder["init_h.weight"].shape[0], "vocab_size": vocab_size,
            "encoder_dim": encoder_dim, "dropout": 0.5}


# ---- word embeddings -------------------------------------------------------------------------------------------------

def load_embeddings(path: str | Path, word_map: dict[str, int]) -> tuple[Tensor, int]:
    """Pretrained word vectors in GloVe's text format, a word and its numbers a line.

    Returns:
        Embeddings (V, E), uniform random with GloVe-like variance for words not in the file, and how many were found.

    Raises:
        InputError: a line whose number of values differs from the first line's, or no word of the vocabulary.
    """
    rows: dict[int, list[float]] = {}
    size = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            word, *values = line.rstrip().split(" ")
            if number == 1 and len(values) == 1:
                continue  # word2vec's text format begins with the counts of words and numbers
            size = size or len(values)
            if len(values) != size:
                raise InputError(f"{path}, line {number}: {len(values)} numbers where the lines before have {size}")
            if word in word_map:
                rows[word_map[word]] = [float(value) for value in values]
    if not rows:
        raise InputError(f"{path}: none of its words is in the vocabulary; GloVe's text format is a word and its "
                         "numbers a line")
    bound = math.sqrt(3 / size)
    embeddings = torch.empty(len(word_map), size).uniform_(-bound, bound)
    embeddings[list(rows)] = torch.tensor(list(rows.values()))
    return embeddings, len(rows)


# ---- training aids ---------------------------------------------------------------------------------------------------

def adjust_learning_rate(optimizer: torch.optim.Optimizer, shrink_factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= shrink_factor


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Adds up the gradients of all processes: with losses divided by global counts, those of the whole batch."""
    gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in parameters]
    flat = torch.cat([each.flatten() for each in gradients])
    dist.all_reduce(flat)
    for parameter, piece in zip(parameters, flat.split([each.numel() for each in gradients]), strict=True):
        parameter.grad = piece.view_as(parameter)
