"""What must hold for any input, tried with some: captions, the search, checkpoints, pictures, what is printed.

The files of create_input_files.py, the sampler and damaged checkpoints have theirs beside their other tests.
"""
from __future__ import annotations

import re
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_checkpoints import WORDS, same
from test_models import WORDS as SAID
from test_models import narrowing_search, random_decoder

from caption import Search, beam_search
from create_input_files import encode_caption, sample_captions
from datasets import read_image, reverse, words_of
from safety.checkpoints import load_checkpoint, save_checkpoint
from safety.errors import printable

few = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)  # a hundred files, of which none must survive
        yield tmp_path_factory.mktemp("properties")


# ---- captions --------------------------------------------------------------------------------------------------------

some_words = st.lists(st.sampled_from([*"abcdefg", "rare", "\x1b[2J", "<b>"]), min_size=1, max_size=6)


@given(st.lists(some_words, min_size=1, max_size=7), st.integers(1, 6), st.integers(0, 3))
@few
def test_encoded_captions_are_captions_of_the_picture(captions, cpi, more):
    """Each of them is one that people wrote, with <unk> for what is not in the vocabulary."""
    max_len = max(map(len, captions)) + more
    drawn = sample_captions(captions, cpi, Random(123))
    known = [[word if word in WORDS else "<unk>" for word in caption] for caption in captions]
    assert len(drawn) == cpi
    for words in drawn:
        row, length = encode_caption(words, WORDS, max_len), 2 + len(words)
        assert len(row) == max_len + 2 and row[0] == WORDS["<start>"] and row[length - 1] == WORDS["<end>"]
        assert set(row[length:]) <= {WORDS["<pad>"]} and words_of(row, reverse(WORDS)) in known and length == 2 + len(
            words_of(row, reverse(WORDS)))
    if cpi >= len(captions):
        assert {str(words) for words in drawn} == set(map(str, captions)), "none is left out"


# ---- the search ------------------------------------------------------------------------------------------------------

@given(st.integers(0, 10 ** 6), st.integers(1, 5), st.integers(1, 5), st.floats(-2, 3))
@few
def test_the_search_is_the_simple_one(seed, beam_size, max_len, bias):
    """Whatever the weights, the width, the length and how readily captions end; the best first."""
    decoder, features = random_decoder(seed, bias)
    found = beam_search(decoder, features, SAID, Search(beam_size, max_len, n_best=beam_size, forbidden=()))
    for picture, captions in zip(features, found, strict=True):
        expected = narrowing_search(decoder, picture.unsqueeze(0), beam_size, max_len)
        finished = [each for each in captions if each.finished]
        assert [each.sequence for each in finished] == [words for _, words in expected]
        assert [each.log_prob for each in finished] == pytest.approx([total for total, _ in expected], abs=1e-4)
        assert all(one is other for one, other in zip(captions, finished, strict=False)), "finished ones come first"
        assert all(len(each.sequence) <= max_len + 1 for each in captions)
        for each in captions:
            assert len(each.word_log_probs) == len(each.sequence) - 1
            assert sum(each.word_log_probs) == pytest.approx(each.log_prob, rel=1e-6, abs=1e-6)


# ---- checkpoints -----------------------------------------------------------------------------------------------------

numbers = st.integers(-2 ** 62, 2 ** 62) | st.floats(allow_nan=False) | st.booleans() | st.none()
plain = st.recursive(numbers | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=5), inner, max_size=3), max_leaves=8)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])


@given(weights=st.dictionaries(st.text(max_size=8), st.tuples(st.lists(st.integers(0, 3), max_size=4), dtypes),
                               max_size=4), training=plain, scores=plain)
@few
def test_a_checkpoint_comes_back_the_same(folder, weights, training, scores):
    """Tensors of any shape and kind, of names in any script, and whatever plain Python goes with them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).mul(9).to(dtype) for name, (shape, dtype)
               in weights.items()}
    state = {"encoder": tensors, "decoder": {**tensors}, "word_map": WORDS, "model": {"vocab_size": len(WORDS)},
             "preprocessing": None, "training": training, "scores": scores}
    save_checkpoint(folder / "x.pth.tar", state)
    found = load_checkpoint(folder / "x.pth.tar")
    assert same(found, {"format": 1, **state})
    assert all(found["encoder"][name].dtype == dtype for name, (_, dtype) in weights.items())


# ---- pictures, and what is printed -----------------------------------------------------------------------------------

@given(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]), st.integers(1, 40),
       st.integers(1, 40), st.integers(0, 8))
@few
def test_any_picture_becomes_bytes(folder, mode, width, height, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", (width, height), 200).convert(mode).save(folder / "x.tiff", exif=exif)
    pixels = read_image(folder / "x.tiff")
    assert (pixels.shape, pixels.dtype) == ((3, 256, 256), np.uint8) and np.ptp(pixels) == 0


@given(st.text(st.characters(), max_size=20))
@few
def test_nothing_that_is_printed_moves_the_cursor(text):
    shown = printable(text)
    assert not re.search(r"[^\n\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", shown)
    shown.encode()
    if text.isprintable():
        assert shown == text
    assert len(shown) >= len(text)
