"""A stranger's file runs nothing, reads nothing beside itself, and shows nothing that a terminal would obey.

Attacks on the original tutorial's container stand in test_checkpoints.py; JSON paths that leave the image folder and
HDF5 files that point into others in test_bad_input.py. Here are those on PyTorch's own, and on whoever looks at words.
fuzz_checkpoints.py looks for more.
"""
from __future__ import annotations

import builtins
import codecs
import functools
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER
from PIL import EpsImagePlugin, Image
from test_bad_input import EPS
from test_checkpoints import Call, Name, Raw, opcodes
from test_datasets import BASE, old, put  # noqa: F401 (a fixture)
from test_eval import Model
from torch import nn

import caption
import eval as evaluation
import train
from datasets import read_image, read_word_map
from models import Encoder
from safety.checkpoints import load_checkpoint, load_weights, save_checkpoint
from safety.errors import InputError

WORDS = {word: index for index, word in enumerate(("<pad>", "a", "<unk>", "<start>", "<end>"))}
REACHING_OUT = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "os.mkdir", "shutil",
                "subprocess", "socket", "webbrowser")
events: list[str] = []
watched: list[Path] = []  # the only file that may be opened, while there is one


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python tells of whatever reaches out."""
    if watched and (event.startswith(REACHING_OUT) or (event == "open" and arguments[0] != -1 and (
            "w" in str(arguments[1]) or str(arguments[0]) != str(watched[0])))):
        events.append(f"{event} {arguments}")


@pytest.fixture(scope="module", autouse=True)
def _watch(tmp_path_factory) -> None:
    """Python opens its own modules when it first needs them, so a good and a bad file are read before."""
    path = tmp_path_factory.mktemp("warm") / "x.pth.tar"
    for content in (good(), {"format": 1, "x": print}):
        torch.save(content, path)
        with suppress(InputError):
            load_checkpoint(path)
    codecs.lookup("cp437")  # of names in a zip
    sys.addaudithook(watch)  # for good: Python knows no way to take it away


# ---- checkpoints -----------------------------------------------------------------------------------------------------

class Reduced:
    """What it becomes is decided by whoever wrote it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


class Loud:
    """Does something when its state comes back."""

    def __init__(self, proof: Path) -> None:
        self.proof = str(proof)

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["proof"]).touch()


class Dressed(nn.Linear):
    """A module with a class of its own."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        Path(state["proof"]).touch()


def good(**changes: Any) -> dict[str, Any]:
    return {"format": 1, "encoder": {}, "decoder": {"w": torch.zeros(3)}, "word_map": WORDS,
            "model": {"vocab_size": len(WORDS)}, **changes}


def dressed(proof: Path) -> nn.Module:
    module = Dressed(1, 1)
    module.proof = str(proof)
    return module


def hooked(proof: Path) -> nn.Module:
    module = nn.Linear(1, 1)
    module.register_forward_hook(functools.partial(os.system, f"touch '{proof}'"))
    return module


def parameter_with_hooks(proof: Path) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.extra = OrderedDict({0: "hook"})
    return parameter


# What a checkpoint holds beside the rest, or instead of it. The first ones run if Python's own unpickler reads them.
REAL: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda proof: good(scores=Reduced(os.system, f"touch '{proof}'")),
    "subprocess": lambda proof: good(scores=Reduced(subprocess.call, ["touch", str(proof)])),
    "eval": lambda proof: good(scores=Reduced(builtins.eval, f"open({str(proof)!r}, 'w')")),
    "exec": lambda proof: good(scores=Reduced(builtins.exec, f"open({str(proof)!r}, 'w')")),
    "open": lambda proof: good(scores=Reduced(builtins.open, str(proof), "w")),
    "Path.touch": lambda proof: good(scores=Reduced(Path.touch, proof)),
    "os.mkdir": lambda proof: good(scores=Reduced(os.mkdir, str(proof))),
    "deep in the training": lambda proof: good(training={"log": [{"a": (Reduced(os.system, f"touch '{proof}'"),)}]}),
    "a word": lambda proof: good(word_map={**WORDS, Reduced(os.system, f"touch '{proof}'"): 5}),
    "a weight": lambda proof: good(decoder={"w": Reduced(os.system, f"touch '{proof}'")}),
    "the whole file": lambda proof: Reduced(os.system, f"touch '{proof}'"),
    "a function of a function": lambda proof: good(scores=Reduced(map, os.system, [f"touch '{proof}'"])),
    "a class's __setstate__": lambda proof: good(scores=Loud(proof)),
    "a module's class": lambda proof: good(decoder=nn.Sequential(nn.Sequential(dressed(proof)))),
    "torch.save": lambda proof: good(scores=Reduced(torch.save, {}, str(proof))),
}
INERT: dict[str, Callable[[Path], Any]] = {
    "a hook": lambda proof: good(decoder=hooked(proof)),
    "a parameter with attributes": lambda proof: good(decoder={"w": parameter_with_hooks(proof)}),
    "one number for a trillion": lambda _: good(decoder={"w": torch.zeros(1).expand(10 ** 6, 10 ** 6)}),
    "a trillion zeros": lambda _: good(decoder={"w": torch.sparse_coo_tensor(
        size=(10 ** 6, 10 ** 6), check_invariants=True)}),
    "a trillion of nothing": lambda _: good(decoder={"w": torch.zeros(10 ** 6, 10 ** 6, device="meta")}),
    "an allowed function, and nonsense": lambda _: good(scores=Reduced(torch._utils._rebuild_tensor_v2, 1, 2, (3,), 4,
                                                                      False, {})),
    "an allowed function, and too much": lambda _: good(scores=Reduced(torch._utils._rebuild_tensor_v2, *range(20))),
    "an allowed class, called": lambda _: good(scores=Reduced(nn.Parameter, 5, 6, 7)),
}


# What stands where a weight or a word should, or can be no plain tensor that is whole in the file. All else is not
# needed: such files were refused until odd metadata became no reason to; now it is as if it were not there.
REFUSED = {"a word", "a weight", "the whole file", "a module's class", "a parameter with attributes",
           "one number for a trillion", "a trillion zeros", "a trillion of nothing"}


@contextmanager
def watching(path: Path, proof: Path) -> Iterator[None]:
    """Nothing of the file runs, and no other is opened."""
    events.clear()
    watched.append(path)
    try:
        yield
    finally:
        watched.clear()
    assert not proof.exists() and events == []


def refused_and_inert(path: Path, proof: Path) -> None:
    with watching(path, proof), pytest.raises(InputError, match=re.escape(path.name)) as error:
        load_checkpoint(path, WORDS)
    assert "\n" not in str(error.value)


def read_and_inert(path: Path, proof: Path) -> None:
    """Only weights and words of it are left."""
    with watching(path, proof):
        loaded = load_checkpoint(path, WORDS)
    assert all(type(each) is torch.Tensor for part in ("encoder", "decoder") for each in loaded[part].values())
    assert {name: loaded[name] for name in loaded if name != "decoder"} == {
        **{name: value for name, value in good().items() if name != "decoder"}, "training": None, "scores": {},
        "preprocessing": None}


@pytest.mark.parametrize("attack", [*REAL, *INERT])
def test_a_hostile_checkpoint_is_inert(attack, tmp_path):
    torch.save({**REAL, **INERT}[attack](tmp_path / "proof"), tmp_path / "x.pth.tar")
    (refused_and_inert if attack in REFUSED else read_and_inert)(tmp_path / "x.pth.tar", tmp_path / "proof")


@pytest.mark.parametrize("attack", REAL)
def test_the_attacks_are_real(attack, tmp_path):
    """PyTorch itself, told to trust the file, runs them, so it means something that nothing happened."""
    torch.save(REAL[attack](tmp_path / "proof"), tmp_path / "x.pth.tar")
    with suppress(Exception):
        loaded = torch.load(tmp_path / "x.pth.tar", weights_only=False)
        list(loaded["scores"])  # where it is a map, it runs now
    assert (tmp_path / "proof").exists()


def as_pickle(path: Path, proof: Path) -> None:
    path.write_bytes(pickle.dumps(REAL["os.system"](proof)))


def as_old_tar(path: Path, proof: Path) -> None:
    """The container before PyTorch 0.1.10; of torch.load's readers the last to learn what weights_only means."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(0 if name != "pickle" else Reduced(os.system, f"touch '{proof}'"))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def as_old_stream(path: Path, proof: Path) -> None:
    torch.save(REAL["os.system"](proof), path, _use_new_zipfile_serialization=False)


def zipped(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def as_a_bomb(path: Path, proof: Path) -> None:
    zipped(path, {"a/data.pkl": b"\x80\x02}.", "a/version": b"3\n", "a/data/0": bytes(10 ** 7)}, zipfile.ZIP_DEFLATED)


def with_names_upwards(path: Path, proof: Path) -> None:
    system = opcodes(Call(Name("posix", "system"), (f"touch '{proof}'",)))
    zipped(path, {"../proof": b"x", "a/data.pkl": b"\x80\x02" + system + b".", "a/version": b"3\n"})


def with_storages_upwards(path: Path, proof: Path) -> None:
    (path.with_name("secret")).write_bytes(bytes(16))
    storage = Raw(opcodes(("storage", Name("torch", "FloatStorage"), "../../secret", "cpu", 4)) + b"Q")
    tensor = Call(Name("torch._utils", "_rebuild_tensor_v2"), (storage, 0, (4,), (1,), False, {}))
    content = opcodes({**good(), "decoder": {}, "encoder": {"w": tensor}})
    zipped(path, {"a/data.pkl": b"\x80\x02" + content + b".", "a/version": b"3\n"})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [as_pickle, as_old_tar, as_a_bomb, with_names_upwards, with_storages_upwards])
def test_a_hostile_container_is_refused_and_inert(write, tmp_path):
    write(tmp_path / "x.pth.tar", tmp_path / "proof")
    refused_and_inert(tmp_path / "x.pth.tar", tmp_path / "proof")


def test_a_hostile_score_in_the_old_container_is_inert(tmp_path):
    as_old_stream(tmp_path / "x.pth.tar", tmp_path / "proof")
    read_and_inert(tmp_path / "x.pth.tar", tmp_path / "proof")


@pytest.mark.usefixtures("old")
def test_hostile_weights_of_an_encoder_do_nothing(tmp_path, command):
    """Refused, as the encoder's weights are not among them; or read, where they are, and the rest does nothing."""
    flags = ("--data_folder", tmp_path, "--data_name", BASE, "--output_folder", tmp_path / "out", "--encoder", ENCODER,
             "--encoder_weights", tmp_path / "weights.pt", "--device", "cpu")
    for name in ("os.system", "the whole file"):
        torch.save(REAL[name](tmp_path / "proof"), tmp_path / "weights.pt")
        status, shown = command(train, *flags)
        assert status == 1 and "weights.pt: " in shown and shown.count("\n") == 1
        assert not (tmp_path / "proof").exists() and not (tmp_path / "out").exists()
    weights = Encoder(name=ENCODER).state_dict()
    torch.save({**weights, "best": Reduced(os.system, f"touch '{tmp_path / 'proof'}'")}, tmp_path / "weights.pt")
    read = load_weights(tmp_path / "weights.pt")
    assert list(read) == list(weights) and all(torch.equal(read[name], weights[name]) for name in weights)
    assert not (tmp_path / "proof").exists()


# ---- pictures --------------------------------------------------------------------------------------------------------

def test_a_program_is_no_picture(tmp_path, monkeypatch):
    """Pillow would have Ghostscript run what stands in it."""
    def run(*_: Any, **__: Any) -> Image.Image:
        (tmp_path / "proof").touch()
        return Image.new("RGB", (9, 9)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    (tmp_path / "x.png").write_bytes(EPS)
    Image.open(tmp_path / "x.png").load()
    (tmp_path / "proof").unlink()  # the attack is real
    with pytest.raises(InputError, match=r"x\.png: .*EPS"):
        read_image(tmp_path / "x.png")
    assert not (tmp_path / "proof").exists()


# ---- words -----------------------------------------------------------------------------------------------------------

ESCAPES = ("\x1b]0;owned\x07", "\x9b2J", "\x1b[8m", "\ud800", "\u202e", "$\\frac{", "<script>", "\x00", "\r", "\x7f")
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


@pytest.mark.parametrize("flags", [[], ["--probabilities"], ["--json"]])
def test_words_that_a_terminal_would_obey_are_shown_as_escapes(flags, tmp_path, capsys):
    words = {word: i for i, word in enumerate((*ESCAPES, "<pad>", "<unk>", "<start>", "<end>"))}
    path = Model(words).save(tmp_path / "x.pth.tar")
    Image.effect_noise((30, 30), 90).save(tmp_path / "\x1b[2J.png")
    results = caption.main(caption.get_parser().parse_args(
        ["--img", str(tmp_path), "--model", str(path), "--device", "cpu", "--max_len", "2", "--n_best", "5", "--out",
         str(tmp_path / "figures"), *flags]))
    shown = capsys.readouterr().out
    assert not OBEYED.search(shown) and "\\u001b[2J.png" in shown and "\\u" in shown.replace("\\u001b[2J", "")
    assert "--json" not in flags or json.loads(shown) == results, "nothing is lost of the JSON"
    assert len(list((tmp_path / "figures").iterdir())) == 1


@pytest.mark.usefixtures("old")
def test_training_shows_them_as_escapes_too(tmp_path, command, monkeypatch):
    put(tmp_path, "VAL_REFERENCES", [[["\u202e", "\u2066"]]])  # control characters are refused, but not these
    said: list[str] = []
    monkeypatch.setattr(builtins, "print", lambda *texts, **_: said.extend(map(str, texts)))
    assert command(train, "--data_folder", tmp_path, "--data_name", BASE, "--output_folder", tmp_path, "--encoder",
                   ENCODER, "--encoder_weights", "none", "--emb_dim", 4, "--attention_dim", 4, "--decoder_dim", 4,
                   "--device", "cpu", "--stage", 1, "--epochs", 1) == (0, "")
    assert any("\\u202e \\u2066" in text for text in said) and not any(map(OBEYED.search, said))


@pytest.mark.usefixtures("old")
def test_warnings_show_them_as_escapes_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(evaluation, "warn_if_collapsed", lambda _: "warning: \x1b[2J")
    path = Model(read_word_map(tmp_path / f"WORDMAP_{BASE}.json")).save(tmp_path / "x.pth.tar")
    evaluation.main(evaluation.get_parser().parse_args(
        ["--data_folder", str(tmp_path), "--data_name", BASE, "--split", "VAL", "--checkpoint", str(path), "--device",
         "cpu", "--beam_size", "1", "--max_len", "3"]))
    assert "warning: \\u001b[2J\n" in capsys.readouterr().err


def test_a_good_checkpoint_is_read_under_the_same_eyes(tmp_path):
    """The watch sees what it should, and a good file passes."""
    save_checkpoint(tmp_path / "x.pth.tar", {name: value for name, value in good().items() if name != "format"})
    events.clear()
    watched.append(tmp_path / "x.pth.tar")
    try:
        assert load_checkpoint(tmp_path / "x.pth.tar")["word_map"] == WORDS and events == []
        (tmp_path / "proof").write_text("x")
    finally:
        watched.clear()
    assert len(events) == 1 and events[0].startswith("open ")
