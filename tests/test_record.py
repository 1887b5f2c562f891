"""The slow search whose tree docs/captions.md shows finds what `beam_search` does."""
from __future__ import annotations

import torch

from caption import Search, beam_search
from img.record import grow
from models import DecoderWithAttention

WORDS = {word: i for i, word in enumerate(["<pad>", "a", "b", "c", "d", "e", "<unk>", "<start>", "<end>"])}


def test_the_tree_is_the_searchs_own() -> None:
    torch.manual_seed(3)
    decoder = DecoderWithAttention(4, 4, 6, len(WORDS), encoder_dim=5).eval()
    torch.nn.init.uniform_(decoder.fc.weight, -2, 2)
    features = torch.randn(1, 3, 3, 5)
    for beam_size in (1, 2, 3):
        tree = grow(decoder, features, WORDS, beam_size, max_len=12)
        ended = sorted((log_prob for level in tree for _, _, log_prob, fate in level if fate == "ended"), reverse=True)
        [captions] = beam_search(decoder, features, WORDS, Search(beam_size, max_len=12, n_best=beam_size))
        found = [each.log_prob for each in captions if each.finished]
        assert len(ended) == len(found)
        torch.testing.assert_close(torch.tensor(ended), torch.tensor(found))
        assert beam_size == 1 or found, "a test of searches that end"
        assert any(fate == "dropped" for level in tree for *_, fate in level) == (beam_size > 1)
