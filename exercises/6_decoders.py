"""Exercise 6, a GRU and a Transformer: see 6_decoders.md.

    python -m pytest -n0 -s exercises/6_decoders.py
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from caption import Search, beam_search
from exercises.scenes import WORD_MAP, draw_scenes, fit, small_decoder
from models import Annotations, DecoderWithAttention, caption_losses, teacher_forced  # noqa: F401 (some for you)


class GRUDecoder(DecoderWithAttention):
    """One whose state is h alone."""

    def __init__(self, *args, **options):
        raise NotImplementedError("exercise 6, the first part")


class TransformerDecoder(nn.Module):
    """Of docs/take_it_apart.md, which you put here."""

    def __init__(self, *args, **options):
        raise NotImplementedError("exercise 6, the second part")


def all_at_once(decoder: TransformerDecoder, encoder_out: Tensor, captions: Tensor) -> Tensor:
    """Captions (N, L), <start> first, to the scores (N, L - 1, V) of the words after each, without a loop."""
    raise NotImplementedError("exercise 6, the third part")


# ---- the check -------------------------------------------------------------------------------------------------------

def test_the_gru_computes_what_a_gru_does() -> None:
    """One step, held against the cell of PyTorch and the gated context."""
    decoder, scenes = small_decoder(GRUDecoder).eval(), draw_scenes(4, "some")
    annotations, state = decoder.start(scenes.features)
    assert [each.shape for each in state] == [(4, 64)]
    torch.testing.assert_close(state[0], decoder.init_h(annotations.mean()))
    words, h = scenes.captions[:, 1], state[0]
    output, alpha, state = decoder.step(words, annotations, state)
    context, expected_alpha = decoder.attention(annotations, h)
    inputs = torch.cat([decoder.embedding(words), torch.sigmoid(decoder.f_beta(h)) * context], dim=1)
    assert isinstance(decoder.decode_step, nn.GRUCell)
    torch.testing.assert_close(output, decoder.decode_step(inputs, h))
    torch.testing.assert_close(alpha, expected_alpha)
    torch.testing.assert_close(state, (output,))


def test_the_gru_has_no_idle_weights_and_is_searched() -> None:
    decoder, scenes = small_decoder(GRUDecoder), draw_scenes(4, "some")
    losses = caption_losses(teacher_forced(decoder, *scenes))
    losses.mean(losses, alpha_c=1.0).backward()
    assert [name for name, each in decoder.named_parameters() if each.grad is None] == []
    [best, *_] = beam_search(decoder.eval(), scenes.features[:1], WORD_MAP, Search(beam_size=3, max_len=5))[0]
    assert best.alphas.shape == (len(best.words), 8, 8)


def test_all_steps_at_once_are_the_steps_one_by_one() -> None:
    decoder, scenes = small_decoder(TransformerDecoder).eval(), draw_scenes(6, "six")
    annotations, state = decoder.start(scenes.features)
    steps = []
    for words in scenes.captions[:, :-1].T:
        output, _, state = decoder.step(words, annotations, state)
        steps.append(decoder.fc(output))
    decoder.step = None     # no loop over it
    torch.testing.assert_close(all_at_once(decoder, scenes.features, scenes.captions), torch.stack(steps, dim=1))


def test_no_word_is_seen_too_early() -> None:
    """Another word at a place changes the scores from that place on, and none before."""
    decoder, scenes = small_decoder(TransformerDecoder).eval(), draw_scenes(6, "six")
    other = scenes.captions.clone()
    other[:, 4] = WORD_MAP["<unk>"]
    before, after = (all_at_once(decoder, scenes.features, each) for each in (scenes.captions, other))
    same = (before == after).all(dim=2).all(dim=0).tolist()
    assert all(same[:4]) and not any(same[4:])


def test_the_transformer_learns() -> None:
    scenes = draw_scenes(50, "fifty")
    losses = [row["train_loss"] for row in fit(small_decoder(TransformerDecoder), scenes, scenes, epochs=8)]
    print("training loss by epoch:", *(f"{each:.2f}" for each in losses))
    assert losses[-1] < 0.5 * losses[0]
