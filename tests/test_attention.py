"""Hard attention and none: the gradient against all ways to look, and both kinds from the command line."""
from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Prepared, exact_decoder, refused
from test_train import assert_same_run, flags, load, run, setting_of, stop_after
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

import caption
import train
from datasets import Pictures
from models import (
    ATTENTIONS,
    LAMBDA_E,
    DecoderWithAttention,
    Losses,
    alpha_entropy,
    caption_losses,
    draw,
    hard_attention_loss,
    teacher_forced,
)
from utils import World

START, END = 3, 4
CAPTIONS = torch.tensor([[START, END, 0, 0], [START, 2, 1, END]])  # no word, and two
LENGTHS = torch.tensor([[2], [4]])


def decoder_and_features(attention: str) -> tuple[DecoderWithAttention, torch.Tensor]:
    """A tiny decoder with large random weights in double precision, and maps of 2 x 2 of two pictures."""
    decoder = exact_decoder(attention, attention_dim=3, embed_dim=2, decoder_dim=4, vocab_size=5, encoder_dim=3)
    return decoder, torch.randn(2, 2, 2, 3, dtype=torch.float64)


def gradients(loss: torch.Tensor, decoder: torch.nn.Module) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(decoder.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(each) if grad is None else grad
            for grad, each in zip(found, decoder.parameters(), strict=True)]


def looked(monkeypatch: pytest.MonkeyPatch, decoder: DecoderWithAttention, features: torch.Tensor,
           places: list[torch.Tensor], hard: bool = True) -> Any:
    """Teacher forcing where the regions that are drawn are these, one (n,) for each step."""
    drawn = iter(places)
    monkeypatch.setattr("models.draw", lambda alpha: next(drawn)[:len(alpha)])
    monkeypatch.setattr(torch, "rand", lambda n, device: torch.full((n,), 0.0 if hard else 0.9))
    return teacher_forced(decoder, features, CAPTIONS, LENGTHS)


@pytest.mark.parametrize("baseline", [0.0, 1.7])
def test_hard_attentions_gradient_is_on_average_that_of_the_expected_loss(monkeypatch: pytest.MonkeyPatch,
                                                                          baseline: float) -> None:
    """The mean over all 4 ** 4 ways to look at captions of no word and of two, against the derivative of the expected
    loss, which is the sum over these ways. The baseline changes nothing."""
    monkeypatch.setattr("models.LAMBDA_E", 0.0)
    decoder, features = decoder_and_features("hard")
    expected_loss, estimate = 0.0, [torch.zeros_like(each) for each in decoder.parameters()]
    for way in itertools.product(range(4), repeat=4):
        places = torch.tensor(way).split([2, 1, 1])  # steps of both captions, of one and of one
        decoded = looked(monkeypatch, decoder, features, places)
        losses = caption_losses(decoded, baseline=torch.tensor(baseline))
        assert losses.hard == 0
        probability = decoded.log_places.sum().exp()
        loss = losses.cross_entropy / losses.words
        expected_loss = expected_loss + probability * loss
        for total, grad in zip(estimate, gradients(losses.mean(losses, 0.0), decoder), strict=True):
            total += probability.detach() * grad
    for expected, found in zip(gradients(expected_loss, decoder), estimate, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)
    names = [name for name, _ in decoder.named_parameters()]
    assert estimate[names.index("attention.encoder_att.weight")].abs().max() > 1e-3


def test_the_region_drawn_is_all_that_the_decoder_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, features = decoder_and_features("hard")
    seen: list[torch.Tensor] = []
    decoder.attention.register_forward_hook(lambda module, given, found: seen.append(found[0]))
    places = [torch.tensor([3, 1]), torch.tensor([2]), torch.tensor([0])]
    decoded = looked(monkeypatch, decoder, features, places)
    regions = features.flatten(1, 2)[decoded.order]
    for context, place in zip(seen, places, strict=True):
        torch.testing.assert_close(context, regions[torch.arange(len(place)), place])
    packed = pack_padded_sequence(decoded.alphas, decoded.decode_lengths, batch_first=True).data
    torch.testing.assert_close(decoded.log_places, packed[torch.arange(4), torch.cat(places)].log().float())


def test_half_of_the_pictures_are_looked_at_softly(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if attention were soft, and drawing teaches nothing there; captioning always does so."""
    soft, features = decoder_and_features("soft")
    expected = teacher_forced(soft, features, CAPTIONS, LENGTHS)
    hard, _ = decoder_and_features("hard")
    places = [torch.tensor([0, 0])] * 3
    decoded = looked(monkeypatch, hard, features, places, hard=False)
    torch.testing.assert_close(decoded.scores.data, expected.scores.data)
    assert decoded.log_places.tolist() == [0] * 4
    monkeypatch.undo()
    evaluated = teacher_forced(hard.eval(), features, CAPTIONS, LENGTHS)
    torch.testing.assert_close(evaluated.scores.data, expected.scores.data)
    assert evaluated.log_places is None
    hard.train()
    torch.manual_seed(0)
    coins = torch.stack([hard.start(features)[1][2] for _ in range(200)])
    assert 150 < coins.sum() < 250


def test_entropy_is_that_of_the_weights() -> None:
    alphas = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0, 0, 0, 0]]])
    torch.testing.assert_close(alpha_entropy(alphas), torch.tensor([[math.log(4), 0.0, 0.0]]))
    (grad,) = torch.autograd.grad(alpha_entropy(alphas.requires_grad_()).sum(), alphas)
    assert grad.isfinite().all()
    decoder, features = decoder_and_features("soft")
    with torch.no_grad():
        decoded = teacher_forced(decoder.eval(), features, CAPTIONS, LENGTHS)
    packed = pack_padded_sequence(decoded.alphas, decoded.decode_lengths, batch_first=True).data
    torch.testing.assert_close(caption_losses(decoded).entropy,
                               -(packed * packed.log()).sum().float(), rtol=1e-5, atol=1e-6)


def test_a_wider_gaze_is_wanted_by_hard_attention() -> None:
    """Where every word costs as much as usual, only the entropy counts, and more of it is better."""
    decoder, features = decoder_and_features("hard")
    decoded = teacher_forced(decoder, features, CAPTIONS, LENGTHS)
    found = gradients(hard_attention_loss(decoded, torch.full((4,), 2.0), torch.tensor(2.0)), decoder)
    expected = gradients(-LAMBDA_E * alpha_entropy(decoded.alphas.float()).sum(), decoder)
    torch.testing.assert_close(found, expected)
    assert max(each.abs().max() for each in found) > 1e-3


def test_without_attention_every_region_weighs_the_same() -> None:
    decoder, features = decoder_and_features("mean")
    decoded = teacher_forced(decoder, features, CAPTIONS, LENGTHS)
    assert decoded.alphas[0].tolist() == [[0.25] * 4] * 3
    still = [name for name, each in decoder.named_parameters() if not each.requires_grad]
    assert still == [name for name, _ in decoder.named_parameters() if name.startswith("attention.")]
    alphas = decoder.attention(decoder.attention.annotate(features.flatten(1, 2)), torch.randn(4, 4).double())
    torch.testing.assert_close(alphas[0], features.flatten(1, 2).mean(dim=1).repeat_interleave(2, dim=0))


@pytest.mark.parametrize("attention", ["hard", "mean"])
def test_each_kind_is_trained_resumed_and_captions(prepared: Prepared, tmp_path: Path, attention: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages, stopped in the second; the checkpoint knows its kind, so that nobody need name it again."""
    rows = run(prepared, tmp_path / "alone", "--attention", attention)
    assert all(0 < row["alpha_entropy"] <= math.log(16) + 1e-4 for row in rows)
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        with pytest.raises(KeyboardInterrupt):
            run(prepared, tmp_path / "stopped", "--attention", attention, "--checkpoint_minutes", 0)
    path = tmp_path / "stopped" / f"checkpoint_{prepared.name}.pth.tar"
    run(prepared, tmp_path / "stopped", "--checkpoint", path)
    assert_same_run(load(tmp_path / "stopped", prepared), load(tmp_path / "alone", prepared))
    state = load(tmp_path / "alone", prepared)
    assert state["model"]["attention"] == attention
    model = caption.load(path, device="cpu")
    assert type(model.decoder.attention) is ATTENTIONS[attention]
    [[best]] = caption.caption_images(model, sorted(prepared.pictures.iterdir())[:1])
    assert best.log_prob < 0
    if attention == "hard":
        assert 1 < state["decoder"]["attention.baseline"] < 5
    with refused(f"holds a model with --attention {attention}, and not"):
        other = {"hard": "mean", "mean": "hard"}[attention]
        run(prepared, tmp_path / "stopped", "--checkpoint", path, "--attention", other)


def test_two_processes_learn_hard_attention_with_one_baseline(prepared: Prepared, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         Path(train.__file__), *flags(prepared, tmp_path, "--attention", "hard", "--epochs", 1, "--batch_size", 10)],
        capture_output=True, text=True, timeout=200, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = map(json.loads, (tmp_path / f"log_{prepared.name}.jsonl").read_text().splitlines())
    assert second["train_loss"] < first["train_loss"]
    steps, baseline = 8, load(tmp_path, prepared)["decoder"]["attention.baseline"].item()
    # The mean of what was seen, each step's with a weight of 0.1 that shrinks; it begins at 0.
    assert 0.9 * second["val_cross_entropy"] * (1 - 0.9 ** steps) < baseline < first["train_loss"]


def test_a_decoder_that_knows_nothing_of_it_is_named(prepared: Prepared, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train.DECODERS, "other", torch.nn.Module)
    with refused("--attention hard: the decoder other is no DecoderWithAttention"):
        run(prepared, tmp_path, "--decoder", "other", "--attention", "hard")


def test_the_baseline_follows_what_all_processes_saw(prepared: Prepared, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """And so stays the same on all of them."""
    setting = setting_of(prepared, tmp_path, "--attention", "hard")
    training = train.build_training(setting, 1, None)
    setting = setting._replace(world=World(1, 2, torch.device("cpu")))
    others = torch.arange(1.0, len(Losses._fields) + 1, dtype=torch.float64) * 100
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.add_(others))
    sums = Losses(*train.train_step(setting, training, next(iter(DataLoader(Pictures(setting.train), 1)))))
    assert sums.cross_entropy > 100
    expected = 0.1 * sums.cross_entropy / sums.words
    assert training.captioner.decoder.attention.baseline.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_drawn_region_of_nan_shows_in_the_loss() -> None:
    """Which names the batch, where an error of PyTorch's would not."""
    decoder, features = decoder_and_features("hard")
    decoded = teacher_forced(decoder, features * torch.nan, CAPTIONS, LENGTHS)
    assert caption_losses(decoded, baseline=torch.tensor(0.0)).cross_entropy.isnan()


def test_draws_have_their_probabilities() -> None:
    torch.manual_seed(0)
    drawn = draw(torch.tensor([[0.5, 0.25, 0.0, 0.25]]).expand(20_000, 4))
    assert (drawn.bincount(minlength=4) / 20_000).tolist() == pytest.approx([0.5, 0.25, 0, 0.25], abs=0.015)
