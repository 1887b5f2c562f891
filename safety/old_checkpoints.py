"""Checkpoints of the original tutorial and of its forks, read without running anything of them.

A pickle is a program that may call whatever it names. Here no name is looked up: what a pickle names, calls or builds
becomes an inert stand-in (but for dicts and the types of numbers), and only what lies on the way to the weights is
judged. `load_checkpoint` comes here for the files that `torch.load(weights_only=True)` refuses.
"""
from __future__ import annotations

import functools
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch import Tensor, nn

from safety.errors import InputError


class Inert:
    """Stands for whatever a pickle names, calls or builds: keeps what it is given, and has nothing that could run."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None
        self.entries: dict[Any, Any] = {}  # of a dict of a class of its own

    def __call__(self, *args: Any) -> Inert:
        return Inert(*args)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, *_: Any) -> None:
        """Of a list or set of a class of its own nothing is kept."""

    extend = add = append


STORAGES = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
            "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
            "Bool": torch.bool}
# Of these nothing is read, but in the old container the next storage begins behind them: bytes for a number.
OTHER_STORAGES = {"QInt8": 1, "QUInt8": 1, "QInt32": 4, "ComplexFloat": 8, "ComplexDouble": 16}
# The only names that become anything else. None of these runs, imports or changes anything, whatever a pickle does.
KNOWN: dict[str, Any] = {"collections.OrderedDict": dict,
                         **{f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()},
                         **{f"torch.{name}Storage": SimpleNamespace(itemsize=size)
                            for name, size in OTHER_STORAGES.items()}}
# A bytearray would be made as long as the file claims, before what should be in it is looked for. The others take what
# another part of the process has registered.
REFUSED_OPCODES = (pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4)
# By the blocks of the last stage but one, and of the first block the second layer's channels (out, in) and how many.
RESNETS = {
    (2, 64, 64, 2): "resnet18", (6, 64, 64, 2): "resnet34", (6, 64, 64, 3): "resnet50", (23, 64, 64, 3): "resnet101",
    (36, 64, 64, 3): "resnet152", (6, 128, 4, 3): "resnext50_32x4d", (23, 256, 8, 3): "resnext101_32x8d",
    (23, 256, 4, 3): "resnext101_64x4d", (6, 128, 128, 3): "wide_resnet50_2", (23, 128, 128, 3): "wide_resnet101_2"}
ENCODERS_OWN, DECODERS_OWN = "resnet.4.0.conv2.weight", "attention.encoder_att.weight"  # by which both are known
WRAPPERS = ("module", "_orig_mod")  # of DataParallel, DistributedDataParallel, torch.compile
MOST_ENTRIES, LONGEST_NAME = 300_000, 128  # more than any checkpoint has; a nest may hold itself, or one part often


class OldUnpickler(pickle._Unpickler):  # the one written in Python: in the other, five bytes can take all memory
    """Reads any pickle as plain values and stand-ins."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")  # of what Python 2 wrote, numbers as bytes too
        self.dtypes: dict[str, Any] = {}  # by storage
        self.dispatch = {code: load for code, load in super().dispatch.items() if bytes([code]) not in REFUSED_OPCODES}
        self.dispatch |= {pickle.NEWOBJ[0]: OldUnpickler.load_reduce, pickle.NEWOBJ_EX[0]: OldUnpickler.load_newobj_ex,
                          pickle.BUILD[0]: OldUnpickler.load_build}

    def find_class(self, module: str, name: str) -> Any:
        return KNOWN.get(f"{module}.{name}", Inert())

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # arguments by name
        self.load_reduce()

    def load_build(self) -> None:
        """State, for stand-ins alone: the attributes of a dict are not needed, and a class's would change it."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def persistent_load(self, saved_id: Any) -> Any:
        if saved_id[0] == "module":  # ("module", class, source file, source): PyTorch 0.4 kept the source beside it
            return saved_id[1]
        _, dtype, key, *_ = saved_id  # ("storage", type, key, place, count), in the old container also a view or None
        self.dtypes[key] = dtype
        return Inert(*saved_id)


def load_inert(path: str | Path) -> Any:
    """What a file of PyTorch's holds, as `plain` makes it.

    PyTorch 1.6 began to write a zip of `*/data.pkl` and a file for each storage. Before, a checkpoint was a row of
    pickles (magic number, version, system, data, storage keys), and then the storages.
    """
    most = 4 * Path(path).stat().st_size  # bytes of tensors: some may share their numbers, but not a thousand
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            pickled = OldUnpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
            return plain(pickled, lambda key: archive.read(f"{root}/data/{key}"), most)
    with open(path, "rb") as file:
        unpickler = OldUnpickler(file)
        _, _, _, pickled, keys = [unpickler.load() for _ in range(5)]
        storages = {}
        for key in keys:
            size = int.from_bytes(file.read(8), "little") * unpickler.dtypes[key].itemsize
            storages[key] = file.read(min(size, most))
            if len(storages[key]) < size:
                raise EOFError("the file is cut short")
    return plain(pickled, storages.__getitem__, most)


def plain(pickled: Any, read: Callable[[str], bytes], most: int) -> Any:
    """A nest of dicts with tensors and dicts in the place of their stand-ins. Nothing is made twice, however often it
    is held.

    Args:
        read: a storage's bytes, by its key.
        most: how many bytes all tensors may have.
    """
    read_once = functools.cache(lambda key: bytearray(read(key)))
    made: dict[int, Any] = {}

    def make(value: Any) -> Any:
        nonlocal most
        if id(value) in made:
            return made[id(value)]
        found = unpacked(value, read_once) if isinstance(value, Inert) else value
        if isinstance(found, Tensor):
            most -= found.nbytes
            if most < 0:
                raise pickle.UnpicklingError("its tensors are many times as large as the file")
            made[id(value)] = found.clone(memory_format=torch.contiguous_format)  # row by row
        elif isinstance(found, dict):
            made[id(value)] = copy = {}  # before it is filled: it may hold itself
            copy.update({key: make(each) if type(key) is str else each for key, each in found.items()})
        return made.get(id(value), found)

    return make(pickled)


def unpacked(value: Inert, read: Callable[[str], bytearray]) -> Any:
    """What it stands for, if that is a tensor, a module (as a dict of all that it holds), or a dict; else itself."""
    try:
        if not isinstance(value.state, dict) or "_modules" not in value.state:
            return value.entries or view_of(value, read)
        held = dict(**value.state["_parameters"], **value.state["_buffers"], **value.state["_modules"])
        held |= {name: value.state[name] for name in ["enc_image_size"] if name in value.state}
        return {name: each for name, each in held.items() if each is not None}
    except Exception:  # it is none of these, or not whole, and that can be wrong in any way
        return value


def view_of(value: Inert, read: Callable[[str], bytearray]) -> Tensor:
    """From the arguments of `Parameter(tensor, ...)` or `_rebuild_tensor(storage, offset, size, stride, ...)`."""
    if value.args[0].args[0] != "storage":
        value = value.args[0]
    storage, offset, size, stride, *_ = value.args
    _, dtype, key, _, _, *view = storage.args
    _, first, count = view[0] if view and view[0] else (None, 0, -1)
    numbers = torch.frombuffer(read(key), dtype=dtype, offset=first * dtype.itemsize, count=count)
    tensor = numbers.as_strided(size, stride, offset)  # refuses what lies outside the storage
    if tensor.numel() > len(numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(tensor.shape)} is larger than its storage")
    return tensor


def by_name(nest: Any) -> dict[str, Any]:
    """All that a nest of dicts holds, by the keys that lead there: the names of a state_dict, without wrappers'."""
    found: dict[str, Any] = {}
    waiting, entries = [("", nest)], 0
    while waiting:
        name, value = waiting.pop()
        if not isinstance(value, dict):
            found[name] = value.data if isinstance(value, nn.Parameter) else value
        elif len(name) < LONGEST_NAME:
            entries += len(value)
            if entries > MOST_ENTRIES:
                raise pickle.UnpicklingError(f"it holds more than {MOST_ENTRIES} things")
            names = {key: ".".join(part for part in key.split(".") if part not in WRAPPERS)
                     for key in reversed(value) if type(key) is str and len(key) < LONGEST_NAME}
            waiting += [(f"{name}.{names[key]}".strip("."), value[key]) for key in names]
    return found


def unwrapped(weights: dict[str, Any]) -> dict[str, Any]:
    """A state_dict without the wrappers that stand before all of its names."""
    for wrapper in WRAPPERS * 2:  # each may be within the other
        if all(type(name) is str and name.startswith(f"{wrapper}.") for name in weights):
            weights = {name.removeprefix(f"{wrapper}."): each for name, each in weights.items()}
    return weights


def beside(found: dict[str, Any], known_by: str) -> dict[str, Any]:
    """The first module's weights among which there is one of that name, or an empty dict."""
    for name in found:
        if f".{name}".endswith(f".{known_by}"):
            prefix = name.removesuffix(known_by)
            return {name.removeprefix(prefix): each for name, each in found.items() if name.startswith(prefix)}
    return {}


def from_tutorial(pickled: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A checkpoint of the original tutorial or of a fork, modules or state_dicts, wrapped or not and under whatever
    keys, as one of ours; the shapes tell the model's arguments."""
    found = by_name(pickled)
    encoder, decoder = beside(found, ENCODERS_OWN), beside(found, DECODERS_OWN)
    missing = [name for name, part in ((ENCODERS_OWN, encoder), (DECODERS_OWN, decoder)) if not part]
    if missing:
        raise InputError(f"{path}: refused, not a captioning checkpoint: no weights in it are called ..."
                         f"{' and ...'.join(missing)}, as in the original tutorial's; name one that train.py made with "
                         "--checkpoint")
    image_size = encoder.pop("enc_image_size", 14)  # a state_dict does not tell
    blocks = len({key.split(".")[2] for key in encoder if key.startswith("resnet.6.")})
    kind = (blocks, *encoder[ENCODERS_OWN].shape[:2], 3 if "resnet.4.0.conv3.weight" in encoder else 2)
    if kind not in RESNETS or type(image_size) is not int or not 0 < image_size <= 256:
        raise pickle.UnpicklingError("its encoder is none of torchvision's ResNets")
    vocab_size, embed_dim = decoder["embedding.weight"].shape
    attention_dim, encoder_dim = decoder[DECODERS_OWN].shape
    model = {"encoder": RESNETS[kind], "encoded_image_size": image_size, "attention_dim": attention_dim,
             "embed_dim": embed_dim, "decoder_dim": decoder["init_h.weight"].shape[0], "vocab_size": vocab_size,
             "encoder_dim": encoder_dim, "dropout": 0.5}
    score, word_map = pickled.get("bleu-4"), pickled.get("word_map")
    return {"encoder": encoder, "decoder": decoder, "model": model,
            "word_map": word_map if isinstance(word_map, dict) and "<start>" in word_map else None,
            "scores": {"bleu4_teacher_forced": 100 * score} if isinstance(score, float) else {}}
