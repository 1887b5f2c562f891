"""Exercise 1, attention taken away: see 1_attention.md.

    python -m pytest -n0 -s exercises/1_attention.py
"""
from __future__ import annotations

import torch
from torch import Tensor

from exercises.scenes import FEATURES, colours_right, draw_scenes, fit, small_decoder
from models import Annotations, Attention


class EvenAttention(Attention):
    """Looks at every region alike, whatever was said."""

    def weigh(self, annotations: Annotations, decoder_hidden: Tensor) -> Tensor:
        """The weights alpha (R, P)."""
        raise NotImplementedError("exercise 1")


# ---- the check -------------------------------------------------------------------------------------------------------

def test_every_region_weighs_the_same() -> None:
    """Of two pictures with 6 regions and three hypotheses each; and the context is then the mean of the regions."""
    attention = EvenAttention(encoder_dim=4, decoder_dim=5, attention_dim=3)
    annotations = attention.annotate(torch.randn(2, 6, 4))
    context, alpha = attention(annotations, 10 * torch.randn(6, 5))
    torch.testing.assert_close(alpha, torch.full((6, 6), 1 / 6))
    torch.testing.assert_close(context, annotations.mean().repeat_interleave(3, dim=0))


def test_it_counts_the_regions_that_attention_looks_at() -> None:
    """Which are not the encoder's own where a map is pooled: here 2 to 4."""
    attention = EvenAttention(encoder_dim=4, decoder_dim=5, attention_dim=3)
    pooling = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])    # (P, S)
    _, alpha = attention(attention.annotate(torch.randn(2, 2, 4), pooling), torch.randn(2, 5))
    torch.testing.assert_close(alpha, torch.full((2, 4), 1 / 4))


def test_what_it_costs() -> None:
    """The share of new scenes whose two colours are named rightly and in order, after equal training."""
    right = {}
    for kind in (EvenAttention, Attention):
        decoder = small_decoder()
        decoder.attention = kind(encoder_dim=FEATURES, decoder_dim=64, attention_dim=32)
        loss = fit(decoder, draw_scenes(200, "train"), draw_scenes(100, "val"), epochs=16)[-1]["val_loss"]
        right[kind] = colours_right(decoder, draw_scenes(100, "val"))
        print(f"{kind.__name__}: validation loss {loss:.3f}, both colours right in {right[kind]:.0%} of the scenes")
    assert right[Attention] - right[EvenAttention] > 0.1
