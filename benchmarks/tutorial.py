"""What the well-known PyTorch 0.4 tutorial computes, written out literally and on purpose as slow as it: the baseline.

    python benchmarks/tutorial.py --caption PICTURE CHECKPOINT --word_map WORDMAP    # its cold start, by itself

Nothing here is hoisted, batched or shared: the encoder's projection is taken again at every word, the vocabulary layer
runs at every word, every caption's picture is encoded anew, and evaluation searches one caption's picture at a time.
The names of the weights are those of models.py, so that a state_dict moves from one to the other.
"""
from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # where the checkpoint's pickled classes are found from

MAX_WORDS = 51                   # a search stops here, as that of models.py does
GRAD_CLIP, ALPHA_C = 5.0, 1.0
NORMALIZE = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


# ---- the model -------------------------------------------------------------------------------------------------------

class TutorialEncoder(nn.Module):
    """A ResNet without its head, pooled to 14x14: pictures (N, 3, H, W) to features (N, 14, 14, C)."""

    def __init__(self, name: str = "resnet101", weights: str | None = None, encoded_image_size: int = 14) -> None:
        super().__init__()
        if not name.startswith("resnet"):
            raise ValueError(f"the tutorial's encoder is a ResNet, not {name}")
        layers = list(torchvision.models.get_model(name, weights=weights).children())
        self.resnet = nn.Sequential(*layers[:-2])
        self.adaptive_pool = nn.AdaptiveAvgPool2d((encoded_image_size, encoded_image_size))
        self.fine_tune(False)

    def fine_tune(self, fine_tune: bool) -> None:
        """Blocks 2 to 4 learn, or nothing does."""
        self.requires_grad_(False)
        for block in self.resnet[5:]:
            block.requires_grad_(fine_tune)

    def forward(self, images: Tensor) -> Tensor:
        features = self.adaptive_pool(self.resnet(images))
        return features.permute(0, 2, 3, 1)


class TutorialAttention(nn.Module):
    """Where to look: features (n, P, C) and state (n, D) to context (n, C) and weights (n, P)."""

    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(self, encoder_out: Tensor, decoder_hidden: Tensor) -> tuple[Tensor, Tensor]:
        of_pixels = self.encoder_att(encoder_out)                               # (n, P, A), at each word again
        of_state = self.decoder_att(decoder_hidden)                             # (n, A)
        energy = self.full_att(torch.relu(of_pixels + of_state.unsqueeze(1))).squeeze(2)
        alpha = torch.softmax(energy, dim=1)                                    # (n, P)
        return (encoder_out * alpha.unsqueeze(2)).sum(dim=1), alpha


class TutorialDecoder(nn.Module):
    """The LSTM with attention; arguments as those of DecoderWithAttention."""

    def __init__(self, attention_dim: int, embed_dim: int, decoder_dim: int, vocab_size: int, encoder_dim: int = 2048,
                 dropout: float = 0.5) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.attention = TutorialAttention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim)
        self.init_h = nn.Linear(encoder_dim, decoder_dim)
        self.init_c = nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.fc = nn.Linear(decoder_dim, vocab_size)
        self.embedding.weight.data.uniform_(-0.1, 0.1)
        self.fc.weight.data.uniform_(-0.1, 0.1)
        self.fc.bias.data.zero_()

    def init_hidden_state(self, encoder_out: Tensor) -> tuple[Tensor, Tensor]:
        mean = encoder_out.mean(dim=1)
        return self.init_h(mean), self.init_c(mean)

    def forward(self, encoder_out: Tensor, encoded_captions: Tensor,
                caption_lengths: Tensor) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
        """Features (N, 14, 14, C), captions (N, L), lengths (N, 1) to scores (N, T, V), sorted captions, their
        lengths less one, weights (N, T, P) and the order."""
        n, n_features = encoder_out.size(0), encoder_out.size(-1)
        encoder_out = encoder_out.reshape(n, -1, n_features)
        caption_lengths, order = caption_lengths.squeeze(1).sort(dim=0, descending=True)
        encoder_out, encoded_captions = encoder_out[order], encoded_captions[order]
        embeddings = self.embedding(encoded_captions)
        h, c = self.init_hidden_state(encoder_out)
        decode_lengths = (caption_lengths - 1).tolist()
        predictions = torch.zeros(n, max(decode_lengths), self.vocab_size, device=encoder_out.device)
        alphas = torch.zeros(n, max(decode_lengths), encoder_out.size(1), device=encoder_out.device)
        for t in range(max(decode_lengths)):
            running = sum(length > t for length in decode_lengths)
            context, alpha = self.attention(encoder_out[:running], h[:running])
            context = torch.sigmoid(self.f_beta(h[:running])) * context
            h, c = self.decode_step(torch.cat([embeddings[:running, t], context], dim=1), (h[:running], c[:running]))
            predictions[:running, t] = self.fc(self.dropout(h))
            alphas[:running, t] = alpha
        return predictions, encoded_captions, decode_lengths, alphas, order


# ---- data ------------------------------------------------------------------------------------------------------------

class TutorialDataset(Dataset):
    """The captions of a split, each with its own float picture (3, 256, 256), normalised one at a time."""

    def __init__(self, folder: Path, name: str, split: str) -> None:
        self.path, self.split = folder / f"{split}_IMAGES_{name}.hdf5", split
        self.captions = json.loads((folder / f"{split}_CAPTIONS_{name}.json").read_text())
        self.lengths = json.loads((folder / f"{split}_CAPLENS_{name}.json").read_text())
        self.file: Any = None

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        if self.file is None:  # in the worker: whatever starts it, an open HDF5 file need not travel there
            import h5py  # here, as captioning a picture needs none of it
            self.file = h5py.File(self.path, "r")
            self.images, self.cpi = self.file["images"], int(self.file.attrs["captions_per_image"])
        image = NORMALIZE(torch.FloatTensor(self.images[i // self.cpi] / 255.0))
        caption, length = torch.LongTensor(self.captions[i]), torch.LongTensor([self.lengths[i]])
        if self.split == "TRAIN":
            return image, caption, length
        first = i // self.cpi * self.cpi
        return image, caption, length, torch.LongTensor(self.captions[first:first + self.cpi])


def loader(dataset: Dataset, batch_size: int, device: torch.device) -> DataLoader:
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=1, pin_memory=device.type == "cuda")


# ---- training --------------------------------------------------------------------------------------------------------

def make_optimizer(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam as it was: one parameter after another."""
    return torch.optim.Adam([each for each in module.parameters() if each.requires_grad], lr=lr, foreach=False,
                            fused=False)


def train_step(encoder: TutorialEncoder, decoder: TutorialDecoder, optimizers: list[torch.optim.Optimizer],
               images: Tensor, captions: Tensor, lengths: Tensor) -> tuple[float, float]:
    """One step on a batch that is on the device; returns the loss and the top-5 accuracy in per cent."""
    decoder.train()
    # The one deviation: the tutorial has the encoder in training mode, which makes BatchNorm drift, and then nothing
    # could be equal to a project that keeps ImageNet's statistics.
    encoder.eval()
    features = encoder(images)  # no torch.no_grad: where the encoder is frozen its parameters require no gradients
    scores, sorted_captions, decode_lengths, alphas, _ = decoder(features, captions, lengths)
    scores = pack_padded_sequence(scores, decode_lengths, batch_first=True).data
    targets = pack_padded_sequence(sorted_captions[:, 1:], decode_lengths, batch_first=True).data
    loss = nn.CrossEntropyLoss()(scores, targets)
    loss = loss + ALPHA_C * ((1.0 - alphas.sum(dim=1)) ** 2).mean()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.data.clamp_(-GRAD_CLIP, GRAD_CLIP)
    for optimizer in optimizers:
        optimizer.step()
    _, best = scores.topk(5, dim=1)
    right = best.eq(targets.view(-1, 1).expand_as(best)).float().sum().item()
    return loss.item(), 100.0 * right / len(targets)


# ---- captions --------------------------------------------------------------------------------------------------------

def search(encoder: TutorialEncoder, decoder: TutorialDecoder, image: Tensor, word_map: dict[str, int],
           beam_size: int) -> list[int]:
    """The most probable caption of one picture (1, 3, 256, 256), from <start> on, with a beam that narrows."""
    k = beam_size
    features = encoder(image)
    features = features.reshape(1, -1, features.size(3))
    features = features.expand(k, -1, -1)                                       # the batch is the beam
    words = torch.full((k, 1), word_map["<start>"], device=image.device)
    sequences, totals = words, torch.zeros(k, 1, device=image.device)
    complete, complete_totals = [], []
    h, c = decoder.init_hidden_state(features)
    for step in range(MAX_WORDS):
        context, _ = decoder.attention(features, h)
        context = torch.sigmoid(decoder.f_beta(h)) * context
        h, c = decoder.decode_step(torch.cat([decoder.embedding(words).squeeze(1), context], dim=1), (h, c))
        scores = torch.log_softmax(decoder.fc(h), dim=1)
        scores = totals.expand_as(scores) + scores                              # (k, V)
        # At first all k rows are the same.
        totals, best = (scores[0] if step == 0 else scores.view(-1)).topk(k, 0)
        parents, words = best // decoder.vocab_size, best % decoder.vocab_size
        sequences = torch.cat([sequences[parents], words.unsqueeze(1)], dim=1)
        going = [i for i, word in enumerate(words.tolist()) if word != word_map["<end>"]]
        ended = sorted(set(range(len(words))) - set(going))
        complete.extend(sequences[ended].tolist())
        complete_totals.extend(totals[ended].tolist())
        k -= len(ended)
        if k == 0:
            break
        sequences, parents = sequences[going], parents[going]
        h, c, features = h[parents], c[parents], features[parents]
        totals, words = totals[going].unsqueeze(1), words[going].unsqueeze(1)
    if not complete:  # the tutorial crashes here
        return sequences[totals.argmax()].tolist()
    return complete[complete_totals.index(max(complete_totals))]


def evaluate(encoder: TutorialEncoder, decoder: TutorialDecoder, batches: Iterable[tuple[Tensor, ...]],
             word_map: dict[str, int], device: torch.device, beam_size: int = 5) -> list[list[int]]:
    """A caption for each caption of a split, in batches of 1: each picture as often as people described it."""
    decoder.eval()
    encoder.eval()
    silent = {word_map["<start>"], word_map["<end>"], word_map["<pad>"]}
    references, hypotheses = [], []
    for image, _, _, all_captions in batches:
        sequence = search(encoder, decoder, image.to(device), word_map, beam_size)
        references.append([[word for word in each if word not in silent] for each in all_captions[0].tolist()])
        hypotheses.append(sequence)
    return hypotheses


def main(args: argparse.Namespace) -> str:
    """A cold start of the tutorial's captioning: its imports, its pickle of whole modules, one picture, one caption."""
    import matplotlib
    matplotlib.use("Agg")  # the tutorial opens a window; here is none
    import matplotlib.pyplot
    import skimage.transform  # noqa: F401  both are imported by the tutorial before anything else happens

    picture, checkpoint_path = args.caption
    # A pickle of modules can run anything. The tutorial opens it so, and the benchmark gives it one that it just made.
    checkpoint = torch.load(checkpoint_path, map_location=args.device, weights_only=False)
    encoder, decoder = checkpoint["encoder"].to(args.device).eval(), checkpoint["decoder"].to(args.device).eval()
    word_map = json.loads(Path(args.word_map).read_text())
    words = {index: word for word, index in word_map.items()}
    pixels = np.array(Image.open(picture).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR))
    image = NORMALIZE(torch.FloatTensor(pixels.transpose(2, 0, 1) / 255.0)).to(args.device)
    sequence = search(encoder, decoder, image.unsqueeze(0), word_map, args.beam_size)
    caption = " ".join(words[index] for index in sequence if words[index] not in {"<start>", "<end>", "<pad>"})
    print(caption)
    return caption


# ---- preparation -----------------------------------------------------------------------------------------------------

def prepare(json_path: Path, image_folder: Path, folder: Path, base: str, captions_per_image: int = 5,
            min_word_freq: int = 0, max_len: int = 50) -> None:
    """Karpathy's JSON and its pictures to the tutorial's files, in one process, one picture after another."""
    import h5py
    folder.mkdir(parents=True)
    frequencies: Counter[str] = Counter()
    splits: dict[str, list[tuple[Path, list[list[str]]]]] = {"TRAIN": [], "VAL": [], "TEST": []}
    for image in json.loads(json_path.read_text())["images"]:
        for sentence in image["sentences"]:
            frequencies.update(sentence["tokens"])
        captions = [each["tokens"] for each in image["sentences"] if len(each["tokens"]) <= max_len]
        if captions:
            split = "TRAIN" if image["split"] == "restval" else image["split"].upper()
            splits[split].append((image_folder / image["filename"], captions))
    words = [word for word in frequencies if frequencies[word] > min_word_freq]
    word_map = {word: index for index, word in enumerate(words, 1)}
    for word in ("<unk>", "<start>", "<end>"):
        word_map[word] = len(word_map) + 1
    word_map["<pad>"] = 0
    (folder / f"WORDMAP_{base}.json").write_text(json.dumps(word_map))

    random.seed(123)
    for split, pictures in splits.items():
        encoded, lengths = [], []
        with h5py.File(folder / f"{split}_IMAGES_{base}.hdf5", "a") as file:
            file.attrs["captions_per_image"] = captions_per_image
            images = file.create_dataset("images", (len(pictures), 3, 256, 256), dtype="uint8")
            for i, (path, captions) in enumerate(pictures):
                if len(captions) < captions_per_image:
                    missing = captions_per_image - len(captions)
                    captions = captions + [random.choice(captions) for _ in range(missing)]
                else:
                    captions = random.sample(captions, k=captions_per_image)
                picture = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
                images[i] = np.array(picture).transpose(2, 0, 1)
                for caption in captions:
                    inside = [word_map.get(word, word_map["<unk>"]) for word in caption]
                    encoded.append([word_map["<start>"], *inside, word_map["<end>"]] + [0] * (max_len - len(caption)))
                    lengths.append(len(caption) + 2)
        (folder / f"{split}_CAPTIONS_{base}.json").write_text(json.dumps(encoded))
        (folder / f"{split}_CAPLENS_{base}.json").write_text(json.dumps(lengths))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caption", nargs=2, required=True, metavar=("PICTURE", "CHECKPOINT"),
                        help="a checkpoint that run.py made, never a stranger's: it could run anything")
    parser.add_argument("--word_map", required=True, metavar="FILE")
    parser.add_argument("--beam_size", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    main(parser.parse_args())
