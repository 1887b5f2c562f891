"""Checkpoints made small enough to give away, and the model in the box."""
from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from conftest import ENCODER
from PIL import Image
from test_checkpoints import our_state

import caption
from models import Encoder
from safety.checkpoints import load_checkpoint, load_weights, save_checkpoint
from safety.errors import InputError, UsageError
from training import publish

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whole") / "BEST_checkpoint_x.pth.tar"
    save_checkpoint(path, our_state() | {"preprocessing": {}})
    return path


def published(checkpoint: Path, folder: Path, bits: int) -> Path:
    path = folder / f"{bits}.pth.tar"
    publish.main(publish.get_parser().parse_args([str(checkpoint), str(path), "--bits", str(bits)]))
    return path


@pytest.mark.parametrize("bits", [16, 8])
def test_its_encoder_serves_another_decoder(bits: int, checkpoint: Path, tmp_path: Path) -> None:
    """--encoder_weights takes such a file, and in 8 bits each row times its scale."""
    small = published(checkpoint, tmp_path, bits)
    expected = load_checkpoint(small)["encoder"]
    encoder = Encoder(3, ENCODER, load_weights(small))
    assert all(torch.equal(each, expected[name].to(each.dtype)) for name, each in encoder.state_dict().items())


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 2 ** -11), (8, 1 / 254)])
def test_each_weight_is_as_near_as_so_many_bits_can_be(bits, tolerance, checkpoint, tmp_path):
    whole, small = load_checkpoint(checkpoint), load_checkpoint(published(checkpoint, tmp_path, bits))
    for part in ("encoder", "decoder"):
        assert whole[part].keys() == small[part].keys()
        for name, weight in whole[part].items():
            rows = weight.float().flatten(1) if weight.dim() > 1 else weight.float().reshape(1, -1)
            error = (small[part][name].float().reshape(rows.shape) - rows).abs()
            assert (error <= rows.abs().amax(dim=1, keepdim=True) * tolerance * 1.01 + 1e-7).all(), name
    assert small["training"] is None
    assert {part: small[part] for part in ("word_map", "model", "scores")} == {
        part: whole[part] for part in ("word_map", "model", "scores")}


def test_it_is_read_without_running_anything_and_captions(checkpoint, tmp_path, capsys):
    whole, small = (caption.caption_images(caption.load(path, device="cpu"), PICTURE, max_len=8)[0][0]
                    for path in (checkpoint, published(checkpoint, tmp_path, 8)))
    assert small.log_prob == pytest.approx(whole.log_prob, rel=0.02)
    assert torch.load(tmp_path / "8.pth.tar", weights_only=True)["decoder"]["fc.weight"].dtype == torch.int8
    assert (tmp_path / "8.pth.tar").stat().st_size < 0.5 * checkpoint.stat().st_size
    assert "SHA-256 " in capsys.readouterr().out


def test_it_is_a_command_of_its_own(checkpoint, tmp_path):
    command = [sys.executable, REPOSITORY / "training" / "publish.py", checkpoint, "small.pth.tar"]
    assert subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.startswith("small")
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode and again.stderr.count("\n") == 1 and "small.pth.tar: is there already" in again.stderr


def test_nothing_is_overwritten(checkpoint):
    with pytest.raises(UsageError, match="is there already"):
        publish.main(publish.get_parser().parse_args([str(checkpoint), str(checkpoint)]))


@pytest.mark.parametrize("scales", [
    3, {"decoder": {}}, {"encoder": {}, "decoder": {"fc.weight": torch.ones(3, 1)}},
    {"encoder": {}, "decoder": {"fc.weight": torch.ones(1, 1)}}, {"encoder": {}, "decoder": {"nothing": torch.ones(1)}},
    {"encoder": {}, "decoder": {"fc.weight": 2.0}}, {"encoder": {}, "decoder": {"fc.bias": torch.ones(10)}}])
def test_scales_that_do_not_fit_are_refused(scales, tmp_path):
    save_checkpoint(tmp_path / "x.pth.tar", our_state() | {"scales": scales})
    with pytest.raises(InputError, match=r"x\.pth\.tar: refused, the scales of its (en|de)coder do not fit"):
        load_checkpoint(tmp_path / "x.pth.tar")


def test_without_a_model_the_one_in_the_box_is_taken_and_named(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caption, "PRETRAINED", checkpoint)
    in_the_box, named = (caption.caption_images(caption.load(*model, device="cpu"), PICTURE, max_len=8)[0][0]
                         for model in ((), (checkpoint,)))
    assert in_the_box.words == named.words
    assert capsys.readouterr().err.count("pretrained/flickr8k.pth.tar") == 1


def test_the_model_in_the_box_is_that_of_its_card() -> None:
    card = (REPOSITORY / "pretrained" / "README.md").read_text(encoding="utf-8")
    content = caption.PRETRAINED.read_bytes()
    assert hashlib.sha256(content).hexdigest() in card and f"{len(content) / 1e6:.1f} MB" in card
    assert len(content) < 32e6
    assert torch.load(caption.PRETRAINED, weights_only=True).keys() == {
        "format", "encoder", "decoder", "word_map", "model", "preprocessing", "scores"}
    [[best]] = caption.caption_images(caption.load(caption.PRETRAINED, device="cpu"),
                                     Image.fromarray(skimage.data.camera()))
    assert "man" in best.words and best.finished
