"""Other decoders under the same training and search: a GRU by inheritance, a Transformer by the interface alone.

And any module as an encoder. Each caption of the search is held against all its steps computed at once.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_packed_sequence

import models
from caption import Captioner, Search, beam_search, caption_image_beam_search, caption_images
from datasets import normalize, read_image
from models import (
    Annotations,
    Caption,
    DecoderWithAttention,
    Encoder,
    build,
    caption_losses,
    teacher_forced,
)
from safety.restore import restore

WORDS = {"<pad>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "<unk>": 5, "<start>": 6, "<end>": 7}
NAMES = {index: word for word, index in WORDS.items()}
C = 7  # features of a pixel
SEARCH = Search(beam_size=3, max_len=9, n_best=3)
AllAtOnce = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]

# Scores are of the order of 100, a caption's log-probability goes down to -264, and float32 has seven digits: on one
# CPU 1e-4 was enough, on another not.
CLOSE = {"rel": 1e-5, "abs": 1e-3}


class GRUDecoder(DecoderWithAttention):
    """The whole change from an LSTM to a GRU."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.decode_step = nn.GRUCell(self.decode_step.input_size, self.decode_step.hidden_size)
        del self.init_c  # without a use, it would have no gradient

    def init_hidden_state(self, encoder_out):
        return (self.init_h(encoder_out.mean(dim=1)),)

    def step(self, words, annotations, state):
        context, alpha = self.attention(annotations, *state)
        context = torch.sigmoid(self.f_beta(*state)) * context
        h = self.decode_step(torch.cat([self.embedding(words), context], dim=1), *state)
        return self.dropout(h), alpha, (h,)


class TransformerDecoder(nn.Module):
    """One layer: self-attention over the words so far, which are the state, and cross-attention over the pixels."""

    def __init__(self, vocab_size, encoder_dim, dim=12, heads=2, longest=60):
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding, self.position = nn.Embedding(vocab_size, dim), nn.Embedding(longest, dim)
        self.project = nn.Linear(encoder_dim, dim)
        self.words_attention, self.pixels_attention = (nn.MultiheadAttention(dim, heads, batch_first=True)
                                                       for _ in range(2))
        self.fc = nn.Linear(dim, vocab_size)

    def start(self, encoder_out):
        features = self.project(encoder_out.flatten(1, -2))
        return Annotations(features, features, None), (features[:, :0],)

    def step(self, words, annotations, state):
        last = (self.embedding(words) + self.position.weight[state[0].size(1)]).unsqueeze(1)
        words = torch.cat([state[0], last], dim=1)
        features = annotations.features.repeat_interleave(len(words) // len(annotations.features), dim=0)
        last = last + self.words_attention(last, words, words)[0]
        context, alpha = self.pixels_attention(last, features, features)
        return (last + context).squeeze(1), alpha.squeeze(1), (words,)


def by_forward(decoder: DecoderWithAttention, encoder_out: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (T, V) and alphas (T, P) of all steps of a caption (T + 1,)."""
    scores, _, _, alphas, _ = decoder(encoder_out, caption.unsqueeze(0), torch.tensor([[len(caption)]]))
    return scores[0], alphas[0]


def by_mask(decoder: TransformerDecoder, encoder_out: Tensor, caption: Tensor) -> tuple[Tensor, Tensor]:
    """The same, as Transformers are trained: in one pass, with a mask instead of steps."""
    n = len(caption) - 1
    words = (decoder.embedding(caption[:-1]) + decoder.position.weight[:n]).unsqueeze(0)
    mask = nn.Transformer.generate_square_subsequent_mask(n)
    words = words + decoder.words_attention(words, words, words, attn_mask=mask)[0]
    features = decoder.project(encoder_out.flatten(1, -2))
    context, alphas = decoder.pixels_attention(words, features, features)
    return decoder.fc(words + context)[0], alphas[0]


def decoders(seed: int, spread: float = 1.3) -> dict[str, tuple[nn.Module, AllAtOnce]]:
    """By name, with random weights, large so that captions differ; and how to compute all steps at once."""
    torch.manual_seed(seed)
    found: dict[str, tuple[nn.Module, AllAtOnce]] = {
        "lstm": (DecoderWithAttention(5, 6, 8, len(WORDS), C), by_forward),
        "gru": (GRUDecoder(5, 6, 8, len(WORDS), C), by_forward),
        "gru that pools": (GRUDecoder(5, 6, 8, len(WORDS), C, map_size=5), by_forward),
        "transformer": (TransformerDecoder(len(WORDS), C), by_mask)}
    for decoder, _ in found.values():
        for parameter in decoder.parameters():
            nn.init.normal_(parameter, std=spread / 2 if isinstance(decoder, TransformerDecoder) else spread)
        decoder.eval()
    return found


KINDS = list(decoders(0))


def search_all(kind: str) -> list[tuple[nn.Module, AllAtOnce, Tensor, list[Caption]]]:
    """Captions of some pictures by decoders of a kind: decoder, its steps at once, features (1, 4, 4, C), captions."""
    found = []
    for seed in range(3):
        decoder, all_at_once = decoders(seed)[kind]
        features = torch.randn(4, 4, 4, C)
        found += [(decoder, all_at_once, picture.unsqueeze(0), captions) for picture, captions
                  in zip(features, beam_search(decoder, features, WORDS, SEARCH), strict=True)]
    return found


# ---- the search ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_captions_probabilities_are_those_of_all_steps_at_once(kind: str) -> None:
    """Of each word and of the whole caption, and where it looked; finished or not."""
    found = search_all(kind)
    for decoder, all_at_once, features, captions in found:
        for each in captions:
            sequence = torch.tensor(each.sequence)
            with torch.no_grad():
                scores, alphas = all_at_once(decoder, features, sequence)
            log_probs = scores.log_softmax(dim=1).gather(1, sequence[1:].unsqueeze(1)).squeeze(1)
            assert each.word_log_probs == pytest.approx(log_probs.tolist(), **CLOSE)
            assert each.log_prob == pytest.approx(log_probs.sum().item(), **CLOSE)
            looked = torch.from_numpy(each.sequence_alphas[1:]).flatten(1)
            torch.testing.assert_close(looked, alphas, atol=1e-5, rtol=1e-5)
    captions = [each for *_, of_picture in found for each in of_picture]
    assert {each.finished for each in captions} == {True, False}
    assert len({tuple(each.sequence) for each in captions}) > len(captions) / 3, "they differ"


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_search_takes_the_most_probable_word_of_all_steps_at_once(kind: str) -> None:
    decoder, all_at_once = decoders(4)[kind]
    features = torch.randn(6, 4, 4, C)
    found = beam_search(decoder, features, WORDS, Search(beam_size=1, max_len=9, forbidden=()))
    for picture, [best] in zip(features, found, strict=True):
        with torch.no_grad():
            scores, _ = all_at_once(decoder, picture.unsqueeze(0), torch.tensor(best.sequence))
        assert scores.argmax(dim=1).tolist() == best.sequence[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_caption_holds(kind: str) -> None:
    """Words and alphas without <start> and <end>; log-probabilities of all words and <end>, which add up."""
    for *_, captions in search_all(kind):
        for each in captions:
            steps = len(each.sequence) - 1
            assert len(each.word_log_probs) == steps
            assert sum(each.word_log_probs) == pytest.approx(each.log_prob, rel=1e-6)
            assert max(each.word_log_probs) <= 0
            assert each.sequence[0] == WORDS["<start>"]
            assert each.finished == (each.sequence[-1] == WORDS["<end>"])
            assert each.words == [NAMES[index] for index in each.sequence[1:1 + steps - each.finished]]
            side = 5 if kind == "gru that pools" else 4
            assert each.sequence_alphas.shape == (1 + steps, side, side)
            assert each.sequence_alphas.dtype == np.float32
            assert np.all(each.sequence_alphas[0] == 1)
            assert np.allclose(each.sequence_alphas[1:].sum(axis=(1, 2)), 1, atol=1e-5)
            assert np.array_equal(each.alphas, each.sequence_alphas[1:1 + len(each.words)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_searched_as_its_pictures_alone(kind: str) -> None:
    decoder, _ = decoders(5)[kind]
    features = torch.randn(12, 4, 4, C)
    together = beam_search(decoder, features, WORDS, SEARCH)
    assert len({len(best.sequence) for best, *_ in together}) > 1, "some leave the batch before others"
    for picture, captions in zip(features, together, strict=True):
        [alone] = beam_search(decoder, picture.unsqueeze(0), WORDS, SEARCH)
        assert [each.sequence for each in captions] == [each.sequence for each in alone]
        for one, other in zip(captions, alone, strict=True):
            assert one.word_log_probs == pytest.approx(other.word_log_probs, **CLOSE)


# ---- training --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_training_computes_what_all_steps_at_once_do(kind: str) -> None:
    """Captions of different lengths, two of each picture: scores, alphas, the loss, and its gradients."""
    decoder, all_at_once = decoders(6)[kind]
    features = torch.randn(3, 4, 4, C)
    lengths = torch.tensor([[5], [8], [4], [8], [3], [6]])
    captions = torch.randint(1, 6, (6, 8))
    decoded = teacher_forced(decoder, features, captions, lengths)
    losses = caption_losses(decoded)
    loss = losses.mean(losses, alpha_c=0.5)
    loss.backward()
    gradients = {name: each.grad.clone() for name, each in decoder.named_parameters()}
    decoder.zero_grad()

    cross_entropy = doubly_stochastic = 0.0
    scores = pad_packed_sequence(decoded.scores, batch_first=True)[0]
    for place, i in enumerate(decoded.order.tolist()):
        caption, steps = captions[i, :lengths[i]], int(lengths[i]) - 1
        expected, alphas = all_at_once(decoder, features[i // 2:i // 2 + 1], caption)
        torch.testing.assert_close(scores[place, :steps], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decoded.alphas[place, :steps], alphas, atol=1e-5, rtol=1e-5)
        assert decoded.decode_lengths[place] == steps and not decoded.alphas[place, steps:].any()
        cross_entropy = cross_entropy + F.cross_entropy(expected, caption[1:], reduction="sum")
        doubly_stochastic = doubly_stochastic + ((1 - alphas.sum(dim=0)) ** 2).mean()
    by_hand = cross_entropy / (lengths - 1).sum() + 0.5 * doubly_stochastic / 6
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    by_hand.backward()
    for name, each in decoder.named_parameters():
        torch.testing.assert_close(gradients[name], each.grad, atol=1e-4, rtol=1e-4)
    silent = {name for name, gradient in gradients.items() if not gradient.any()}
    assert silent == set(), "all of it learns"


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind: str) -> None:
    decoder, _ = decoders(7, spread=0.4)[kind]
    decoder.train()
    features, captions = torch.randn(2, 4, 4, C), torch.tensor([[6, 1, 2, 3, 7, 0], [6, 4, 3, 7, 0, 0]])
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.02)
    for _ in range(150):
        losses = caption_losses(teacher_forced(decoder, features, captions, torch.tensor([[5], [4]]), sampling=0.1))
        optimizer.zero_grad()
        losses.mean(losses, alpha_c=1.0).backward()
        optimizer.step()
    found = beam_search(decoder.eval(), features, WORDS, SEARCH)
    assert [" ".join(best.words) for best, *_ in found] == ["a b c", "d c"]


# ---- by name ---------------------------------------------------------------------------------------------------------

SIZES = {"attention_dim": 5, "embed_dim": 6, "decoder_dim": 8, "vocab_size": len(WORDS)}


def test_a_checkpoint_names_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that names none is of the LSTM; sizes that are not there are the encoder's."""
    monkeypatch.setitem(models.DECODERS, "gru", GRUDecoder)
    model = {"encoder": "mobilenet_v3_small", "encoded_image_size": 3, **SIZES}
    for arguments, expected in ((model, DecoderWithAttention), ({**model, "decoder": "lstm"}, DecoderWithAttention),
                                ({**model, "decoder": "gru"}, GRUDecoder)):
        encoder, decoder = build(arguments)
        assert type(decoder) is expected
        assert (decoder.map_size, decoder.attention.encoder_att.in_features) == (3, encoder.encoder_dim)
        again = restore({"model": arguments, "encoder": encoder.state_dict(), "decoder": decoder.state_dict()})[1]
        assert type(again) is expected and not again.training
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in decoder.state_dict().items())


def test_a_decoder_that_is_not_there_is_named() -> None:
    model = {"encoder": "mobilenet_v3_small", "encoded_image_size": 3, "decoder": "gru", **SIZES}
    with pytest.raises(ValueError, match="no decoder 'gru', only lstm"):
        build(model)
    with pytest.raises(OSError, match=r"x\.pth\.tar.*no decoder 'gru'"):
        restore({"model": model, "encoder": {}, "decoder": {}}, "x.pth.tar")


# ---- any module as an encoder ----------------------------------------------------------------------------------------

class PlainEncoder(nn.Module):
    """With `forward` alone. In training mode its dropout would leave nothing of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, C, 64, stride=64), nn.Dropout(1.0))

    def forward(self, images: Tensor) -> Tensor:
        return 20 * self.layers(images).permute(0, 2, 3, 1)  # (N, 4, 4, C)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Three pictures, each of some blots of colour."""
    found = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(found):
        pixels = np.random.default_rng(i).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 70)).save(path)
    return found


def normalized(paths: list[Path]) -> Tensor:
    return normalize(torch.from_numpy(np.stack([read_image(path) for path in paths])), torch.device("cpu"))


@pytest.mark.parametrize(("kind", "side"), [("gru", 4), ("gru that pools", 5), ("transformer", 4)])
def test_any_module_is_an_encoder(kind: str, side: int, paths: list[Path]) -> None:
    """For decoders that pool and those that do not: captions as a search of its features by hand finds them."""
    decoder, _ = decoders(1)[kind]
    encoder = PlainEncoder()
    with torch.no_grad():
        features = encoder.eval()(normalized(paths))
    expected = beam_search(decoder, features, WORDS, SEARCH)
    assert len({str(best.sequence) for best, *_ in expected}) > 1, "they differ"
    found = caption_images(Captioner(encoder.train(), decoder.train(), WORDS), paths, SEARCH)
    assert not encoder.training and not decoder.training
    for captions, others in zip(found, expected, strict=True):
        assert [each.sequence for each in captions] == [each.sequence for each in others]
        for one, other in zip(captions, others, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob, **CLOSE)
            assert one.alphas.shape == (len(one.words), side, side)
            assert np.allclose(one.sequence_alphas, other.sequence_alphas, atol=1e-5)

    for path, picture in zip(paths, features, strict=True):
        [[best]] = beam_search(decoder, picture.unsqueeze(0), WORDS, Search(beam_size=2))
        sequence, alphas = caption_image_beam_search(encoder, decoder, path, WORDS, beam_size=2)
        assert sequence == best.sequence
        assert isinstance(alphas, list) and np.allclose(alphas, best.sequence_alphas, atol=1e-5)


def test_the_encoder_pools_for_decoders_that_do_not(paths: list[Path]) -> None:
    encoder = Encoder(3, "mobilenet_v3_small")
    torch.manual_seed(0)
    decoder = TransformerDecoder(len(WORDS), encoder.encoder_dim).eval()
    with torch.no_grad():
        encoder.resnet[-1][1].weight.fill_(1e8)  # random layers leave almost nothing of a picture
        expected = beam_search(decoder, encoder(normalized(paths)), WORDS, SEARCH)
    found = caption_images(Captioner(encoder, decoder, WORDS), paths, SEARCH)
    for captions, others in zip(found, expected, strict=True):
        assert [each.sequence for each in captions] == [each.sequence for each in others]
        for one, other in zip(captions, others, strict=True):
            assert one.sequence_alphas.shape == (len(one.sequence), 3, 3)
            assert np.allclose(one.sequence_alphas, other.sequence_alphas, atol=1e-5)
