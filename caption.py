"""Captions for any picture, and where the model looked for each word.

    python caption.py --img photo.jpg --out photo_attention.png             # or .gif: the gaze moves word by word
    python caption.py --img holiday/ 'more/*.png' --out gallery.html        # one page; point at a word
    python caption.py --img holiday/ --beam_size 5 --n_best 3 --json captions.json
    python caption.py --img photo.jpg --sample 5 --temperature 0.7          # drawn, not searched
    python caption.py --img photo.jpg --model one.pth.tar other.pth.tar     # an ensemble

The checkpoint alone is enough. Without --model, the one BEST_checkpoint_*.pth.tar in this folder is taken, or else the
model in the box, pretrained/flickr8k.pth.tar. In Python:

    from caption import caption_images, load
    model = load()  # or load("BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar")
    for best, *others in caption_images(model, ["photo.jpg", picture], n_best=3):  # files, Pillow's pictures, arrays
        print(" ".join(best.words), best.log_prob)
        print(best.alphas.shape)  # (words, 14, 14): for each word where the model looked
"""
from __future__ import annotations

import argparse
import atexit
import gc
import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":      # speed, skip it: garbage collection among half a million objects of PyTorch's takes
    gc.disable()                # 0.4 s until the model is loaded
    atexit.register(gc.freeze)  # and 0.8 s at Python's end

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from datasets import AnyPicture, encode, read_image, read_word_map, reverse
from drawing.figure import draw_figure, figure_paths, visualize_att  # noqa: F401 (here in the original tutorial)
from drawing.page import PAGES, html_figure, write_page
from models import Caption
from safety.checkpoints import load_checkpoint
from safety.errors import InputError, UsageError, printable, run_script
from safety.files import atomic_write
from safety.flags import integer, real
from safety.pictures import counted, find_pictures, is_one_colour, picture_suffixes, unreadable_error
from safety.restore import restore
from safety.words import normal
from searching.consensus import by_consensus
from searching.ensemble import Ensemble, check_vocabularies
from searching.settings import check_counts, check_search, ids_of
from searching.words import draw, forbid
from utils import World, add_device_flags, autocast, broadcast, progress_bar, setup_world

# ---- the search ------------------------------------------------------------------------------------------------------

class Search(NamedTuple):
    """How captions are searched for, and which of those found are best."""

    beam_size: int = 5              # hypotheses that compete; 1: always the most probable word (greedy)
    max_len: int = 51               # words at most, <end> included
    n_best: int = 1                 # captions of each picture, at most
    length_penalty: float = 0.0     # rank by log-probability / words ** length_penalty, <end> counted; 0 favours short
    consensus: bool = False         # rank by similarity to the others instead (searching/consensus.py)
    forbidden: Collection[str] = ("<start>", "<pad>", "<unk>")  # words that are never generated
    no_repeat: int = 0              # no run of so many words comes twice in a caption; 0: any may
    sample: int = 0                 # captions that are drawn, word by word, without a beam; 0: they are searched for
    temperature: float = 1.0        # draws from p ** (1 / temperature): below 1 likelier words, above 1 odder ones
    seed: int | None = None         # of the draw, for each picture the same; None: PyTorch's own random numbers

    @staticmethod
    def from_args(args: argparse.Namespace, **settings: Any) -> Search:
        """From the flags of the fields' names, if they were given, and from --forbid; settings go before them."""
        flags = {name: value for name in Search._fields if (value := getattr(args, name, None)) is not None}
        search = Search(**{**flags, **settings, "forbidden": (*Search().forbidden, *map(normal, args.forbid))})
        check_search(search, flags)
        return search

    def checked(self) -> Search:
        """Itself, if its values make sense; from Python they may be anything."""
        check_search(self)
        return self


@torch.inference_mode()
def beam_search(decoder: nn.Module, encoder_out: Tensor, word_map: dict[str, int], search: Search = Search(),
                with_alphas: bool = True) -> list[list[Caption]]:
    """The most probable captions of each of many pictures, at least one, the best first and unfinished ones last.

    Each picture has K hypotheses. At each step all their continuations compete, and the best K live on. One that ends
    leaves the beam, which is one narrower from then on; a picture whose beam is empty leaves the batch. With
    `search.sample` nothing competes: each hypothesis goes on by a word that is drawn, until it ends.

    Args:
        decoder: anything with `start`, `step`, `fc` and `vocab_size`, in eval mode.
        encoder_out: (N, h, w, C) or (N, P, C).
    """
    n, k, device = len(encoder_out), search.checked().sample or search.beam_size, encoder_out.device
    forbidden = torch.tensor(ids_of(search.forbidden, word_map), dtype=torch.long).to(device)
    generator = None if search.seed is None else torch.Generator().manual_seed(search.seed)
    annotations, state = decoder.start(encoder_out)
    state = tuple(each.repeat_interleave(k, dim=0) for each in state)           # (N * K, ...); annotations stay N
    sequences = torch.full((n, k, 1), word_map["<start>"], device=device)       # (N, K, t), the hypotheses
    log_probs = torch.zeros(n, k, 1, device=device)                             # (N, K, t), up to each word
    log_probs[:, 1:] = 0.0 if search.sample else -torch.inf  # all begin alike: a beam continues one, not K equal ones
    alphas = None                                                               # (N, K, t, P)
    width = torch.full((n, 1), k, device=device)                                # hypotheses that still compete
    active = torch.arange(n)                                                    # pictures still in the batch
    left = []                                                                   # hypotheses that left the beam, by step

    for t in range(search.max_len):
        output, alpha, state = decoder.step(sequences[:, :, -1].flatten(), annotations, state)
        scores = F.log_softmax(decoder.fc(output).float(), dim=1)               # (N * K, V)
        forbid(scores, forbidden, sequences.flatten(0, 1), search.no_repeat)
        candidates = log_probs[:, :, -1:] + scores.view(n, k, -1)               # (N, K, V), all continuations
        total, best = draw(candidates, search.temperature, generator) if search.sample else best_of(candidates, width)
        parent, word = best // decoder.vocab_size, best % decoder.vocab_size
        rows = (torch.arange(n, device=device).unsqueeze(1), parent)            # (N, K), whom each continues
        sequences = torch.cat([sequences[rows], word.unsqueeze(2)], dim=2)
        log_probs = torch.cat([log_probs[rows], total.unsqueeze(2)], dim=2)
        state = tuple(each.unflatten(0, (n, k))[rows].flatten(0, 1) for each in state)
        if with_alphas:
            alpha = alpha.float().view(n, k, 1, -1)
            alphas = torch.cat([torch.ones_like(alpha) if t == 0 else alphas, alpha], dim=2)[rows]  # of the parents

        growing = total > -torch.inf
        ended = growing & (word == word_map["<end>"])
        width = width - ended.sum(dim=1, keepdim=True)
        growing &= ~ended
        has_ended, goes_on = torch.stack([ended, growing]).cpu()                # the one wait for a GPU in a step
        if has_ended.any():
            left.append(hypotheses_at(has_ended, active, sequences, log_probs, alphas))
        log_probs[:, :, -1].masked_fill_(~growing, -torch.inf)                  # these have left the beam
        alive = goes_on.any(dim=1).nonzero().squeeze(1)                         # pictures whose beam is not empty
        if len(alive) < n:
            active, goes_on, n = active[alive], goes_on[alive], len(alive)
            if n == 0:
                break
            alive = alive.to(device, non_blocking=True)
            annotations, alphas = annotations.rows(alive), alphas[alive] if with_alphas else None
            sequences, log_probs, width = (each[alive] for each in (sequences, log_probs, width))
            state = tuple(each.unflatten(0, (-1, k))[alive].flatten(0, 1) for each in state)
    left.append(hypotheses_at(goes_on, active, sequences, log_probs, alphas))   # none, if the loop was left early
    found = to_captions(left, len(encoder_out), word_map)
    return [ranked(captions, search)[:search.sample or search.n_best] for captions in found]


def best_of(candidates: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Of all continuations, (N, K, V), the best K: log-probabilities, -inf beyond the beam's width (N, 1), and places
    among the K * V, both (N, K)."""
    total, best = candidates.flatten(1).topk(candidates.size(1), dim=1)
    return total.masked_fill(torch.arange(total.size(1), device=total.device) >= width, -torch.inf), best


def hypotheses_at(which: Tensor, active: Tensor, sequences: Tensor, log_probs: Tensor,
                  alphas: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Those where `which`, (N, K) bool on the CPU, is True, m of them: picture (m,), ids and log-probabilities up to
    each of them (m, t), alphas (m, t, P)."""
    picture, place = which.nonzero(as_tuple=True)
    rows = tuple(each.to(sequences.device, non_blocking=True) for each in (picture, place))
    return active[picture], sequences[rows], log_probs[rows], None if alphas is None else alphas[rows]


def to_captions(left: Sequence[tuple[Tensor, ...]], n: int, word_map: dict[str, int]) -> list[list[Caption]]:
    """What `hypotheses_at` gave at each step, as captions of each of n pictures; only at the end, as it waits."""
    found, rev_word_map = [[] for _ in range(n)], reverse(word_map)
    for pictures, ids, log_probs, alphas in left:
        looks = [None] * len(pictures) if alphas is None else alphas.cpu().numpy()          # (t, P) each
        for i, *hypothesis in zip(pictures.tolist(), ids.tolist(), log_probs.tolist(), looks, strict=True):
            found[i].append(to_caption(*hypothesis, rev_word_map))
    start_alphas = None if alphas is None else np.ones((1, alphas.size(-1)), np.float32)
    fallback = to_caption([word_map["<start>"]], [-math.inf], start_alphas, rev_word_map)  # where all was NaN
    return [captions or [fallback] for captions in found]


def to_caption(sequence: list[int], log_probs: list[float], alphas: np.ndarray | None,
               rev_word_map: dict[int, str]) -> Caption:
    """A hypothesis as a caption; of its alphas, (t, P), each row becomes the square that the regions form."""
    finished = rev_word_map[sequence[-1]] == "<end>"
    words = [rev_word_map[index] for index in (sequence[1:-1] if finished else sequence[1:])]
    if alphas is not None:
        side = math.isqrt(alphas.shape[1])
        alphas = alphas.reshape(len(alphas), side if side ** 2 == alphas.shape[1] else 1, -1)
    return Caption(words, log_probs[-1], finished, None if alphas is None else alphas[1:1 + len(words)], sequence,
                   [after - before for before, after in pairwise(log_probs)], alphas)


def ranked(captions: Sequence[Caption], search: Search) -> list[Caption]:
    """A picture's captions, the best first, and unfinished ones last."""
    captions = sorted(captions, key=lambda each: (
        not each.finished, -each.log_prob / max(len(each.sequence) - 1, 1) ** search.length_penalty))
    return by_consensus(captions) if search.consensus else captions


# ---- in Python -------------------------------------------------------------------------------------------------------

PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "flickr8k.pth.tar"
FILES = (str, Path, Image.Image)  # pictures that can turn out to be damaged; Pillow reads the pixels late

class Captioner(NamedTuple):
    """A model that captions: what `load` returns."""

    encoder: nn.Module      # its forward maps pictures (N, 3, 256, 256), normalised, to features (N, h, w, C); of an
                            # ensemble a list of them, which its decoder calls
    decoder: nn.Module      # with `start`, `step`, `fc` and `vocab_size`
    word_map: dict[str, int]
    precision: str = "float32"


def load(model: str | Path | Sequence[str | Path] | None = None, word_map: str | Path | None = None,
         device: str | None = None, precision: str | None = None) -> Captioner:
    """A checkpoint, ready to caption; arguments as the flags of the same names. In 16 bits PyTorch may use TF32 too.

    Args:
        model: a file, or several of an ensemble, whose probabilities are averaged. None: as `find_model` finds it.

    Raises:
        InputError: no such file, no checkpoint that can be read safely, no such device, or other words in each.
    """
    world, precision = setup_world(device, precision, join=False)
    model = find_model() if model is None else model
    paths = [model] if isinstance(model, (str, Path)) else list(model)
    return load_models(paths, read_word_map(word_map) if word_map else None, world, precision)


def find_model() -> Path:
    """Where none is named: the one checkpoint in this folder, or else the model in the box."""
    found = sorted(Path().glob("BEST_checkpoint_*.pth.tar"))
    if len(found) > 1:
        raise InputError(f"say which model with --model FILE: there are {', '.join(map(str, found))}")
    if not found and not PRETRAINED.is_file():
        raise InputError("say which model with --model FILE: this folder has no BEST_checkpoint_*.pth.tar, and the "
                         f"model in the box is gone; get it back with: git checkout {PRETRAINED}")
    if not found:
        print("no model named, and none in this folder: pretrained/flickr8k.pth.tar, which knows people and dogs "
              "outdoors", file=sys.stderr)
    return (found or [PRETRAINED])[0]


def load_models(paths: Sequence[str | Path], word_map: dict[str, int] | None, world: World,
                precision: str) -> Captioner:
    """The same on all processes, of which the first reads the files; the word map is for files that hold none."""
    models, word_maps = [], []
    for path in paths:
        checkpoint = broadcast(load_checkpoint(path, word_map) if world.rank == 0 else None, world)
        models.append([each.to(world.device) for each in restore(checkpoint, path)])
        word_maps.append(checkpoint["word_map"])
    check_vocabularies(word_maps, paths)
    encoder, decoder = models[0]
    if len(models) > 1:
        decoder = Ensemble(*zip(*models, strict=True))
        encoder = decoder.encoders
    return Captioner(encoder, decoder, word_maps[0], precision)


def caption_images(model: Captioner, images: AnyPicture | Iterable[AnyPicture], search: Search = Search(),
                   batch_size: int = 16, with_alphas: bool = True, skip_unreadable: bool = False,
                   **settings: Any) -> list[list[Caption] | None]:
    """For each picture its captions, the best first.

    Args:
        images: files, Pillow's pictures, arrays (H, W, 3) or tensors (3, H, W), both uint8; in any mixture, or one.
        skip_unreadable: None in the place of a picture that cannot be read, instead of an error.
        settings: fields of `Search`, in place of those that `search` has: caption_images(model, images, n_best=3).

    Raises:
        InputError: a picture cannot be read or is none, or a setting makes no sense.
    """
    check_counts(batch_size=batch_size)
    if isinstance(model, (str, Path)):
        raise UsageError(f"{model}: a file's name, and no model yet; give load({str(model)!r})")
    if not isinstance(search, Search):
        raise UsageError(f"search={search!r:.50}: no Search; leave it out, or give Search(beam_size=5)")
    search, images = search._replace(**settings).checked(), as_list(images)
    found: list[list[Caption] | InputError] = []
    for i in range(0, len(images), batch_size):
        batch = images[i:i + batch_size]
        pixels = [try_to_read(image) for image in batch]
        for image, result in zip(batch, pixels, strict=True):
            if isinstance(result, InputError) and not (skip_unreadable and isinstance(image, FILES)):
                raise result
        found += caption_read(model, pixels, search, with_alphas)
    return [None if isinstance(captions, InputError) else captions for captions in found]


def as_list(images: AnyPicture | Iterable[AnyPicture]) -> list[AnyPicture]:
    """One picture or many, as a list; what is none is named by its type."""
    several = images.ndim == 4 if isinstance(images, (np.ndarray, Tensor)) else (
        isinstance(images, Iterable) and not isinstance(images, (*FILES, bytes, bytearray, memoryview, Mapping)))
    listed = list(images) if several else [images]
    for each in listed:
        if not isinstance(each, (*FILES, np.ndarray, Tensor)):
            raise InputError(f"{type(each).__name__}: no picture; give a file's name, a picture of Pillow's, an array "
                             "(H, W, 3) or a tensor (3, H, W)")
    return listed


def try_to_read(image: AnyPicture) -> np.ndarray | InputError:
    """What the model sees of a picture, (3, 256, 256); or why it cannot be read."""
    try:
        return read_image(image)
    except InputError as error:
        return error


def caption_read(model: Captioner, pixels: Sequence[np.ndarray | InputError], search: Search,
                 with_alphas: bool = True) -> list[list[Caption] | InputError]:
    """The captions of a batch of what `try_to_read` gives; the errors stay in their places."""
    readable = [torch.from_numpy(each) for each in pixels if not isinstance(each, InputError)]
    found = iter(caption_pixels(model, torch.stack(readable), search, with_alphas) if readable else ())
    return [each if isinstance(each, InputError) else next(found) for each in pixels]


@torch.inference_mode()
def caption_pixels(model: Captioner, images: Tensor, search: Search, with_alphas: bool = True) -> list[list[Caption]]:
    """The same for one batch as a data set holds it: pictures (N, 3, 256, 256) uint8, or their features."""
    encoder, decoder = model.encoder.eval(), model.decoder.eval()
    device = next(decoder.parameters()).device
    with autocast(device, model.precision):
        features = encode(encoder, decoder, images, device)                     # (N, h, w, C)
        return beam_search(decoder, features, model.word_map, search, with_alphas)


def caption_image_beam_search(encoder: nn.Module, decoder: nn.Module, image_path: str | Path,
                              word_map: dict[str, int], beam_size: int = 3) -> tuple[list[int], list[Any]]:
    """The best caption of a picture, under the original's name.

    Returns:
        Ids of the words, from <start> to <end>, and for each of them alpha, a list of 14 rows of 14.
    """
    [[best]] = caption_images(Captioner(encoder, decoder, word_map), [image_path], beam_size=beam_size)
    return best.sequence, best.sequence_alphas.tolist()


# ---- the command -----------------------------------------------------------------------------------------------------

def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="%(prog)s --img PATH [FLAG ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to caption").add_argument
    add("--img", "-i", nargs="+", required=True, metavar="PATH",
        help="pictures, folders of pictures, or patterns like '*.jpg'")
    add("--skip_unreadable", action="store_true", help="do not fail where some pictures cannot be read")
    add("--model", "-m", "--checkpoint", nargs="+", metavar="FILE",
        help="of several the probabilities are averaged (default: the BEST_checkpoint_* in this folder, or else "
             "pretrained/flickr8k.pth.tar)")
    add("--word_map", "-wm", metavar="FILE", help="only for checkpoints that hold none (the original tutorial's)")
    add = parser.add_argument_group("search").add_argument
    add("--beam_size", "-b", type=integer(1), metavar="K", help="hypotheses of the beam search (default: 5)")
    add("--n_best", type=integer(1), metavar="N", help="captions for each picture (default: 1)")
    add_search_flags(add)
    add("--sample", type=integer(1), metavar="N",
        help="N captions for each picture, drawn word by word from the model's probabilities; some may be equal")
    add("--temperature", type=real(0.01, 100), metavar="T",
        help="of --sample: probabilities ** (1 / T), so below 1 fewer surprises, above 1 more (default: 1)")
    add("--seed", type=integer(0, 2 ** 32 - 1), metavar="N", help="of --sample: another, other captions (default: 0)")
    add = parser.add_argument_group("results").add_argument
    add("--out", metavar="PATH",
        help="where the model looked: an .html page, or a folder for .png files; for one picture a .png or .gif file")
    add("--dont_smooth", dest="smooth", action="store_false", help="show the attention's pixels as they are")
    add("--json", nargs="?", const="-", metavar="FILE", help="all results, into a file or instead of the lines")
    add("--probabilities", action="store_true", help="after each word, how sure of it the model was, in percent")
    add = parser.add_argument_group("running").add_argument
    add("--batch_size", type=integer(1), default=16, metavar="N", help="pictures at once (default: 16)")
    add_device_flags(add)
    return parser


def add_search_flags(add: Callable[..., Any]) -> None:
    """The flags that caption.py and eval.py share: how captions are found and chosen."""
    add("--max_len", type=integer(1), metavar="WORDS", help="longest caption, <end> included (default: 51)")
    add("--no_repeat", type=integer(1), metavar="N", help="no run of N words twice in a caption (default: any)")
    add("--forbid", nargs="+", default=(), metavar="WORD", help="words that are not to be said")
    add("--length_penalty", type=real(0, 2), metavar="P",
        help="of the beam's captions the best by log-probability / words ** P, 0 to 2; longer with more (default: 0)")
    add("--consensus", action="store_true", default=None,
        help="of the beam's captions the one that is most like the others; best with --beam_size 20")


def result_of(path: Path, captions: Sequence[Caption]) -> dict[str, Any]:
    """A picture's captions as they stand in the JSON."""
    return {"image": str(path), "captions": [
        {"caption": " ".join(each.words), "log_prob": each.log_prob, "finished": each.finished,
         "word_log_probs": each.word_log_probs} for each in captions]}


def line_of(path: Path, caption: Caption, probabilities: bool) -> str:
    """A caption as it stands in the terminal."""
    words = caption.words
    if probabilities:  # none of <end>
        words = [f"{word} ({math.exp(log_prob):.0%})" for word, log_prob
                 in zip(words, caption.word_log_probs, strict=False)]
    return printable(f"{path}: {' '.join(words)}{'' if caption.finished else ' ...'}")


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Captions pictures, prints and returns the results. Where some cannot be read, it fails after all others."""
    search = Search.from_args(args, **{"seed": args.seed or 0} if args.sample else {})  # the same at every call
    if args.json and Path(args.json).suffix.lower() in picture_suffixes() | PAGES:
        raise UsageError(f"--json {args.json}: the results would overwrite a picture or a page; name another file")
    pictures = find_pictures(args.img)
    # A path for each picture; if --out is a page there is only one path, and so one entry.
    figures = dict(zip(pictures, figure_paths(args.out, pictures), strict=False)) if args.out else {}
    page = any(path.suffix.lower() in PAGES for path in figures.values())
    model = load(args.model, args.word_map, args.device, args.precision)
    gc.enable()

    results, shown, rev_word_map = [], [], reverse(model.word_map)
    unreadable: list[tuple[Path, InputError]] = []
    lines: list[str] = []  # to be printed, once the files that hold the same are written
    starts = range(0, len(pictures), args.batch_size)
    bar = progress_bar(starts, "captions", "batch", len(starts) > 1)
    try:
        for i in bar:
            batch = pictures[i:i + args.batch_size]
            pixels = [try_to_read(path) for path in batch]
            for path, seen, captions in zip(batch, pixels, caption_read(model, pixels, search), strict=True):
                if isinstance(captions, InputError):
                    unreadable.append((path, captions))
                    continue
                if is_one_colour(seen):
                    bar.write(printable(f"warning: {path} is of one colour; what is said of it means nothing"),
                              sys.stderr)
                results.append(result_of(path, captions))
                lines += [line_of(path, each, args.probabilities) for each in captions if args.json != "-"]
                if page:
                    shown.append(html_figure(path, path.name, captions))
                elif figures:
                    draw_figure(path, figures[path], captions[0], rev_word_map, args.smooth)
            while lines and not (args.json or page):
                bar.write(lines.pop(0))
        if not results:
            raise unreadable_error(unreadable, others_exist=False)
        if page:
            write_page(args.out, "What the model saw", {"": shown}, args.smooth)
        text = printable(json.dumps(results, indent=2, ensure_ascii=False))  # names may hold unprintable characters
        if args.json not in (None, "-"):
            with atomic_write(args.json) as file:
                file.write(text + "\n")
    finally:  # what was found is seen, whatever becomes of files
        for line in lines:
            bar.write(line)
    if args.json == "-":
        print(text)
    if unreadable and not args.skip_unreadable:
        raise unreadable_error(unreadable, others_exist=True)
    if unreadable:
        print(printable(counted([path for path, _ in unreadable], "left out, which cannot be read")), file=sys.stderr)
    return results


if __name__ == "__main__":
    try:
        run_script(main, get_parser())
    finally:
        gc.enable()  # where it failed before: the process may be a notebook's, and lives on
