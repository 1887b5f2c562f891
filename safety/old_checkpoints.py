"""Checkpoints of the original tutorial, pickles of whole modules, read without running anything of them.

A pickle is a program that may call whatever it names. Here each name of a fixed list stands for something inert, and
any other is refused. `load_checkpoint` comes here for the files that `torch.load(weights_only=True)` refuses.
"""
from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


class Inert:
    """Stands for what an old checkpoint names: keeps what it is given, and has nothing that could run."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:  # without it a pickle could set any attribute, of this class too
        self.state = state


LAYERS = """container.Sequential conv.Conv2d batchnorm.BatchNorm2d pooling.MaxPool2d pooling.AdaptiveAvgPool2d
    linear.Linear sparse.Embedding rnn.LSTMCell dropout.Dropout activation.ReLU activation.Sigmoid activation.Softmax
    activation.Tanh"""
OTHERS = """models.Encoder models.Attention models.DecoderWithAttention torchvision.models.resnet.Bottleneck
    torchvision.models.resnet.BasicBlock torch.optim.adam.Adam torch.nn.parameter.Parameter torch._utils._rebuild_tensor
    torch._utils._rebuild_tensor_v2 torch._utils._rebuild_parameter torch.nn.backends.thnn._get_thnn_function_backend"""
# What each name in an old checkpoint becomes. None of these runs, imports or changes anything, whatever a pickle does.
ALLOWED: dict[str, Any] = {
    **{f"torch.nn.modules.{name}": Inert for name in LAYERS.split()}, **dict.fromkeys(OTHERS.split(), Inert),
    "builtins.dict": dict, "builtins.set": set, "collections.OrderedDict": dict,
    "collections.defaultdict": collections.defaultdict, "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64, "torch.HalfStorage": torch.float16, "torch.LongStorage": torch.int64}


class OldUnpickler(pickle._Unpickler):  # the one written in Python: in the other, five bytes can take all memory
    """Reads the original tutorial's pickles as inert stand-ins; a name that is not in the list is refused."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")
        # A bytearray would be made as long as the file claims, before what should be in it is looked for.
        self.dispatch = {code: load for code, load in super().dispatch.items() if code != pickle.BYTEARRAY8[0]}
        self.item_sizes: dict[str, int] = {}  # bytes a number, by storage

    def find_class(self, module: str, name: str) -> Any:
        name = f"{module}.{name}".replace("__builtin__.", "builtins.")  # Python 2's name, kept by pickle's protocol 2
        if name not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {name!r}, which no captioning checkpoint needs")
        return ALLOWED[name]

    def persistent_load(self, saved_id: Any) -> Any:
        if saved_id[0] == "module":  # ("module", class, source file, source): PyTorch 0.4 kept the source beside it
            return saved_id[1]
        _, dtype, key, *_ = saved_id  # ("storage", type, key, place, count), in the old container also a view or None
        self.item_sizes[key] = dtype.itemsize
        return Inert(*saved_id)


def load_pickled_modules(path: str | Path) -> dict[str, Any]:
    """The original tutorial's checkpoint, a pickle of whole modules, as ours; the shapes tell the model's arguments."""
    pickled, storages = read_container(path)
    encoder, decoder = (state_dict(pickled[name], storages) for name in ("encoder", "decoder"))
    image_size = pickled["encoder"].state["enc_image_size"]
    blocks = len({key.split(".")[2] for key in encoder if key.startswith("resnet.6.")})
    resnets = {2: "resnet18", 6: "resnet50" if "resnet.6.0.conv3.weight" in encoder else "resnet34",
               23: "resnet101", 36: "resnet152"}  # by the number of blocks in the last stage but one
    if blocks not in resnets or type(image_size) is not int or not 0 < image_size <= 256:
        raise pickle.UnpicklingError("its encoder is none of torchvision's ResNets")
    vocab_size, embed_dim = decoder["embedding.weight"].shape
    attention_dim, encoder_dim = decoder["attention.encoder_att.weight"].shape
    model = {"encoder": resnets[blocks], "encoded_image_size": image_size, "attention_dim": attention_dim,
             "embed_dim": embed_dim, "decoder_dim": decoder["init_h.weight"].shape[0], "vocab_size": vocab_size,
             "encoder_dim": encoder_dim, "dropout": 0.5}
    scores = {"bleu4_teacher_forced": 100 * float(pickled.get("bleu-4", math.nan))}
    return {"encoder": encoder, "decoder": decoder, "word_map": None, "model": model, "scores": scores}


def read_container(path: str | Path) -> tuple[Any, dict[str, bytearray]]:
    """What was pickled, and each storage's bytes.

    PyTorch 1.6 began to write a zip of `*/data.pkl` and a file for each storage. Before, a checkpoint was a row of
    pickles (magic number, version, system, data, storage keys), and then the storages.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0]
            unpickler = OldUnpickler(io.BytesIO(archive.read(f"{root}/data.pkl")))
            pickled = unpickler.load()
            return pickled, {key: bytearray(archive.read(f"{root}/data/{key}")) for key in unpickler.item_sizes}
    with open(path, "rb") as file:
        unpickler = OldUnpickler(file)
        _, _, _, pickled, keys = [unpickler.load() for _ in range(5)]
        storages = {}
        for key in keys:
            size = int.from_bytes(file.read(8), "little") * unpickler.item_sizes[key]
            storages[key] = bytearray(file.read(min(size, Path(path).stat().st_size)))
            if len(storages[key]) < size:
                raise EOFError("the file is cut short")
    return pickled, storages


def state_dict(module: Inert, storages: dict[str, bytearray], prefix: str = "") -> dict[str, Tensor]:
    """What `module.state_dict()` would have been."""
    held = module.state
    tensors = {**held["_parameters"], **held["_buffers"]}
    state = {prefix + name: to_tensor(value, storages) for name, value in tensors.items() if value is not None}
    for name, child in held["_modules"].items():
        state |= state_dict(child, storages, f"{prefix}{name}.")
    return state


def to_tensor(value: Inert, storages: dict[str, bytearray]) -> Tensor:
    """From the arguments of `Parameter(tensor, ...)` or `_rebuild_tensor(storage, offset, size, stride, ...)`."""
    if value.args[0].args[0] != "storage":
        value = value.args[0]
    storage, offset, size, stride, *_ = value.args
    _, dtype, key, _, _, *view = storage.args
    _, first, count = view[0] if view and view[0] else (None, 0, -1)
    numbers = torch.frombuffer(storages[key], dtype=dtype, offset=first * dtype.itemsize, count=count)
    tensor = numbers.as_strided(size, stride, offset)  # refuses what lies outside the storage
    if tensor.numel() > len(numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(tensor.shape)} is larger than its storage")
    return tensor.clone(memory_format=torch.contiguous_format)  # row by row, as PyTorch would have made it
