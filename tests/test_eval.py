"""Scores mean what they say, captions are of each picture once, and the table and its files are complete."""

import base64
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import ENCODER, Prepared, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu
from PIL import Image
from torch.nn.utils.rnn import pack_padded_sequence

import eval as evaluation
import train
from caption import Captioner, Search, beam_search, by_consensus, caption_pixels
from datasets import CaptionDataset, image_loader, load_word_map, normalize, reverse, words_of
from eval import bad_endings, bleu, brevity_penalty, generate_captions, meteor, score
from models import Decoded, DecoderWithAttention, Encoder, Losses, caption_losses
from safety.checkpoints import save_checkpoint
from safety.errors import InputError
from utils import World, gather_in_order

ALONE = World(0, 1, torch.device("cpu"))
SCORES = evaluation.COLUMNS[:9]  # without the times


class Model:
    """A small model with random weights that says something else of each picture, and sometimes does not end."""

    def __init__(self, words: dict[str, int]) -> None:
        torch.manual_seed(2)
        self.words = words
        self.encoder = Encoder(3, ENCODER)
        self.arguments = {"attention_dim": 8, "embed_dim": 8, "decoder_dim": 16, "vocab_size": len(words),
                          "encoder_dim": self.encoder.encoder_dim, "dropout": 0.5}
        self.decoder = DecoderWithAttention(**self.arguments, map_size=3).eval()
        with torch.no_grad():
            self.encoder.resnet[-1][1].weight.fill_(1e8)  # random layers leave almost nothing of a picture
            for weight, factor in ((self.decoder.fc.weight, 30), (self.decoder.embedding.weight, 10),
                                   (self.decoder.init_h.weight, 10), (self.decoder.decode_step.weight_hh, 4)):
                weight.mul_(factor)
            self.decoder.fc.bias[words["<end>"]] = 3
        self.captioner = Captioner(self.encoder, self.decoder, words, "float32")

    def save(self, path: Path, **changes: Any) -> Path:
        save_checkpoint(path, {
            "encoder": self.encoder.state_dict(), "decoder": self.decoder.state_dict(), "word_map": self.words,
            "model": {"encoder": ENCODER, "encoded_image_size": 3, **self.arguments}, "preprocessing": None,
            "scores": {}, "training": None, **changes})
        return path

    def in_other_order(self, path: Path, order: list[int]) -> dict[str, int]:
        """Saves the same model with the words numbered otherwise, but without word map, which is returned."""
        weights = {name: value[order] if name in {"fc.weight", "fc.bias", "embedding.weight"} else value
                   for name, value in self.decoder.state_dict().items()}
        self.save(path, decoder=weights, word_map=None)
        words = reverse(self.words)
        return {words[old]: new for new, old in enumerate(order)}


@pytest.fixture(scope="module")
def model(prepared) -> Model:
    return Model(load_word_map(prepared.folder, prepared.name))


@pytest.fixture(scope="module")
def pictures(prepared) -> CaptionDataset:
    return CaptionDataset(prepared.folder, prepared.name, "TEST")


def captions_of(model: Model, dataset: CaptionDataset, search: Search = Search(2, 8), world: World = ALONE,
                **options: Any) -> list[list[int]]:
    return [each.sequence for each in generate_captions(model.captioner, dataset, search, world, **options)]


# ---- scores ----------------------------------------------------------------------------------------------------------

def words(*sentences: str) -> list[list[str]]:
    return [sentence.split() for sentence in sentences]


@pytest.mark.parametrize("caption, expected", [
    ("a b c d e f", [1, 1, 1, 1]), ("a b c d x f", [5 / 6, 3 / 5, 2 / 4, 1 / 3]), ("a a a a a a", [1 / 6, 0, 0, 0]),
    ("a b c d", [1, 1, 1, 1]), ("c d e f x y", [4 / 6, 3 / 5, 2 / 4, 1 / 3]), ("x y z", [0, 0, 0, 0])])
def test_bleu_by_hand(caption, expected):
    """Geometric means of the n-gram precisions, times what brevity costs, in percent."""
    length = len(caption.split())
    brevity = min(1, math.exp(1 - 6 / length))
    by_hand = [100 * brevity * math.prod(expected[:n]) ** (1 / n) for n in (1, 2, 3, 4)]
    assert bleu([words("a b c d e f")], words(caption)) == pytest.approx(by_hand, abs=0.02)
    assert brevity_penalty([words("a b c d e f", "a b c d e f g h i")], words(caption)) == pytest.approx(brevity)


SENTENCE = st.lists(st.sampled_from("abc"), min_size=4, max_size=9)


@settings(max_examples=60, deadline=None)
@given(corpus=st.lists(st.tuples(st.lists(SENTENCE, min_size=1, max_size=4), SENTENCE), min_size=1, max_size=5))
def test_bleu_equals_nltk(corpus):
    references, captions = [[*pair[0], [*"abca"]] for pair in corpus], [[*"abca", *pair[1]] for pair in corpus]
    for n, value in enumerate(bleu(references, captions), 1):
        assert value == pytest.approx(100 * corpus_bleu(references, captions, weights=[1 / n] * n), abs=1e-4)


PEOPLE = [words("a red circle above a blue square", "the circle is over a square"),
          words("two green stars side by side"), words("a big white heart in the middle")]


def test_perfect_captions_have_the_highest_scores(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = score(PEOPLE, [each[0] for each in PEOPLE])
    assert [found[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx([100] * 4) and found["METEOR"] is None
    assert found["ROUGE-L"] == 100 and 5 < found["CIDEr"] <= 10


@pytest.mark.parametrize("caption", ["", "<unk>", "<unk> <unk>"])
def test_nothing_and_unknown_words_match_nothing(caption, monkeypatch):
    """The references are those of a folder of the original tutorial, whose unknown words have a stand-in."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = score([words("a <unknown> one"), words("the <unknown>")], words(caption, caption))
    assert 0 <= found.pop("brevity penalty") <= 1
    assert found.pop("bad endings") == 0
    assert [found.pop("METEOR"), *found.values()] == [None, *[pytest.approx(0, abs=1e-3)] * 6]


def test_captions_that_break_off_are_counted():
    assert bad_endings(words("a dog with a", "a dog", "", "a dog is", "on top", "near")) == pytest.approx(100 * 3 / 6)


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_meteor_in_percent(monkeypatch):
    """The number is that of METEOR's own program for these captions, but with a word for <unk> that nobody uses.

    It takes punctuation apart: the brackets of <unk> would match those of other words. And it fails where Java writes
    0,5, as people do in many countries, if that were not set otherwise.
    """
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    monkeypatch.setenv("_JAVA_OPTIONS", "-Duser.language=de -Xmx1500m")
    references = [words("a red circle above a square"), words("two green stars"), words("a < > unk <unknown> .")]
    assert score(references, words("", "two green stars", "<unk>"))["METEOR"] == pytest.approx(19.2572, abs=1e-3)


def test_meteor_needs_java(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(evaluation, "meteor_score", None)
    found = score(PEOPLE, [[], *(each[0] for each in PEOPLE[1:])])
    assert found["METEOR"] is None and 50 < found["ROUGE-L"] < 70 and 0 < found["BLEU-1"] < 100


def test_meteor_that_cannot_be_started_costs_only_itself(monkeypatch, capsys):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", fail)
    assert meteor(PEOPLE, [each[0] for each in PEOPLE]) is None
    assert capsys.readouterr().err == "METEOR is left out: its Java program failed (Cannot allocate memory)\n"


@pytest.fixture
def java(tmp_path, monkeypatch):
    """Another program of that name, in the shell's language."""
    def install(does: str) -> None:
        (tmp_path / "java").write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize(("does", "said"), [
    ("exit 1", "failed ("), ("echo no number; cat", "could not convert string to float"),
    ("echo 'Picked up X' >&2; printf 'Error:\\n  no jar' >&2; exit 1", "(Error: no jar)"),
    ("sleep 99", "no answer within 1 seconds"), ("cat > /dev/null & sleep 99", "no answer within 1 seconds"),
    ("exec sleep 99 > /dev/null", "could not convert string to float")])
def test_meteor_that_fails_costs_only_itself(does, said, java, monkeypatch, capsys):
    """An old Java, or too little memory for it, or one that never answers. Nothing of it lives on."""
    java(does)
    monkeypatch.setattr("safety.meteor.START_SECONDS", 1)
    made, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **options: made.append(popen(*given, **options)) or made[0])
    assert meteor(PEOPLE, [each[0] for each in PEOPLE]) is None
    shown = capsys.readouterr().err
    assert shown.startswith("METEOR is left out: its Java program failed (") and said in shown
    assert shown.count("\n") == 1
    assert made[0].stdout.closed and made[0].stdin.closed and made[0].returncode is not None
    deadline = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:  # the system needs a moment for what the shell had started
            os.killpg(made[0].pid, 0)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_meteor_may_take_longer_for_more_words(java, monkeypatch):
    """Each word of a caption is compared with each word of its references."""
    java("exit 1")
    limits, timer = [], threading.Timer
    monkeypatch.setattr(threading, "Timer", lambda seconds, *rest: limits.append(seconds) or timer(seconds, *rest))
    for n in (1, 1000):
        assert meteor([words("a " * n) * 5], words("a " * n)) is None
    assert 60 < limits[0] < 600 and 300 < limits[1] - limits[0] < 3000


# ---- sums and teacher forcing ----------------------------------------------------------------------------------------

def teacher_forced(vocab_size: int = 11, captions: int = 5) -> tuple[Any, ...]:
    torch.manual_seed(0)
    decoder = DecoderWithAttention(4, 4, 6, vocab_size, 3).eval()
    lengths = torch.randint(3, 9, (captions, 1))
    return decoder(torch.randn(captions, 2, 2, 3), torch.randint(1, vocab_size, (captions, 9)), lengths)


def losses_of(output: tuple[Any, ...]) -> Losses:
    """`caption_losses` of what `forward` returns, whose scores are padded."""
    scores, captions, lengths, *others = output
    return caption_losses(Decoded(pack_padded_sequence(scores, lengths, batch_first=True), captions, lengths, *others))


def test_losses_are_the_plain_formulas():
    scores, captions, lengths, alphas, _ = output = teacher_forced()
    assert lengths[0] > lengths[-1], "some end earlier"
    n_words, loss, near = sum(lengths), 0.0, 0
    for row, length in enumerate(lengths):
        for t in range(length):
            target = captions[row, t + 1]
            loss -= scores[row, t].log_softmax(0)[target].item()
            near += int((scores[row, t] > scores[row, t, target]).sum() < 5)
    attention = sum(((1 - alphas[row, :length].sum(0)) ** 2).mean().item() for row, length in enumerate(lengths))
    entropy = -torch.xlogy(alphas, alphas).sum().item()
    assert [losses_of(output).top5, losses_of(output).entropy] == [0, 0], "nothing shows them in training"
    found = losses_of(tuple(each.detach() if isinstance(each, torch.Tensor) else each for each in output))
    assert [each.item() for each in found] == pytest.approx(
        [loss, attention, near, n_words, 5, entropy, 0, 0], rel=1e-5)
    assert 0 < near < n_words
    assert found.mean(found, 0.7).item() == pytest.approx(loss / n_words + 0.7 * attention / 5, rel=1e-5)


def test_losses_carry_gradients_and_take_few_words():
    assert [each.requires_grad for each in losses_of(teacher_forced(vocab_size=3))] == [True] * 2 + [False] * 6
    with torch.no_grad():
        found = losses_of(teacher_forced(vocab_size=3))
    assert found.top5 == found.words, "of three words all are among the first five"


def test_losses_count_exactly_in_bfloat16():
    """Whose numbers from 256 on are even."""
    scores, captions, lengths, alphas, order = teacher_forced(captions=301)
    found = losses_of((scores.bfloat16(), captions, lengths, alphas.bfloat16(), order))
    assert [found.words, found.captions] == [sum(lengths), 301]


def tutorials_bleu(dataset: CaptionDataset, predictions: dict[int, list[int]], word_map: dict[str, int]) -> float:
    """The original tutorial's lines: for each caption the five of its picture, without <start> and <pad>."""
    references, hypotheses = [], []
    for i in range(len(dataset)):
        of_picture = dataset.captions[i // 5 * 5:i // 5 * 5 + 5].tolist()
        references.append([[w for w in c if w not in {word_map["<start>"], word_map["<pad>"]}] for c in of_picture])
        hypotheses.append(predictions[i])
    return 100 * corpus_bleu(references, hypotheses)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_validation_is_one_pass_over_everything(batch_size, model, prepared):
    """The sums, scores and captions of plain code that knows no batches, where half is what the model would say."""
    dataset = CaptionDataset(prepared.folder, prepared.name, "VAL")
    greedy = captions_of(model, dataset, Search(1))
    for i in range(15):
        dataset.captions[i] = 0
        dataset.captions[i, :len(greedy[i // 5])] = greedy[i // 5]
        dataset.caplens[i] = len(greedy[i // 5])
    captions = torch.from_numpy(dataset.captions).long()
    with torch.inference_mode():
        features = model.encoder(normalize(torch.from_numpy(np.array(dataset.images)), ALONE.device))
        output = model.decoder(features.repeat_interleave(5, 0), captions, (captions > 0).sum(1, keepdim=True))
    scores, _, lengths, _, order = output
    predictions = {int(i): scores[row, :length].argmax(1).tolist()
                   for row, (i, length) in enumerate(zip(order, lengths, strict=True))}
    loader = image_loader(dataset, batch_size, 0, ALONE)
    losses, bleu4, generated = train.validate(model.captioner, dataset, loader, ALONE)
    assert losses == pytest.approx([each.item() for each in losses_of(output)], rel=1e-5)
    assert losses.captions == len(dataset) == 30
    assert bleu4 == pytest.approx(tutorials_bleu(dataset, predictions, model.words)) and 10 < bleu4 < 90
    assert generated == [words_of(each, reverse(model.words)) for each in greedy] and len(greedy) == 6


def test_teacher_forced_bleu_is_the_tutorials(pictures, model):
    """Of predictions that are right in most places."""
    random = np.random.default_rng(0)
    said = []
    for caption, length in zip(pictures.captions, pictures.caplens, strict=True):
        wrong = random.random(length - 1) < 0.2
        said.append(np.where(wrong, 3, caption[1:length]).tolist())
    expected = tutorials_bleu(pictures, dict(enumerate(said)), model.words)
    by_picture = [said[i:i + 5] for i in range(0, len(said), 5)]
    assert train.teacher_forced_bleu(pictures, by_picture, model.words) == pytest.approx(expected)
    assert 30 < expected < 90


# ---- captions of a split ---------------------------------------------------------------------------------------------

def test_each_picture_is_captioned_once_in_order(model, pictures):
    found = captions_of(model, pictures, batch_size=3)
    alone = []
    for picture in pictures.images:
        features = model.encoder(normalize(torch.from_numpy(np.array(picture))[None], ALONE.device))
        alone += [best.sequence for best, in beam_search(model.decoder, features, model.words, Search(2, 8))]
    assert found == alone and len(found) == 7 and len({tuple(each) for each in found}) >= 4
    assert captions_of(model, pictures, batch_size=1) == found
    assert captions_of(model, pictures, batch_size=100, workers=1) == found


def test_consensus_of_the_whole_beam(model, pictures, prepared, run, tmp_path):
    found = captions_of(model, pictures, Search(5, 8, consensus=True))
    beams = caption_pixels(model.captioner, torch.from_numpy(np.array(pictures.images[:])), Search(5, 8, n_best=5),
                           with_alphas=False)
    assert found == [by_consensus(beam)[0].sequence for beam in beams] != [beam[0].sequence for beam in beams]
    rows = run("--checkpoint", model.save(tmp_path / "model.pth.tar"), "--beam_size", 5, "--max_len", 8, "--consensus",
               "--out", tmp_path, "--gallery", tmp_path / "page.html")
    said = [" ".join(words_of(each, reverse(model.words))) for each in found]
    assert [each["caption"] for each in json.loads((tmp_path / "captions_TEST_beam5.json").read_text())] == said
    page = (tmp_path / "page.html").read_text()
    assert rows[0]["consensus"] and f"<h1>{prepared.name}, TEST, beam 5, consensus</h1>" in page
    shown = [" ".join(re.findall("<button[^>]*>([^<]*)<", figure)) for figure in page.split("<figure")[1:]]
    assert sorted(map(html.unescape, shown)) == sorted(said)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_processes_share_the_pictures(world_size, model, pictures, monkeypatch):
    whole, shares = captions_of(model, pictures), []
    monkeypatch.setattr(evaluation, "gather_in_order", lambda found, _: shares.append(found) or found)
    for rank in range(world_size):
        captions_of(model, pictures, world=World(rank, world_size, ALONE.device))
    assert sum(map(len, shares)) == 7 and max(map(len, shares)) == math.ceil(7 / world_size)
    monkeypatch.setattr("utils.gather", lambda *_: shares)
    in_order = gather_in_order([], World(0, world_size, ALONE.device))
    assert [each.sequence for each in in_order] == whole


# ---- the command -----------------------------------------------------------------------------------------------------

@pytest.fixture
def run(prepared, monkeypatch):
    """Runs the script without Java on the prepared data."""
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "java" else which(name))

    def run_eval(*arguments: Any, data: Prepared = prepared) -> list[dict[str, Any]]:
        fixed = ["--data_folder", data.folder, "--data_name", data.name, "--device", "cpu", "--workers", 0]
        return evaluation.main(evaluation.get_parser().parse_args([str(each) for each in (*fixed, *arguments)]))

    return run_eval


def test_the_table_is_shown_whatever_becomes_of_files(model, run, tmp_path, monkeypatch, capsys):
    """And a folder that cannot be written is named before anything is computed."""
    path = model.save(tmp_path / "model.pth.tar")

    def full(*_: Any) -> None:
        raise InputError("the disk is full")

    monkeypatch.setattr(evaluation, "atomic_write", full)
    with refused("the disk is full"):
        run("--checkpoint", path, "--beam_size", 1, "--max_len", 3, "--json", tmp_path / "scores.json")
    assert "BLEU-4" in capsys.readouterr().out
    for flag in ("--json", "--gallery", "--out"):
        with refused(f"{path / 'x'}: nothing can be written there"):
            run("--checkpoint", "none", flag, path / "x" / "page.html" if flag != "--out" else path / "x")


@pytest.mark.parametrize("split, n_pictures", [("TEST", 7), ("VAL", 6)])
def test_the_table_and_its_files(split, n_pictures, model, prepared, run, tmp_path, capsys):
    path = model.save(tmp_path / "model.pth.tar")
    out = tmp_path / "out" / "a"
    rows = run("--checkpoint", path, "--beam_size", 1, 3, "--max_len", 8, "--split", split, "--batch_size", 4,
               "--out", out, "--json", tmp_path / "scores.json")
    shown = capsys.readouterr()
    assert shown.err.count("Java was not found: METEOR is left out") == 1
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.out.splitlines()]
    assert table[0] == ["beam", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "unfinished",
                        "seconds", "images/s"]
    assert [line[0] for line in table[2:]] == ["1", "3"] and [line[5] for line in table[2:]] == ["-", "-"]
    assert len({len(line) for line in shown.out.splitlines()}) == 1, "aligned"
    assert json.loads((tmp_path / "scores.json").read_text()) == rows
    assert {each.name for each in out.iterdir()} == {
        f"scores_{split}.md", f"scores_{split}.json", f"captions_{split}_beam1.json", f"captions_{split}_beam3.json"}
    assert (out / f"scores_{split}.md").read_text() == shown.out
    assert json.loads((out / f"scores_{split}.json").read_text()) == rows

    dataset = CaptionDataset(prepared.folder, prepared.name, split)
    karpathy = json.loads(prepared.json_path.read_text())["images"]
    for row, beam_size in zip(rows, (1, 3), strict=True):
        results = json.loads((out / f"captions_{split}_beam{beam_size}.json").read_text())
        assert [each["image_id"] for each in results] == [image["imgid"] for image in karpathy
                                                          if image["split"] == split.lower()]
        assert [each.keys() for each in results] == [{"image_id", "caption"}] * n_pictures
        captions = [each["caption"].split() for each in results]
        sequences = captions_of(model, dataset, Search(beam_size, 8))
        assert captions == [words_of(each, reverse(model.words)) for each in sequences]
        assert row["unfinished"] == sum(each[-1] != model.words["<end>"] for each in sequences) / n_pictures
        assert row.items() >= score(dataset.references(model.words), captions).items()
        assert row["images/s"] == pytest.approx(n_pictures / row["seconds"])


def test_json_instead_of_the_table(model, prepared, run, tmp_path, capsys, monkeypatch):
    """With the checkpoint of the data's name in this folder, which is the default."""
    model.save(tmp_path / f"BEST_checkpoint_{prepared.name}.pth.tar")
    monkeypatch.chdir(tmp_path)
    rows = run("--beam_size", 2, "--json")
    assert json.loads(capsys.readouterr().out) == rows and rows[0]["METEOR"] is None
    assert len(list(tmp_path.iterdir())) == 1, "no files without --out"


@pytest.mark.parametrize("limit, best, worst", [(12, 4, 3), (2, 2, 2)])
def test_a_gallery_of_the_best_and_the_worst(limit, best, worst, model, prepared, run, tmp_path, monkeypatch):
    """In order of CIDEr, beside all that people wrote; where the model looked is asked for these pictures alone."""
    monkeypatch.setattr(evaluation, "SHOWN", limit)
    asked = []
    monkeypatch.setattr("caption.beam_search", lambda decoder, features, word_map, search, with_alphas:
                        asked.extend(len(features) * [with_alphas]) or
                        beam_search(decoder, features, word_map, search, with_alphas))
    run("--checkpoint", model.save(tmp_path / "model.pth.tar"), "--beam_size", 1, 3, "--max_len", 8, "--batch_size", 2,
        "--gallery", tmp_path / "page.html", "--out", tmp_path)
    assert asked == [False] * 14 + [True] * (best + worst)
    page = (tmp_path / "page.html").read_text()
    assert f"<h1>{prepared.name}, TEST, beam 3</h1>" in page

    dataset = CaptionDataset(prepared.folder, prepared.name, "TEST")
    references = dataset.references(model.words)
    captions = [each["caption"].split() for each in json.loads((tmp_path / "captions_TEST_beam3.json").read_text())]
    pairs = evaluation._coco(references, captions)
    cider = dict(zip(dataset.image_ids, evaluation.Cider().compute_score(*pairs)[1], strict=True))
    by_id = {each: i for i, each in enumerate(dataset.image_ids)}
    sections = page.split("<h2>")[1:]
    shown = [[int(each) for each in re.findall(r"picture (\d+) &middot;", section)] for section in sections]
    ranked = sorted(cider, key=lambda each: -cider[each])
    assert [section.split("<")[0] for section in sections] == ["Best by CIDEr", "Worst by CIDEr"]
    assert shown == [ranked[:best], ranked[::-1][:worst]] and cider[ranked[0]] > cider[ranked[-1]]
    for image_id, figure in zip([*shown[0], *shown[1]], page.split("<figure")[1:], strict=True):
        i = by_id[image_id]
        assert f"picture {image_id} &middot; CIDEr {cider[image_id]:.2f}<" in figure
        assert [html.unescape(each) for each in re.findall("<button[^>]*>([^<]*)<", figure)] == captions[i]
        written = [html.unescape(each).split(" ") for each in re.findall("<li>([^<]*)<", figure)]
        assert written == references[i]
        photo = base64.b64decode(re.search('"data:image/jpeg;base64,([^"]*)"', figure)[1])
        pixels = np.array(Image.open(io.BytesIO(photo)).resize((256, 256))).astype(int)
        assert np.abs(pixels - dataset.images[i].transpose(1, 2, 0)).mean() < 4


def test_a_model_that_never_ends_is_told(model, run, tmp_path, capsys):
    weights = model.decoder.state_dict()
    bias = weights["fc.bias"].clone()
    bias[model.words["<end>"]] = -1e4
    path = model.save(tmp_path / "model.pth.tar", decoder={**weights, "fc.bias": bias})
    rows = run("--checkpoint", path, "--beam_size", 2, "--max_len", 5)
    assert rows[0]["unfinished"] == 1
    assert "warning: at beam 2 100% of the captions never end" in capsys.readouterr().err


@pytest.mark.parametrize("captions, warns", [
    (["a dog"] * 19, False), (["a dog"] * 20, True), (["a dog"] * 11 + [f"{i} cats" for i in range(9)], True),
    (["a dog"] * 10 + [f"{i} cats" for i in range(10)], False), (["a dog", "a cat"] * 50 + ["x"], False),
    (["a dog", "a cat", "a bird"] * 100, True), ([], False)])
def test_collapsed_captions_are_told(captions, warns):
    """More than half the same, or fewer than one in fifty different; not of a handful of pictures."""
    text = evaluation.warn_if_collapsed(captions)
    assert bool(text) == warns and (text is None or f"for {len(captions)} pictures, " in text)


def test_both_warnings_are_lines(model, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "warn_if_collapsed", lambda captions: "warning: collapsed")
    monkeypatch.setattr(evaluation, "warn_if_endless", lambda unfinished, beam_size: f"warning: endless at {beam_size}")
    run("--checkpoint", model.save(tmp_path / "model.pth.tar"), "--beam_size", 1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == ["warning: collapsed", "warning: endless at 1", "warning: collapsed", "warning: endless at 2"]


def test_another_numbering_of_the_words_changes_nothing(model, run, tmp_path):
    """Neither one in the checkpoint nor one in its own file: references are words, and keep the data's numbering."""
    expected = run("--checkpoint", model.save(tmp_path / "model.pth.tar"), "--beam_size", 2)[0]
    order = torch.randperm(len(model.words), generator=torch.Generator().manual_seed(0)).tolist()
    other = model.in_other_order(tmp_path / "other.pth.tar", order)
    (tmp_path / "words.json").write_text(json.dumps(other))
    within = model.save(tmp_path / "model.pth.tar", word_map=None)
    for arguments in (["other.pth.tar", "--word_map", tmp_path / "words.json"], [within]):
        found = run("--beam_size", 2, "--checkpoint", tmp_path / arguments[0], *arguments[1:])[0]
        assert [found[name] for name in SCORES] == [expected[name] for name in SCORES]


@pytest.fixture
def tutorials_folder(prepared, tmp_path) -> Prepared:
    """The prepared files as the original tutorial's script writes them: no references, no image ids."""
    folder = tmp_path / "tutorial"
    folder.mkdir()
    for path in prepared.folder.glob("*.json"):
        if "REFERENCES" not in path.name:
            shutil.copy(path, folder)
    for split in ("VAL", "TEST"):
        source = CaptionDataset(prepared.folder, prepared.name, split)
        with h5py.File(folder / source.path.name, "w") as file:
            file.attrs["captions_per_image"] = 5
            file.create_dataset("images", data=np.array(source.images), dtype="uint8")
    return prepared._replace(folder=folder)


def test_a_folder_of_the_original_tutorial(model, tutorials_folder, run, tmp_path):
    """And a checkpoint with the words in another order, in a file: the references keep the data's."""
    path = model.save(tmp_path / "model.pth.tar")
    expected = run("--checkpoint", path, "--beam_size", 2, "--out", tmp_path, data=tutorials_folder)[0]
    results = json.loads((tmp_path / "captions_TEST_beam2.json").read_text())
    assert [each["image_id"] for each in results] == list(range(7)) and expected["BLEU-1"] > 1
    other = model.in_other_order(path, list(reversed(range(len(model.words)))))
    (tmp_path / "words.json").write_text(json.dumps(other))
    found = run("--checkpoint", path, "--beam_size", 2, "--word_map", tmp_path / "words.json",
                data=tutorials_folder)[0]
    assert [found[name] for name in SCORES] == [expected[name] for name in SCORES]


@pytest.mark.parametrize("arguments, message", [
    (["--checkpoint", "missing.pth.tar"], r"missing\.pth\.tar: no such checkpoint"), ([], "BEST_checkpoint_.*no such"),
    (["--gallery", "page.png"], "--gallery page.png"), (["--data_name", "x"], "no data set x"),
    (["--word_map", "missing.json"], r"missing\.json"), (["--device", "gpu"], "--device gpu"),
    (["--length_penalty", "1", "--consensus"], "--length_penalty and --consensus")])
def test_mistakes_are_named(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run(*arguments)


@pytest.mark.parametrize("arguments, message", [
    (["--beam_size", "3", "0"], "argument --beam_size: 0: a whole number of 1 or more"),
    (["--batch_size", "0"], "argument --batch_size: 0: a whole number of 1 or more"),
    (["--max_len", "-1"], "argument --max_len: -1: a whole number of 1 or more"),
    (["--workers", "-1"], "argument --workers: -1: a whole number of 0 or more"),
    (["--length_penalty", "2.5"], "argument --length_penalty: 2.5: a number from 0 to 2")])
def test_numbers_out_of_range_are_named_with_their_range(arguments, message, command):
    assert command(evaluation, *arguments) == (2, f"eval.py: {message} (--help tells the flags)\n")


def test_a_split_without_pictures_is_named(model, prepared, run, tmp_path):
    for path in prepared.folder.glob("WORDMAP*"):
        shutil.copy(path, tmp_path)
    for kind in ("CAPTIONS", "CAPLENS", "REFERENCES"):
        (tmp_path / f"TEST_{kind}_{prepared.name}.json").write_text("[]")
    with h5py.File(tmp_path / f"TEST_IMAGES_{prepared.name}.hdf5", "w") as file:
        file.attrs["captions_per_image"] = 5
        file.create_dataset("images", (0, 3, 256, 256), dtype="uint8")
    with pytest.raises(InputError, match=r"split TEST .*no pictures.*--split"):
        run("--checkpoint", model.save(tmp_path / "model.pth.tar"), data=prepared._replace(folder=tmp_path))


# ---- somebody else's captions ----------------------------------------------------------------------------------------

@pytest.fixture
def without_java(monkeypatch):
    """METEOR takes seconds."""
    monkeypatch.setattr(shutil, "which", lambda _: None)


def scored(prepared: Prepared, path: Path, *more: object) -> list[dict[str, Any]]:
    return evaluation.main(evaluation.get_parser().parse_args(
        ["--data_folder", str(prepared.folder), "--data_name", prepared.name, "--captions", str(path),
         *map(str, more)]))


def results(pictures: CaptionDataset, captions: list[str]) -> list[dict[str, Any]]:
    return [{"image_id": image_id, "caption": caption}
            for image_id, caption in zip(pictures.image_ids, captions, strict=True)]


@pytest.mark.usefixtures("without_java")
def test_captions_of_another_system_give_the_same_table(prepared, pictures, model, tmp_path, capsys):
    """Those that eval.py writes, scored again, and without a model."""
    arguments = ["--data_folder", str(prepared.folder), "--data_name", prepared.name, "--device", "cpu", "--beam_size",
                 "2", "--checkpoint", str(model.save(tmp_path / "model.pth.tar")), "--out", str(tmp_path / "ours")]
    (ours,) = evaluation.main(evaluation.get_parser().parse_args(arguments))
    shown = capsys.readouterr().out.splitlines()
    (again,) = scored(prepared, tmp_path / "ours" / "captions_TEST_beam2.json", "--out", tmp_path / "again")
    again_shown = capsys.readouterr().out.splitlines()
    assert ours.keys() == again.keys()
    assert [ours[name] for name in SCORES[1:-1]] == [again[name] for name in SCORES[1:-1]]
    assert again_shown[0] == shown[0] and again_shown[2].split("|")[2:9] == shown[2].split("|")[2:9]
    assert {again[name] for name in ("beam", "unfinished", "seconds", "images/s")} == {None}
    assert json.loads((tmp_path / "again" / "scores_TEST.json").read_text()) == [again]
    assert sorted(each.name for each in (tmp_path / "again").iterdir()) == ["scores_TEST.json", "scores_TEST.md"]


@pytest.mark.usefixtures("without_java")
def test_captions_as_people_write_them(prepared, pictures, tmp_path, capsys):
    """In any order, with capitals, full stops, ids as text and a byte order mark."""
    people = pictures.references(load_word_map(prepared.folder, prepared.name))
    captions = [" ".join(each[0]) for each in people]
    raw = [{"image_id": str(each["image_id"]), "caption": f" {each['caption'].capitalize()} .\n", "score": 0.5}
           for each in reversed(results(pictures, captions))]
    (tmp_path / "a.json").write_text(json.dumps(results(pictures, captions)))
    (tmp_path / "b.json").write_text(json.dumps(raw), encoding="utf-8-sig")
    (plain,), (written,) = (scored(prepared, tmp_path / name) for name in ("a.json", "b.json"))
    assert plain == written and plain["BLEU-4"] == pytest.approx(100) and "warning" not in capsys.readouterr().err


def test_captions_with_marks_of_the_vocabulary_keep_them(pictures, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(results(pictures, ["t-shirt , a", *["A t-shirt"] * 6])))
    first, *others = evaluation.read_captions(str(tmp_path / "x.json"), pictures, {"t-shirt": 1, ",": 2, "a": 3})
    assert first == ["t-shirt", ",", "a"] and others == [["a", "tshirt"]] * 6


@pytest.mark.usefixtures("without_java")
def test_captions_of_other_pictures_and_again_are_counted(prepared, pictures, tmp_path, capsys):
    content = results(pictures, ["a red square"] * 7)
    (tmp_path / "x.json").write_text(json.dumps([*content, content[2], *(
        {"image_id": 10**6 + i, "caption": "a"} for i in range(4))]))
    assert len(scored(prepared, tmp_path / "x.json")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "--captions" in line]
    assert "x.json: 4 captions of other pictures, left out (image_id 1000000, 1000001, 1000002, ...), " in line
    assert line.endswith(f"1 pictures with the same caption again (image_id {pictures.image_ids[2]})")


@pytest.mark.parametrize("content, parts", [
    (lambda given: given[1:], ["1 pictures of TEST without a caption (image_id ", "give each picture"]),
    (lambda given: [*given, {**given[0], "caption": "b"}], ["1 pictures of TEST with several (image_id "]),
    (lambda given: [{**each, "image_id": -1 - each["image_id"]} for each in given],
     ["7 pictures of TEST without a caption", "captions of other pictures"]),
    (lambda given: {"annotations": given}, ["not in COCO's result format", '"image_id"']),
    (lambda given: [each["caption"] for each in given], ["not in COCO's result format"]),
    (lambda given: [{**each, "caption": 5} for each in given], ["not in COCO's result format"]),
    (lambda given: [{**each, "image_id": "x.jpg"} for each in given], ["not in COCO's result format"]),
    (lambda given: 5, ["not in COCO's result format"])])
def test_captions_that_do_not_fit_are_named(content, parts, prepared, pictures, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(content(results(pictures, ["a red square"] * 7))))
    with refused("x.json", *parts):
        scored(prepared, tmp_path / "x.json")


def test_captions_of_no_file_or_for_a_model_are_refused(prepared, tmp_path):
    (tmp_path / "x.json").write_text("[")
    with refused("x.json: not in COCO's result format"):
        scored(prepared, tmp_path / "x.json")
    with refused("y.json: No such file"):
        scored(prepared, tmp_path / "y.json")
    for flag in ("--checkpoint", "--gallery"):
        with refused("--captions", "leave out --checkpoint and --gallery"):
            scored(prepared, tmp_path / "x.json", flag, "x.html")
