"""Draws COCO-like pictures and captions, and random weights to start from, all from fixed seeds."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from benchmarks import ours
from benchmarks.setting import CAPTIONS_PER_IMAGE, Setting
from benchmarks.tutorial import NORMALIZE, TutorialDecoder, TutorialEncoder

WIDTH, HEIGHT = 640, 480
# How many of 1,000 captions have so many words, about as in COCO: from 8, seldom more than 16, 10.5 in the mean.
LENGTHS = {8: 121, 9: 259, 10: 255, 11: 159, 12: 88, 13: 47, 14: 26, 15: 15, 16: 9, 17: 6, 18: 4, 19: 3, 20: 2, 22: 2,
           25: 2, 30: 1, 40: 1}
SPOKEN_WORDS = 10  # about so many words have the captions that the models make


def make_data(setting: Setting) -> None:
    """Pictures, captions in Karpathy's layout, the prepared files and the weights, all under the setting's folder."""
    draw_pictures(setting.pictures_folder, setting.pictures)
    write_captions(setting)
    ours.prepare(setting, setting.data)
    make_weights(setting)


def draw_pictures(folder: Path, count: int) -> None:
    """JPEG files of 640x480 pixels and 100 to 150 KB: smooth noise for light and texture, with shapes in it."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(count):
        picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
        for cells, strength in ((4, 60), (16, 45), (80, 25), (320, 18)):
            noise = random.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
            smooth = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
            picture += (np.asarray(smooth, dtype=np.float32) - 127.5) * (strength / 64)
        image = Image.fromarray((picture + 127.5).clip(0, 255).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        for _ in range(6):
            x, y, width, height = random.integers((0, 0, 30, 30), (WIDTH, HEIGHT, 200, 200)).tolist()
            shape = pen.ellipse if random.random() < 0.5 else pen.rectangle
            shape((x, y, x + width, y + height), fill=tuple(random.integers(0, 256, 3).tolist()))
        image.save(folder / f"{i:06d}.jpg", quality=92)


def write_captions(setting: Setting) -> None:
    """Five captions a picture in Karpathy's layout. Every word occurs; most are rare, as in any language."""
    random = np.random.default_rng(1)
    n_words, n_captions = setting.vocabulary - 4, CAPTIONS_PER_IMAGE * setting.pictures
    lengths = random.choice(list(LENGTHS), n_captions, p=np.array(list(LENGTHS.values())) / sum(LENGTHS.values()))
    if lengths.sum() < n_words:
        raise ValueError(f"{n_captions} captions hold {lengths.sum()} words, too few for a vocabulary of "
                         f"{setting.vocabulary}; ask for more --pictures or a smaller --vocabulary")
    zipf = 1 / np.arange(1, n_words + 1)
    drawn = random.choice(n_words, lengths.sum() - n_words, p=zipf / zipf.sum())
    words = [f"word{index}" for index in random.permutation(np.concatenate([np.arange(n_words), drawn]))]
    captions = np.split(np.array(words), lengths.cumsum()[:-1])
    n_train = setting.pictures * 2 // 3
    splits = ["train"] * n_train + ["val"] * 2 + ["test"] * (setting.pictures - n_train - 2)
    images = [{"filename": f"{i:06d}.jpg", "imgid": i, "split": split, "sentences": [
        {"tokens": tokens.tolist()} for tokens in captions[CAPTIONS_PER_IMAGE * i:CAPTIONS_PER_IMAGE * (i + 1)]]}
              for i, split in enumerate(splits)]
    setting.json_path.write_text(json.dumps({"images": images}))


def make_weights(setting: Setting) -> None:
    """State dicts that both sides load: `encoder`, `decoder` (random) and `speaker` (whose captions end)."""
    torch.manual_seed(0)
    encoder = TutorialEncoder(setting.encoder, setting.encoder_weights)
    if setting.encoder_weights is None:
        settle_batchnorm(encoder, setting)
    with torch.no_grad():
        encoder_dim = encoder.eval()(torch.zeros(1, 3, 64, 64)).size(3)
    decoder = TutorialDecoder(**setting.decoder_arguments(encoder_dim))
    weights = {"encoder": encoder.state_dict(), "encoder_dim": encoder_dim,
               "decoder": {name: value.clone() for name, value in decoder.state_dict().items()}}
    make_speaker(decoder, setting.word_map())
    torch.save({**weights, "speaker": decoder.state_dict()}, setting.weights_path)


@torch.no_grad()
def settle_batchnorm(encoder: TutorialEncoder, setting: Setting) -> None:
    """Gives a random ResNet the statistics of some pictures; without them its features grow from block to block to
    sizes that no trained one has, and rounding errors with them."""
    paths = sorted(setting.pictures_folder.glob("*.jpg"))[:8]
    pictures = np.stack([np.array(Image.open(path).resize((256, 256))).transpose(2, 0, 1) for path in paths])
    for layer in encoder.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the plain mean over all batches, of which there is one
    encoder.train()(NORMALIZE(torch.from_numpy(pictures).float() / 255))


@torch.no_grad()
def make_speaker(decoder: TutorialDecoder, word_map: dict[str, int]) -> None:
    """Makes a random decoder end its captions as a trained one does, after about ten words.

    A random one never says <end>, and every search would go on to its last step. Here the LSTM's first unit counts
    the words (all its gates open, its cell grows by about 0.1 a word, more or less from picture to picture), and
    <end> is probable once it is high. The other words get probabilities as uneven as a trained decoder's.
    """
    size = decoder.decode_step.hidden_size
    step = decoder.decode_step
    for gate, bias in enumerate((10.0, 10.0, 0.1, 10.0)):                       # input, forget, cell, output
        row = gate * size
        step.weight_ih[row] *= 0.03
        step.weight_hh[row] = 0
        step.bias_ih[row], step.bias_hh[row] = bias, 0
    for first in (decoder.init_h, decoder.init_c):
        first.weight[0], first.bias[0] = 0, 0
    decoder.embedding.weight.mul_(40)  # so that a word depends on the one before it
    decoder.fc.weight.mul_(10)
    decoder.fc.weight[:, 0] = 0
    decoder.fc.weight[word_map["<end>"]] = 0
    steepness, enough = 300, float(np.tanh(0.1 * (SPOKEN_WORDS + 1)))
    decoder.fc.weight[word_map["<end>"], 0] = steepness
    decoder.fc.bias[word_map["<end>"]] = 15 - steepness * enough
    for word in ("<start>", "<pad>"):  # never in a caption; models.py forbids them, the tutorial does not
        decoder.fc.bias[word_map[word]] = -100
