"""Exercise 2, the gate: see 2_gate.md.

    python -m pytest -n0 -s exercises/2_gate.py
"""
from __future__ import annotations

import torch
from torch import Tensor

from exercises.scenes import WORDS, Scenes, draw_scenes, fit, small_decoder
from models import Annotations, DecoderWithAttention, caption_losses, teacher_forced


def openings(decoder: DecoderWithAttention, scenes: Scenes) -> Tensor:
    """How far the gate opens for each word after <start>, with the true words as input: (N, L - 1), from 0 to 1.

    The mean over its features. What comes for padding is left to you.
    """
    raise NotImplementedError("exercise 2, the first part")


class UngatedDecoder(DecoderWithAttention):
    """A decoder that takes the context as attention gives it."""

    def step(self, words: Tensor, annotations: Annotations,
             state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        raise NotImplementedError("exercise 2, the second part")


# ---- the check -------------------------------------------------------------------------------------------------------

def test_a_gate_that_stands_still_is_measured() -> None:
    """Open by a quarter for one half of the features and by three quarters for the other."""
    decoder, scenes = small_decoder(), draw_scenes(4, "some")
    torch.nn.init.zeros_(decoder.f_beta.weight)
    decoder.f_beta.bias.data = torch.tensor([0.25, 0.75] * 25).logit()
    torch.testing.assert_close(openings(decoder, scenes), torch.full((4, scenes.captions.size(1) - 1), 0.5))


def test_it_is_the_gate_of_the_state_before_the_step() -> None:
    """Of which h is known before the first word: here it is 1 everywhere, and c is 0."""
    decoder, scenes = small_decoder(), draw_scenes(4, "some")
    for layer, bias in ((decoder.init_h, 1.0), (decoder.init_c, 0.0)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, bias)
    expected = torch.sigmoid(decoder.f_beta(torch.ones(64))).mean()
    torch.testing.assert_close(openings(decoder, scenes)[:, 0], expected.expand(4))


def test_without_it_a_step_is_one_with_the_gate_wide_open() -> None:
    ungated, gated = small_decoder(UngatedDecoder).eval(), small_decoder().eval()
    gated.load_state_dict(ungated.state_dict(), strict=False)
    torch.nn.init.zeros_(gated.f_beta.weight)
    torch.nn.init.constant_(gated.f_beta.bias, 40.0)
    scenes = draw_scenes(4, "some")
    for ours, theirs in zip(ungated(*scenes)[:4:3], gated(*scenes)[:4:3], strict=True):     # scores, alphas
        torch.testing.assert_close(ours, theirs)


def test_no_weight_is_left_that_does_not_learn() -> None:
    """One that is never used stops a run of several processes, which wait for its gradient."""
    decoder = small_decoder(UngatedDecoder)
    losses = caption_losses(teacher_forced(decoder, *draw_scenes(4, "some")))
    losses.mean(losses, alpha_c=0.0).backward()
    assert [name for name, each in decoder.named_parameters() if each.grad is None] == []


def test_it_opens_for_colours() -> None:
    """And not for what the sentence decides: "of" follows "left", whatever the picture is."""
    decoder, scenes = small_decoder(), draw_scenes(200, "train")
    fit(decoder, scenes, scenes, epochs=12)
    opened, words = openings(decoder, scenes), scenes.captions[:, 1:]
    mean = {word: opened[words == i].mean().item() for i, word in enumerate(WORDS) if i and (words == i).any()}
    print("open by", ", ".join(f"{mean[word]:.2f} for {word}" for word in sorted(mean, key=mean.get)))
    assert min(mean["red"], mean["green"], mean["blue"]) > mean["of"] + 0.03
