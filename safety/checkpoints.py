"""Checkpoints: written whole, and read without running anything that a stranger's file may hold."""
from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safety.errors import InputError, reason
from safety.files import atomic_write
from safety.old_checkpoints import by_name, from_tutorial, load_inert, unwrapped

CHECKPOINT_FORMAT = 1
SPECIAL_WORDS = ("<start>", "<end>", "<pad>", "<unk>")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes state_dicts and plain values to one file; `torch.load(path, weights_only=True)` reads it."""
    with atomic_write(path, "wb") as file:
        torch.save({"format": CHECKPOINT_FORMAT, **state}, file)


def load_checkpoint(path: str | Path, word_map: dict[str, int] | None = None, mapped: bool = True) -> dict[str, Any]:
    """Reads a checkpoint of ours, or of the original tutorial or a fork of it, onto the CPU. Runs nothing of it.

    Args:
        word_map: for the original tutorial's checkpoints, which do not hold it.
        mapped: through a memory map, if the file system has them: of an optimizer, which captions need not, nothing is
            read. As long as the result is held, Windows lets nobody replace the file.

    Returns:
        A dict with `encoder` and `decoder` (state_dicts), `word_map`, `model` (arguments that rebuild both),
        `preprocessing`, `scores`, and `training` (for a resume; None in the original tutorial's).

    Raises:
        InputError: no such file, not a checkpoint, or one whose weights are not plain tensors, whole in the file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; name one that train.py made with --checkpoint")
    try:
        state = _unpickle(path, mapped)
        if isinstance(state, dict) and "format" not in state:
            state = {"format": CHECKPOINT_FORMAT, **from_tutorial(state, path)}
    except InputError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        if getattr(error, "errno", None):
            raise  # the system's refusal: it says nothing of what is in the file
        raise InputError(f"{path}: refused, this is no checkpoint that can be read whole and safely ({reason(error)}); "
                         "get the file again, or name another") from error
    _check_parts(state, path)
    state |= {part: unwrapped(_in_full(state, part, path)) for part in ("encoder", "decoder")}
    state["word_map"] = state["word_map"] or word_map
    _check_vocabulary(state, path)
    stripped = {"preprocessing": None, "scores": {}, "training": None}  # maybe, for publishing
    return state | {name: state.get(name, nothing) for name, nothing in stripped.items()}


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, by the names of a state_dict: one alone, among other things, or a whole module's; or
    safetensors. Runs nothing of it.

    Raises:
        InputError: there are none. ImportError: the package safetensors is not there.
    """
    try:
        with open(path, "rb") as file:
            safe = file.read(9)[8:] == b"{"  # after the length of what stands between the brackets
        state = _read_safetensors(path) if safe else _unpickle(path, mapped=False)
        if isinstance(state, dict) and isinstance(state.get("scales"), dict):  # one of ours, in 8 bits
            state = {part: _in_full(state, part, path) for part in ("encoder", "decoder")}
        weights = by_name(state)
        weights = {name: each for name, each in weights.items() if _is_whole(each)}
        if not weights:
            raise ValueError("there are no tensors in it")
    except (ImportError, InputError):
        raise
    except Exception as error:  # a file that is something else can fail in any way
        raise InputError(f"--encoder_weights {path}: not a state dict of a classifier ({reason(error)})") from error
    return weights


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise ImportError(f"{path} is in the format of safetensors, whose package is not there: pip install "
                          "safetensors") from error
    return load(Path(path).read_bytes())  # load_file would map it, which not all file systems can


def _unpickle(path: str | Path, mapped: bool) -> Any:
    """What the file holds, by PyTorch's own list of harmless names, or else with stand-ins for all names."""
    _refuse_others(path)
    if zipfile.is_zipfile(path):  # not so PyTorch's files of before 1.6
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
                raise zipfile.BadZipFile("it is compressed, as PyTorch's files never are")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what the file's maker did
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            if mapped and "unable to mmap" in str(error):
                return _unpickle(path, mapped=False)
            # It names something else: a fork's of the original tutorial, maybe, or no checkpoint.
    state = load_inert(path)
    if not isinstance(state, dict):
        raise ValueError("it holds no weights by name, but a list, a tuple or something else")
    scores = state["scores"].items() if isinstance(state.get("scores"), dict) else ()
    numbers = {name: score for name, score in scores if isinstance(score, int | float)}
    return {**state, "scores": numbers, "training": None}  # stand-ins are no scores, and cannot be resumed from


def _refuse_others(path: str | Path) -> None:
    """Names the files of other kinds that hold models too."""
    kind = None
    with open(path, "rb") as file:
        beginning = file.read(9)
    if beginning.startswith(b"\x89HDF"):
        kind = "HDF5, as Keras's models and prepared pictures are; give a file that torch.save wrote"
    elif beginning[8:] == b"{":
        kind = "in the format of safetensors, weights alone; give them to train.py with --encoder_weights"
    elif beginning[:1] == b"\x08" and beginning[2:3] == b"\x12":  # its version, then who made it
        kind = "ONNX, a graph without PyTorch's names; give the file that it was exported from"
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "model.weights.h5" in names:
                kind = "a model of Keras; give a file that torch.save wrote"
            elif any(name.endswith("/constants.pkl") for name in names):
                kind = ("TorchScript, a program, which is not run; if you trust it, "
                        f"torch.save(torch.jit.load({str(path)!r}).state_dict(), FILE) takes the weights out, "
                        "for train.py's --encoder_weights")
    if kind:
        raise InputError(f"{path}: refused, this is {kind}")


def _check_parts(state: Any, path: str | Path) -> None:
    """Every checkpoint has these parts: of a format we know, with weights that are plain tensors."""
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


def _is_whole(value: Any) -> bool:
    """Whether it is an ordinary tensor with all its numbers in memory: one number can pass for a trillion of them."""
    return (type(value) is Tensor and not value.is_quantized and value.layout == torch.strided
            and value.device.type == "cpu" and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def _in_full(state: dict[str, Any], part: str, path: str | Path) -> dict[str, Tensor]:
    """The weights of a part; where a file has them in 8 bits (training/publish.py), times the scale of each row."""
    weights, scales = state[part], state.get("scales", {})
    if not scales:
        return weights
    scales = scales.get(part) if isinstance(scales, dict) else None
    if not isinstance(scales, dict) or not all(name in weights and _is_whole(scale) and weights[name].dim() > 1 and (
            scale.shape == (len(weights[name]), *[1] * (weights[name].dim() - 1))) for name, scale in scales.items()):
        raise InputError(f"{path}: refused, the scales of its {part} do not fit the weights; get the file again, or "
                         "name another")
    return {name: each.float() * scales[name] if name in scales else each for name, each in weights.items()}


def _check_vocabulary(state: dict[str, Any], path: str | Path) -> None:
    """The word map must be whole, and of the model's size."""
    if not state["word_map"]:
        raise InputError(f"{path}: this checkpoint holds no word map; give it with --word_map WORDMAP_....json")
    if not isinstance(state["model"], dict) or type(state["model"].get("vocab_size")) is not int:
        raise InputError(f"{path}: not a captioning checkpoint, it does not tell its model's sizes; name another")
    if len(state["word_map"]) != state["model"]["vocab_size"]:
        raise InputError(f"{path}: the model knows {state['model']['vocab_size']} words, the word map has "
                         f"{len(state['word_map'])}; give the word map that the model was trained with")
    check_word_map(state["word_map"], path)


def check_word_map(word_map: Any, path: str | Path) -> None:
    """A word map's indices must be 0 to V - 1, the special words among them."""
    if not isinstance(word_map, dict) or not set(SPECIAL_WORDS) <= word_map.keys():
        raise InputError(f"{path}: not a word map, it lacks one of {' '.join(SPECIAL_WORDS)}")
    if not all(type(word) is str and type(index) is int for word, index in word_map.items()):
        raise InputError(f"{path}: not a word map, its indices are not 0 to {len(word_map) - 1} for a word each")
    if set(word_map.values()) != set(range(len(word_map))):
        raise InputError(f"{path}: not a word map, its indices are not 0 to {len(word_map) - 1}, each once")
