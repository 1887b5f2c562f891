"""The model of "Show, Attend and Tell" (Xu et al. 2015, arXiv 1502.03044), with soft or hard attention.

Read from top to bottom: Encoder (a picture to a grid of features), Attention (where to look), DecoderWithAttention
(one decoding step), `teacher_forced` (all steps of the training captions) and the losses. Below the line both are built
from their arguments (with a checkpoint's weights: safety/restore.py). The encoders by name are in encoders/; how a
caption is found, with a beam search, is in caption.py. *The original* is sgrvinod's tutorial, whose names these are.

    encoder = Encoder(weights="IMAGENET1K_V1")
    decoder = DecoderWithAttention(attention_dim=512, embed_dim=512, decoder_dim=512, vocab_size=len(word_map))
    features = encoder(images)                                     # (N, 3, 256, 256) -> (N, 14, 14, 2048)
    scores, captions, lengths, alphas, order = decoder(features, captions, caption_lengths)

Of 256 x 256 pixels a ResNet makes a map of 8 x 8 regions; the original pools it to 14 x 14, where attention looks. The
same numbers come out, faster, if what is linear is computed on the smaller map: this is why there are two maps below.

Letters of the shapes: N pictures (or captions), h x w = S regions of the encoder's own map (64), P regions that
attention looks at (196), C features of a region, K hypotheses of a picture in a search (1 in training), R = N * K rows
of a step, L ids of a padded caption, T steps of decoding, E, D and A the dimensions of word embedding, decoder and
attention, V words of the vocabulary.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from encoders.by_name import ENCODERS, find_trunk  # noqa: F401 (ENCODERS is for those who add one)
from encoders.speed import speed_up_convolutions
from encoders.trunk import UnitFeatures

LAMBDA_E = 0.01     # weight of the gaze's entropy in hard attention: the larger, the more even the gaze stays


class Encoder(nn.Module):
    """A pretrained image classifier without its head: pictures to a grid of feature vectors (section 3.1.1).

    It is always in eval mode, `train()` notwithstanding: BatchNorm keeps the statistics of ImageNet. A frozen
    encoder is therefore frozen bit for bit, and a fine-tuned one computes the same on one process or on eight.

    Args:
        encoded_image_size: the grid is this wide and high, whatever the trunk's own map is.
        name: a classifier of torchvision (ResNets, VGG, EfficientNet, ConvNeXt, ViT, Swin, ...),
            "efficientnet_lite0", "efficientnet_lite2", or "timm:NAME" for any of timm's.
        weights: the name of torchvision's weights ("IMAGENET1K_V1"), a state_dict of a classifier or of its trunk
            alone, or None for random ones.
        stride: pixels from one region of the trunk's map to the next, at most. 32: the trunk's last map; 16: the last
            that is twice as fine, of a ResNet that of its third block, 16 x 16 x 1024 of 256 x 256 pixels.
        image_size: of a Vision Transformer that is not for pictures of its usual size.
        unit_features: bring each region's features to mean 0 and deviation 1, as train.py does where the map is not
            the trunk's last.

    Attributes:
        pixels: the size of the pictures that it expects, and what they are normalised with (`datasets.normalize`).

    Raises:
        OSError: the weights cannot be downloaded. ValueError: no such model, or none with a map of features.
    """

    def __init__(self, encoded_image_size: int = 14, name: str = "resnet101",
                 weights: str | dict[str, Tensor] | None = None, stride: int = 32,
                 image_size: int | None = None, unit_features: bool = False) -> None:
        super().__init__()
        self.enc_image_size = encoded_image_size
        layers, self.encoder_dim, self.first_tuned, self.pixels = find_trunk(name, weights, stride, image_size)
        self.pixels.checked()
        self.resnet = nn.Sequential(*layers)  # the original's name for it
        if unit_features:
            self.resnet.append(UnitFeatures())
        self.adaptive_pool = nn.AdaptiveAvgPool2d((encoded_image_size, encoded_image_size))
        self.eval()
        self.fine_tune(False)
        speed_up_convolutions(self.resnet)  # memory layout

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), normalised, to features (N, 14, 14, C)."""
        features = self.adaptive_pool(self.resnet(images))  # (N, C, h, w) -> (N, C, 14, 14)
        return features.permute(0, 2, 3, 1)                 # (N, 14, 14, C)

    def grid(self, images: Tensor) -> Tensor:
        """The same before the pooling, (N, h, w, C), for a decoder that pools by itself, as ours does below."""
        return self.resnet(images).permute(0, 2, 3, 1)

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)

    def fine_tune(self, fine_tune: bool = True) -> None:
        """Lets the last stages learn, or freezes everything.

        The first layers (edges, textures) stay as ImageNet taught them: of a ResNet blocks 2 to 4 are tuned, of
        other convolutional networks the layers from the same depth on, where the map is an eighth of the picture, of a
        Vision Transformer all blocks, and every layer of a timm model.
        """
        self.requires_grad_(False)
        for layer in self.resnet[self.first_tuned:]:
            layer.requires_grad_(fine_tune)


class Annotations(NamedTuple):
    """The paper's annotation vectors a_i of each picture, and what attention computes of them once for all steps."""

    features: Tensor        # (N, S, C), the a_i on the encoder's own map
    keys: Tensor            # (N, P, A), the layer `encoder_att` of them, on the map that attention looks at
    pooling: Tensor | None  # (P, S), each of the P regions as a mean of the S; None where they are the same

    def rows(self, index: Tensor | slice) -> Annotations:
        """Those of some of the pictures."""
        return self._replace(features=rows(self.features, index), keys=rows(self.keys, index))

    def mean(self) -> Tensor:
        """The mean of the P regions, (N, C)."""
        if self.pooling is None:
            return self.features.mean(dim=1)
        return self.pooling.mean(dim=0) @ self.features                         # (S,) @ (N, S, C)


def rows(tensor: Tensor, index: Tensor | slice) -> Tensor:
    """tensor[index]. Where rows repeat, the gradient of `tensor[index]` adds them in another order in every run, if a
    CPU has several threads; that of index_select does not."""
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)


class Attention(nn.Module):
    """Soft attention: how much to look at each region, given what was said so far (sections 3.1.2 and 4.2)."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def annotate(self, features: Tensor, pooling: Tensor | None = None) -> Annotations:
        """Features (N, S, C) to annotations. pool(W a) is W pool(a), but multiplies 64 regions by W, and not 196."""
        keys = self.encoder_att(features)                                       # (N, S, A)
        if pooling is not None:  # its rows sum to 1, so that the bias stays as it is
            pooling = pooling.to(keys.dtype)
            keys = pooling @ keys                                               # (N, P, A)
        return Annotations(features.to(keys.dtype), keys, pooling)

    def begin(self, n: int) -> tuple[Tensor, ...]:
        """What the decoder's state has to hold of the gaze of n pictures: nothing."""
        return ()

    def forward(self, annotations: Annotations, decoder_hidden: Tensor) -> tuple[Tensor, ...]:
        """The weighted features and the weights.

        Args:
            annotations: of N pictures.
            decoder_hidden: (R, D), each picture's K hypotheses one after another; K is 1 in training.

        Returns:
            The context (R, C) and the weights alpha (R, P), which sum to 1 over the regions.
        """
        alpha = self.weigh(annotations, decoder_hidden)                         # (R, P)
        return self.look(annotations, alpha), alpha                             # (R, C), equation 13

    def weigh(self, annotations: Annotations, decoder_hidden: Tensor) -> Tensor:
        """The weights alpha (R, P)."""
        keys = annotations.keys
        queries = self.decoder_att(decoder_hidden).unflatten(0, (len(keys), -1))  # (N, K, A)
        hidden = (keys.unsqueeze(1) + queries.unsqueeze(2)).relu_()             # (N, K, P, A)
        return self.full_att(hidden).squeeze(3).softmax(dim=2).flatten(0, 1)    # (R, P), equations 4 and 5

    def look(self, annotations: Annotations, weights: Tensor) -> Tensor:
        """The features with weights (R, P), summed over the regions: (R, C)."""
        features, _, pooling = annotations
        weights = weights.to(features.dtype).unflatten(0, (len(features), -1))  # (N, K, P)
        if pooling is not None:  # alpha (pooling a) = (alpha pooling) a: weights of the encoder's own regions
            weights = weights @ pooling                                         # (N, K, S)
        return (weights @ features).flatten(0, 1)                               # (R, C)


class HardAttention(Attention):
    """Hard attention: for each word one region s, drawn with the probabilities alpha (section 4.1).

    The loss has no derivative with respect to the region drawn, so `hard_attention_loss` below teaches it. In training
    half of the pictures are looked at softly all the same, and captions are found with the expected context, which is
    soft too.
    """

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int) -> None:
        super().__init__(encoder_dim, decoder_dim, attention_dim)
        self.register_buffer("baseline", torch.zeros(()))  # b, the usual cross entropy of a word

    def begin(self, n: int) -> tuple[Tensor, ...]:
        """In training, for each picture whether it is looked at hard, and log alpha of the region last drawn."""
        if not self.training:
            return ()
        return torch.rand(n, device=self.baseline.device) < 0.5, self.baseline.new_zeros(n)

    def forward(self, annotations: Annotations, decoder_hidden: Tensor, *gaze: Tensor) -> tuple[Tensor, ...]:
        """Context (R, C), alpha (R, P), and what `begin` began, brought up to date."""
        alpha = self.weigh(annotations, decoder_hidden)                         # (R, P)
        if not gaze:
            return self.look(annotations, alpha), alpha
        hard, _ = gaze                                                          # (R,)
        place = draw(alpha.detach().float()).unsqueeze(1)                       # (R, 1), equation 8
        weights = torch.where(hard.unsqueeze(1), torch.zeros_like(alpha).scatter(1, place, 1), alpha)
        log_place = alpha.gather(1, place).squeeze(1).float().log() * hard      # (R,)
        return self.look(annotations, weights), alpha, hard, log_place

    def move_baseline(self, cross_entropy: Tensor) -> None:
        """After each step, towards the cross entropy of a word in it."""
        self.baseline.lerp_(cross_entropy.to(self.baseline.dtype), 0.1)


class MeanAttention(Attention):
    """No attention, to see what it is worth: every region weighs the same, whatever was said."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int) -> None:
        super().__init__(encoder_dim, decoder_dim, attention_dim)
        self.requires_grad_(False)

    def annotate(self, features: Tensor, pooling: Tensor | None = None) -> Annotations:
        """Nothing is compared, so the keys are empty: they only tell how many regions there are."""
        regions = features.size(1) if pooling is None else len(pooling)
        return Annotations(features, features.new_zeros(len(features), regions, 0), pooling)

    def weigh(self, annotations: Annotations, decoder_hidden: Tensor) -> Tensor:
        even = annotations.keys.new_zeros(len(decoder_hidden), annotations.keys.size(1))
        return even.softmax(dim=1)                                              # (R, P), as precise as the others'


class DecoderWithAttention(nn.Module):
    """An LSTM that looks at the picture again before each word (section 3.1.2).

    Another decoder needs `start`, `step`, `fc` and `vocab_size`, and is then trained and searched like this one. Its
    annotations may be anything with `rows`, its state any tuple of tensors whose first dimension is the row.

    Args:
        attention_dim, embed_dim, decoder_dim: dimensions of the attention network, the word embeddings and the LSTM.
        vocab_size: number of words, the special ones included.
        encoder_dim: features of a region.
        dropout: on the LSTM's output, before the vocabulary.
        map_size: attention looks at a map this wide and high, to which others are pooled; None: at any map as it is.
            `build` sets it, so that what the scripts train and search gets `Encoder.grid` (see `datasets.encode`).
    """

    def __init__(self, attention_dim: int, embed_dim: int, decoder_dim: int, vocab_size: int, encoder_dim: int = 2048,
                 dropout: float = 0.5, map_size: int | None = None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.map_size = map_size
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)     # `build` may put another kind here
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)  # a cell: the next input depends on h
        self.init_h = nn.Linear(encoder_dim, decoder_dim)   # as in the original: one layer, the paper has more
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)   # the gate
        self.fc = nn.Linear(decoder_dim, vocab_size)        # of h alone; the paper's equation 7 adds word and context
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

    def init_hidden_state(self, encoder_out: Tensor) -> tuple[Tensor, ...]:
        """The LSTM's first state, h and c (N, D), from the mean of the features (N, P, C)."""
        mean = encoder_out.mean(dim=1)
        return self.init_h(mean), self.init_c(mean)

    def start(self, encoder_out: Tensor) -> tuple[Annotations, tuple[Tensor, ...]]:
        """Before the first word: features (N, h, w, C) or (N, P, C) to annotations and the state h and c (N, D)."""
        pooling = pooling_matrix(encoder_out, self.map_size) if self.map_size else None  # (P, S)
        annotations = self.attention.annotate(encoder_out.flatten(1, -2), pooling)
        state = self.init_hidden_state(annotations.mean().unsqueeze(1))                 # the mean as a map of 1 region
        return annotations, (*state, *self.attention.begin(len(encoder_out)))

    def step(self, words: Tensor, annotations: Annotations,
             state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """One decoding step.

        Args:
            words: (R,) ids of the last words.
            state: h and c, (R, D), and what attention may have to remember.

        Returns:
            The output (R, D), of which `fc` makes the scores of the next words; alpha (R, P); the new state.
        """
        h, c, *gaze = state
        context, alpha, *gaze = self.attention(annotations, h, *gaze)           # (R, C), (R, P)
        context = torch.sigmoid(self.f_beta(h)) * context                       # which of it this word needs, 4.2.1
        inputs = torch.cat([self.embedding(words), context], dim=1)             # (R, E + C)
        h, c = self.decode_step(inputs, (h, c))                                 # equations 1 to 3
        return self.dropout(h), alpha, (h, c, *gaze)

    def forward(self, encoder_out: Tensor, encoded_captions: Tensor, caption_lengths: Tensor,
                sampling: float = 0.0) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
        """Scores of all next words with the true words as input, in the original's form.

        Args:
            encoder_out: (N, h, w, C) or (N, P, C), or of fewer pictures where each has several captions in a row.
            encoded_captions: (N, L), ids from <start> to <end>, then <pad>.
            caption_lengths: (N, 1), on the CPU; <start> and <end> count.
            sampling: see `teacher_forced`.

        Returns:
            Scores (N, T, V), captions (N, L), decode lengths, alphas (N, T, P) and the order (N,): all sorted by
            decreasing length, by that order; zero where a caption has ended.
        """
        scores, *others, _ = teacher_forced(self, encoder_out, encoded_captions, caption_lengths, sampling)
        return pad_packed_sequence(scores, batch_first=True)[0], *others


class Decoded(NamedTuple):
    """What a decoder makes of captions, sorted by decreasing length."""

    scores: PackedSequence      # (words, V): of all captions the first word, of all the second, ...; no padding
    captions: Tensor            # (N, L)
    decode_lengths: list[int]   # words to predict of each caption: all but <start>
    alphas: Tensor              # (N, T, P), zero where a caption has ended
    order: Tensor               # (N,), the place of each before the sorting; on the CPU
    log_places: Tensor | None = None    # (words,), hard attention in training: log alpha of the region drawn, packed


def teacher_forced(decoder: nn.Module, encoder_out: Tensor, captions: Tensor, caption_lengths: Tensor,
                   sampling: float = 0.0) -> Decoded:
    """The paper's loop: one step after another, each with the true word as input (*teacher forcing*).

    Sorted by length, the captions that have not ended are always the first n, and no step computes padding.

    Args:
        decoder: anything with `start`, `step` and `fc`.
        encoder_out, captions, caption_lengths: see `DecoderWithAttention.forward`.
        sampling: probability with which an input is the word that the model itself finds most probable, with dropout
            if it is in training mode (*scheduled sampling*, arXiv 1506.03099).
    """
    if len(captions) % len(encoder_out):
        raise ValueError(f"{len(captions)} captions do not belong to {len(encoder_out)} pictures")
    lengths, order = caption_lengths.squeeze(1).sort(descending=True, stable=True)
    index = order.to(encoder_out.device, non_blocking=True)                     # (N,), longest caption first
    picture = index // (len(captions) // len(encoder_out))                      # (N,), the picture of each
    captions, decode_lengths = captions[index], (lengths - 1).tolist()          # nothing is predicted after <end>
    annotations, state = decoder.start(encoder_out)
    annotations, state = annotations.rows(picture), tuple(rows(each, picture) for each in state)

    # Packed, the captions [a b c], [d e] become data a d b e c in batches of 2, 2 and 1: one for each step.
    inputs = pack_padded_sequence(captions, decode_lengths, batch_first=True)
    outputs, alphas, log_places = [], [], []
    attention = getattr(decoder, "attention", None)
    hard = isinstance(attention, HardAttention) and attention.training
    for words in inputs.data.split(inputs.batch_sizes.tolist()):                # (n,), n captions have not ended
        n = len(words)
        if n < len(state[0]):
            annotations, state = annotations.rows(slice(n)), tuple(each[:n] for each in state)
        if sampling > 0 and outputs:
            predicted = decoder.fc(outputs[-1][:n]).argmax(dim=1)
            words = torch.where(torch.rand(n, device=words.device) < sampling, predicted, words)
        output, alpha, state = decoder.step(words, annotations, state)
        outputs.append(output)
        alphas.append(alpha)
        if hard:
            log_places.append(state[-1])                                        # (n,)

    scores = inputs._replace(data=decoder.fc(torch.cat(outputs)))               # (words, V), once for all steps
    return Decoded(scores, captions, decode_lengths, padded(alphas), order, torch.cat(log_places) if hard else None)


def draw(probabilities: Tensor) -> Tensor:
    """Of each row (R, X) a place (R,), drawn with these probabilities.

    The largest of p / x, with an exponentially distributed x for each, is a draw from p (Gumbel 1954). Unlike
    `torch.multinomial` it takes NaN, which then shows in the loss.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_().clamp_(min=1e-30)).argmax(dim=1)


def padded(steps: list[Tensor]) -> Tensor:
    """Rows of each step, (n, P) with ever fewer captions, to (N, T, P): zero where a caption has ended.

    `pad_packed_sequence` gives the same, but takes several operations a step, and on a GPU each is a launch.
    """
    caption = torch.cat([torch.arange(len(each)) for each in steps])            # (words,), of each row
    step = torch.cat([torch.full((len(each),), t) for t, each in enumerate(steps)])
    rows, device = torch.cat(steps), steps[0].device
    place = (caption.to(device, non_blocking=True), step.to(device, non_blocking=True))
    return rows.new_zeros(len(steps[0]), len(steps), rows.size(1)).index_put(place, rows)


def doubly_stochastic(alphas: Tensor) -> Tensor:
    """How far each picture's attention is from equal over time (equation 14): (N, T, P) -> (N,).

    Softmax makes the weights sum to 1 over the regions; this asks that every region's sum over time be near 1 too.
    The mean over the regions, as in the original, keeps it comparable between sizes of feature maps.
    """
    return ((1 - alphas.sum(dim=1)) ** 2).mean(dim=1)


def alpha_entropy(alphas: Tensor) -> Tensor:
    """How widely attention is spread (N, T, P) -> (N, T): 0 where all is on one region, ln P where it is even."""
    return -(alphas * alphas.clamp(min=1e-12).log()).sum(dim=2)  # the gradient of 0 log 0 would be infinite


def hard_attention_loss(decoded: Decoded, cross_entropy: Tensor, baseline: Tensor) -> Tensor:
    """What teaches hard attention where to look: 0, with the gradient that the paper derives in section 4.1.

    A caption's expected cost is the sum over all ways s to look of p(s) cost(s). As the gradient of p is p times that
    of log p, the gradient of the sum is the mean, over ways drawn, of that of cost(s) and cost(s) times that of
    log p(s): a way that costs more than usual becomes less probable. That part is here. The `baseline` says what is
    usual; it changes nothing on average, as the gradients of log p(s) do not, but much of the noise.

    Args:
        cross_entropy: (words,), of each word, packed.
        baseline: (), the usual cross entropy of a word.
    """
    def by_caption(values: Tensor) -> Tensor:
        return pad_packed_sequence(decoded.scores._replace(data=values), batch_first=True)[0].sum(dim=1)    # (N,)

    cost = by_caption(cross_entropy.detach() - baseline)                        # (N,)
    loss = (cost * by_caption(decoded.log_places)).sum() - LAMBDA_E * alpha_entropy(decoded.alphas.float()).sum()
    return loss - loss.detach()


class Losses(NamedTuple):
    """The parts of the loss and their counts: sums, so that they add up over batches and processes."""

    cross_entropy: Tensor       # summed over the words; in stage 3 SelfCritical puts its own here
    doubly_stochastic: Tensor   # summed over the captions
    top5: Tensor                # how many words were among the five most probable; 0 in training
    words: Tensor               # how many
    captions: Tensor            # how many
    entropy: Tensor = 0.0       # of the attention, summed over the words; 0 in training
    hard: Tensor = 0.0          # hard attention's own part, a gradient alone: its value is 0
    reward: Tensor = 0.0        # of the captions drawn in stage 3, summed over them; 0 in other stages

    def mean(self, totals: Losses, alpha_c: float) -> Tensor:
        """This process's part of the loss (equation 14): its sums, divided by the counts of all processes (`totals`),
        so that the parts of all processes add up to the mean."""
        words = (self.cross_entropy + self.hard) / totals.words
        return words + alpha_c * self.doubly_stochastic / totals.captions


def caption_losses(decoded: Decoded, label_smoothing: float = 0.0, baseline: Tensor | None = None) -> Losses:
    """The losses of what was predicted.

    Args:
        label_smoothing: share of the true word's probability that the target gives to all words alike.
        baseline: see `hard_attention_loss`.
    """
    scores, alphas = decoded.scores.data.float(), decoded.alphas.float()        # (words, V), (N, T, P)
    targets = pack_padded_sequence(decoded.captions[:, 1:], decoded.decode_lengths, batch_first=True).data  # (words,)
    cross_entropy = F.cross_entropy(scores, targets, reduction="none", label_smoothing=label_smoothing)     # (words,)
    top5 = entropy = hard = reward = scores.new_zeros(())
    if decoded.log_places is not None:
        hard = hard_attention_loss(decoded, cross_entropy, baseline)
    if not scores.requires_grad:  # nothing shows these of a training step
        top5 = (scores.topk(min(5, scores.size(1)), dim=1).indices == targets.unsqueeze(1)).sum().float()
        entropy = alpha_entropy(alphas).sum()
    words, captions = scores.new_full((), len(targets)), scores.new_full((), len(decoded.captions))
    return Losses(cross_entropy.sum(), doubly_stochastic(alphas).sum(), top5, words, captions, entropy, hard, reward)


class Caption(NamedTuple):
    """What a model says of a picture: what a search finds (caption.py) and drawing/ shows."""

    words: list[str]                        # between <start> and <end>
    log_prob: float                         # of the whole sentence, <end> included; no length normalisation
    finished: bool                          # False: the search stopped before <end>
    alphas: np.ndarray | None               # (len(words), 14, 14): for each where the model looked; sum to 1
    sequence: list[int]                     # ids, <start> first
    word_log_probs: list[float]             # of each id after <start>; their sum is `log_prob`
    sequence_alphas: np.ndarray | None      # (len(sequence), 14, 14): for <start> (all ones) and <end> too


# ---- models by name: a first reading may end here --------------------------------------------------------------------

def pooling_matrix(features: Tensor, size: int) -> Tensor | None:
    """Average pooling of a map (N, h, w, C) to size x size as a matrix (size * size, h * w); None if it is that size.

    Each pooled region is a mean of regions, so that sums over 196 pooled ones are sums over the 64 of a ResNet's map.
    """
    if features.dim() == 3 or features.size(1) == features.size(2) == size:
        return None
    height, width = features.shape[1:3]
    pixels = torch.eye(height * width, device=features.device).view(-1, 1, height, width)
    return F.adaptive_avg_pool2d(pixels, size).flatten(1).T.to(features.dtype)


# By name: classes that are built with DecoderWithAttention's arguments, and kinds of `Attention`. Encoders by name are
# in encoders/.
DECODERS: dict[str, type[nn.Module]] = {"lstm": DecoderWithAttention}
ATTENTIONS: dict[str, type[Attention]] = {"soft": Attention, "hard": HardAttention, "mean": MeanAttention}


def build(model: dict[str, Any], weights: str | dict[str, Tensor] | None = None,
          image_size: int | None = None) -> tuple[Encoder, nn.Module]:
    """Encoder and decoder as a checkpoint's `model` describes them; `weights` and `image_size`: see `Encoder`.

    Raises:
        OSError: the weights cannot be downloaded. ValueError: no such encoder or decoder.
    """
    arguments = {"decoder": "lstm", "attention": "soft", "encoder_stride": 32, "unit_features": False, **model}
    size, encoder_name, stride, unit, name, kind = (arguments.pop(key) for key in (
        "encoded_image_size", "encoder", "encoder_stride", "unit_features", "decoder", "attention"))
    if name not in DECODERS:
        raise ValueError(f"there is no decoder {name!r}, only {', '.join(DECODERS)}; add others to models.DECODERS")
    encoder = Encoder(size, encoder_name, weights, stride, image_size, unit)
    if size > (side := image_size or encoder.pixels.image_size):
        raise ValueError(f"a map of {size} x {size} pixels is larger than the picture, {side} x {side}")
    decoder = DECODERS[name](**{"encoder_dim": encoder.encoder_dim, "map_size": size, **arguments})
    if kind != "soft":
        decoder.attention = ATTENTIONS[kind](encoder.encoder_dim, model["decoder_dim"], model["attention_dim"])
    return encoder, decoder
