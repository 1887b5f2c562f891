"""Encoders that are no chain of convolutions, those of timm, and the pictures that each of them expects."""
from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from conftest import ENCODER, Prepared
from test_train import assert_same_run, load, run
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.transforms.v2.functional import resize

import caption
import eval as evaluation
from datasets import CaptionDataset, encode, normalize
from encoders.trunk import IMAGENET, Pixels, Trunk
from models import ENCODERS, DecoderWithAttention, Encoder, build
from safety.restore import restore
from training.features import keep_features

CPU = torch.device("cpu")
SIZES = {"attention_dim": 4, "embed_dim": 4, "decoder_dim": 4, "vocab_size": 9}
WORDS = {"<pad>": 0, "a": 1, "<unk>": 2, "<start>": 3, "<end>": 4}


def checkpoint_of(encoder: Encoder, name: str, stride: int = 32, **more: Any) -> dict[str, Any]:
    decoder = DecoderWithAttention(**SIZES, encoder_dim=encoder.encoder_dim)
    return {"model": {"encoder": name, "encoded_image_size": 4, "encoder_stride": stride, **SIZES},
            "encoder": encoder.state_dict(), "decoder": decoder.state_dict(), **more}


@pytest.fixture
def vit(monkeypatch: pytest.MonkeyPatch) -> list[VisionTransformer]:
    """Under the name vit_b_16 a smaller one; those that were made."""
    made: list[VisionTransformer] = []

    def get_model(name: str, weights: None, image_size: int = 96) -> VisionTransformer:
        made.append(VisionTransformer(image_size, 16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16))
        return made[-1]

    monkeypatch.setattr("torchvision.models.get_model", get_model)
    return made


def test_a_vision_transformer_gives_the_tokens_of_its_patches(vit: list[VisionTransformer]) -> None:
    """In their places, without the class's; a file of the classifier's weights fits, and stage 2 tunes the blocks."""
    torch.manual_seed(0)
    classifier = torchvision.models.get_model("vit_b_16", weights=None)
    for parameter in classifier.parameters():
        nn.init.normal_(parameter)
    encoder = Encoder(4, "vit_b_16", classifier.state_dict(), stride=16)
    images = torch.randn(2, 3, 96, 96)
    tokens: list[torch.Tensor] = []
    classifier.eval().encoder.register_forward_hook(lambda *call: tokens.append(call[2]))
    with torch.inference_mode():
        classifier(images)
        assert torch.equal(encoder.grid(images), tokens[0][:, 1:].view(2, 6, 6, 8))
        assert encoder(images).shape == (2, 4, 4, 8)
    assert (encoder.encoder_dim, encoder.pixels) == (8, Pixels(96))
    encoder.fine_tune()
    frozen = {name for name, each in encoder.named_parameters() if not each.requires_grad}
    assert {name.split(".")[1] for name in frozen} == {"0"} and len(frozen) == 4
    with pytest.raises(ValueError, match=r"^vit_b_16 has no map with a stride of 8 \(its last has 16\); name another "
                                         "encoder, or take --encoder_stride 32$"):
        Encoder(4, "vit_b_16", stride=8)


def test_a_checkpoint_tells_for_which_pictures_a_vision_transformer_is(vit: list[VisionTransformer]) -> None:
    """As does a file of its weights, by the places that it knows."""
    file = VisionTransformer(128, 16, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16).state_dict()
    encoder = Encoder(4, "vit_b_16", {f"model.{name}": each for name, each in file.items()})
    assert encoder.pixels.image_size == 128
    again, _ = restore(checkpoint_of(encoder, "vit_b_16", preprocessing=encoder.pixels.described()))
    assert vit[-1].image_size == again.pixels.image_size == 128
    assert torch.equal(again.grid(torch.ones(1, 3, 128, 128)), encoder.grid(torch.ones(1, 3, 128, 128)))


@pytest.mark.parametrize(("stride", "dim", "side"), [(32, 64, 3), (16, 32, 6)])
def test_a_swin_transformer_gives_its_map(monkeypatch: pytest.MonkeyPatch, stride: int, dim: int, side: int) -> None:
    torch.manual_seed(0)
    swin = SwinTransformer([4, 4], 8, [1, 1, 2, 1], [1, 1, 2, 2], [7, 7]).eval()
    monkeypatch.setattr("torchvision.models.get_model", lambda *_, **__: swin)
    encoder, images = Encoder(4, "swin_t", swin.state_dict(), stride), torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        expected = swin.norm(swin.features(images)) if stride == 32 else swin.features[:6](images)
        assert torch.equal(encoder.grid(images), expected)
    assert (expected.shape, encoder.encoder_dim) == ((2, side, side, dim), dim)
    assert (encoder.pixels, encoder.first_tuned) == (Pixels(224), 2)


# ---- pictures --------------------------------------------------------------------------------------------------------

def test_bytes_become_the_pictures_that_an_encoder_expects() -> None:
    """As torchvision resizes them; of an encoder that says nothing, as ever."""
    torch.manual_seed(0)
    images = torch.randint(256, (2, 3, 256, 256), dtype=torch.uint8)
    pixels = Pixels(96, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in pixels[1:])
    smaller = resize(images.float() / 255, [96, 96], antialias=True)
    torch.testing.assert_close(normalize(images, CPU, pixels), (smaller - mean) / std)
    encoder = nn.Identity()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    plain = (images.float() / 255 - mean) / std
    assert torch.equal(encode(encoder, None, images, CPU), plain)
    encoder.pixels = pixels
    assert torch.equal(encode(encoder, None, images, CPU), normalize(images, CPU, pixels))


def test_what_a_checkpoint_says_of_its_pictures_is_used() -> None:
    encoder = Encoder(4, ENCODER)
    own = {"image_size": 128, "mean": [0.5, 0.25, 0.0], "std": [1.0, 2.0, 3.0]}
    assert restore(checkpoint_of(encoder, ENCODER, preprocessing=own))[0].pixels.described() == own
    for nothing in ({}, {"preprocessing": None}):
        assert restore(checkpoint_of(encoder, ENCODER, **nothing))[0].pixels == IMAGENET


@pytest.mark.parametrize(("name", "value"), [
    ("image_size", 10 ** 9), ("image_size", "256"), ("image_size", 0), ("mean", [0.5, 0.5]), ("mean", None),
    ("mean", [math.nan] * 3), ("std", [1, 0, 1]), ("std", ["a"] * 3)])
def test_pictures_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    checkpoint = checkpoint_of(Encoder(4, ENCODER), ENCODER, preprocessing=IMAGENET.described() | {name: value})
    with pytest.raises(OSError, match=r"model\.pth\.tar: its weights and the model that it names do not fit"):
        restore(checkpoint, "model.pth.tar")


@pytest.mark.parametrize(("held", "pixels"), [
    ({"mean": [0.5]}, Pixels(256, (0.5,) * 3)), ({"image_size": 224}, Pixels(224)),
    ({"std": [1, 2, 3], "of another": 1}, Pixels(std=(1.0, 2.0, 3.0)))])
def test_what_an_older_file_does_not_say_of_its_pictures_is_imagenets(held: dict[str, Any], pixels: Pixels) -> None:
    assert restore(checkpoint_of(Encoder(4, ENCODER), ENCODER, preprocessing=held))[0].pixels == pixels


@pytest.mark.parametrize("held", [["mean"], {"mean": 0.5}, {"std": None}, {"std": ["a"]}, {"mean": []}])
def test_what_cannot_be_read_of_pictures_is_a_value_error(held: Any) -> None:
    with pytest.raises(ValueError, match=r"^its (preprocessing cannot be read|pixels have the mean)"):
        Pixels.of(held)


@pytest.mark.parametrize("pixels", [Pixels(16), Pixels(4096), Pixels(std=(0.0,) * 3)])
def test_an_encoder_of_your_own_must_make_sense_before_it_is_trained(pixels: Pixels,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Else days later its checkpoint could not be read."""
    monkeypatch.setitem(ENCODERS, "own", lambda *_: Trunk([nn.Conv2d(3, 2, 8, 8)], 2, 0, pixels))
    with pytest.raises(ValueError, match=r"32 to 2048|the deviation"):
        Encoder(4, "own")


def test_a_map_may_be_as_large_as_the_encoders_own_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS, "own", lambda *_: Trunk([nn.Conv2d(3, 2, 8, 8)], 2, 0, Pixels(64)))
    assert build({"encoder": "own", "encoded_image_size": 64, **SIZES})
    with pytest.raises(ValueError, match="a map of 65 x 65 pixels is larger than the picture, 64 x 64"):
        build({"encoder": "own", "encoded_image_size": 65, **SIZES})


def test_features_of_other_pictures_are_kept_in_another_file(prepared: Prepared, tmp_path: Path) -> None:
    dataset = CaptionDataset(shutil.copytree(prepared.folder, tmp_path / "data"), prepared.name, "VAL")
    encoder = Encoder(4, ENCODER)
    model = caption.Captioner(encoder, DecoderWithAttention(4, 4, 4, 9, encoder.encoder_dim, map_size=4), WORDS)
    shapes = []
    for pixels in (IMAGENET, Pixels(128), Pixels(128, (0.5,) * 3)):
        encoder.pixels, dataset.features = pixels, None
        keep_features(dataset, model, 0, show=False)
        shapes.append(dataset.features.shape[1:3])
    assert shapes == [(8, 8), (4, 4), (4, 4)] and len(list((tmp_path / "data").glob("*FEATURES*"))) == 3


# ---- timm ------------------------------------------------------------------------------------------------------------

class TinyModel(nn.Module):
    """What our code asks of timm's models; its map is of two channels, and the second layer's of four."""

    def __init__(self) -> None:
        super().__init__()
        self.stages, self.norm = nn.Sequential(nn.Conv2d(3, 2, 16, 16), nn.Conv2d(2, 4, 2, 2)), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 9)
        self.feature_info = [{"num_chs": 2, "reduction": 16}, {"num_chs": 4, "reduction": 32}]
        self.pretrained_cfg = {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def prune_intermediate_layers(self, indices: list[int], prune_norm: bool = False) -> list[int]:
        self.stages, self.head = self.stages[:indices[0] + 1], nn.Identity()
        self.norm = nn.Identity() if prune_norm else self.norm
        return indices

    def forward_intermediates(self, images: torch.Tensor, indices: list[int], norm: bool,
                              intermediates_only: bool) -> list[torch.Tensor]:
        assert intermediates_only
        features = self.stages[:indices[0] + 1](images)
        return [self.norm(features) if norm else features]


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """A package of that name with two models, one without weights; and what it was asked for."""
    made: list[tuple[str, bool]] = []

    def create_model(name: str, pretrained: bool, **more: int) -> TinyModel:
        made.append((name, pretrained, *more.values()))
        if pretrained and name != "tiny.tag":
            raise RuntimeError("no network")
        return TinyModel()

    def get_pretrained_cfg(name: str) -> SimpleNamespace:
        if name not in ("tiny", "tiny.tag", "bare"):
            raise RuntimeError("Invalid pretrained tag")
        return SimpleNamespace(fixed_input_size=name == "tiny.tag", input_size=(3, 64, 64))

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(
        is_model=lambda name: name.split(".")[0] in ("tiny", "bare"), create_model=create_model, __version__="0",
        list_models=lambda pattern, pretrained: ["tiny.tag"] if pattern == "tiny.*" and pretrained else [],
        models=SimpleNamespace(get_pretrained_cfg=get_pretrained_cfg, is_model_pretrained=lambda name: name != "bare")))
    return made


@pytest.mark.parametrize(("stride", "dim", "side"), [(32, 4, 2), (16, 2, 4)])
def test_a_model_of_timms_gives_its_last_map_of_the_stride(timm: list[tuple[str, bool]], stride: int, dim: int,
                                                           side: int) -> None:
    """With the picture size and the pixels that it says; a file of the model's weights fits, and a checkpoint."""
    torch.manual_seed(0)
    model, images = TinyModel().eval(), torch.randn(1, 3, 64, 64)
    nn.init.normal_(model.norm.running_mean)
    encoder = Encoder(4, "timm:tiny", model.state_dict(), stride)
    [expected] = model.forward_intermediates(images, [stride // 16 - 1], stride == 32, True)
    torch.testing.assert_close(encoder.grid(images), expected.permute(0, 2, 3, 1))
    assert expected.shape[2] == side
    assert (encoder.encoder_dim, encoder.pixels) == (dim, Pixels(64, (0.5,) * 3, (0.25,) * 3))
    assert len(list(encoder.parameters())) == {32: 6, 16: 2}[stride]  # none that is not used
    again, _ = restore(checkpoint_of(encoder, "timm:tiny", stride, preprocessing=encoder.pixels.described()))
    assert torch.equal(again.grid(images), encoder.grid(images))
    with pytest.raises(ValueError, match=r"no map with a stride of 8 \(its last has 32\); name"):
        Encoder(4, "timm:tiny", stride=8)


def test_the_name_tells_timms_weights(timm: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    Encoder(4, "timm:tiny.tag", "IMAGENET1K_V1")
    assert timm == [("tiny.tag", True)]
    with pytest.raises(OSError, match=r"the weights of timm:tiny could not be fetched \(no network\)"):
        Encoder(4, "timm:tiny", "IMAGENET1K_V1")
    with pytest.raises(ValueError, match=r"timm:tiny\.TAG, and not IMAGENET1K_V2"):
        Encoder(4, "timm:tiny", "IMAGENET1K_V2")
    timm.clear()
    for weights in ("IMAGENET1K_V1", None):
        with pytest.raises(ValueError, match=r"timm 0 has no tiny\.tga, only tiny\.tag; or get a newer one"):
            Encoder(4, "timm:tiny.tga", weights)
    with pytest.raises(ValueError, match="timm 0 has no weights for bare; give a file with --encoder_weights FILE, or"):
        Encoder(4, "timm:bare", "IMAGENET1K_V1")
    for name in ("timm:hf-hub:somebody/something", "timm:", "timm"):
        with pytest.raises(ValueError, match="has no model"):
            Encoder(4, name)
    assert not timm  # nothing of a stranger's was asked for
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm:tiny needs: pip install timm$"):
        Encoder(4, "timm:tiny")


def test_a_model_for_pictures_of_one_size_is_made_for_the_checkpoints(timm: list[tuple[Any, ...]]) -> None:
    """The same name may be for others in another version of timm; a model for all sizes is made as ever."""
    for name in ("timm:tiny", "timm:tiny.tag"):
        assert [Encoder(4, name, image_size=size).pixels.image_size for size in (None, 64, 96)] == [64, 64, 96]
    assert [made[2:] for made in timm] == [(), (), (), (), (), (96,)]


@pytest.mark.parametrize(("name", "words"), [
    ("timm:newer", "timm 0 has no model newer; .*pip install -U timm$"),
    ("timm:tiny.newer", r"timm 0 has no tiny\.newer, only tiny\.tag; or get a newer one: pip install -U timm$"),
    ("vit_b16", "torchvision has no model vit_b16, .*pip install -U torchvision$")])
def test_a_model_of_a_newer_package_is_named_with_what_to_do(name: str, words: str,
                                                             timm: list[tuple[str, bool]]) -> None:
    with pytest.raises(OSError, match=rf"^model\.pth\.tar: {words}"):
        restore(checkpoint_of(Encoder(4, ENCODER), name), "model.pth.tar")
    with pytest.raises(ValueError, match=words):
        Encoder(4, name, {"pos_embedding": torch.zeros(1, 5, 2)})


# ---- a small file that describes a large model -----------------------------------------------------------------------

@pytest.fixture
def computing(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An encoder that computes with its first weights, as RegNet's; an item for each that was begun."""
    made: list[None] = []

    def find(*_: Any) -> Trunk:
        made.append(None)
        layer = nn.Conv2d(3, 2, 8, 8)
        layer.weight.sum().item()
        return Trunk([layer], 2, 0)

    monkeypatch.setitem(ENCODERS, "computing", find)
    return made


def test_weights_that_do_not_fit_build_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their shapes: a small file may name a large model."""
    devices: list[str] = []
    monkeypatch.setitem(ENCODERS, "own", lambda *_: devices.append(torch.empty(0).device.type) or Trunk(
        [nn.Conv2d(3, 2, 8, 8)], 2, 0))
    checkpoint = checkpoint_of(Encoder(4, "own"), "own")
    devices.clear()
    assert restore(checkpoint) and devices == ["meta"]
    checkpoint["model"]["vocab_size"] = 10 ** 6
    with pytest.raises(OSError, match="do not fit"):
        restore(checkpoint)
    assert devices == ["meta", "meta"]


def test_a_model_that_computes_is_built_as_far_as_its_weights_reach(computing: list[None],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(Encoder(4, "computing"), "computing")
    assert restore(checkpoint)
    assert len(computing) == 3
    monkeypatch.setattr(nn.Embedding, "reset_parameters", lambda _: pytest.fail("it takes the memory"))
    checkpoint["model"] |= {"vocab_size": 10 ** 6, "embed_dim": 1000}
    with pytest.raises(OSError, match=r"it describes a larger model than its \d+ weights are of"):
        restore(checkpoint)
    monkeypatch.undo()
    assert nn.Embedding(10, 2 * 10 ** 7, device="meta")  # afterwards anybody may have such models


def test_models_without_a_square_map_are_refused(timm: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    wide = TinyModel()
    wide.pretrained_cfg["input_size"] = (3, 32, 64)
    monkeypatch.setattr(sys.modules["timm"], "create_model", lambda *_, **__: wide)
    with pytest.raises(ValueError, match="timm:tiny is for pictures of 32 x 64"):
        Encoder(4, "timm:tiny")
    monkeypatch.delattr(TinyModel, "forward_intermediates")
    with pytest.raises(ValueError, match="does not give maps of tiny; get a newer one: pip install -U timm"):
        Encoder(4, "timm:tiny")


def test_a_model_of_timms_is_trained_resumed_evaluated_and_captions(prepared: Prepared, tmp_path: Path,
                                                                    timm: list[tuple[str, bool]],
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """From kept features too; the checkpoint says what its pictures are."""
    monkeypatch.setattr("shutil.which", lambda _: None)  # METEOR has nothing to do with it
    data = shutil.copytree(prepared.folder, tmp_path / "data")
    wanted = ["--encoder", "timm:tiny", "--data_folder", data, "--cache_features", "--epochs", 1]
    run(prepared, tmp_path / "straight", *wanted)
    run(prepared, tmp_path / "first", *wanted, "--stage", 1)
    path = tmp_path / "first" / f"checkpoint_{prepared.name}.pth.tar"
    run(prepared, tmp_path / "first", *wanted, "--checkpoint", path)
    whole, resumed = (load(tmp_path / each, prepared) for each in ("straight", "first"))
    assert_same_run(resumed, whole)
    assert resumed["preprocessing"] == {"image_size": 64, "mean": [0.5] * 3, "std": [0.25] * 3}
    rows = evaluation.main(evaluation.get_parser().parse_args(
        ["--data_folder", str(data), "--data_name", prepared.name, "--checkpoint", str(path), "--beam_size", "1",
         "--json", str(tmp_path / "rows.json")]))
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    [[best]] = caption.caption_images(caption.load(path), sorted(prepared.pictures.iterdir())[:1])
    assert best.sequence_alphas.shape == (len(best.sequence), 4, 4)


@pytest.mark.parametrize(("name", "stride", "shape", "pixels"), [
    ("timm:vit_tiny_patch16_224", 32, (14, 14, 192), Pixels(224, (0.5,) * 3, (0.5,) * 3)),
    ("timm:efficientnet_lite0", 16, (14, 14, 112), Pixels(224)),
    ("timm:swin_tiny_patch4_window7_224", 16, (14, 14, 384), Pixels(224))])  # its masks are no weights
def test_real_models_of_timms(name: str, stride: int, shape: tuple[int, ...], pixels: Pixels) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder, images = Encoder(4, name, None, stride), torch.randn(1, 3, 224, 224)
    again, _ = restore(checkpoint_of(encoder, name, stride, preprocessing=encoder.pixels.described()))
    encoder.fine_tune()
    grid = encoder.grid(images)
    grid.sum().backward()
    assert all(each.grad is not None for each in encoder.parameters())
    assert (grid.shape[1:], encoder.pixels) == (shape, pixels) and torch.equal(again.grid(images), grid)


def test_features_that_were_kept_before_fit(prepared: Prepared, tmp_path: Path) -> None:
    """The name of their file has not changed since encoders say what pictures they expect."""
    dataset = CaptionDataset(shutil.copytree(prepared.folder, tmp_path / "data"), prepared.name, "VAL")
    encoder = Encoder(4, ENCODER)
    decoder = DecoderWithAttention(4, 4, 4, 9, encoder.encoder_dim, map_size=4)
    keep_features(dataset, caption.Captioner(encoder, decoder, WORDS), 0, show=False)
    before = {"image_size": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    file = dataset.path.stat()
    digest = hashlib.sha256(repr((str(encoder), before, torch.float32, file.st_size, file.st_mtime_ns)).encode())
    for tensor in encoder.state_dict().values():
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    assert dataset.features.path.stem.endswith(digest.hexdigest()[:16])
    assert hashlib.sha256(str(Encoder(4, "mobilenet_v3_small")).encode()).hexdigest() == (
        "53979c05a4f1bb2aacf788e6ccdab7033f460ddb70c5f8c9d144d774e97f8398")  # of the layers' names, as they were
