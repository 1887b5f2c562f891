"""Captions of a whole split, and the table of scores by beam size.

    python eval.py --checkpoint BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar --beam_size 1 3 5
    python eval.py --gallery gallery.html    # the best and the worst captions on a page; point at a word
    torchrun --nproc_per_node=8 eval.py --checkpoint ...

Captions are generated freely, one for each picture, and scored against all that people wrote of it.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nltk.translate import bleu_score
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from caption import Captioner, add_choice, caption_images, check_choice, search
from datasets import CaptionDataset, encode, image_loader, load_word_map, read_word_map, reverse, words_of
from drawing.page import PAGES, html_figure, write_page
from models import Hypothesis, build_models, doubly_stochastic
from safety.checkpoints import load_checkpoint
from safety.errors import InputError, UsageError, printable, run_script
from safety.files import atomic_write, unwritable
from utils import World, autocast, broadcast, gather, loader_workers, progress, setup_world

SHOWN = 12  # of the gallery's best captions, and of its worst
COLUMNS = ("beam", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "unfinished", "seconds",
           "images/s")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="%(prog)s [FLAG ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model and data").add_argument
    add("--checkpoint", metavar="FILE", help="the model (default: BEST_checkpoint_DATANAME.pth.tar in this folder)")
    add("--word_map", metavar="FILE", help="for checkpoints without one (default: the data folder's)")
    add("--data_folder", default="data", metavar="DIR", help="what create_input_files.py made (default: data)")
    add("--data_name", default="coco_5_cap_per_img_5_min_word_freq", metavar="NAME",
        help="base name of those files (default: coco_5_cap_per_img_5_min_word_freq)")
    add("--split", choices=("TEST", "VAL", "TRAIN"), default="TEST", help="(default: TEST)")
    add = parser.add_argument_group("search").add_argument
    add("--beam_size", type=int, nargs="+", default=[1, 3, 5], metavar="K", help="one row each (default: 1 3 5)")
    add_choice(add)
    add = parser.add_argument_group("results").add_argument
    add("--json", nargs="?", const="-", metavar="FILE", help="scores as JSON, into a file or instead of the table")
    add("--out", metavar="DIR", help="writes the table (Markdown, JSON) and the captions in COCO's result format")
    add("--gallery", metavar="FILE", help="an .html page: best and worst captions at the last --beam_size")
    add = parser.add_argument_group("running").add_argument
    add("--batch_size", type=int, default=32, metavar="N", help="pictures searched at once (default: 32)")
    add("--workers", type=int, metavar="N", help="processes reading pictures (default: 1 for a GPU, 0 on a CPU)")
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=("bfloat16", "float32"),
        help="of matrix products (default: bfloat16 on a GPU that has it, else float32)")
    return parser


def generate_captions(model: Captioner, dataset: CaptionDataset, beam_size: int, world: World,
                      batch_size: int = 32, workers: int = 0, max_len: int = 51,
                      length_penalty: float = 0.0, consensus: bool = False) -> list[Hypothesis]:
    """The best caption of each picture of the data set, in its order, on every process."""
    found: list[Hypothesis] = []
    loader = image_loader(dataset, batch_size, workers, world)
    for images, *_ in progress(loader, f"beam {beam_size}", "batch", world.rank == 0):
        best = search(model, images, beam_size, max_len, 1, length_penalty, consensus, with_alphas=False)
        found += [hypotheses[0] for hypotheses in best]
    return interleave(gather(found, world))


@torch.inference_mode()
def validate(model: Captioner, dataset: CaptionDataset, world: World, batch_size: int,
             workers: int = 0) -> tuple[list[float], float, list[list[str]]]:
    """What training asks after each epoch. Every picture is encoded once, for all its captions and for the search.

    Returns:
        The sums of `measure` with the true words as input, the tutorial's BLEU-4 of the words predicted that way, and
        for each picture a caption generated freely (beam 1), as words.
    """
    encoder, decoder, word_map = model.encoder, model.decoder.eval(), model.word_map
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    forced, generated, rev_word_map = [], [], reverse(word_map)
    loader = image_loader(dataset, batch_size, workers, world)
    for images, captions, lengths in progress(loader, "validation", "batch", world.rank == 0):
        with autocast(world.device, model.precision):
            features = encode(encoder, images, world.device)                                   # (N, h, w, C)
            pooling, captions = encoder.pooling(features), captions.flatten(0, 1).to(world.device)  # (N * 5, L)
            output = decoder.unroll(features, captions, lengths.view(-1, 1), pooling=pooling)
            best = decoder.beam_search(features, word_map, beam_size=1, pooling=pooling, with_alphas=False)
        sums += measure(*output)
        scores, _, decode_lengths, _, order = output
        predicted = pad_packed_sequence(scores._replace(data=scores.data.argmax(dim=1)), batch_first=True)[0]
        said = [words[:n] for words, n in zip(predicted.tolist(), decode_lengths, strict=True)]
        said = [said[i] for i in order.argsort().tolist()]                      # as the pictures are, not by length
        forced += [said[i:i + dataset.cpi] for i in range(0, len(said), dataset.cpi)]
        generated += [words_of(hypotheses[0].sequence, rev_word_map) for hypotheses in best]
    if world.size > 1:
        dist.all_reduce(sums)
    forced, generated = interleave(gather(forced, world)), interleave(gather(generated, world))
    return sums.tolist(), forced_bleu(dataset, forced, word_map), generated


def measure(scores: PackedSequence, captions: Tensor, decode_lengths: list[int], alphas: Tensor, _: Tensor,
            label_smoothing: float = 0.0) -> Tensor:
    """What the decoder's `unroll` is worth, as sums that add up over batches and processes.

    Args:
        label_smoothing: share of the true word's probability that the target gives to all words alike.

    Returns:
        (5,): cross entropy over the words, doubly stochastic term over the captions (both carry gradients), words
        that were among the five most probable, number of words, number of captions.
    """
    predicted = scores.data                                                     # (words, V), no padding
    targets = pack_padded_sequence(captions[:, 1:], decode_lengths, batch_first=True).data  # (words,)
    cross_entropy = F.cross_entropy(predicted.float(), targets, reduction="sum", label_smoothing=label_smoothing)
    top5 = (predicted.topk(min(5, predicted.size(1)), dim=1).indices == targets.unsqueeze(1)).sum()
    counts = (cross_entropy.new_full((), count) for count in (len(targets), len(captions)))
    return torch.stack([cross_entropy, doubly_stochastic(alphas.float()).sum(), top5.float(), *counts])


def forced_bleu(dataset: CaptionDataset, forced: list[list[list[int]]], word_map: dict[str, int]) -> float:
    """BLEU-4 as the original tutorial reports it: of predictions that were given the true words before each."""
    silent = {word_map["<start>"], word_map["<pad>"]}
    true = [[word for word in caption if word not in silent] for caption in dataset.captions.tolist()]
    references = [true[i:i + dataset.cpi] for i in range(0, len(true), dataset.cpi) for _ in range(dataset.cpi)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nltk's, of a model that has no 4-gram right yet
        return 100 * float(bleu_score.corpus_bleu(references, [words for picture in forced for words in picture]))


def interleave(shares: list[list[Any]]) -> list[Any]:
    """Undoes the dealing of pictures to processes: share r holds items r, r + W, r + 2W, ..."""
    items: list[Any] = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        items[rank::len(shares)] = share
    return items


def bleu(references: Sequence[Sequence[Sequence[str]]], captions: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to 4 of a whole corpus, 0 to 100, with brevity penalty (COCO's own implementation)."""
    return [100 * value for value in Bleu(4).compute_score(*_coco(references, captions), verbose=0)[0]]


def brevity_penalty(references: Sequence[Sequence[Sequence[str]]], captions: Sequence[Sequence[str]]) -> float:
    """The factor, 1 or less, by which BLEU punishes captions shorter than people's. The paper's figures are without."""
    lengths = [len(words) for words in captions]
    nearest = [bleu_score.closest_ref_length(each, n) for each, n in zip(references, lengths, strict=True)]
    return float(bleu_score.brevity_penalty(sum(nearest), sum(lengths)))


def score(references: Sequence[Sequence[Sequence[str]]], captions: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """The standard scores: BLEU, METEOR and ROUGE-L from 0 to 100, CIDEr from 0 to 10. METEOR is None without Java."""
    scores: dict[str, float | None] = {f"BLEU-{n}": value for n, value in enumerate(bleu(references, captions), 1)}
    scores["brevity penalty"] = brevity_penalty(references, captions)
    scores["METEOR"] = meteor(references, captions) if shutil.which("java") else None
    pairs = _coco(references, captions)
    scores["ROUGE-L"] = 100 * float(Rouge().compute_score(*pairs)[0])
    scores["CIDEr"] = float(Cider().compute_score(*pairs)[0])
    return scores


def meteor(references: Sequence[Sequence[Sequence[str]]], captions: Sequence[Sequence[str]]) -> float | None:
    """METEOR, 0 to 100, by its own Java program. None, and a line on stderr, where that fails."""
    # It takes punctuation apart, and the brackets of <unk> would match other brackets.
    captions = [["xunkx" if word == "<unk>" else word for word in words] for words in captions]
    try:
        scorer = Meteor()
        with scorer.meteor_p as process:  # closes the pipes
            try:
                return 100 * scorer.compute_score(*_coco(references, captions))[0]
            finally:
                process.kill()
                scorer.lock = threading.Lock()  # a failure leaves it locked, and the destructor would wait for ever
    except (OSError, ValueError) as error:
        print(f"METEOR is left out: its Java program failed ({error})", file=sys.stderr)
        return None


def _coco(references: Sequence[Sequence[Sequence[str]]],
          captions: Sequence[Sequence[str]]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and captions as pycocoevalcap takes them: sentences by picture."""
    return ({i: [" ".join(words) for words in each] for i, each in enumerate(references)},
            {i: [" ".join(words)] for i, words in enumerate(captions)})


def warn_if_collapsed(captions: Sequence[str]) -> str | None:
    """A sentence to print where nearly all pictures got the same few captions."""
    if len(captions) < 20:
        return None
    (commonest, count), distinct = Counter(captions).most_common(1)[0], len(set(captions))
    if count <= len(captions) / 2 and distinct >= len(captions) / 50:
        return None
    return (f"warning: only {distinct} different captions for {len(captions)} pictures, {count} times \"{commonest}\": "
            "the model does not see the pictures. Too little training, or other pixels than it was trained with")


def warn_if_endless(unfinished: float, beam_size: int) -> str | None:
    if unfinished <= 0.2:
        return None
    return f"warning: at beam {beam_size} {unfinished:.0%} of the captions never end: the model has not learned <end>"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table, aligned so that it reads well as plain text too."""
    formats = {"beam": "d", "CIDEr": ".3f", "unfinished": ".1%"}
    cells = [["-" if row[name] is None else format(row[name], formats.get(name, ".1f")) for name in COLUMNS]
             for row in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    lines = [[name.rjust(width) for name, width in zip(line, widths, strict=True)] for line in (COLUMNS, *cells)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_gallery(args: argparse.Namespace, model: Captioner, dataset: CaptionDataset,
                  references: Sequence[Sequence[Sequence[str]]], captions: Sequence[Sequence[str]]) -> None:
    """The captions with the highest and the lowest CIDEr on a page, beside those that people wrote."""
    cider = Cider().compute_score(*_coco(references, captions))[1]              # (I,)
    order = sorted(range(len(captions)), key=lambda i: -cider[i])
    half = min(SHOWN, (len(order) + 1) // 2)  # no picture is shown twice
    sections = {}
    for heading, shown in (("Best by CIDEr", order[:half]), ("Worst by CIDEr", order[half:][::-1][:half])):
        pictures = [Image.fromarray(dataset.images[i].transpose(1, 2, 0)) for i in shown]
        # Captioned again: where the model looked is kept of these alone.
        found = caption_images(model, pictures, args.beam_size[-1], args.max_len, 1, args.batch_size,
                               args.length_penalty, args.consensus)
        sections[heading] = [
            html_figure(picture, f"picture {dataset.image_ids[i]}", best, f"CIDEr {cider[i]:.2f}",
                        [" ".join(words) for words in references[i]])
            for i, picture, best in zip(shown, pictures, found, strict=True)]
    chosen = f", length penalty {args.length_penalty:g}" if args.length_penalty else ", consensus" * args.consensus
    write_page(args.gallery, f"{args.data_name}, {args.split}, beam {args.beam_size[-1]}{chosen}", sections)


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    if min(args.beam_size) < 1 or args.batch_size < 1 or args.max_len < 1 or (args.workers or 0) < 0:
        raise UsageError("--beam_size, --batch_size and --max_len are 1 or more, --workers 0 or more")
    check_choice(args)
    if (args.out and Path(args.out).is_file()) or (args.json and Path(args.json).is_dir()):
        raise UsageError(f"--out {args.out} --json {args.json}: --out is a folder, --json a file")
    if args.gallery and Path(args.gallery).suffix.lower() not in PAGES:
        raise UsageError(f"--gallery {args.gallery}: a page is an .html file; name one")
    world, precision = setup_world(args.device, args.precision)
    first = world.rank == 0
    files = [Path(each) for each in (args.json, args.gallery) if each not in (None, "-")]
    folders = [each.parent for each in files if each.is_file() or not each.exists()]
    for folder in [*folders, Path(args.out)] if args.out else folders:
        if first and (reason := unwritable(folder)):  # better now than after the search
            raise InputError(reason)
    data_words = load_word_map(args.data_folder, args.data_name)
    dataset = CaptionDataset(args.data_folder, args.data_name, args.split)
    if not dataset.n_images:
        raise InputError(f"the split {args.split} of {args.data_name} holds no pictures; name another with --split")
    path = args.checkpoint or f"BEST_checkpoint_{args.data_name}.pth.tar"
    own_words = read_word_map(args.word_map) if args.word_map else data_words
    checkpoint = broadcast(load_checkpoint(path, own_words) if first else None, world)
    encoder, decoder = (each.to(world.device) for each in build_models(checkpoint, path))
    model = Captioner(encoder, decoder, checkpoint["word_map"], precision)
    rev_word_map = reverse(model.word_map)
    references = dataset.references(data_words)
    if first and not shutil.which("java"):
        print("Java was not found: METEOR is left out (install a Java runtime, say default-jre)", file=sys.stderr)

    rows: list[dict[str, Any]] = []
    for beam_size in args.beam_size:
        started = time.perf_counter()
        found = generate_captions(model, dataset, beam_size, world, args.batch_size,
                                  loader_workers(args.workers, world.device), args.max_len, args.length_penalty,
                                  args.consensus)
        seconds = time.perf_counter() - started
        if not first:
            continue
        captions = [words_of(each.sequence, rev_word_map) for each in found]
        unfinished = sum(not each.finished for each in found) / len(found)
        rows.append({"beam": beam_size, "length penalty": args.length_penalty, "consensus": args.consensus,
                     **score(references, captions), "unfinished": unfinished, "seconds": seconds,
                     "images/s": len(found) / seconds})
        sentences = [" ".join(words) for words in captions]
        for warning in (warn_if_collapsed(sentences), warn_if_endless(unfinished, beam_size)):
            if warning:
                print(printable(warning), file=sys.stderr)
        if args.out:
            with atomic_write(Path(args.out) / f"captions_{args.split}_beam{beam_size}.json") as file:
                json.dump([{"image_id": image_id, "caption": caption} for image_id, caption
                           in zip(dataset.image_ids, sentences, strict=True)], file)
    if first:
        write_table(args, rows)
        if args.gallery:
            write_gallery(args, model, dataset, references, captions)
    return rows


def write_table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    text = json.dumps(rows, indent=2)
    print(text if args.json == "-" else markdown(rows))  # first: what was computed is seen, whatever becomes of files
    if args.json not in (None, "-"):
        with atomic_write(args.json) as file:
            file.write(text + "\n")
    if args.out:
        for suffix, content in ((".md", markdown(rows)), (".json", text)):
            with atomic_write(Path(args.out) / f"scores_{args.split}{suffix}") as file:
                file.write(content + "\n")


if __name__ == "__main__":
    run_script(main, get_parser())
