"""Whatever is wrong with what a command is given: one line that names it, the right exit status, nothing written.

A case is: what breaks the folder, the flags that follow, the exit status, and words that the line must hold. What the
functions below the commands refuse has its cases in their own tests (test_datasets.py, test_checkpoints.py, ...).
"""
from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import ENCODER
from PIL import Image
from test_create_input_files import image, listing, write_set
from test_datasets import BASE, CAPTIONS, WORDS, archive, old, other_archive, put  # noqa: F401 (a fixture)
from test_eval import Model

import caption
import create_input_files
import eval as evaluation
import train
from datasets import CaptionDataset, read_image
from safety.checkpoints import save_checkpoint

Break = Callable[[Path], Any]
Case = tuple[Break | None, list[str], int, list[str]]


def table(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("change, flags, status, words", cases.values(), ids=cases)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "proc" not in
            str(path.resolve())}


@pytest.fixture
def refuses(tmp_path, command, monkeypatch):
    """Runs a script on the broken folder, from within it, and expects one line and no change."""
    def check(script: Any, fixed: list[str], case: Case) -> None:
        change, flags, status, words = case
        monkeypatch.chdir(tmp_path)
        kept = change and change(tmp_path)  # such as a lock
        before = contents(tmp_path)
        code, shown = command(script, *fixed, *flags)
        assert (code, shown.count("\n"), shown.startswith(f"{script.__name__}.py: ")) == (status, 1, True), shown
        assert [each for each in words if each not in shown] == [], shown
        assert "Traceback" not in shown and "fault of this program" not in shown
        assert contents(tmp_path) == before
        del kept

    return check


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict[str, Any]:
    """A small checkpoint as it is in memory."""
    path = Model(WORDS).save(tmp_path_factory.mktemp("model") / "x.pth.tar")
    return torch.load(path, weights_only=True)


@pytest.fixture(autouse=True, scope="module")
def _states(state) -> None:
    global STATE
    STATE = state


def saved(**changes: Any) -> Break:
    """model.pth.tar of the good checkpoint with some of its parts changed."""
    return lambda folder: save_checkpoint(folder / "model.pth.tar", {**STATE, **changes})


def of_model(**changes: Any) -> Break:
    return lambda folder: saved(model={**STATE["model"], **changes})(folder)


def text(name: str, content: str | bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


# ---- caption.py ------------------------------------------------------------------------------------------------------

def words_file(content: Any) -> Break:
    """A checkpoint without words, and a word map beside it."""
    def change(folder: Path) -> None:
        saved(word_map=None)(folder)
        (folder / "words.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return change


WITH_WORDS = ["--model", "model.pth.tar", "--word_map", "words.json"]
MODEL = ["--model", "model.pth.tar"]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(proof) (w) file closefile\nshowpage\n"
HEADER = b"IHDR" + struct.pack(">IIBBBBB", 32_000, 32_000, 8, 2, 0, 0, 0)
BOMB = b"\x89PNG\r\n\x1a\n\0\0\0\r" + HEADER + struct.pack(">I", zlib.crc32(HEADER)) + b"\0\0\0\0IDAT"
CHECKPOINTS: dict[str, Case] = {
    "missing": (None, MODEL, 1, ["model.pth.tar: no such checkpoint", "train.py"]),
    "a folder": (lambda folder: (folder / "model.pth.tar").mkdir(), MODEL, 1, ["model.pth.tar: no such checkpoint"]),
    "empty": (text("model.pth.tar", ""), MODEL, 1, ["model.pth.tar: refused", "get the file again"]),
    "cut short": (lambda folder: (saved()(folder), os.truncate(folder / "model.pth.tar", 10 ** 6)), MODEL, 1,
                  ["model.pth.tar: refused", "get the file again"]),
    "a newer format": (saved(format=2), MODEL, 1, ["model.pth.tar: made by a newer version", "format 2", "update it"]),
    "a format of many lines": (saved(format="1\n2\n"), MODEL, 1, ["model.pth.tar: not a captioning checkpoint"]),
    "a tensor for a format": (saved(format=torch.ones(3)), MODEL, 1, ["model.pth.tar: not a captioning checkpoint"]),
    "other sizes": (of_model(decoder_dim=17), MODEL, 1, ["model.pth.tar: its weights", "do not fit", "size mismatch"]),
    "other network": (of_model(encoder="resnet18"), MODEL, 1, ["model.pth.tar: its weights", "do not fit"]),
    "a network that is not there": (of_model(encoder="resnet1001"), MODEL, 1,
                                    ["model.pth.tar: ", "no model resnet1001", "pip install -U torchvision"]),
    "a detector": (of_model(encoder="fasterrcnn_resnet50_fpn"), MODEL, 1, ["model.pth.tar: ", "no classifier"]),
    "a number for a network": (of_model(encoder=5), MODEL, 1, ["model.pth.tar: its weights"]),
    "no size": (lambda folder: saved(model={"encoder": ENCODER})(folder), MODEL, 1,
                ["model.pth.tar: ", "does not tell its model's sizes"]),
    "one size": (lambda folder: saved(model={"vocab_size": len(WORDS)})(folder), MODEL, 1, ["model.pth.tar: its weig"]),
    "a list of sizes": (saved(model=[1, 2]), MODEL, 1, ["model.pth.tar: ", "does not tell its model's sizes"]),
    "a size in words": (of_model(embed_dim="8"), MODEL, 1, ["model.pth.tar: its weights"]),
    "a size below nothing": (of_model(attention_dim=-8), MODEL, 1, ["model.pth.tar: its weights"]),
    "one size too many": (of_model(layers=2), MODEL, 1, ["model.pth.tar: its weights", "layers"]),
    "an impossible dropout": (of_model(dropout=7.0), MODEL, 1, ["model.pth.tar: its weights", "dropout"]),
    "a huge map": (of_model(encoded_image_size=10 ** 6), MODEL, 1, ["model.pth.tar: its weights", "1000000 pixels"]),
    "no weights": (saved(decoder={}), MODEL, 1, ["model.pth.tar: its weights", "Missing key"]),
    "weights in a list": (saved(decoder=[torch.ones(2)]), MODEL, 1, ["model.pth.tar: refused, its decoder"]),
    "numbers for weights": (saved(encoder={"resnet.0.0.weight": [1.0]}), MODEL, 1, ["refused, its encoder"]),
    "whole numbers": (lambda folder: saved(decoder={name: each.int() for name, each in STATE["decoder"].items()})(
        folder), MODEL, 1, ["model.pth.tar: its weights", "While copying"]),
    "words in a list": (saved(word_map=list(WORDS)), MODEL, 1, ["model.pth.tar: not a word map"]),
    "indices of tensors": (saved(word_map={**WORDS, "a": torch.tensor(1)}), MODEL, 1, ["model.pth.tar: not a word"]),
    "indices of floats": (saved(word_map={**WORDS, "a": 1.0}), MODEL, 1, ["model.pth.tar: not a word map"]),
    "a number for a word": (saved(word_map={7 if word == "a" else word: i for word, i in WORDS.items()}), MODEL, 1,
                            ["model.pth.tar: not a word map"]),
    "no special words": (saved(word_map={f"{i}": i for i in range(7)}), MODEL, 1, ["model.pth.tar: not a word map"]),
}
CAPTION: dict[str, Case] = {
    **CHECKPOINTS,
    "no word map at all": (saved(word_map=None), MODEL, 1, ["model.pth.tar: ", "--word_map WORDMAP_"]),
    "a word map that is missing": (saved(word_map=None), WITH_WORDS, 1, ["words.json: no such file"]),
    "a word map that is a picture": (words_file("\x89PNG"), WITH_WORDS, 1, ["words.json: not a JSON file", "again"]),
    "a word map of deep brackets": (words_file("[" * 10 ** 5), WITH_WORDS, 1, ["words.json: not a JSON file"]),
    "an index twice": (words_file({**WORDS, "a": 2}), WITH_WORDS, 1, ["words.json: not a word map", "each once"]),
    "no <end>": (words_file({"<start>": 0, "<pad>": 1, "<unk>": 2}), WITH_WORDS, 1, ["words.json: ", "<end>"]),
    "more words than the model": (words_file({**WORDS, "x": 7}), WITH_WORDS, 1, ["knows 7 words", "has 8", "give the"]),
    "an index of floats": (words_file({**WORDS, "a": 1.0}), WITH_WORDS, 1, ["words.json: not a word map"]),
    "a picture of no bytes": (text("bad.png", ""), ["--img", "bad.png"], 1, ["bad.png: ", "replace it"]),
    "half a picture": (lambda folder: os.truncate(folder / "good.png", 90), [], 1, ["good.png: ", "replace it"]),
    "a text for a picture": (text("bad.jpg", "GIF87a?"), ["--img", "good.png", "bad.jpg"], 1, ["bad.jpg: ", "repla"]),
    "a program for a picture": (text("bad.png", EPS), ["--img", "bad.png"], 1, ["bad.png: ", "EPS", "replace it"]),
    "a picture of a billion pixels": (text("bad.png", BOMB), ["--img", "bad.png"], 1, ["bad.png: ", "bomb", "replace"]),
    "a picture that cannot be read": (
        lambda folder: (folder / "bad.png").symlink_to("/proc/self/mem"), ["--img", "bad.png"], 1,
        ["bad.png: ", "replace it"]),
    "a picture that is missing": (None, ["--img", "bad.png"], 1, ["--img bad.png: no picture there"]),
    "a folder without pictures": (lambda folder: (folder / "empty").mkdir(), ["--img", "empty"], 1, ["--img empty: "]),
    "a name that clears the screen": (text("\x1b[2J.png", ""), ["--img", "\x1b[2J.png"], 1, ["\\u001b[2J.png: "]),
    "no picture asked for": (None, ["--img"], 2, ["--img", "--help"]),
    "an unknown flag": (None, ["--beams", "3"], 2, ["unrecognized arguments: --beams", "--help"]),
    "a beam in words": (None, ["--beam_size", "three"], 2, ["--beam_size/-b: three: a whole number of 1 or more"]),
    "a penalty below nothing": (None, ["--length_penalty", "-1"], 2, ["--length_penalty: -1: a number from 0 to 2"]),
    "two ways to choose": (None, ["--length_penalty", "0.7", "--consensus"], 2,
                           ["--length_penalty and --consensus", "name one"]),
    "no beam": (None, ["--beam_size", "0"], 2, ["--beam_size/-b: 0: a whole number of 1 or more"]),
    "more captions than the beam": (None, ["--n_best", "6"], 2, ["--n_best 6: a beam of 5", "widen it with --beam"]),
    "no length": (None, ["--max_len", "0"], 2, ["--max_len: 0: a whole number of 1 or more"]),
    "no batch": (None, ["--batch_size", "-1"], 2, ["--batch_size: -1: a whole number of 1 or more"]),
    "a precision that is not": (None, ["--precision", "int8"], 2, ["--precision", "float32"]),
    "results over a picture": (None, ["--json", "good.png"], 2, ["--json good.png", "another file"]),
    "figures as JPEG": (None, ["--out", "figures.jpg"], 2, ["--out figures.jpg", ".png"]),
    "no such device": (None, ["--device", "gpu"], 1, ["--device gpu", "leave the flag out"]),
}


@table(CAPTION)
def test_caption_refuses(change, flags, status, words, tmp_path, refuses):
    Image.effect_noise((9, 9), 50).save(tmp_path / "good.png")
    refuses(caption, ["--img", "good.png"], (change, flags if "--model" in flags or status == 2 else [
        *flags, "--model", str(saved_once(tmp_path))], status, words))


def saved_once(folder: Path) -> Path:
    """The good checkpoint, written once for all tests."""
    path = folder.parent / "good_model.pth.tar"
    if not path.exists():
        save_checkpoint(path, STATE)
    return path


# ---- eval.py ---------------------------------------------------------------------------------------------------------

def pictures(make: Callable[[h5py.File, Path], Any], name: str = "images") -> Break:
    """The archive's pictures (or other numbers), made anew."""
    def change(folder: Path) -> None:
        with h5py.File(archive(folder, "VAL"), "a") as file:
            file.pop(name, None)
            make(file, folder)
    return change


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((1, 3, 256, 256), "uint8")
    layout[:] = h5py.VirtualSource(archive(folder), "images", (2, 3, 256, 256))[:1]
    file.create_virtual_dataset("images", layout)


def locked(folder: Path) -> Any:
    file = open(archive(folder, "VAL"), "rb")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def of_other_base(folder: Path) -> None:
    """Made with one caption each."""
    put(folder, "VAL_CAPTIONS", CAPTIONS["VAL"][:1])
    put(folder, "VAL_CAPLENS", [4])


ARCHIVE = f"VAL_IMAGES_{BASE}.hdf5"
REFERENCES = f"VAL_REFERENCES_{BASE}.json"
DATA: dict[str, Case] = {
    "a link to another file": (pictures(lambda h, folder: h.update(images=h5py.ExternalLink(
        str(archive(folder)), "/images"))), [], 1, [ARCHIVE, "not in the file itself", "--overwrite"]),
    "a link within the file": (pictures(lambda h, _: h.update(images=h5py.SoftLink("/other"))), [], 1,
                               [ARCHIVE, "not in the file itself"]),
    "pixels of another file": (pictures(lambda h, folder: h.create_dataset(
        "images", (1, 3, 256, 256), "uint8", external=[("/etc/passwd", 0, 196_608)])), [], 1,
        [ARCHIVE, "not in the file itself"]),
    "a view of another file": (pictures(virtual), [], 1, [ARCHIVE, "not in the file itself"]),
    "ids of another file": (pictures(lambda h, folder: h.update(image_ids=h5py.ExternalLink(
        str(archive(folder)), "/images")), "image_ids"), [], 1, [ARCHIVE, "its image_ids are not in the file itself"]),
    "a group for pictures": (pictures(lambda h, _: h.create_group("images")), [], 1, [ARCHIVE, "not in the file"]),
    "pictures for ever": (pictures(lambda h, _: h.create_dataset("images", (10 ** 12, 3, 256, 256), "uint8", chunks=(
        1, 3, 256, 256))), [], 1, [ARCHIVE, "do not belong together", "--overwrite"]),
    "ids in words": (pictures(lambda h, _: h.update(image_ids=["one"]), "image_ids"), [], 1, [ARCHIVE, "belong toge"]),
    "ids for ever": (pictures(lambda h, _: h.create_dataset("image_ids", (10 ** 13,), "int64", chunks=(1,)),
                              "image_ids"), [], 1, [ARCHIVE, "do not belong together"]),
    "no captions each": (pictures(lambda h, _: h.attrs.modify("captions_per_image", 0), "-"), [], 1, [ARCHIVE]),
    "locked": (locked, [], 1, [ARCHIVE, "another program is writing it", "try again"]),
    "captions of another base": (of_other_base, [], 1, [ARCHIVE, "1 captions", "do not belong together"]),
    "a word below 0": (lambda folder: put(folder, "VAL_CAPTIONS", [[5, -1, 4, 6, 1], [5, 2, 3, 6, 0]]), [], 1,
                       [ARCHIVE, "words from -1", "--overwrite"]),
    "an empty caption": (lambda folder: (put(folder, "VAL_CAPTIONS", [[5, 0], [0, 0]]), put(
        folder, "VAL_CAPLENS", [1, 0])), [], 1, [ARCHIVE, "do not belong together"]),
    "captions in a number": (lambda folder: put(folder, "VAL_CAPTIONS", "5"), [], 1, [ARCHIVE, "cannot be read"]),
    "captions in a row": (lambda folder: put(folder, "VAL_CAPTIONS", [5, 6]), [], 1, [ARCHIVE, "belong together"]),
    "captions of deep brackets": (lambda folder: put(folder, "VAL_CAPTIONS", "[" * 10 ** 5), [], 1,
                                  [f"VAL_CAPTIONS_{BASE}.json: not a JSON file"]),
    "references of numbers": (lambda folder: put(folder, "VAL_REFERENCES", [[[1, 2]]]), [], 1,
                              [REFERENCES, "other than words", "--overwrite"]),
    "a picture without references": (lambda folder: put(folder, "VAL_REFERENCES", [[]]), [], 1, [REFERENCES]),
    "references in a number": (lambda folder: put(folder, "VAL_REFERENCES", "1"), [], 1, [REFERENCES]),
}
EVAL: dict[str, Case] = {
    **DATA,
    "a checkpoint that does not fit": (of_model(embed_dim=9), ["--checkpoint", "model.pth.tar"], 1,
                                       ["model.pth.tar: its weights", "do not fit"]),
    "a split that is not": (None, ["--split", "DEV"], 2, ["--split", "'DEV'", "TEST"]),
    "a split without files": (None, ["--split", "TEST"], 1, [f"TEST_CAPTIONS_{BASE}.json: no such file", "create_"]),
    "a path for a name": (None, ["--data_name", "../x"], 2, ["--data_name ../x", "--data_folder"]),
    "a penalty that is no number": (None, ["--length_penalty", "nan"], 2, ["--length_penalty: nan", "from 0 to 2"]),
    "one beam of none": (None, ["--beam_size", "1", "0"], 2, ["--beam_size: 0: a whole number of 1 or more"]),
    "workers below nothing": (None, ["--workers", "-1"], 2, ["--workers: -1: a whole number of 0 or more"]),
    "a file for --out": (None, ["--out", ARCHIVE], 2, [f"--out {ARCHIVE}", "folder"]),
    "a folder for --json": (None, ["--json", "."], 2, ["--json .", "file"]),
    "a word map that is missing": (None, ["--word_map", "words.json"], 1, ["words.json: no such file"]),
}


@pytest.mark.usefixtures("old")
@table(EVAL)
def test_eval_refuses(change, flags, status, words, tmp_path, refuses):
    refuses(evaluation, ["--data_folder", ".", "--data_name", BASE, "--split", "VAL", "--device", "cpu", "--checkpoint",
                         str(saved_once(tmp_path))], (change, flags, status, words))


# ---- train.py --------------------------------------------------------------------------------------------------------

CHECKPOINT = ["--checkpoint", "model.pth.tar"]
RESUMED = ["--checkpoint", "model.pth.tar", "--emb_dim", "512", "--encoder", "resnet101"]
VECTORS = ["--embeddings", "vectors.txt"]


def weights(content: dict[str, Any]) -> Break:
    return lambda folder: torch.save(content, folder / "weights.pt")


TRAIN: dict[str, Case] = {
    "no rate": (None, ["--decoder_lr", "0"], 2, ["--decoder_lr: 0: a number above 0"]),
    "a rate that is no number": (None, ["--encoder_lr", "nan"], 2, ["--encoder_lr: nan: a number above 0"]),
    "an endless rate": (None, ["--decoder_lr", "inf"], 2, ["--decoder_lr: inf: a number above 0"]),
    "gradients cut to nothing": (None, ["--grad_clip", "-5"], 2, ["--grad_clip: -5: a number above 0"]),
    "a weight below nothing": (None, ["--alpha_c", "-1"], 2, ["--alpha_c: -1: a number of 0 or more"]),
    "minutes that are no number": (None, ["--checkpoint_minutes", "nan"], 2, ["--checkpoint_minutes: nan: ", "0 or"]),
    "a seed below nothing": (None, ["--seed", "-1"], 2, ["--seed: -1: a whole number from 0 to 4294967295"]),
    "a seed without end": (None, ["--seed", "9" * 30], 2, ["99: a whole number from 0 to 4294967295"]),
    "all dropped": (None, ["--dropout", "1"], 2, ["--dropout: 1: a number from 0 to below 1"]),
    "more than always": (None, ["--scheduled_sampling", "1.1"], 2, ["--scheduled_sampling: 1.1: a number from 0 to 1"]),
    "a decoder that is not there": (None, ["--decoder", "gru"], 2, ["--decoder gru", "is lstm", "take_it_apart.md"]),
    "all smoothed": (None, ["--label_smoothing", "1"], 2, ["--label_smoothing: 1: a number from 0 to below 1"]),
    "an unknown schedule": (None, ["--schedule", "sine"], 2, ["--schedule", "plateau", "cosine"]),
    "a recipe that is not there": (None, ["@nothing.txt"], 2, ["nothing.txt"]),
    "four stages of rates": (None, ["--decoder_lr", "1", "2", "3", "4"], 2, ["--decoder_lr takes one number"]),
    "four stages of epochs": (None, ["--epochs", "1", "2", "3", "4"], 2, ["--epochs takes one number"]),
    "no captions": (None, ["--batch_size", "0"], 2, ["--batch_size: 0: a whole number of 1 or more"]),
    "no words": (None, ["--emb_dim", "0"], 2, ["--emb_dim: 0: a whole number of 1 or more"]),
    "a fourth stage": (None, ["--stage", "4"], 2, ["--stage", "'4'"]),
    "fine-tuning of nothing": (None, ["--stage", "2"], 2, ["--stage 2", "--checkpoint"]),
    "frozen embeddings of nowhere": (None, ["--freeze_embeddings"], 2, ["--freeze_embeddings", "--embeddings"]),
    "a path for a name": (None, ["--data_name", "/../../x"], 2, ["--data_name /../../x", "--data_folder"]),
    "a number in words": (None, ["--epochs", "many"], 2, ["--epochs: many: a whole number of 1 or more"]),
    "vectors that are missing": (None, VECTORS, 1, ["--embeddings vectors.txt", "No such file"]),
    "vectors in a folder": (lambda folder: (folder / "vectors.txt").mkdir(), VECTORS, 1, ["--embeddings vectors.txt"]),
    "vectors of no numbers": (text("vectors.txt", "a nan 1\n"), VECTORS, 1, ["vectors.txt, line 1", "not finite"]),
    "endless vectors": (text("vectors.txt", "b 1 1\na 1 1e999\n"), VECTORS, 1, ["vectors.txt, line 2", "not finite"]),
    "vectors of one length and another": (text("vectors.txt", "a 1 2\ndog 1 2 3\n"), VECTORS, 1,
                                          ["vectors.txt, line 2: 3 numbers", "GloVe"]),
    "vectors of no text": (text("vectors.txt", b"2 3\n\xff\xfe\x00"), VECTORS, 1, ["vectors.txt", "GloVe"]),
    "weights of no file": (text("weights.pt", "x"), ["--encoder_weights", "weights.pt"], 1, ["weights.pt: not a st"]),
    "weights of another network": (weights({"x": torch.ones(2)}), ["--encoder_weights", "weights.pt"], 1,
                                   ["--encoder_weights weights.pt", "0 of the trunk's", "name the network"]),
    "weights of code": (weights({"x": print}), ["--encoder_weights", "weights.pt"], 1, ["weights.pt: not a state"]),
    "a detector": (None, ["--encoder", "ssd300_vgg16"], 1, ["--encoder ssd300_vgg16", "no classifier"]),
    "a run of other embeddings": (saved(), [*RESUMED, "--emb_dim", "9"], 1, ["model.pth.tar", "--emb_dim 8", "not 9"]),
    "a run of another network": (saved(), [*RESUMED, "--encoder", "vgg16"], 1, ["model.pth.tar", f"--encoder {ENCODER}",
                                                                             "not vgg16"]),
    "a run of another map": (saved(), [*RESUMED, "--encoded_image_size", "4"], 1, ["--encoded_image_size 3", "not 4"]),
    "a run of another LSTM": (saved(), [*RESUMED, "--decoder_dim", "1"], 1, ["--decoder_dim 16", "not 1"]),
    "a run of another attention": (saved(), [*RESUMED, "--attention_dim", "1"], 1, ["--attention_dim 8", "not 1"]),
    "a run of other words": (saved(word_map={**WORDS, "a": 2, "dog": 1}), RESUMED, 1, ["model.pth.tar", "other order"]),
    "a checkpoint without weights": (saved(decoder={}), RESUMED, 1, ["model.pth.tar: its weights", "do not fit"]),
    "a checkpoint cut short": (text("model.pth.tar", b"PK\x03\x04"), CHECKPOINT, 1, ["model.pth.tar: refused"]),
    "pictures of a link": (lambda folder: other_archive(lambda h: (h.pop("images"), h.update(
        images=h5py.ExternalLink(str(archive(folder, "VAL")), "/images"))))(folder), [], 1,
        [f"TRAIN_IMAGES_{BASE}.hdf5", "not in the file itself"]),
    "an output folder that is a file": (None, ["--output_folder", f"WORDMAP_{BASE}.json", "--epochs", "1", "--stage",
                                               "1"], 1, [f"WORDMAP_{BASE}.json"]),
}


@pytest.mark.usefixtures("old")
@table(TRAIN)
def test_train_refuses(change, flags, status, words, tmp_path, refuses):
    fixed = ["--data_folder", ".", "--data_name", BASE, "--output_folder", "out", "--device", "cpu", "--encoder",
             ENCODER, "--encoder_weights", "none", "--emb_dim", "8", "--attention_dim", "8", "--decoder_dim", "16"]
    refuses(train, fixed, (change, flags, status, words))


# ---- create_input_files.py -------------------------------------------------------------------------------------------

def data(*images: Any) -> Break:
    return lambda folder: (folder / "set.json").write_text(json.dumps({"images": list(images)}))


def of_tokens(*tokens: Any) -> Break:
    return data({"filename": "0.png", "split": "train", "sentences": [{"tokens": list(tokens)}]})


def linked(folder: Path) -> None:
    data(image("link.png", "train", "a"))(folder)
    (folder / "link.png").symlink_to("/etc/passwd")


def linked_folder(folder: Path) -> None:
    data(image("link/../etc/passwd", "train", "a"))(folder)
    (folder / "link").symlink_to("/etc")


TABLE = ["--captions_csv", "mine.csv"]
CREATE: dict[str, Case] = {
    "a path upwards": (data(image("../../../../../../../../etc/passwd", "train", "a")), [], 1,
                       ["leads to /etc/passwd by way of '..'", "--image_folder"]),
    "a path from the root": (data(image("/etc/passwd", "train", "a")), [], 1, ["leads to /etc/passwd, outside ."]),
    "one's own link to no picture": (linked, [], 1, ["link.png: this picture cannot be read", "replace it"]),
    "a path upwards from a link": (linked_folder, [], 1, ["link/../etc/passwd leads to /etc/passwd by way of '..'"]),
    "a table's path upwards": (text("mine.csv", "image,caption\n/etc/passwd,a\n"), TABLE, 1, ["/etc/passwd, outside"]),
    "a folder for a picture": (data(image(".", "train", "a")), [], 1, ["1 of 1 pictures are missing"]),
    "a name with a zero": (data(image("0\0.png", "train", "a")), [], 1, ["0\\u0000.png", "missing"]),
    "a name that clears the screen": (data(image("\x1b[2J\x9b2J", "train", "a")), [], 1, ["\\u001b[2J\\u009b2J"]),
    "a name in a list": (data(image(["0.png"], "train", "a")), [], 1, ["set.json: not in Karpathy's layout"]),
    "a split in a list": (data(image("0.png", ["train"], "a")), [], 1, ["set.json: not in Karpathy's layout"]),
    "only splits that are not": (data(image("0.png", "dev", "a")), [], 1, ["set.json: no picture of the split train"]),
    "numbers for words": (of_tokens(1, 2), [], 1, ["set.json: ", "no list of words"]),
    "nothing for words": (of_tokens("a", None), [], 1, ["set.json: ", "no list of words"]),
    "lists for words": (of_tokens(["a"]), [], 1, ["set.json: ", "no list of words"]),
    "an endless id": (text("set.json", '{"images": [{"filename": "0.png", "split": "train", "imgid": Infinity, '
                                       '"sentences": [{"tokens": ["a"]}]}]}'), [], 1, ["set.json: not in Karpathy's"]),
    "an id too large": (data(image("0.png", "train", "a", imgid=10 ** 30)), [], 1, ["set.json: not in Karpathy's"]),
    "an id twice": (data(image("0.png", "train", "a", imgid=3), image("1.png", "train", "b", imgid=3)), [], 1,
                    ["set.json: 2 pictures of TRAIN have the id 3"]),
    "deep brackets": (text("set.json", "[" * 10 ** 5), [], 1, ["set.json: not a JSON file"]),
    "no text": (text("set.json", b"\xff\xfe\x00{"), [], 1, ["set.json: not a JSON file"]),
    "a picture for a JSON": (text("set.json", b"\x89PNG\r\n\x1a\n"), [], 1, ["set.json: not a JSON file"]),
    "a folder for a JSON": (None, ["--karpathy_json_path", "."], 1, [".: no such file", "--karpathy_json_path"]),
    "a picture of no bytes": (text("1.png", ""), [], 1, ["1.png: ", "replace it"]),
    "half a picture": (lambda folder: os.truncate(folder / "1.png", 80), [], 1, ["1.png: ", "replace it"]),
    "a program for a picture": (text("1.png", EPS), [], 1, ["1.png: ", "EPS", "replace it"]),
    "a picture of a billion pixels": (text("1.png", BOMB), [], 1, ["1.png: ", "bomb", "replace it"]),
    "an output folder that is a file": (None, ["--output_folder", "0.png"], 1, ["0.png"]),
    "no captions": (None, ["--captions_per_image", "0"], 2, ["--captions_per_image", "1 or more"]),
    "two sources": (None, TABLE, 2, ["--captions_csv and --karpathy_json_path"]),
    "a path for a name": (None, ["--dataset", "../x"], 2, ["--dataset is a name"]),
    "a frequency below nothing": (None, ["--min_word_freq", "-1"], 2,
                                  ["--min_word_freq: -1: a whole number of 0 or more"]),
    "workers in words": (None, ["--workers", "all"], 2, ["--workers: all: a whole number of 1 or more"]),
}


@table(CREATE)
def test_create_input_files_refuses(change, flags, status, words, tmp_path, refuses):
    write_set(tmp_path, [image(f"{i}.png", "train", "a b", "c") for i in range(3)])
    source = [] if change and flags == TABLE else ["--karpathy_json_path", "set.json"]
    (tmp_path / "out").mkdir()
    refuses(create_input_files, ["--dataset", "mine", *source, "--output_folder", "out", "--min_word_freq", "0",
                                 "--workers", "1"], (change, flags, status, words))
    assert listing(tmp_path / "out") == []


# ---- strange, and fine -----------------------------------------------------------------------------------------------

def strange_pictures(folder: Path) -> list[str]:
    noise = Image.effect_noise((60, 40), 90)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.effect_noise((20_000, 1), 90).save(folder / "wide.png")
    Image.effect_noise((1, 20_000), 90).save(folder / "high.png")
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    noise.convert("RGB").save(folder / "turned.jpg", exif=turned)
    noise.convert("CMYK").save(folder / "ink.jpg")
    noise.convert("P").save(folder / "palette.png", transparency=3)
    Image.fromarray(np.asarray(noise).astype(np.uint16) * 257).save(folder / "deep.png")
    noise.save(folder / "moving.gif", save_all=True, append_images=[noise.rotate(90), noise.rotate(180)])
    return sorted(path.name for path in folder.iterdir())


def test_strange_pictures_are_prepared_and_captioned(tmp_path, command):
    """One pixel, twenty thousand in a row, turned by EXIF, CMYK, with a clear colour, of 16 bits, moving."""
    (tmp_path / "in").mkdir()
    names = strange_pictures(tmp_path / "in")
    write_set(tmp_path / "in", [image(name, "train", "a b") for name in names])
    flags = ["--dataset", "mine", "--karpathy_json_path", tmp_path / "in" / "set.json", "--workers", 1]
    assert command(create_input_files, *flags, "--output_folder", tmp_path / "out") == (0, "")
    stored = CaptionDataset(tmp_path / "out", "mine_5_cap_per_img_5_min_word_freq", "TRAIN").images
    assert all((stored[i] == read_image(tmp_path / "in" / name)).all() for i, name in enumerate(names))
    flags = ["--img", *(tmp_path / "in" / name for name in names), "--model", saved_once(tmp_path), "--device", "cpu"]
    warning = f"warning: {tmp_path / 'in' / 'dot.png'} is of one colour; what is said of it means nothing\n"
    assert command(caption, *flags, "--max_len", 1, "--json", tmp_path / "captions.json") == (0, warning)
    assert len(json.loads((tmp_path / "captions.json").read_text())) == len(names) == 8


@pytest.mark.parametrize("flags, unused", [
    (["--stage", "1", "--augment"], ["--augment"]),
    (["--stage", "1", "--encoder_lr", "0.1", "--augment"], ["--augment", "--encoder_lr"]),
    (["--stage", "2", "--checkpoint", "x", "--cache_features", "--augment"], ["--cache_features"]),
    (["--stage", "3", "--checkpoint", "x", "--cache_features", "--augment", "--bucket"], ["--augment", "--bucket"]),
    (["--stage", "3", "--checkpoint", "x", "--fine_tune_encoder", "--cache_features", "--bucket"],
     ["--cache_features", "--bucket"]),
    (["--cache_features", "--augment", "--encoder_lr", "0.1"], [])])
def test_flags_that_a_stage_does_not_use_are_named_and_fine(flags, unused):
    """A recipe for both stages serves one of them, too."""
    args = train.get_parser().parse_args(flags)
    train.check_arguments(args)
    assert train.unused_flags(args) == unused


# ---- the real commands -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, flags, status, words", [
    ("caption.py", ["--img", "x", "--beam_size", "0"], 2, "1 or more"),
    ("create_input_files.py", ["--karpathy_json_path", "set.json", "--debug"], 1, "not a JSON file")])
def test_a_command_ends_as_it_should(script, flags, status, words, tmp_path):
    (tmp_path / "set.json").write_text("{")
    path = Path(caption.__file__).with_name(script)
    done = subprocess.run([sys.executable, path, *flags], capture_output=True, text=True, cwd=tmp_path)
    *traceback, line = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (status, "") and line.startswith(f"{script}: ") and words in line
    assert bool(traceback) == ("--debug" in flags) == ("Traceback" in done.stderr)
