"""Self-critical training: the gradient against the expected reward's, and stage 3 from the command line."""
from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Prepared, exact_decoder, refused
from matplotlib.figure import Figure
from test_train import assert_same_run, flags, load, run, same, setting_of, stop_after
from torch.nn.utils.rnn import pad_packed_sequence
from torch.utils.data import DataLoader

import train
from caption import Search
from datasets import Pictures
from models import DecoderWithAttention, Losses, teacher_forced
from training.curves import draw_curves
from training.rewards import cider_d, frequencies
from training.self_critical import SelfCritical, draw_captions

WORD_MAP = {"<pad>": 0, "a": 1, "b": 2, "<unk>": 3, "<start>": 4, "<end>": 5}
FORBIDDEN = [0, 3, 4]
TRUE = torch.tensor([[[4, 1, 2, 5, 0], [4, 1, 5, 0, 0]], [[4, 2, 5, 0, 0], [4, 2, 2, 2, 5]]])  # of two pictures
LONGEST = 3


def decoder_and_features(kind: str = "soft", n: int = 2) -> tuple[DecoderWithAttention, torch.Tensor]:
    """A tiny decoder with large random weights in double precision, and maps of 2 x 2."""
    decoder = exact_decoder(kind, attention_dim=2, embed_dim=2, decoder_dim=3, vocab_size=6, encoder_dim=2)
    return decoder, torch.randn(n, 2, 2, 2, dtype=torch.float64)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of three words at most."""
    monkeypatch.setattr("training.self_critical.Search", lambda: Search(max_len=LONGEST))


def all_captions() -> torch.Tensor:
    """Every one that can be drawn, (M, T)."""
    found = set()
    for words in itertools.product((1, 2, 5), repeat=LONGEST):
        end = words.index(5) + 1 if 5 in words else LONGEST
        found.add((*words[:end], *[0] * (LONGEST - end)))
    return torch.tensor(sorted(found))


def log_probs_of(decoder: DecoderWithAttention, features: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """Of each word of captions (N, K, T), by teacher forcing in double precision; 0 of padding."""
    n, k, _ = captions.shape
    ids = torch.nn.functional.pad(captions.flatten(0, 1), (1, 0), value=WORD_MAP["<start>"])
    lengths = (ids != 0).sum(dim=1, keepdim=True)
    decoded = teacher_forced(decoder, features, ids, lengths)
    scores = pad_packed_sequence(decoded.scores, batch_first=True)[0][decoded.order.argsort()]
    scores = torch.cat([scores, scores.new_zeros(n * k, captions.size(2) - scores.size(1), scores.size(2))], dim=1)
    scores = scores.index_fill(2, torch.tensor(FORBIDDEN), -torch.inf).log_softmax(dim=2)
    words = captions.flatten(0, 1)
    return scores.gather(2, words.unsqueeze(2)).squeeze(2).masked_fill(words == 0, 0).view(n, k, -1)


def test_the_gradient_is_on_average_that_of_the_expected_reward(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all pairs of captions that can be drawn of one picture, each by its probability, against finite
    differences of the expected reward."""
    monkeypatch.setattr("training.self_critical.SAMPLES", 2)
    decoder, features = decoder_and_features(n=1)
    model = SelfCritical(torch.nn.Identity(), decoder, WORD_MAP, TRUE)
    captions, true = all_captions(), TRUE[:1]
    rewards = cider_d(captions.unsqueeze(0), true[:, :, 1:], frequencies(TRUE[:, :, 1:], 6)).squeeze(0)     # (M,)
    assert len(captions) == 15 and rewards.std() > 0.5

    @torch.no_grad()
    def expected_reward() -> float:
        probabilities = log_probs_of(decoder, features, captions.unsqueeze(0)).sum(dim=2).exp().squeeze(0)
        assert probabilities.sum().item() == pytest.approx(1)
        return float(probabilities @ rewards)

    with torch.no_grad():
        probabilities = log_probs_of(decoder, features, captions.unsqueeze(0)).sum(dim=2).exp().squeeze(0)
    parameters = list(decoder.parameters())
    estimate = [torch.zeros_like(each) for each in parameters]
    for i, j in itertools.product(range(len(captions)), repeat=2):
        words = iter(captions[[i, j]].T)
        monkeypatch.setattr("training.self_critical.draw", lambda *_, words=words: next(words).clamp(min=1))
        losses = model(features, true)
        assert losses.captions == 2 and losses.words == (captions[[i, j]] != 0).sum()
        assert losses.reward.item() == pytest.approx(float(rewards[i] + rewards[j]), rel=1e-6)
        for total, grad in zip(estimate, torch.autograd.grad(losses.cross_entropy, parameters), strict=True):
            total -= probabilities[i] * probabilities[j] * grad / 2
    for parameter, found in zip(parameters, estimate, strict=True):
        for place in itertools.product(*map(range, parameter.shape)):
            with torch.no_grad():
                parameter[place] += 1e-5
                above = expected_reward()
                parameter[place] -= 2e-5
                below = expected_reward()
                parameter[place] += 1e-5
            assert found[place].item() == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-6)
    assert max(each.abs().max() for each in estimate) > 0.05


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_probabilities_are_those_of_teacher_forcing(short: None, kind: str) -> None:
    """And the words are drawn by them; nothing comes after <end>. Hard attention looks softly, as in a search."""
    decoder, features = decoder_and_features(kind, n=30)
    SelfCritical(torch.nn.Identity(), decoder, WORD_MAP, TRUE).train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn, log_probs = draw_captions(decoder, features, WORD_MAP, 2)
        assert {*(drawn != 0).sum(dim=2).amax(dim=1).tolist()} == {1, 2, 3}  # pictures leave at each step
        torch.testing.assert_close(log_probs.double(), log_probs_of(decoder.eval(), features, drawn), rtol=1e-5,
                                   atol=1e-6)
        captions, features = all_captions(), features[:2]
        drawn, _ = draw_captions(decoder, features, WORD_MAP, 2000)
        expected = log_probs_of(decoder, features, captions.expand(2, -1, -1)).sum(dim=2).exp()             # (N, M)
    share = (drawn.unsqueeze(2) == captions).all(dim=3).double().mean(dim=1)
    assert share.sum(dim=1).tolist() == pytest.approx([1, 1])
    torch.testing.assert_close(share, expected, rtol=0, atol=0.04)


def test_weights_that_are_nan_show_in_the_loss() -> None:
    """Whose batch is then named, as in other stages; drawing itself would only say that it cannot."""
    decoder, features = decoder_and_features()
    torch.nn.init.constant_(decoder.fc.bias, torch.nan)
    assert SelfCritical(torch.nn.Identity(), decoder, WORD_MAP, TRUE)(features, TRUE).cross_entropy.isnan()


def test_the_reward_of_a_trained_model_rises() -> None:
    """Of captions drawn for four pictures, which it can tell apart; Adam, as in train.py."""
    torch.manual_seed(0)
    words = {"<pad>": 0, **{f"word {i}": i for i in range(1, 20)}, "<unk>": 20, "<start>": 21, "<end>": 22}
    true = torch.zeros(4, 3, 9, dtype=torch.long)
    for caption in true.flatten(0, 1):
        length = int(torch.randint(4, 8, ()))
        caption[:length + 2] = torch.tensor([21, *torch.randint(1, 20, (length,)).tolist(), 22])
    decoder = DecoderWithAttention(8, 8, 32, len(words), encoder_dim=8, dropout=0.1)
    features = torch.randn(4, 2, 2, 8)
    lengths = (true != 0).sum(dim=2)
    steps: list[float] = []
    for model, rate, n in ((train.TeacherForcing(torch.nn.Identity(), decoder), 0.02, 30),
                           (SelfCritical(torch.nn.Identity(), decoder, words, true), 0.01, 60)):
        optimizer = torch.optim.Adam(decoder.parameters(), lr=rate)
        for _ in range(n):
            losses = model(features, true, lengths, 0.0, 0.0)
            optimizer.zero_grad()
            losses.mean(losses, 0.0).backward()
            optimizer.step()
            steps.append(float(losses.reward / losses.captions))
    before, after = sum(steps[30:40]) / 10, sum(steps[-10:]) / 10
    assert after - 0.5 > before > 0.5, (before, after)


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage 1 leaves, whose first epoch was the better one."""
    folder, scores = tmp_path_factory.mktemp("trained"), iter([5.0, 3.0])
    with mock.patch.object(train, "bleu", lambda *_: [0, 0, 0, next(scores)]):
        run(prepared, folder, "--stage", 1)
    return folder


def stage_3(folder: Path, prepared: Prepared) -> list[object]:
    return ["--stage", 3, "--checkpoint", folder / f"BEST_checkpoint_{prepared.name}.pth.tar", "--epochs", 2, 2, 2,
            "--batch_size", 20, 20, 20]


def test_the_log_and_what_is_printed_tell_of_the_reward(prepared: Prepared, trained: Path, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(prepared, tmp_path, *stage_3(trained, prepared), "--label_smoothing", 0.1, "--augment")
    assert all({"cider", "length", "bad_endings"} <= row.keys() for row in rows)
    first, *_, last = rows
    assert first["stage"] == 1 and "reward" not in first and last["stage"] == 3 and 0 < last["reward"] < 10
    assert last["decoder_lr"] == 5e-5
    said = capsys.readouterr().out
    assert "stage 3 alone does not use --augment, --label_smoothing" in said
    assert "stage 3 (decoder only): 5 captions drawn of each of 16 pictures in 4 batches" in said
    assert f"stage 3, epoch 2 of 2: reward {last['reward']:.3f}, val loss" in said
    assert (f"CIDEr {last['cider']:.3f}, {last['length']:.1f} words, {last['bad_endings']:.1f} % bad endings, best "
            in said)
    assert "stage 3 is over, all its epochs are done. Best CIDEr 0." in said
    drawn = [axes.get_title() for axes in curves_of(rows)]
    assert drawn == ["loss", "BLEU-4 on the validation split", "CIDEr"]
    assert [len(curves_of(each)) for each in (rows[:1], rows)] == [2, 3]
    named = [[text.get_text() for text in curves_of(each)[0].get_legend().get_texts()] for each in (rows, [last])]
    assert named == [["train", "validation", "self-critical training begins"], ["validation"]]


def curves_of(rows: list[dict[str, Any]]) -> list[Any]:
    """The panels that are drawn of a log."""
    figures: list[Figure] = []
    with mock.patch.object(Figure, "savefig", lambda figure, *_, **__: figures.append(figure)), \
            mock.patch("training.curves.atomic_write"):
        draw_curves(rows, Path("curves.png"))
    return figures[0].axes


def test_no_worse_model_replaces_the_best_of_an_earlier_stage(prepared: Prepared, trained: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """By CIDEr. Older checkpoints do not tell it, and published ones nothing: they are validated first."""
    steps: list[int] = []
    monkeypatch.setattr(train, "train_step", lambda *_: steps.append(1) or torch.ones(len(Losses._fields)))
    monkeypatch.setattr(train, "cider", lambda *_: (0.4 if steps else 0.5, []))
    best = f"BEST_checkpoint_{prepared.name}.pth.tar"
    given = load(trained, prepared, "BEST_checkpoint_")
    older = {name: {key: each for key, each in given[name].items() if "cider" not in key}
             for name in ("scores", "training")}
    for kind, change in (("newer", {"scores": {**given["scores"], "cider": 0.6}}), ("older", older),
                         ("published", {"training": None})):
        steps.clear()
        (tmp_path / kind).mkdir()
        torch.save(given | change, tmp_path / kind / best)
        run(prepared, tmp_path / f"{kind} goes on", *stage_3(tmp_path / kind, prepared))
        training = load(tmp_path / f"{kind} goes on", prepared)["training"]
        assert training["best_cider"] == (0.6 if kind == "newer" else 0.5)
        assert (training["epoch"], training["epochs_since_improvement"]) == (2, 2)
        kept = load(tmp_path / f"{kind} goes on", prepared, "BEST_checkpoint_")
        assert same(kept["decoder"], given["decoder"])
        assert kept["training"]["epoch"] == 0 if kind == "published" else same(kept, given | change)


def test_it_begins_with_the_best_checkpoint_and_watches_cider(prepared: Prepared, trained: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Not with the last, though that is named; and BLEU-4 decides nothing any more."""
    folder = shutil.copytree(trained, tmp_path / "copy")
    best = load(folder, prepared, "BEST_checkpoint_")
    best["scores"]["cider"], best["scores"]["bleu4"] = 0.3, 7.0
    torch.save(best, folder / f"BEST_checkpoint_{prepared.name}.pth.tar")
    ciders, bleus = iter([(0.35, []), (0.32, [])]), iter([1.0, 99.0])
    monkeypatch.setattr(train, "cider", lambda *_: next(ciders))
    monkeypatch.setattr(train, "bleu", lambda *_: [0, 0, 0, next(bleus)])
    begun: list[dict[str, Any]] = []
    build_training = train.build_training
    monkeypatch.setattr(train, "build_training", lambda run, stage, start: begun.append(start) or build_training(
        run, stage, start))
    run(prepared, folder, *stage_3(folder, prepared), "--checkpoint", folder / f"checkpoint_{prepared.name}.pth.tar")
    assert same(begun[0]["decoder"], best["decoder"])
    assert f"stage 3 begins with {folder / 'BEST_checkpoint_'}" in capsys.readouterr().out
    assert load(folder, prepared, "BEST_checkpoint_")["scores"]["cider"] == 0.35
    training = load(folder, prepared)["training"]
    assert (training["best_cider"], training["best_bleu4"], training["epochs_since_improvement"]) == (0.35, 7.0, 1)


@pytest.mark.parametrize("more", [[], ["--fine_tune_encoder", "--augment"]], ids=["decoder", "encoder too"])
def test_a_resumed_run_is_the_run_left_alone(prepared: Prepared, trained: Path, tmp_path: Path, more: list[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun in the folder of stage 1, all of whose log stays: by the name of the best checkpoint, or by --checkpoint
    auto, which then finds stage 3's own."""
    for name in ("alone", "stopped"):
        shutil.copytree(trained, tmp_path / name)
    rows = run(prepared, tmp_path / "alone", *stage_3(tmp_path / "alone", prepared), *more)
    command = [*stage_3(trained, prepared), "--checkpoint", "auto", *more]
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run(prepared, tmp_path / "stopped", *command, "--checkpoint_minutes", 0)
    assert load(tmp_path / "stopped", prepared)["training"]["step"] == 1
    with refused("is in stage 3 already; resume with --stage 3"):
        run(prepared, tmp_path / "stopped", "--checkpoint", "auto")
    run(prepared, tmp_path / "stopped", *command)
    assert_same_run(load(tmp_path / "stopped", prepared), load(tmp_path / "alone", prepared))
    before, after = (load(folder, prepared)["encoder"] for folder in (trained, tmp_path / "alone"))
    assert any(not torch.equal(before[key], after[key]) for key in before) == bool(more)


def test_two_processes_learn_together(prepared: Prepared, trained: Path, tmp_path: Path) -> None:
    """From kept features, of which they keep one file for each split."""
    data = shutil.copytree(prepared.folder, tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", Path(train.__file__),
         *flags(prepared, tmp_path / "out", *stage_3(trained, prepared), "--batch_size", 10, 10, 10, "--data_folder",
                data, "--cache_features")],
        capture_output=True, text=True, timeout=200, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = list(map(json.loads, (tmp_path / "out" / f"log_{prepared.name}.jsonl").read_text().splitlines()))
    assert [row["stage"] for row in rows[-2:]] == [3, 3] and 0 < rows[-1]["reward"] < 10
    state = load(tmp_path / "out", prepared)["training"]
    assert state["stage"] == 3 and state["world_size"] == 2
    assert len(list(data.glob("*FEATURES*"))) == 2


def test_each_flag_has_its_number_for_stage_3() -> None:
    """Never another stage's, which would ruin it."""
    def values(*given: str) -> list[Any]:
        args = vars(train.get_parser().parse_args(given))
        return [train.for_stage(args, name, 3) for name in ("epochs", "batch_size", "decoder_lr")]

    assert values() == values("--epochs", "5", "5", "--decoder_lr", "8e-4", "--batch_size", "7") == [20, 80, 5e-5]
    assert values("--epochs", "1", "2", "3", "--batch_size", "4", "5", "6", "--decoder_lr", "7", "8", "9") == [3, 6, 9]


@pytest.mark.parametrize(("given", "stage", "tunes"), [
    ([], "both", False), (["--fine_tune_encoder"], "2", True), (["--stage", "1", "--fine_tune_encoder"], "2", True),
    (["--stage", "3"], "3", False), (["--stage", "3", "--fine_tune_encoder"], "3", True),
    (["--fine_tune_encoder", "--stage", "3"], "3", True)])
def test_fine_tune_encoder_is_stage_2_or_a_part_of_stage_3(given: list[str], stage: str, tunes: bool) -> None:
    args = train.get_parser().parse_args(given)
    assert (args.stage, stage != "both" and train.tunes_encoder(vars(args), int(stage))) == (stage, tunes)


def test_hard_attentions_baseline_stays(prepared: Prepared, tmp_path: Path) -> None:
    """It is of cross entropy, which stage 3 does not compute."""
    setting = setting_of(prepared, tmp_path, "--attention", "hard")
    training = train.build_training(setting, 3, None)
    training.model.train()
    training.captioner.decoder.attention.baseline.fill_(3.5)
    train.train_step(setting, training, next(iter(DataLoader(Pictures(setting.train), 3))))
    assert training.captioner.decoder.attention.baseline == 3.5
