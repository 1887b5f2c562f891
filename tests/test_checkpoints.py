"""Checkpoints: ours are whole and plain; the original tutorial's are read as data; a hostile file runs nothing."""

import argparse
import collections
import datetime
import functools
import io
import itertools
import json
import pickle
import resource
import struct
import sys
import time
import tracemalloc
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_train import flags
from torch import nn

import caption
import eval as evaluation
import train
from models import DecoderWithAttention, Encoder
from safety import old_checkpoints
from safety.checkpoints import load_checkpoint, load_weights, save_checkpoint
from safety.errors import InputError
from safety.restore import restore

WORDS = {word: index for index, word in enumerate(("<pad>", *"abcdefg", "<unk>", "<start>", "<end>"))}
CAPTIONS = torch.tensor([[9, 1, 2, 10], [9, 3, 10, 0]]), torch.tensor([[4], [3]])
BOTH_CONTAINERS = pytest.mark.parametrize("container", ["zip", "stream"])


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists and tensors hold the same."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---- ours ------------------------------------------------------------------------------------------------------------

@functools.cache
def our_state() -> dict[str, Any]:
    torch.manual_seed(0)
    encoder = Encoder(3, "mobilenet_v3_small")
    arguments = {"attention_dim": 5, "embed_dim": 6, "decoder_dim": 7, "vocab_size": len(WORDS), "dropout": 0.5,
                 "encoder_dim": encoder.encoder_dim}
    decoder = DecoderWithAttention(**arguments)
    optimizer = torch.optim.Adam(decoder.parameters())
    decoder.fc.bias.sum().backward()
    optimizer.step()
    return {"encoder": encoder.state_dict(), "decoder": decoder.state_dict(), "word_map": WORDS,
            "model": {"encoder": "mobilenet_v3_small", "encoded_image_size": 3, **arguments},
            "preprocessing": {"mean": [0.5]}, "scores": {"bleu4": 1.5},
            "training": {"epoch": 3, "optimizers": {"decoder": optimizer.state_dict()}}}


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ours") / "BEST_checkpoint_x.pth.tar"
    save_checkpoint(path, our_state())
    return path


def test_a_saved_checkpoint_comes_back_the_same(ours):
    assert same(torch.load(ours, weights_only=True), {"format": 1, **our_state()})
    assert same(load_checkpoint(ours), {"format": 1, **our_state()})
    assert load_checkpoint(ours, {"another": 0})["word_map"] == WORDS, "its own word map counts"


def test_a_checkpoint_of_a_gpu_loads_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    save(tmp_path / "model.pth.tar")
    assert b"cuda:0" in (tmp_path / "model.pth.tar").read_bytes()
    assert same(load_checkpoint(tmp_path / "model.pth.tar")["encoder"], our_state()["encoder"])


def test_models_are_rebuilt_with_the_same_outputs(ours):
    encoder, decoder = restore(load_checkpoint(ours), ours)
    same_encoder = Encoder(3, "mobilenet_v3_small")
    same_encoder.load_state_dict(our_state()["encoder"])
    same_decoder = DecoderWithAttention(5, 6, 7, len(WORDS), 576).eval()
    same_decoder.load_state_dict(our_state()["decoder"])
    pictures = torch.randn(2, 3, 64, 64)
    features = encoder(pictures)
    assert features.shape == (2, 3, 3, 576) and torch.equal(features, same_encoder(pictures))
    assert same(decoder(features, *CAPTIONS), same_decoder(features, *CAPTIONS)), "no dropout"
    pooled, expected = decoder(encoder.grid(pictures), *CAPTIONS), same_decoder(features, *CAPTIONS)
    torch.testing.assert_close(pooled, expected)  # it pools by itself


@pytest.mark.skipif(sys.platform != "linux", reason="maps are read from /proc")
def test_no_checkpoint_stays_mapped(prepared, tmp_path, monkeypatch):
    """Windows lets nobody replace a mapped file, and so train.py could not save."""
    def maps() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if ".pth.tar" in line]

    seen = []
    for module, name in ((train, "train_epoch"), (evaluation, "generate_captions")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=function: seen.append(maps()) or own(*args))
    arguments, path = flags(prepared, tmp_path, "--epochs", 1), tmp_path / f"checkpoint_{prepared.name}.pth.tar"
    train.main(train.get_parser().parse_args([*arguments, "--stage", "1"]))
    train.main(train.get_parser().parse_args([*arguments, "--checkpoint", str(path)]))  # stage 2, from the best
    evaluation.main(evaluation.get_parser().parse_args([
        "--data_folder", str(prepared.folder), "--data_name", prepared.name, "--checkpoint", str(path), "--beam_size",
        "1", "--device", "cpu"]))
    model = caption.load(path, device="cpu")
    assert seen == [[]] * 3 and maps() == [] and len(model) == 4
    held = load_checkpoint(path)
    assert maps() and held  # so that the test would see one


def test_a_decoder_is_built_by_its_name(ours):
    """Checkpoints made before decoders had names are of the LSTM."""
    state = load_checkpoint(ours)
    assert "decoder" not in state["model"]
    named, another = ({**state, "model": {**state["model"], "decoder": name}} for name in ("lstm", "another"))
    assert same(restore(named)[1].state_dict(), restore(state)[1].state_dict())
    with pytest.raises(OSError, match=r"BEST_checkpoint_x.*: its weights .*no decoder 'another', only lstm"):
        restore(another, ours)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_of_ours_are_looked_through(prefix, tmp_path):
    """As where somebody saved again what DataParallel or torch.compile had wrapped."""
    wrapped = {part: {f"{prefix}{name}": each for name, each in our_state()[part].items()}
               for part in ("encoder", "decoder")}
    for part in wrapped:
        save(tmp_path / "x.pth.tar", **{part: wrapped[part]})
        assert same(load_checkpoint(tmp_path / "x.pth.tar"), {"format": 1, **our_state()})


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "deep" / "checkpoint.pth.tar"
    save_checkpoint(path, {"a": 1})
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {"weights": torch.zeros(10_000), "not plain": lambda: None})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def save(path: Path, **changes: Any) -> None:
    save_checkpoint(path, {**our_state(), **changes})


def write_zip(path: Path, **files: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: (save(path), path.write_bytes(path.read_bytes()[:100_000])),
    "a number changed": lambda path: (save(path), path.write_bytes(path.read_bytes().replace(b"encoder", b"encodeR"))),
    "random bytes": lambda path: path.write_bytes(bytes(i * i % 251 for i in range(5000))),
    "text": lambda path: path.write_text("Not Found\n"),
    "a web page": lambda path: path.write_text("<!DOCTYPE html><html>quota exceeded</html>"),
    "a pickled string": lambda path: path.write_bytes(pickle.dumps("hello")),
    "a tensor": lambda path: torch.save(torch.zeros(2), path),
    "a list": lambda path: torch.save(["format", "encoder", "decoder", "word_map", "model"], path),
    "other keys": lambda path: torch.save({"state_dict": {}}, path),
    "no format": lambda path: torch.save(our_state(), path),
    "another zip": lambda path: write_zip(path, letter=b"Dear"),
    "a zip of nothing": lambda path: write_zip(path),
    "a zip of no pickle": lambda path: write_zip(path, **{"a__data.pkl": b"hello", "a__version": b"3"}),
    "a newer format": lambda path: save_checkpoint(path, {**our_state(), "format": 2}),
    "a strange format": lambda path: save_checkpoint(path, {**our_state(), "format": "x"}),
    "quantized": lambda path: save(path, decoder={name: torch.quantize_per_tensor(each, 0.1, 0, torch.qint8)
                                                  for name, each in our_state()["decoder"].items()}),
    "two modules": lambda path: torch.save((nn.ReLU(), nn.ReLU()), path),
    "too few words": lambda path: save(path, word_map={"<pad>": 0}),
    "no words but a number": lambda path: save(path, word_map=5),
    "no words but a tensor": lambda path: save(path, word_map=torch.zeros(2)),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_checkpoint_is_named_in_one_line(damage, tmp_path):
    path = tmp_path / "model.pth.tar"
    DAMAGES[damage](path)
    with pytest.raises(InputError) as error:
        load_checkpoint(path, WORDS)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["missing.pth.tar", "."])
def test_no_such_file(name, tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("change, message", [
    ({"format": 2}, r"newer version .*format 2"), ({"word_map": None}, "give it with --word_map"),
    ({"word_map": {"a": 0}}, "knows 11 words, the word map has 1; give")])
def test_the_message_says_what_to_do(change, message, tmp_path):
    save(tmp_path / "model.pth.tar", **change)
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "model.pth.tar")


# ---- the original tutorial's, made by today's PyTorch ----------------------------------------------------------------

class Tutorials(NamedTuple):
    """What the original tutorial would have saved."""

    encoder: Encoder
    decoder: DecoderWithAttention
    optimizer: torch.optim.Adam

    def save(self, path: Path, container: str, encoder_optimizer: Any = None) -> Path:
        vars(self.decoder).pop("map_size", None)
        torch.save({"epoch": 7, "epochs_since_improvement": 2, "bleu-4": 0.2325, "encoder": self.encoder,
                    "decoder": self.decoder, "encoder_optimizer": encoder_optimizer,
                    "decoder_optimizer": self.optimizer}, path, _use_new_zipfile_serialization=container == "zip")
        return path

    def same_outputs(self, state: dict[str, Any]) -> bool:
        self.decoder.map_size = None  # which the tutorial's lacked
        pictures = torch.randn(2, 3, 64, 64)
        encoder, decoder = restore(state)
        features = encoder(pictures)
        return (torch.equal(features, self.encoder(pictures))
                and same(decoder(features, *CAPTIONS), self.decoder(features, *CAPTIONS)))


@pytest.fixture(scope="module")
def tutorials() -> Tutorials:
    """A small model, trained by one step, with the attributes that the tutorial's had, and only those."""
    torch.manual_seed(0)
    encoder = Encoder(4, "resnet18")
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.num_batches_tracked.fill_(9)
    decoder = DecoderWithAttention(5, 6, 7, len(WORDS), encoder.encoder_dim)
    del encoder.first_tuned, encoder.encoder_dim
    decoder.attention_dim, decoder.embed_dim, decoder.decoder_dim = 5, 6, 7
    decoder.attention.relu, decoder.attention.softmax, decoder.sigmoid = nn.ReLU(), nn.Softmax(dim=1), nn.Sigmoid()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=4e-4)
    sum(parameter.sum() for parameter in decoder.parameters()).backward()
    optimizer.step()
    return Tutorials(encoder, decoder.eval(), optimizer)


@pytest.mark.filterwarnings("error")
@BOTH_CONTAINERS
def test_whole_modules_load(container, tutorials, tmp_path):
    path = tutorials.save(tmp_path / "BEST_coco.pth.tar", container)
    assert zipfile.is_zipfile(path) == (container == "zip")
    state = load_checkpoint(path, WORDS)
    assert same(state["encoder"], dict(tutorials.encoder.state_dict()))
    assert same(state["decoder"], dict(tutorials.decoder.state_dict()))
    assert state["scores"] == {"bleu4_teacher_forced": pytest.approx(23.25)} and state["training"] is None
    assert tutorials.same_outputs(state)


def test_old_checkpoints_caption(tutorials, tmp_path, capsys):
    """With Adam of a fine-tuned encoder in the file, and the word map in its own."""
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(3))], lr=1e-4)
    path = tutorials.save(tmp_path / "x.pth.tar", "stream", optimizer)
    (tmp_path / "words.json").write_text(json.dumps(WORDS))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    arguments = ["--img", str(tmp_path / "red.png"), "--model", str(path), "--max_len", "4", "--device", "cpu"]
    with pytest.raises(InputError, match=r"x\.pth\.tar: .* no word map; give it with --word_map"):
        caption.main(caption.get_parser().parse_args(arguments))
    arguments += ["--word_map", str(tmp_path / "words.json"), "--out", str(tmp_path / "out.png")]
    found = caption.main(caption.get_parser().parse_args(arguments))[0]["captions"][0]["caption"]
    assert 0 < len(found.split()) <= 4 and set(found.split()) <= {*"abcdefg", "<unk>"}
    assert found in capsys.readouterr().out and (tmp_path / "out.png").is_file()


@pytest.mark.parametrize("name", old_checkpoints.RESNETS.values())
def test_the_encoder_is_told_from_its_weights(name):
    with torch.device("meta"):
        encoder = Encoder(9, name)
    decoder = dict.fromkeys(("embedding.weight", "attention.encoder_att.weight", "init_h.weight"), torch.zeros(2, 3))
    found = old_checkpoints.from_tutorial({"encoder": encoder.state_dict(), "decoder": decoder}, "x")
    assert found["model"] == {"encoder": name, "encoded_image_size": 14, "attention_dim": 2, "encoder_dim": 3,
                              "vocab_size": 2, "embed_dim": 3, "decoder_dim": 2, "dropout": 0.5}
    assert list(found["encoder"]) == list(encoder.state_dict())


# ---- forks of the original tutorial ----------------------------------------------------------------------------------

class Toy(nn.Module):
    """Modules of these names."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Settings(dict):
    """A dict of a class that nobody else has."""


def toys() -> tuple[Toy, Toy]:
    """The smallest encoder and decoder that are known for what they are; a ResNet's weight has no numbers."""
    conv = nn.Module()
    conv.weight = nn.Parameter(torch.zeros(5)[:0].view(64, 64, 0, 0))
    stages = {"4": Toy(**{"0": Toy(conv2=conv)}), "6": Toy(**{str(i): nn.BatchNorm2d(2) for i in range(2)})}
    encoder, decoder = Toy(resnet=Toy(**stages)), Toy(
        embedding=nn.Embedding(len(WORDS), 3), attention=Toy(encoder_att=nn.Linear(3, 2)), init_h=nn.Linear(3, 4))
    encoder.enc_image_size = 9
    return encoder, decoder


def states(encoder: nn.Module, decoder: nn.Module, suffix: str = "", prefix: str = "") -> dict[str, Any]:
    return {f"{name}{suffix}": {f"{prefix}{key}": value for key, value in module.state_dict().items()}
            for name, module in (("encoder", encoder), ("decoder", decoder))}


def modules(encoder: nn.Module, decoder: nn.Module) -> dict[str, Any]:
    return {"encoder": encoder, "decoder": decoder}


def optimizers(decoder: nn.Module) -> dict[str, Any]:
    sgd = torch.optim.SGD(decoder.parameters(), lr=0.1, momentum=0.9)
    return {"encoder_optimizer": torch.optim.AdamW(decoder.parameters()), "decoder_optimizer": sgd,
            "scheduler": torch.optim.lr_scheduler.StepLR(sgd, 3), "scaler": torch.amp.GradScaler("cpu")}


METADATA = {"bleu-4": np.float64(0.25), "history": [np.arange(3)], "args": argparse.Namespace(lr=0.1, out=Path("x")),
            "when": datetime.datetime(2020, 1, 1), "counts": collections.Counter("aab"), "settings": Settings(a=1),
            "queue": collections.deque([1, 2]), "losses": collections.defaultdict(list, {"train": [1.5]}),
            "dtype": torch.float16, "device": torch.device("cpu"), "criterion": nn.CrossEntropyLoss(), 3: {4}}
FORKS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "DataParallel": lambda encoder, decoder: modules(nn.DataParallel(encoder), nn.DataParallel(decoder)),
    "DataParallel within": lambda encoder, decoder: modules(Toy(resnet=nn.DataParallel(encoder.resnet)), decoder),
    "other optimizers": lambda encoder, decoder: modules(encoder, decoder) | optimizers(decoder),
    "odd metadata": lambda encoder, decoder: modules(encoder, decoder) | METADATA,
    "state_dicts": states,
    "state_dicts and metadata": lambda encoder, decoder: METADATA | states(encoder, decoder),
    "state_dicts of other names": lambda encoder, decoder: states(encoder, decoder, "_state_dict"),
    "state_dicts of DataParallel": lambda encoder, decoder: states(encoder, decoder, "_state_dict", "module."),
    "state_dicts of torch.compile": lambda encoder, decoder: states(encoder, decoder, prefix="_orig_mod.module."),
    "optimizers' states too": lambda encoder, decoder: states(encoder, decoder) | {
        "optimizer": optimizers(decoder)["decoder_optimizer"].state_dict(), "bleu-4": np.float64(0.25)},
    "one state_dict": lambda encoder, decoder: {"epoch": 3, "state_dict": Toy(
        encoder=encoder, decoder=decoder).state_dict()},
    "one module": lambda encoder, decoder: Toy(encoder=encoder, decoder=decoder),
    "a dict of its own class": lambda encoder, decoder: Settings(model=Settings(states(encoder, decoder))),
    "parameters": lambda encoder, decoder: {name: {**dict(module.named_parameters()), **dict(module.named_buffers())}
                                            for name, module in modules(encoder, decoder).items()}}


@pytest.mark.filterwarnings("error")
@BOTH_CONTAINERS
@pytest.mark.parametrize("fork", FORKS)
def test_checkpoints_of_forks_load(fork, container, tmp_path):
    """What is not needed is no reason to refuse, and what is wrapped around the weights is looked through."""
    encoder, decoder = toys()
    content = FORKS[fork](encoder, decoder)
    torch.save(content, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=container == "zip")
    state = load_checkpoint(tmp_path / "x.pth.tar", WORDS)
    for part, module in (("encoder", encoder), ("decoder", decoder)):
        expected = module.state_dict()
        assert same(state[part], {name: expected[name] for name in state[part]}) and len(state[part]) == len(expected)
        assert all(type(each) is torch.Tensor for each in state[part].values())
    size = 9 if fork in {"DataParallel", "other optimizers", "odd metadata", "one module"} else 14  # which others lack
    assert state["model"] == {"encoder": "resnet18", "encoded_image_size": size, "attention_dim": 2,
                              "encoder_dim": 3, "vocab_size": len(WORDS), "embed_dim": 3, "decoder_dim": 4,
                              "dropout": 0.5}
    assert state["word_map"] == WORDS and state["training"] is None


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("kind", ["qint8", "qint32", "complex64"])
@BOTH_CONTAINERS
def test_numbers_of_other_kinds_beside_the_weights_do_not_matter(kind, container, tutorials, tmp_path):
    dtype = getattr(torch, kind)
    other = torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, dtype) if kind[0] == "q" else torch.ones(3, dtype=dtype)
    torch.save({"before": other, "encoder": tutorials.encoder, "decoder": tutorials.decoder, "behind": other},
               tmp_path / "x.pth.tar", _use_new_zipfile_serialization=container == "zip")
    state = load_checkpoint(tmp_path / "x.pth.tar", WORDS)
    assert same(state["encoder"], dict(tutorials.encoder.state_dict()))
    torch.save({"w": other, "v": torch.ones(2)}, tmp_path / "w.pt", _use_new_zipfile_serialization=container == "zip")
    assert load_weights(tmp_path / "w.pt")["v"].tolist() == [1, 1]


def test_a_fork_s_own_word_map_counts(tmp_path):
    own = {word: (index + 1) % len(WORDS) for word, index in WORDS.items()}
    torch.save({**states(*toys()), "word_map": own}, tmp_path / "x.pth.tar")
    assert load_checkpoint(tmp_path / "x.pth.tar", WORDS)["word_map"] == own


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_is_missing_of_a_fork_s_checkpoint_is_named(part, tmp_path):
    content = states(*toys())
    del content[part]
    torch.save(content, tmp_path / "x.pth.tar")
    with refused("x.pth.tar: refused", {"encoder": "...resnet.4.0.conv2.weight",
                                        "decoder": "...attention.encoder_att.weight"}[part], "name one that train.py"):
        load_checkpoint(tmp_path / "x.pth.tar", WORDS)


def test_odd_metadata_in_a_checkpoint_of_ours(ours, tmp_path):
    """The weights are read, and nothing of what only a resume needs."""
    torch.save({**torch.load(ours), "scores": {"bleu4": 1.5, "cider": np.float64(2)}, "when": datetime.date.today()},
               tmp_path / "x.pth.tar")
    state = load_checkpoint(tmp_path / "x.pth.tar")
    assert state["training"] is None and state["scores"] == {"bleu4": 1.5}
    assert all(same(state[part], our_state()[part]) for part in ("encoder", "decoder", "word_map", "model"))


@pytest.mark.filterwarnings("error")
def test_a_fork_s_model_computes_the_same(tutorials, tmp_path):
    """With all of it: a ResNeXt, DataParallel, another optimizer, a numpy score."""
    encoder = Encoder(4, "resnext50_32x4d")
    decoder = DecoderWithAttention(5, 6, 7, len(WORDS), encoder.encoder_dim).eval()
    torch.save({"epoch": 7, "bleu-4": np.float64(0.2), "encoder": nn.DataParallel(encoder),
                "decoder": nn.DataParallel(decoder), "decoder_optimizer": torch.optim.AdamW(decoder.parameters())},
               tmp_path / "x.pth.tar")
    state = load_checkpoint(tmp_path / "x.pth.tar", WORDS)
    pictures = torch.randn(1, 3, 64, 64)
    again, decoder_again = restore(state)
    features = encoder(pictures)
    assert state["model"]["encoder"] == "resnext50_32x4d" and torch.equal(again(pictures), features)
    assert same(decoder_again.state_dict(), decoder.state_dict())


# ---- weights of classifiers ------------------------------------------------------------------------------------------

WEIGHTS = {"conv1.weight": torch.arange(6.0).view(2, 3), "bn1.num_batches_tracked": torch.tensor(4)}
CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "a state_dict": lambda: WEIGHTS,
    "Places365's": lambda: {"epoch": 90, "arch": "resnet18", "best_prec1": np.float32(0.5), "state_dict": {
        f"module.{name}": each for name, each in WEIGHTS.items()}, "optimizer": {"state": {1: {"x": torch.ones(3)}}}},
    "beside others": lambda: {"model": WEIGHTS, "lr": 0.1, "args": argparse.Namespace(out=Path("x"))},
    "a module": lambda: Toy(conv1=weight_alone()),
    "a module in DataParallel": lambda: {"net": nn.DataParallel(Toy(conv1=weight_alone()))},
    "a module's parameters": lambda: dict(Toy(conv1=weight_alone()).named_parameters())}


def weight_alone() -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(WEIGHTS["conv1.weight"])
    return module


@BOTH_CONTAINERS
@pytest.mark.parametrize("form", CLASSIFIERS)
def test_weights_of_classifiers_are_found(form, container, tmp_path):
    torch.save(CLASSIFIERS[form](), tmp_path / "w.pt", _use_new_zipfile_serialization=container == "zip")
    found = load_weights(tmp_path / "w.pt")
    assert all(type(each) is torch.Tensor for each in found.values())
    found = {name.removeprefix("state_dict.").removeprefix("model.").removeprefix("net."): each
             for name, each in found.items()}
    assert same(found, {name: WEIGHTS[name] for name in list(WEIGHTS)[:1 if "a module" in form else None]})


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"w": print}, {"w": torch.zeros(1).expand(10**6, 10**6)}, 5])
def test_a_file_without_whole_weights_is_named(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with refused("--encoder_weights", "w.pt: not a state dict of a classifier"):
        load_weights(tmp_path / "w.pt")


def torchscript(path):
    torch.jit.script(nn.Sequential(nn.Linear(2, 2))).save(path)


def keras(path):
    with h5py.File(path, "w") as file:
        file["model_weights/conv1"] = [1.0]


def keras_3(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")


def onnx(path):
    Path(path).write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0")  # ir_version, producer_name, producer_version


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("write, words", [(keras_3, "a model of Keras; give"), (onnx, "ONNX, a graph"),
                                          (torchscript, "takes the weights out, for train.py's --encoder_weights"),
                                          (keras, "HDF5, as Keras's models")])
def test_models_of_other_kinds_are_named(write, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("model")
    with refused("model: refused, this is ", words):
        load_checkpoint("model")
    with refused("model: refused, this is ", words):
        load_weights("model")
    if write is torchscript:  # and the remedy works
        torch.save(torch.jit.load("model").state_dict(), "weights.pt")
        assert load_weights("weights.pt").keys() == {"0.weight", "0.bias"}


def test_safetensors_as_a_checkpoint_are_named(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2) + b"{}")
    with refused("x: refused, this is in the format of safetensors", "--encoder_weights"):
        load_checkpoint(tmp_path / "x")


def test_safetensors_are_read_where_their_package_is(tmp_path, monkeypatch):
    """By their form, whatever the file is called. The package is feigned: it is no requirement."""
    header = json.dumps({"conv1.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    path = tmp_path / "weights.bin"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    package = types.SimpleNamespace(
        load=lambda data: {"conv1.weight": torch.zeros(2, 3)} if data == path.read_bytes() else {})  # without a map
    monkeypatch.setitem(sys.modules, "safetensors", types.SimpleNamespace(torch=package))
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    assert same(load_weights(path), {"conv1.weight": torch.zeros(2, 3)})
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"weights\.bin is in the format of safetensors.*: pip install safetensors$"):
        load_weights(path)


# ---- pickles written by hand -----------------------------------------------------------------------------------------

class Name(NamedTuple):
    """A class or function, by its name."""

    module: str
    name: str


class Call(NamedTuple):
    function: Any
    arguments: Any


class Built(NamedTuple):
    """A thing, and the state that is set on it."""

    thing: Any
    state: Any


class Saved(NamedTuple):
    """What PyTorch keeps outside the pickle."""

    id: tuple


class Ordered(dict):
    """An OrderedDict."""


class Raw(bytes):
    """Opcodes as they are."""


def opcodes(value: Any) -> bytes:
    """A value in pickle's protocol 2, as Python 3.6 wrote it."""
    match value:
        case Raw():
            return value
        case Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            return opcodes(value.function) + opcodes(value.arguments) + b"R"
        case Built():
            return opcodes(value.thing) + opcodes(value.state) + b"b"
        case Saved():
            return opcodes(value.id) + b"Q"
        case dict():
            start = opcodes(Call(Name("collections", "OrderedDict"), ())) if isinstance(value, Ordered) else b"}"
            return start + b"(" + b"".join(map(opcodes, itertools.chain(*value.items()))) + b"u"
        case list() | tuple():
            items = b"(" + b"".join(map(opcodes, value))
            return items + b"t" if isinstance(value, tuple) else b"]" + items + b"e"
        case _:
            return pickle.dumps(value, 2)[2:-1]


def instance(name: Name | Raw, state: Any) -> Built:
    return Built(Raw(opcodes(name) + b")\x81"), state)


def write_old(path: Path, container: str, content: Any, storages: dict[str, torch.Tensor]) -> Path:
    """A file of one of PyTorch's two containers around a pickle."""
    content = b"\x80\x02" + opcodes(content) + b"."
    numbers = {key: storage.numpy().tobytes() for key, storage in storages.items()}
    if container == "zip":
        write_zip(path, **{"a__data.pkl": content, "a__version": b"3\n"},
                  **{f"a__data__{key}": each for key, each in numbers.items()})
        return path
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    heads = b"".join(pickle.dumps(each, 2) for each in (0x1950a86a20f9469cfc6c, 1001, system))
    tail = b"".join(struct.pack("<q", storages[key].numel()) + numbers[key] for key in storages)
    path.write_bytes(heads + content + pickle.dumps(list(storages), 2) + tail)
    return path


REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
ENCODER = Name("models", "Encoder")


class Hand:
    """Pickles modules the way PyTorch 0.4 did on a GPU, and keeps their storages."""

    def __init__(self) -> None:
        self.storages: dict[str, torch.Tensor] = {}

    def tensor(self, tensor: torch.Tensor) -> Call:
        """In the middle of a storage; a matrix by columns."""
        key, matrix = str(94000 + len(self.storages)), tensor.dim() == 2
        numbers = tensor.t().flatten() if matrix else tensor.flatten()
        self.storages[key] = torch.cat([torch.full((3,), torch.nan), numbers, torch.full((2,), torch.nan)])
        storage = Saved(("storage", Name("torch", "FloatStorage"), key, "cuda:0", tensor.numel() + 5, None))
        stride = (1, tensor.size(0)) if matrix else torch.empty(tensor.shape).stride()  # row by row, as flatten gives
        return Call(REBUILD, (storage, 3, tuple(tensor.shape), stride, False, Ordered()))

    def parameter(self, parameter: nn.Parameter | None) -> Call | None:
        return parameter if parameter is None else Call(Name("torch.nn.parameter", "Parameter"),
                                                        (self.tensor(parameter.detach()), True))

    def module(self, module: nn.Module) -> Built:
        kind = Name(type(module).__module__, type(module).__qualname__)
        with_source = Saved(("module", kind, "/home/me/models.py", "class Encoder(nn.Module):\n    ..."))
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | tuple | str)}
        return instance(Raw(opcodes(with_source)), {
            "_backend": Call(Name("torch.nn.backends.thnn", "_get_thnn_function_backend"), ()), **plain,
            **{name: Ordered() for name in ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks")},
            "_parameters": Ordered({name: self.parameter(each) for name, each in module._parameters.items()}),
            "_buffers": Ordered({name: self.tensor(each) for name, each in module._buffers.items()
                                 if name != "num_batches_tracked"}),
            "_modules": Ordered({name: self.module(each) for name, each in module._modules.items()})})


@pytest.mark.filterwarnings("error")
@BOTH_CONTAINERS
def test_pytorch_0_4_checkpoints_load(container, tutorials, tmp_path):
    hand = Hand()
    defaults = Call(Name("collections", "defaultdict"), (Name("__builtin__", "dict"),))
    adam = instance(Name("torch.optim.adam", "Adam"), {"param_groups": [{"lr": 1e-4}], "state": defaults})
    content = {"epoch": 20, "epochs_since_improvement": 0, "bleu-4": 0.24, "encoder": hand.module(tutorials.encoder),
               "decoder": hand.module(tutorials.decoder), "encoder_optimizer": adam, "decoder_optimizer": adam}
    state = load_checkpoint(write_old(tmp_path / "BEST_coco.pth.tar", container, content, hand.storages), WORDS)
    expected = {name: value for name, value in tutorials.encoder.state_dict().items()
                if not name.endswith("num_batches_tracked")}
    assert len(expected) == 100 and same(state["encoder"], expected)
    assert same(state["decoder"], dict(tutorials.decoder.state_dict()))
    assert tutorials.same_outputs(state)


def test_a_view_of_a_storage_begins_where_it_says():
    storage = old_checkpoints.Inert("storage", torch.float32, "7", "cuda:0", 10, ("8", 4, 6))
    numbers = {"7": bytearray(torch.arange(10.0).numpy().tobytes())}
    tensor = old_checkpoints.Inert(storage, 1, (2, 2), (2, 1))
    assert old_checkpoints.view_of(tensor, numbers.__getitem__).tolist() == [[5, 6], [7, 8]]
    with pytest.raises(RuntimeError, match="out of bounds"):
        old_checkpoints.view_of(old_checkpoints.Inert(storage, 3, (2, 2), (2, 1)), numbers.__getitem__)


# ---- hostile files ---------------------------------------------------------------------------------------------------

def attacks(proof: Path | str = "") -> dict[str, Any]:
    """Values that write the file `proof`, if what they name is run."""
    command, code = f"touch '{proof}'", f"open({str(proof)!r}, 'w').close()"
    system, argument = Name("os", "system"), f"S{command!r}\n".encode()

    def dotted(module: str, name: str) -> Raw:
        return Raw(opcodes(module) + opcodes(name) + b"\x93")  # STACK_GLOBAL, by which protocol 4 reaches into classes

    return {
        "os.system": Call(system, (command,)),
        "posix.system": Call(Name("posix", "system"), (command,)),
        "eval": Call(Name("builtins", "eval"), (code,)),
        "Python 2's eval": Call(Name("__builtin__", "eval"), (code,)),
        "exec": Call(Name("builtins", "exec"), (code,)),
        "getattr": Call(Call(Name("builtins", "getattr"), (Call(Name("builtins", "__import__"), ("os",)), "system")),
                        (command,)),
        "subprocess": Call(Name("subprocess", "check_call"), (["touch", str(proof)],)),
        "a method": Call(dotted("pathlib", "Path.touch"), (Call(Name("pathlib", "Path"), (str(proof),)),)),
        "through a module of ours": Call(dotted("safety.files", "os.system"), (command,)),
        "a method of an allowed class": Call(dotted("collections", "OrderedDict.fromkeys"), ([1, 2],)),
        "a name in two parts": Call(dotted("torch", "_utils._import_dotted_name"), ("os.system",)),
        "beside an allowed function": Call(dotted("torch._utils", "_rebuild_tensor_v2.__globals__.get"), ("os",)),
        "INST": Raw(b"(" + argument + b"ios\nsystem\n"),
        "OBJ": Raw(b"(" + opcodes(system) + argument + b"o"),
        "NEWOBJ": Raw(opcodes(Name("subprocess", "Popen")) + opcodes((["touch", str(proof)],)) + b"\x81"),
        "__setstate__": Built(instance(ENCODER, {"__setstate__": system}), command),
        "__setstate__ of the class": Built(instance(Built(ENCODER, (None, {"__setstate__": system})), {}), command),
        "__class__": instance(ENCODER, (None, {"__class__": Name("subprocess", "Popen")})),
        "a module in a module": instance(ENCODER, {"_modules": Ordered({"resnet": Call(system, (command,))})}),
        "a forward hook": instance(ENCODER, {"_forward_hooks": Ordered({0: system})}),
        "a factory": Built(Call(Name("collections", "defaultdict"), (system,)), {}),
        "an iterator": Call(Name("builtins", "set"), (Call(Name("builtins", "map"), (system, [command])),)),
        "a module's class": Saved(("module", system, "models.py", "import os")),
        "a storage's type": Saved(("storage", system, "0", "cpu", 1)),
        "a storage's place": Saved(("storage", Name("torch", "FloatStorage"), "0", Call(system, (command,)), 1)),
        "a module that is imported": Name("antigravity", "webbrowser"),
        "NEWOBJ_EX": Raw(opcodes(Name("subprocess", "Popen")) + opcodes((["touch", str(proof)],)) + b"}\x92"),
        "a list of its own": Raw(opcodes(Call(Name("collections", "deque"), ())) + b"(" + opcodes(Call(
            system, (command,))) + b"e"),
        "a dict of its own": Raw(opcodes(Call(Name("collections", "Counter"), ())) + b"(" + opcodes(Call(
            system, (command,))) + opcodes(system) + b"u"),
        "a set of its own": Raw(opcodes(Call(Name("builtins", "set"), ())) + b"(" + opcodes(system) + b"\x90"),
        "a dict's class": Built(Name("collections", "OrderedDict"), (None, {"items": system})),
        "a dict's attribute": Built(Ordered({"a": 1}), {"__class__": system, "items": system}),
        "a name of a name": Built(Call(Call(system, ()), (command,)), Call(system, (command,))),
    }


def reachable() -> list[Any]:
    """All that an old checkpoint's pickle can lay hands on."""
    classes = (old_checkpoints.Inert, dict, set, collections.defaultdict, collections.OrderedDict, nn.Parameter)
    return [*(dict(vars(each)) for each in classes), dict(old_checkpoints.KNOWN), set(sys.modules),
            torch._utils._rebuild_tensor_v2]


@BOTH_CONTAINERS
@pytest.mark.parametrize("attack", attacks())
def test_code_becomes_a_stand_in_and_does_not_run(attack, container, tmp_path):
    """Beside good weights it is as if it were not there; it was refused until what is not needed was no reason to.
    Where it alone tells how many bytes follow, or in the place of a weight, it is refused."""
    path, (content, storages) = tmp_path / "x.pth.tar", tiny_old({}, {})
    good = load_checkpoint(write_old(path, container, content, storages), WORDS)
    before = reachable()  # once PyTorch has imported what it takes to refuse a file
    hostile = attacks(tmp_path / "proof")[attack]
    write_old(path, container, {**content, "epoch": hostile}, storages)
    if attack == "a storage's type" and container == "stream":
        with pytest.raises(InputError, match=r"x\.pth\.tar: refused"):
            load_checkpoint(path, WORDS)
    else:
        assert same(load_checkpoint(path, WORDS), good)
    write_old(path, container, *tiny_old({}, {"_buffers": Ordered({"x": hostile})}))
    if attack == "a dict of its own":  # which holds nothing that has a weight's name
        assert len(load_checkpoint(path, WORDS)["decoder"]) == 5
    else:
        with pytest.raises(InputError, match=r"x\.pth\.tar: refused"):
            load_checkpoint(path, WORDS)
    assert not (tmp_path / "proof").exists() and reachable() == before


@pytest.mark.parametrize("attack", ["os.system", "posix.system", "eval", "exec", "getattr", "subprocess", "a method",
                                    "through a module of ours", "INST", "OBJ", "an iterator", "a storage's place"])
def test_the_attacks_are_real(attack, tmp_path):
    """Python's own unpickler runs them, so it means something that nothing happened."""
    class Trusting(pickle.Unpickler):
        def persistent_load(self, saved_id: Any) -> None:
            pass

    Trusting(io.BytesIO(b"\x80\x04" + opcodes(attacks(tmp_path / "proof")[attack]) + b".")).load()
    assert (tmp_path / "proof").exists()


STORAGE = ("storage", Name("torch", "FloatStorage"), "0", "cpu", 4)
FITS = (Saved(STORAGE), 1, (3,), (1,))
TENSOR = Call(REBUILD, FITS)


def tiny_old(encoder: dict[str, Any], decoder: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The smallest old checkpoint that loads, with more state; its ResNet has two blocks of one weight each, and the
    one by which it is known, which has no numbers."""
    hand = Hand()

    def module(state: dict[str, Any], **children: Any) -> Built:
        held = {"_parameters": Ordered(), "_buffers": Ordered(), "_modules": Ordered(children)}
        return instance(ENCODER, {**held, **state})

    conv = module({"_parameters": Ordered({"weight": hand.parameter(torch.zeros(64, 64, 0, 0))})})
    stages = {"4": module({}, **{"0": module({}, conv2=conv)}),
              "6": module({}, **{str(i): hand.module(nn.Linear(1, 1)) for i in range(2)})}
    content = {"encoder": module({"enc_image_size": 14, **encoder}, resnet=module({}, **stages)),
               "decoder": module(decoder, embedding=hand.module(nn.Embedding(len(WORDS), 3)),
                                 attention=module({}, encoder_att=hand.module(nn.Linear(3, 2))),
                                 init_h=hand.module(nn.Linear(3, 4))), "more": TENSOR}
    return content, {**hand.storages, "0": torch.arange(4.0)}


@BOTH_CONTAINERS
def test_hostile_attributes_do_nothing(container, tmp_path):
    """Kept as data, whatever they are called."""
    names = ("__class__", "__setstate__", "__getattr__", "__reduce__", "__del__", "items", "state", "_forward_hooks")
    state = {name: [Name("builtins", "set"), Name("torch.nn.parameter", "Parameter")] for name in names}
    path = write_old(tmp_path / "x.pth.tar", container, *tiny_old(state, state))
    before = reachable()
    loaded = load_checkpoint(path, WORDS)
    assert reachable() == before and loaded["model"]["decoder_dim"] == 4 and len(loaded["decoder"]) == 5
    assert all(type(tensor) is torch.Tensor for name in ("encoder", "decoder") for tensor in loaded[name].values())


TENSORS = {
    "fits": FITS,
    "no arguments": (), "no storage": ("storage", 0, (1,), (1,)), "a number as storage": (7, 0, (1,), (1,)),
    "larger than any memory": (Saved(STORAGE), 0, (10**12,), (1,)),
    "a storage that claims so too": (Saved((*STORAGE[:4], 10**12)), 0, (10**12,), (1,)),
    "one number for all": (Saved(STORAGE), 0, (10**12,), (0,)), "one number for five": (Saved(STORAGE), 0, (5,), (0,)),
    "too many": (Saved(STORAGE), 0, (5,), (1,)), "too far on": (Saved(STORAGE), 4, (1,), (1,)),
    "a long stride": (Saved(STORAGE), 0, (2, 2), (2**62, 1)), "before the first": (Saved(STORAGE), -1, (1,), (1,)),
    "backwards": (Saved(STORAGE), 3, (2,), (-1,)), "a product too large": (Saved(STORAGE), 0, (2**32, 2**32), (0, 0)),
    "words": (Saved(STORAGE), 0, ("x",), ("y",)),
    "no such file": (Saved((*STORAGE[:2], "../x", "cpu", 4)), 0, (1,), (1,)),
    "a view beyond": (Saved((*STORAGE, ("1", 3, 2))), 0, (1,), (1,)),
    "a storage of modules": (Saved(("storage", ENCODER, "0", "cpu", 4)), 0, (1,), (1,)),
}


@BOTH_CONTAINERS
@pytest.mark.parametrize("case", TENSORS)
def test_only_what_is_in_the_file_becomes_a_tensor(case, container, tmp_path):
    content = tiny_old({}, {"_buffers": Ordered({"extra": Call(REBUILD, TENSORS[case])})})
    path = write_old(tmp_path / "x.pth.tar", container, *content)
    if case == "fits":
        assert load_checkpoint(path, WORDS)["decoder"]["extra"].tolist() == [1, 2, 3]
    else:
        with pytest.raises(InputError, match=r"x\.pth\.tar: refused"):
            load_checkpoint(path, WORDS)


IN_ITSELF = Raw(opcodes(ENCODER) + b")\x81q\x63}(" + opcodes("_modules") + b"}" + opcodes("again") + b"h\x63s"
                + opcodes("_parameters") + b"}" + opcodes("_buffers") + b"}ub")
STATES = {
    "a class for a module": ({"encoder": ENCODER}, {}), "nothing for a module": ({"decoder": None}, {}),
    "a module without state": ({"encoder": Raw(opcodes(ENCODER) + b")\x81")}, {}),
    "a module in itself": ({"encoder": IN_ITSELF}, {}),
    "an OrderedDict of numbers": ({"epoch": Call(Name("collections", "OrderedDict"), (5, 6, 7))}, {}),
    "a Parameter of nothing": ({}, {"_parameters": {"x": Call(Name("torch.nn.parameter", "Parameter"), ())}}),
    "a Parameter of a list": ({}, {"_parameters": {"x": Call(Name("torch.nn.parameter", "Parameter"), ([1],))}}),
    "a number for a name": ({}, {"_parameters": {7: TENSOR}}), "a list of parameters": ({}, {"_parameters": [TENSOR]}),
    "a word for a tensor": ({}, {"_buffers": {"x": "y"}}), "no children": ({}, {"_modules": {}}),
    "a huge map": ({}, {"enc_image_size": 10**9}), "a word for the map": ({}, {"enc_image_size": "14"}),
}


@pytest.mark.parametrize("case", STATES)
def test_impossible_states_are_refused(case, tmp_path):
    changes, encoder = STATES[case]
    content, storages = tiny_old(encoder, {})
    with pytest.raises(InputError, match=r"x\.pth\.tar: refused"):
        load_checkpoint(write_old(tmp_path / "x.pth.tar", "stream", {**content, **changes}, storages), WORDS)


@pytest.mark.parametrize("score", [Call(ENCODER, ()), "high", None, {"test": 1.0}])
def test_a_strange_score_is_left_out(score, tmp_path):
    """It was refused; but captions need no score."""
    content, storages = tiny_old({}, {})
    state = load_checkpoint(write_old(tmp_path / "x.pth.tar", "zip", {**content, "bleu-4": score}, storages), WORDS)
    assert state["scores"] == {} and len(state["decoder"]) == 5


def nested(times: int, inner: Any, name: str = "x") -> Raw:
    """A dict that holds another twice, which holds another twice, ...: as many copies as 2 to that power."""
    value = opcodes(inner)
    for i in range(times):
        value = b"}(" + opcodes(f"{name}a") + value + f"q{chr(i + 100)}".encode("latin-1") + opcodes(
            f"{name}b") + f"h{chr(i + 100)}".encode("latin-1") + b"u"
    return Raw(value)


LARGE = {
    "a thousand views of one storage": lambda storage: {
        "encoder": {str(i): Call(REBUILD, (storage, 0, (10**5 - i,), (1,))) for i in range(1000)}},
    "a dict that holds another twice": lambda storage: {"x": nested(60, {"y": 1})},
    "and tensors": lambda storage: {"x": nested(60, Call(REBUILD, (storage, 0, (1,), (1,))))},
    "and modules": lambda storage: {"x": nested(60, instance(ENCODER, {
        "_parameters": Ordered(), "_buffers": Ordered(), "_modules": Ordered({"a": None})}))},
    "long names": lambda storage: {"x": nested(40, Call(REBUILD, (storage, 0, (1,), (1,))), "x" * 10**5)},
}


@pytest.mark.parametrize("case", LARGE)
def test_a_small_file_does_not_become_large(case, tmp_path):
    storage = Saved(("storage", Name("torch", "FloatStorage"), "0", "cpu", 10**5))
    path = write_old(tmp_path / "x.pth.tar", "zip", LARGE[case](storage), {"0": torch.zeros(10**5)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    with pytest.raises(InputError, match=r"x\.pth\.tar: refused"):
        load_checkpoint(path, WORDS)
    assert time.monotonic() - began < 30  # a second or two, where nothing else runs
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB: a quarter of the thousand views


def test_what_holds_itself_beside_good_weights_is_left_alone(tmp_path):
    content, storages = tiny_old({}, {})
    endless = Raw(b"}q\x63(" + opcodes("again") + b"h\x63u")
    path = write_old(tmp_path / "x.pth.tar", "zip", {"more": endless, **content}, storages)
    assert len(load_checkpoint(path, WORDS)["decoder"]) == 5


@pytest.mark.parametrize("bomb", ["data.pkl", "data/0"])
def test_a_zip_bomb_is_not_unpacked(bomb, tmp_path):
    content = {"data.pkl": b"\x80\x02" + opcodes(TENSOR) + b".", "data/0": bytes(16), bomb: bytes(10**6)}
    with zipfile.ZipFile(tmp_path / "x.pth.tar", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, each in content.items():
            archive.writestr(f"a/{name}", each)
    with pytest.raises(InputError, match=r"refused.*compressed"):
        load_checkpoint(tmp_path / "x.pth.tar", WORDS)


@pytest.fixture
def little_memory():
    """Fails a test that takes more than ten megabytes, beside what PyTorch takes."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7


@pytest.mark.usefixtures("little_memory")
def test_a_large_memo_takes_no_memory():
    """Python's unpickler in C makes an array as long as the highest number that a pickle calls something by."""
    pickled = b"\x80\x02}r" + struct.pack("<I", 2**25) + b"."
    assert old_checkpoints.OldUnpickler(io.BytesIO(pickled)).load() == {}


@pytest.mark.usefixtures("little_memory")
def test_a_bytearray_that_is_said_to_be_large_takes_no_memory():
    """Ten bytes that the fuzzer found."""
    with pytest.raises(KeyError):
        old_checkpoints.OldUnpickler(io.BytesIO(b"\x80\x05\x96" + struct.pack("<Q", 2**28) + b".")).load()


@pytest.mark.usefixtures("little_memory")
def test_a_storage_that_is_said_to_be_large_takes_no_memory(tmp_path):
    path = write_old(tmp_path / "x.pth.tar", "stream", *tiny_old({}, {}))
    content = path.read_bytes()
    assert content.endswith(struct.pack("<q4f", 4, 0, 1, 2, 3))
    path.write_bytes(content[:-24] + struct.pack("<q4f", 2**28, 0, 1, 2, 3))
    with pytest.raises(EOFError):
        old_checkpoints.load_inert(path)


LANGUAGE = [
    *(opcodes(Name(*name.rsplit(".", 1))) for name in ("models.Encoder", "builtins.dict", "builtins.set",
                                                       "torch.FloatStorage", "collections.defaultdict",
                                                       "collections.OrderedDict")),
    *map(opcodes, (None, 1, "x", "__class__", "state", (), ("storage",), {}, [], {"__init__": 1}, (None, {"hit": 1}))),
    *(bytes([each]) for each in b"(t\x85\x86R\x81\x92boQsuae\x90\x9401\x8f\x93"),
    b"q\x00", b"h\x00", b"q\x01", b"h\x01"]


@settings(max_examples=250, deadline=None)
@given(st.lists(st.sampled_from(LANGUAGE), max_size=25))
def test_no_program_of_allowed_names_reaches_anything(program):
    """Whatever opcodes do with names ends in an error, or in plain data and stand-ins."""
    before = reachable()
    try:
        found = old_checkpoints.OldUnpickler(io.BytesIO(b"\x80\x04" + b"".join(program) + b".")).load()
    except Exception:
        found = None
    assert reachable() == before
    plain = str, int, type(None), tuple, list, dict, set, frozenset
    assert isinstance(found, (*plain, type, torch.dtype, old_checkpoints.Inert))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_old_file_is_read_or_refused(data, tmp_path_factory):
    """Some bytes changed: one line of refusal at worst."""
    path = write_old(tmp_path_factory.getbasetemp() / "damaged.pth.tar", "stream", *tiny_old({}, {}))
    content = bytearray(path.read_bytes())
    places = st.integers(0, len(content) - 1)
    for place, byte in data.draw(st.dictionaries(places, st.integers(0, 255), max_size=4)).items():
        content[place] = byte
    path.write_bytes(content)
    try:
        loaded = load_checkpoint(path, WORDS)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert set(loaded["model"].values()) <= {14, 2, 3, 4, 11, 0.5, "resnet18", 1}


def test_a_checkpoint_stripped_for_publishing_loads(tmp_path):
    """Without what only a resume needs."""
    state = {name: value for name, value in our_state().items() if name not in {"training", "scores", "preprocessing"}}
    save_checkpoint(tmp_path / "x.pth.tar", state)
    loaded = load_checkpoint(tmp_path / "x.pth.tar")
    assert (loaded["training"], loaded["scores"], loaded["preprocessing"]) == (None, {}, None)
    assert loaded["word_map"] == state["word_map"]
