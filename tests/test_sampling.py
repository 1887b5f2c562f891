"""Captions that are drawn instead of searched, and what a caption must not hold: runs that repeat, and some words."""
from __future__ import annotations

import html
import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prepared, refused
from test_decoders import KINDS, WORDS, C, decoders
from test_eval import Model

import caption
import eval as evaluation
from caption import Search, beam_search, caption_images
from datasets import load_word_map
from models import Caption

NOT_SAID = [WORDS[word] for word in Search().forbidden]


def sequences(found: list[list[Caption]]) -> list[list[list[int]]]:
    return [[each.sequence for each in captions] for captions in found]


# ---- drawing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("temperature", "seed"), [(1.0, 0), (1.0, None), (0.5, 3), (3.0, 4)])
def test_captions_come_as_often_as_the_model_says(temperature: float, seed: int | None) -> None:
    """Of all captions of two words, against their probabilities from all steps at once, within four deviations."""
    decoder, all_at_once = decoders(11, spread=0.7)["lstm"]
    features, n = torch.randn(1, 4, 4, C), 20_000
    torch.manual_seed(5)
    [found] = beam_search(decoder, features, WORDS, Search(sample=n, max_len=2, temperature=temperature, seed=seed))
    assert len(found) == n
    counts, expected = Counter(tuple(each.sequence[1:]) for each in found), {}
    for first in set(WORDS.values()) - {*NOT_SAID, WORDS["<end>"]}:
        with torch.no_grad():
            scores, _ = all_at_once(decoder, features, torch.tensor([WORDS["<start>"], first, 1]))
        scores[:, NOT_SAID] = -torch.inf
        probabilities = (scores / temperature).softmax(dim=1).double()
        for second, probability in enumerate(probabilities[1].tolist()):
            expected[first, second] = probabilities[0, first].item() * probability
        expected[WORDS["<end>"],] = probabilities[0, WORDS["<end>"]].item()
    assert sum(expected.values()) == pytest.approx(1)
    assert len([each for each in expected.values() if each > 0.01]) > 5
    for words, probability in expected.items():
        assert abs(counts[words] - n * probability) <= 4 * math.sqrt(n * probability * (1 - probability)), words


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_of_a_drawn_caption_is_true_of_the_model(kind: str) -> None:
    """Whatever the temperature: log-probabilities and gaze of all steps at once; the more probable first, unfinished
    ones last."""
    found = []
    for seed in (12, 13, 14):
        decoder, all_at_once = decoders(seed)[kind]
        features = torch.randn(4, 4, 4, C)
        search = Search(sample=6, max_len=5, temperature=2, seed=1)
        found += [(decoder, all_at_once, *each)
                  for each in zip(features, beam_search(decoder, features, WORDS, search), strict=True)]
    for decoder, all_at_once, picture, captions in found:
        assert len(captions) == 6
        assert captions == sorted(captions, key=lambda each: (not each.finished, -each.log_prob))
        for each in captions:
            sequence = torch.tensor(each.sequence)
            assert not {*each.sequence[1:]} & {*NOT_SAID}
            assert each.finished == (each.sequence[-1] == WORDS["<end>"]) and WORDS["<end>"] not in each.sequence[:-1]
            assert each.finished or len(each.sequence) == 6
            with torch.no_grad():
                scores, alphas = all_at_once(decoder, picture[None], sequence)
            log_probs = scores.log_softmax(dim=1).gather(1, sequence[1:, None]).squeeze(1)
            assert each.word_log_probs == pytest.approx(log_probs.tolist(), abs=1e-4)
            torch.testing.assert_close(torch.from_numpy(each.sequence_alphas[1:]).flatten(1), alphas, atol=1e-5, rtol=0)
    captions = [each for *_, of_picture in found for each in of_picture]
    assert {each.finished for each in captions} == {True, False}
    assert len({tuple(each.sequence) for each in captions}) > len(captions) / 4, "they differ"


def test_the_coldest_draw_is_the_greedy_caption() -> None:
    decoder, _ = decoders(13)["gru"]
    features = torch.randn(5, 4, 4, C)
    greedy = beam_search(decoder, features, WORDS, Search(beam_size=1, max_len=9))
    drawn = beam_search(decoder, features, WORDS, Search(sample=3, max_len=9, temperature=0.01, seed=0))
    assert sequences(drawn) == [3 * each for each in sequences(greedy)]


def test_a_seed_is_the_same_for_each_picture_whatever_stands_beside_it() -> None:
    decoder, _ = decoders(14)["lstm"]
    features = torch.randn(4, 4, 4, C)
    search = Search(sample=4, max_len=9, seed=2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    together = sequences(beam_search(decoder, features, WORDS, search))
    assert [sequences(beam_search(decoder, each[None], WORDS, search))[0] for each in features] == together
    assert torch.equal(torch.get_rng_state(), state), "PyTorch's own random numbers are left alone"
    others = [sequences(beam_search(decoder, features, WORDS, search._replace(seed=seed))) for seed in (0, 1, 3)]
    assert all(one != other for one, other in itertools.combinations([together, *others], 2))


def test_without_a_seed_all_is_independent() -> None:
    """PyTorch's own seed repeats it; a decoder in training mode stays there."""
    decoder, _ = decoders(15)["lstm"]
    decoder.train()
    features, search = torch.randn(1, 4, 4, C).expand(3, 4, 4, C), Search(sample=4, max_len=9)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(sequences(beam_search(decoder, features, WORDS, search, with_alphas=False)))
    assert runs[0] == runs[1] != runs[2] and decoder.training
    assert runs[0][0] != runs[0][1] != runs[0][2], "three times the same picture"


# ---- what does not come twice, or at all -----------------------------------------------------------------------------

def repeated(words: list[int], n: int) -> bool:
    runs = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) < len(runs)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("how", [{"beam_size": 3, "n_best": 3}, {"sample": 3, "seed": 0}])
def test_no_run_of_words_comes_twice(n: int, how: dict[str, int]) -> None:
    found, free = [], []
    for seed in range(4):
        decoder, _ = decoders(seed)["gru"]
        features = torch.randn(6, 4, 4, C)
        for captions, hindrance in ((free, 0), (found, n)):
            search = Search(max_len=14, no_repeat=hindrance, **how)
            captions += itertools.chain(*sequences(beam_search(decoder, features, WORDS, search)))
    assert not any(repeated(each, n) for each in found)
    assert sum(repeated(each, n) for each in free) > 5
    assert any(repeated(each, n - 1) for each in found) or n == 1, "shorter ones do"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_nothing_else_is_forbidden_for_that(n: int) -> None:
    """Each word of a greedy caption is the most probable of those with which no run comes again."""
    decoder, all_at_once = decoders(2)["lstm"]
    features, hindered = torch.randn(8, 4, 4, C), 0
    for picture, [best] in zip(features, beam_search(decoder, features, WORDS, Search(
            beam_size=1, max_len=12, no_repeat=n, forbidden=())), strict=True):
        with torch.no_grad():
            scores, _ = all_at_once(decoder, picture[None], torch.tensor(best.sequence))
        for t in range(1, len(best.sequence)):
            allowed = [word for word in range(len(WORDS)) if not repeated([*best.sequence[:t], word], n)]
            assert best.sequence[t] == max(allowed, key=lambda word: scores[t - 1, word])
            hindered += best.sequence[t] != scores[t - 1].argmax()
    assert hindered > 5


# ---- the commands ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(prepared: Prepared) -> Model:
    return Model(load_word_map(prepared.folder, prepared.name))


@pytest.fixture(scope="module")
def checkpoint(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.save(tmp_path_factory.mktemp("model") / "x.pth.tar")


@pytest.fixture(scope="module")
def pictures(prepared: Prepared) -> list[Path]:
    return sorted(prepared.pictures.glob("shapes_test_*.png"))[:3]


@pytest.fixture
def run(checkpoint: Path, pictures: list[Path]) -> Any:
    def run_caption(*arguments: Any) -> list[dict[str, Any]]:
        fixed = ["--img", *pictures, "--device", "cpu", "--model", checkpoint, "--max_len", 8]
        return caption.main(caption.get_parser().parse_args([str(each) for each in (*fixed, *arguments)]))

    return run_caption


def test_drawn_captions_are_given_as_a_beams_are(model: Model, pictures: list[Path], run: Any, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture) -> None:
    """In lines, in JSON and on a page, whatever the batch; and the same from Python."""
    drawn = ["--sample", 3, "--temperature", 1.5, "--seed", 4]
    results = run(*drawn, "--json", tmp_path / "drawn.json")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads((tmp_path / "drawn.json").read_text()) == results
    run(*drawn, "--out", tmp_path / "page.html", "--batch_size", 2)
    found = caption_images(model.captioner, pictures, sample=3, temperature=1.5, seed=4, max_len=8, batch_size=1)
    for result, captions in zip(results, found, strict=True):
        assert [each["caption"] for each in result["captions"]] == [" ".join(each.words) for each in captions]
        for one, other in zip(result["captions"], captions, strict=True):
            assert one["log_prob"] == pytest.approx(other.log_prob, abs=1e-4)
            assert one["word_log_probs"] == pytest.approx(other.word_log_probs, abs=1e-4)
    said = [(path, each) for path, result in zip(pictures, results, strict=True) for each in result["captions"]]
    assert lines == [f"{path}: {each['caption']}{'' if each['finished'] else ' ...'}" for path, each in said]
    shown = re.findall("<button[^>]*>([^<]*)<", (tmp_path / "page.html").read_text())
    assert [html.unescape(word) for word in shown] == [word for _, each in said for word in each["caption"].split()]
    assert len({each["caption"] for _, each in said}) > 5


def test_the_seed_of_the_command(run: Any) -> None:
    """Without one it is 0, so that a command says the same again."""
    found = run("--sample", 2)
    assert found == run("--sample", 2) == run("--sample", 2, "--seed", 0) != run("--sample", 2, "--seed", 1)


@pytest.mark.parametrize("arguments", [
    ["--sample", 3, "--beam_size", 5], ["--sample", 3, "--beam_size", 3], ["--sample", 3, "--n_best", 1],
    ["--sample", 1, "--n_best", 2], ["--sample", 3, "--consensus"], ["--sample", 3, "--length_penalty", 0.7],
    ["--temperature", 2], ["--temperature", 1], ["--seed", 0], ["--sample", 0], ["--sample", 2, "--temperature", 0],
    ["--sample", 2, "--temperature", "nan"], ["--sample", 2, "--seed", -1], ["--no_repeat", 0],
    ["--forbid", "zebra"], ["--forbid", "red", "zebra", "--sample", 1]])
def test_what_contradicts_is_named(arguments: list[Any], command: Any, checkpoint: Path, pictures: list[Path]) -> None:
    """In a line, with the exit status of wrong flags; so it is even where the flag names what would be anyway."""
    status, shown = command(caption, "--img", pictures[0], "--model", checkpoint, "--device", "cpu", *arguments)
    named = "zebra" if "zebra" in arguments else [each for each in arguments if str(each).startswith("--")][-1]
    assert status == 2 and named in shown and shown.count("\n") == 1


@pytest.mark.parametrize("settings, message", [
    ({"sample": 2, "consensus": True}, "--sample .* --consensus"), ({"sample": 2, "beam_size": 3}, "--beam_size"),
    ({"sample": 2, "n_best": 2}, "--n_best"), ({"sample": -1}, "sample=-1"), ({"sample": 1.5}, "sample=1.5"),
    ({"temperature": 2.0}, "--temperature .* --sample"), ({"seed": 1}, "--seed .* --sample"),
    ({"sample": 2, "temperature": 0}, "temperature: a number from 0.01 to 100"), ({"sample": 2, "seed": 0.5}, "seed: "),
    ({"no_repeat": -2}, "no_repeat=-2"), ({"no_repeat": None}, "no_repeat=NoneType")])
def test_from_python_too(settings: dict[str, Any], message: str, model: Model, pictures: list[Path]) -> None:
    with pytest.raises(caption.UsageError, match=message):
        caption_images(model.captioner, pictures[:1], **settings)


def test_runs_and_words_can_be_kept_out(run: Any, model: Model) -> None:
    def said(*arguments: Any) -> list[list[str]]:
        return [each["caption"].split() for result in run("--beam_size", 3, "--n_best", 3, *arguments)
                for each in result["captions"]]

    assert any(repeated(each, 2) for each in said()) and not any(repeated(each, 2) for each in said("--no_repeat", 2))
    (first, _), (second, _) = Counter(itertools.chain(*said())).most_common(2)
    without = said("--forbid", first, second)
    assert without and not {first, second, "<unk>", "<start>", "<pad>"} & set(itertools.chain(*without))


def test_a_forbidden_word_has_one_spelling(run: Any) -> None:
    """Words of a model are composed; a terminal may give accents apart."""
    for word in ("café", unicodedata.normalize("NFD", "café")):
        with refused("forbidden 'café': not among"):
            run("--forbid", word)


def test_eval_keeps_them_out_too(prepared: Prepared, checkpoint: Path, tmp_path: Path,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)

    def said(*arguments: Any) -> list[list[str]]:
        [row] = evaluation.main(evaluation.get_parser().parse_args([str(each) for each in (
            "--data_folder", prepared.folder, "--data_name", prepared.name, "--checkpoint", checkpoint, "--beam_size",
            2, "--max_len", 8, "--device", "cpu", "--out", tmp_path, *arguments)]))
        assert row["no repeat"] == (2 if "--no_repeat" in arguments else 0)
        return [each["caption"].split() for each in json.loads((tmp_path / "captions_TEST_beam2.json").read_text())]

    free = said()
    commonest = Counter(itertools.chain(*free)).most_common(1)[0][0]
    hindered = said("--no_repeat", 2, "--forbid", commonest)
    assert any(repeated(each, 2) for each in free) and not any(repeated(each, 2) for each in hindered)
    assert commonest not in set(itertools.chain(*hindered))
