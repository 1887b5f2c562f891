"""Stage 3 of train.py, self-critical training: a model learns from captions of its own, by the CIDEr that they earn.

Cross entropy asks for the next word after true ones, which is not what captions are judged by. Here the model draws
whole captions, and those that earn more than others of the same picture become more probable (Rennie et al. 2016, arXiv
1612.00563; the baseline: Luo 2020, arXiv 2003.09971). Letters: N pictures, K captions drawn of each, R = N * K rows of
a step, T steps, L ids of a true caption, V words.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from caption import Search
from datasets import encode
from models import HardAttention, Losses, draw
from searching.settings import ids_of
from training.rewards import cider_d, frequencies

SAMPLES = 5     # K in training


class SelfCritical(nn.Module):
    """Pictures and captions to the loss of stage 3: what TeacherForcing is in the others, and called as that is.

    The expected reward of a picture is the sum over all captions of p(caption) reward(caption). As the gradient of p is
    p times that of log p, the gradient of the sum is the mean, over captions drawn, of reward times the gradient of
    log p. From the reward is subtracted what the picture's other captions earned: it does not depend on this one, and
    so changes nothing on average, but much of the noise.

    Args:
        captions: (I, 5, L), the training captions, on the decoder's device: they tell which words are rare.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, word_map: dict[str, int], captions: Tensor) -> None:
        super().__init__()
        self.encoder, self.decoder, self.word_map = encoder, decoder, word_map
        self.rare = frequencies(captions[:, :, 1:], len(word_map))

    def train(self, mode: bool = True) -> SelfCritical:
        """Hard attention looks softly, as it does in a search, whose captions are to be better."""
        super().train(mode)
        if isinstance(attention := getattr(self.decoder, "attention", None), HardAttention):
            attention.eval()
        return self

    def forward(self, images: Tensor, captions: Tensor, *_: Any) -> Losses:
        """Images (N, 3, 256, 256) bytes, or kept features; captions (N, 5, L), what people said of them."""
        device = next(self.decoder.parameters()).device
        features = encode(self.encoder, self.decoder, images, device)           # (N, h, w, C)
        drawn, log_probs = draw_captions(self.decoder, features, self.word_map, SAMPLES)    # (N, K, T)
        true = captions[:, :, 1:].to(device, non_blocking=True)  # <end> counts: or "a dog with a" would earn as much
        reward = cider_d(drawn, true, self.rare).float()                        # (N, K)
        others = (reward.sum(dim=1, keepdim=True) - reward) / (SAMPLES - 1)     # (N, K), the mean of theirs
        loss = -((reward - others).unsqueeze(2) * log_probs).sum()              # the gradient, in one line
        none, words, count = loss.new_zeros(()), (drawn != 0).sum().float(), loss.new_full((), reward.numel())
        return Losses(loss, none, none, words, count, none, none, reward.sum())


def draw_captions(decoder: nn.Module, encoder_out: Tensor, word_map: dict[str, int], k: int) -> tuple[Tensor, Tensor]:
    """K captions of each picture, every word drawn with the probability that the decoder gives it after those before.

    What a search forbids has no probability here either, and a caption is as long as one found by a search at most.

    Args:
        decoder: anything with `start`, `step` and `fc`; in training mode with dropout, as in all training.
        encoder_out: (N, h, w, C) or (N, P, C).

    Returns:
        The words' ids (N, K, T), <end> included and then 0; the log-probability of each (N, K, T), 0 after <end>.
    """
    search, n, device = Search(), len(encoder_out), encoder_out.device
    forbidden = torch.tensor(ids_of(search.forbidden, word_map)).to(device, non_blocking=True)
    annotations, state = decoder.start(encoder_out)
    state = tuple(each.repeat_interleave(k, dim=0) for each in state)           # (R, ...); annotations stay N
    words = torch.full((n * k,), word_map["<start>"], device=device)            # (R,)
    going = torch.ones_like(words, dtype=torch.bool)                            # captions that have not ended
    active = torch.arange(n, device=device)                                     # pictures that have any
    drawn, log_probs = [], []
    for _ in range(search.max_len):
        output, _, state = decoder.step(words, annotations, state)
        scores = F.log_softmax(decoder.fc(output).float().index_fill(1, forbidden, -torch.inf), dim=1)      # (R, V)
        words = draw(scores.detach().exp()) * going                             # (R,); <pad> is 0
        log_prob = scores.gather(1, words.unsqueeze(1)).squeeze(1).masked_fill(~going, 0.0)
        for steps, new in ((drawn, words), (log_probs, log_prob)):
            steps.append(new.new_zeros(n, k).index_copy(0, active, new.view(-1, k)))
        going = going & (words != word_map["<end>"])
        alive = going.view(-1, k).any(dim=1).nonzero().squeeze(1)  # the one wait for a GPU in a step, as in the search
        if len(alive) == 0:
            break
        if len(alive) < len(active):
            annotations, active = annotations.rows(alive), active[alive]
            words, going, *state = (each.unflatten(0, (-1, k))[alive].flatten(0, 1) for each in (words, going, *state))
    return torch.stack(drawn, dim=2), torch.stack(log_probs, dim=2)
