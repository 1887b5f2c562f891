"""Several models find one caption together: by the mean of their probabilities, each with its own encoder."""
from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Prepared, refused
from PIL import Image
from test_decoders import KINDS, SEARCH, WORDS, C, decoders
from test_eval import Model
from torch import nn

import caption
import eval as evaluation
from caption import beam_search, caption_images
from datasets import load_word_map, normalize, read_image
from models import Caption, DecoderWithAttention
from searching.ensemble import Ensemble, mean_gaze
from utils import World

MIXED = [(1, "lstm"), (5, "gru"), (2, "transformer")]  # of two, one and one tensor of state


def together(*members: nn.Module) -> Ensemble:
    """All of them look at the same features."""
    return Ensemble([nn.Identity()] * len(members), members).eval()


def assert_alike(found: list[list[Caption]], expected: list[list[Caption]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert [each.sequence for each in one] == [each.sequence for each in other]
        for ours, theirs in zip(one, other, strict=True):
            assert ours.word_log_probs == pytest.approx(theirs.word_log_probs, abs=1e-4)
            assert np.allclose(ours.sequence_alphas, theirs.sequence_alphas, atol=1e-6)


# ---- the decoder -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_thrice_is_that_model(kind: str) -> None:
    decoder, _ = decoders(3)[kind]
    features = torch.randn(6, 4, 4, C)
    assert_alike(beam_search(together(decoder, decoder, decoder), features, WORDS, SEARCH),
                 beam_search(decoder, features, WORDS, SEARCH))


@pytest.mark.parametrize("members", [MIXED[:2], MIXED[::2], MIXED[::-1]])
def test_probabilities_and_gaze_are_the_mean_computed_by_hand(members: list[tuple[int, str]]) -> None:
    """Of each word of each caption, from all steps at once of each model; models of other kinds and states, some of
    whose pictures leave the batch before others."""
    models = [decoders(seed, spread=0.8)[kind] for seed, kind in members]
    torch.manual_seed(7)
    features = 2 * torch.randn(12, 4, 4, C)
    found = beam_search(together(*(decoder for decoder, _ in models)), features, WORDS, SEARCH)
    assert len({len(each.sequence) for captions in found for each in captions}) > 3
    for picture, captions in zip(features, found, strict=True):
        for each in captions:
            sequence = torch.tensor(each.sequence)
            with torch.no_grad():
                parts = [at_once(decoder, picture[None], sequence) for decoder, at_once in models]
            mean = sum(scores.softmax(dim=1) for scores, _ in parts) / len(parts)
            by_hand = mean.log().gather(1, sequence[1:, None]).squeeze(1)
            assert each.word_log_probs == pytest.approx(by_hand.tolist(), abs=1e-4)
            looked = torch.from_numpy(each.sequence_alphas[1:]).flatten(1)
            torch.testing.assert_close(looked, sum(alphas for _, alphas in parts) / len(parts), atol=1e-5, rtol=1e-5)
    alone = [beam_search(decoder, features, WORDS, SEARCH) for decoder, _ in models]
    assert all([best.sequence for best, *_ in each] != [best.sequence for best, *_ in found] for each in alone)


def test_a_step_gives_logarithms_of_probabilities() -> None:
    """Those of a word that no model would say too: e ** -200 is 0 in float32, its logarithm is not."""
    decoder, _ = decoders(0)["lstm"]
    with torch.no_grad():
        decoder.fc.bias[WORDS["a"]] = -200
        both = together(decoder, decoder)
        seen, state = both.start(torch.randn(1, 4, 4, C))
        output, *_ = both.step(torch.tensor([WORDS["<start>"]]), seen, state)
    assert both.fc(output).exp().sum().item() == pytest.approx(1)
    assert -300 < output[0, WORDS["a"]] < -100


def test_a_coarser_map_is_enlarged() -> None:
    coarse, fine = torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.arange(16.0).view(1, 16) / 120
    wide = np.kron(coarse.view(2, 2).numpy(), np.ones((2, 2))).ravel() / 4     # a region's weight in four parts
    for alphas in ([coarse, fine], [fine, coarse]):
        assert mean_gaze(alphas).flatten().tolist() == pytest.approx(((wide + fine.numpy()[0]) / 2).tolist())
    uneven = mean_gaze([torch.rand(5, 9).softmax(1), torch.rand(5, 25).softmax(1), torch.rand(5, 49).softmax(1)])
    assert uneven.shape == (5, 49) and torch.allclose(uneven.sum(1), torch.ones(5))
    assert torch.equal(mean_gaze([torch.tensor([[0.2, 0.8, 0.0]]), torch.tensor([[0.4, 0.4, 0.2]])]).round(decimals=5),
                       torch.tensor([[0.3, 0.6, 0.1]])), "maps of one size need be no squares"
    for alphas in ([coarse, fine[:, :15]], [fine, coarse[:, :3]]):
        with refused("look at", "maps of one size"):
            mean_gaze(alphas)


# ---- files -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def models(prepared: Prepared) -> list[Model]:
    """Two that say other things of a picture, because both encoder and decoder differ."""
    words = load_word_map(prepared.folder, prepared.name)
    one, other = Model(words), Model(words)
    with torch.no_grad():
        other.encoder.resnet[0][0].weight.add_(0.3)
        other.decoder.f_beta.weight.mul_(-9)
        other.decoder.fc.weight.copy_(other.decoder.fc.weight.roll(1, 1))
    return [one, other]


@pytest.fixture(scope="module")
def paths(models: list[Model], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [each.save(folder / f"{i}.pth.tar") for i, each in enumerate(models)]


@pytest.fixture(scope="module")
def pictures(prepared: Prepared) -> list[Path]:
    return sorted(prepared.pictures.glob("shapes_test_*.png"))


def mean_log_probs(encoders: list[nn.Module], decoders: list[nn.Module], picture: Path,
                   sequence: list[int]) -> list[float]:
    """Of each word of a caption, by hand."""
    image, mean = normalize(torch.from_numpy(read_image(picture))[None], torch.device("cpu")), torch.zeros(())
    for encoder, decoder in zip(encoders, decoders, strict=True):
        with torch.no_grad():
            scores, *_ = decoder(encoder(image), torch.tensor([sequence]), torch.tensor([[len(sequence)]]))
        mean = mean + scores[0].softmax(dim=1) / len(encoders)
    return mean.log().gather(1, torch.tensor(sequence[1:])[:, None]).flatten().tolist()


def test_each_model_sees_the_picture_by_its_own_encoder(models: list[Model], paths: list[Path],
                                                        pictures: list[Path]) -> None:
    found = caption_images(caption.load(paths, device="cpu"), pictures, beam_size=3, max_len=8, batch_size=3)
    encoders, decoders = [each.encoder for each in models], [each.decoder for each in models]
    for picture, [best] in zip(pictures, found, strict=True):
        by_hand = mean_log_probs(encoders, decoders, picture, best.sequence)
        assert best.word_log_probs == pytest.approx(by_hand, abs=1e-3)
        by_the_others = mean_log_probs(encoders[::-1], decoders, picture, best.sequence)
        assert best.word_log_probs != pytest.approx(by_the_others, abs=0.1)
    for model in models:
        alone = caption_images(model.captioner, pictures, beam_size=3, max_len=8)
        assert [best.words for [best] in alone] != [best.words for [best] in found]


def test_one_file_in_a_list_is_that_file(paths: list[Path], pictures: list[Path]) -> None:
    """To the digit."""
    listed, alone = (caption.load(each, device="cpu") for each in (paths[:1], paths[0]))
    assert type(listed.decoder) is type(alone.decoder) is DecoderWithAttention
    found, expected = (caption_images(each, pictures[:3], max_len=8) for each in (listed, alone))
    assert [each[:3] + each[4:6] for [each] in found] == [each[:3] + each[4:6] for [each] in expected]


def test_maps_of_other_sizes(models: list[Model], paths: list[Path], pictures: list[Path], tmp_path: Path) -> None:
    saved = torch.load(paths[1], weights_only=True)["model"]
    wider = models[1].save(tmp_path / "wider.pth.tar", model={**saved, "encoded_image_size": 5})
    [[best]] = caption_images(caption.load([paths[0], wider], device="cpu"), pictures[0], max_len=8)
    assert best.alphas.shape == (len(best.words), 5, 5) and np.allclose(best.alphas.sum(axis=(1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("change", ["order", "size"])
def test_other_vocabularies_are_refused(change: str, models: list[Model], paths: list[Path], pictures: list[Path],
                                        tmp_path: Path, command: Any) -> None:
    """In one line with both names; a word of the same number in one and not in the other is among them."""
    words, other = dict(models[0].words), tmp_path / "other.pth.tar"
    if change == "order":
        words["red"], words["blue"] = words["blue"], words["red"]
        models[0].save(other, word_map=words)
    else:
        larger = Model({**words, "zebra": len(words)})
        larger.save(other)
    status, shown = command(caption, "--img", pictures[0], "--model", *paths, other, "--device", "cpu")
    assert status == 1 and shown.count("\n") == 1
    assert f"{paths[0]} and {other}: their vocabularies differ ({len(words)} and " in shown
    assert ("'zebra'" if change == "size" else "'red'") in shown or "'blue'" in shown


def test_other_processes_read_no_file(paths: list[Path], models: list[Model], pictures: list[Path],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    monkeypatch.setattr(caption, "broadcast", lambda value, _: sent.append(value) or value)
    caption.load_models(paths, None, World(0, 2, torch.device("cpu")), "float32")
    monkeypatch.setattr(caption, "broadcast", lambda value, _: sent.pop(0) if value is None else pytest.fail("read"))
    model = caption.load_models(["nowhere", "neither"], None, World(1, 2, torch.device("cpu")), "float32")
    monkeypatch.undo()
    assert_alike(caption_images(model, pictures[:2], max_len=8),
                 caption_images(caption.load(paths, device="cpu"), pictures[:2], max_len=8))


# ---- the commands ----------------------------------------------------------------------------------------------------

def test_captions_of_several_models(paths: list[Path], pictures: list[Path], tmp_path: Path) -> None:
    arguments = ["--img", *pictures[:2], "--model", *paths, "--max_len", 8, "--n_best", 2, "--device", "cpu"]
    results = caption.main(caption.get_parser().parse_args(
        [str(each) for each in (*arguments, "--json", tmp_path / "found.json", "--out", tmp_path)]))
    expected = caption_images(caption.load(paths, device="cpu"), pictures[:2], max_len=8, n_best=2)
    assert json.loads((tmp_path / "found.json").read_text()) == results
    assert [[each["caption"] for each in of["captions"]] for of in results] == [
        [" ".join(each.words) for each in captions] for captions in expected]
    for path in pictures[:2]:
        with Image.open(tmp_path / f"{path.stem}_attention.png") as figure:
            assert figure.width == 1200


def test_the_table_of_several_models(paths: list[Path], pictures: list[Path], prepared: Prepared,
                                     tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    [row] = evaluation.main(evaluation.get_parser().parse_args([str(each) for each in (
        "--data_folder", prepared.folder, "--data_name", prepared.name, "--checkpoint", *paths, "--beam_size", 3,
        "--max_len", 8, "--device", "cpu", "--out", tmp_path, "--gallery", tmp_path / "page.html")]))
    found = caption_images(caption.load(paths, device="cpu"), pictures, beam_size=3, max_len=8)
    said = [" ".join(best.words) for [best] in found]
    assert row["models"] == 2
    assert [each["caption"] for each in json.loads((tmp_path / "captions_TEST_beam3.json").read_text())] == said
    page = (tmp_path / "page.html").read_text()
    shown = [" ".join(re.findall("<button[^>]*>([^<]*)<", figure)) for figure in page.split("<figure")[1:]]
    assert sorted(map(html.unescape, shown)) == sorted(said)
