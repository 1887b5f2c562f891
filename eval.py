"""Captions of a whole split, and the table of scores by beam size.

    python eval.py --checkpoint BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar --beam_size 1 3 5
    python eval.py --checkpoint one.pth.tar other.pth.tar    # an ensemble
    python eval.py --gallery gallery.html    # the best and the worst captions on a page; point at a word
    torchrun --nproc_per_node=8 eval.py --checkpoint ...
    python eval.py --captions results.json   # those of another system, in COCO's result format

Captions are generated freely, one for each picture, and scored against all that people wrote of it.
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nltk.translate import bleu_score
from PIL import Image
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from caption import Captioner, Search, add_search_flags, caption_images, caption_pixels, load_models
from datasets import CaptionDataset, image_loader, load_word_map, read_word_map
from drawing.page import PAGES, html_figure, write_page
from models import Caption
from safety.devices import cpu_advice
from safety.errors import InputError, UsageError, printable, reason, run_script
from safety.files import atomic_write, unwritable
from safety.flags import integer
from safety.meteor import meteor_score
from safety.words import normal, words_in
from utils import World, add_device_flags, gather_in_order, loader_workers, progress_bar, setup_world

References = Sequence[Sequence[Sequence[str]]]  # of each picture all that people wrote, as words
SHOWN = 12  # of the gallery's best captions, and of its worst
BAD_ENDINGS = frozenset("a an the in for at of with before after on upon near to is are am".split())
COLUMNS = ("beam", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "unfinished", "seconds",
           "images/s")


def generate_captions(model: Captioner, dataset: CaptionDataset, search: Search, world: World, batch_size: int = 32,
                      workers: int = 0) -> list[Caption]:
    """The best caption of each picture of the data set, in its order, on every process."""
    found: list[Caption] = []
    loader = image_loader(dataset, batch_size, workers, world)
    for images, *_ in progress_bar(loader, f"beam {search.beam_size}", "batch", world.rank == 0):
        found += [best for best, *_ in caption_pixels(model, images, search, with_alphas=False)]
    return gather_in_order(found, world)


def bleu(references: References, captions: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to 4 of a whole corpus, 0 to 100, with brevity penalty (COCO's own implementation)."""
    return [100 * value for value in Bleu(4).compute_score(*_coco(references, captions), verbose=0)[0]]


def brevity_penalty(references: References, captions: Sequence[Sequence[str]]) -> float:
    """The factor, 1 or less, by which BLEU punishes captions shorter than people's. The paper's figures are without."""
    lengths = [len(words) for words in captions]
    nearest = [bleu_score.closest_ref_length(each, n) for each, n in zip(references, lengths, strict=True)]
    return float(bleu_score.brevity_penalty(sum(nearest), sum(lengths)))


def score(references: References, captions: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """The standard scores: BLEU, METEOR and ROUGE-L from 0 to 100, CIDEr from 0 to 10. METEOR is None without Java."""
    scores: dict[str, float | None] = {f"BLEU-{n}": value for n, value in enumerate(bleu(references, captions), 1)}
    scores["brevity penalty"] = brevity_penalty(references, captions)
    scores["METEOR"] = meteor(references, captions) if shutil.which("java") else None
    pairs = _coco(references, captions)
    scores["ROUGE-L"] = 100 * float(Rouge().compute_score(*pairs)[0])
    scores["CIDEr"] = cider(references, captions)[0]
    scores["bad endings"] = bad_endings(captions)
    return scores


def cider(references: References, captions: Sequence[Sequence[str]]) -> tuple[float, Sequence[float]]:
    """CIDEr of all captions, 0 to 10, and of each."""
    mean, each = Cider().compute_score(*_coco(references, captions))
    return float(mean), each


def bad_endings(captions: Sequence[Sequence[str]]) -> float:
    """Per cent of the captions that break off ("a dog with a"), as a model may learn to where scores reward it."""
    return 100 * sum(bool(BAD_ENDINGS.intersection(words[-1:])) for words in captions) / len(captions)


def meteor(references: References, captions: Sequence[Sequence[str]]) -> float | None:
    """METEOR, 0 to 100, by its own Java program. None, and a line on stderr, where that fails."""
    # It takes punctuation apart, and the brackets of <unk> would match other brackets.
    captions = [["xunkx" if word == "<unk>" else word for word in words] for words in captions]
    try:
        return 100 * meteor_score(references, captions)
    except OSError as error:
        print(printable(f"METEOR is left out: its Java program failed ({error})"), file=sys.stderr)
        return None


def say_if_java_is_missing() -> None:
    if not shutil.which("java"):
        print("Java was not found: METEOR is left out (install a Java runtime, say default-jre)", file=sys.stderr)


def _coco(references: References,
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


def write_gallery(args: argparse.Namespace, model: Captioner, dataset: CaptionDataset, references: References,
                  captions: Sequence[Caption], search: Search) -> None:
    """The captions with the highest and the lowest CIDEr on a page, beside those that people wrote."""
    by_picture = cider(references, [each.words for each in captions])[1]
    order = sorted(range(len(captions)), key=lambda i: -by_picture[i])
    half = min(SHOWN, (len(order) + 1) // 2)  # no picture is shown twice
    sections = {}
    for heading, shown in (("Best by CIDEr", order[:half]), ("Worst by CIDEr", order[half:][::-1][:half])):
        pictures = [Image.fromarray(dataset.images[i].transpose(1, 2, 0)) for i in shown]
        # Captioned again, as the alphas of all pictures were not kept.
        found = caption_images(model, pictures, search, args.batch_size)
        sections[heading] = [
            html_figure(picture, f"picture {dataset.image_ids[i]}", n_best, f"CIDEr {by_picture[i]:.2f}",
                        [" ".join(words) for words in references[i]])
            for i, picture, n_best in zip(shown, pictures, found, strict=True)]
    penalty = search.length_penalty
    ranking = f", length penalty {penalty:g}" if penalty else ", consensus" * search.consensus
    write_page(args.gallery, f"{args.data_name}, {args.split}, beam {search.beam_size}{ranking}", sections)


def write_table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Writes the table where the flags want it, and prints it, whatever becomes of files."""
    text = json.dumps(rows, indent=2)
    try:
        if args.json not in (None, "-"):
            with atomic_write(args.json) as file:
                file.write(text + "\n")
        if args.out:
            for suffix, content in ((".md", markdown(rows)), (".json", text)):
                with atomic_write(Path(args.out) / f"scores_{args.split}{suffix}") as file:
                    file.write(content + "\n")
    finally:
        print(text if args.json == "-" else markdown(rows))


def score_file(args: argparse.Namespace, dataset: CaptionDataset, references: References,
               word_map: dict[str, int]) -> list[dict[str, Any]]:
    """The table for captions of another system, which tell of no search; prints it and returns its row."""
    captions = read_captions(args.captions, dataset, word_map)
    say_if_java_is_missing()
    if warning := warn_if_collapsed([" ".join(words) for words in captions]):
        print(printable(warning), file=sys.stderr)
    untold = dict.fromkeys(("beam", "length penalty", "consensus", "no repeat", "models", "unfinished", "seconds",
                            "images/s"))
    rows = [{**untold, **score(references, captions)}]
    write_table(args, rows)
    return rows


def read_captions(path: str, dataset: CaptionDataset, word_map: dict[str, int]) -> list[list[str]]:
    """Another system's captions, in COCO's result format, as words: one for each picture of the data set, in its order.

    A caption whose words are all in the word map is only split at its white space; any other is read as in a table: in
    lower case and without punctuation.

    Raises:
        InputError: a picture has none or several. Captions of other pictures are left out, with a line on stderr.
    """
    found: dict[int, list[str]] = {}
    try:
        for each in json.loads(Path(path).read_text(encoding="utf-8-sig")):
            found.setdefault(int(each["image_id"]), []).append(normal(each["caption"]).strip())
    except OSError as error:
        raise InputError(f"--captions {path}: {error.strerror}; name a file of captions") from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"--captions {path}: not in COCO's result format, a list of {{\"image_id\": 1, \"caption\": "
                         f"\"a dog\"}} ({reason(error)})") from error
    ids = dataset.image_ids
    unusable = {f"pictures of {dataset.split} without a caption": [each for each in ids if each not in found],
                f"pictures of {dataset.split} with several": [each for each in ids if len({*found.get(each, ())}) > 1]}
    unused = {"captions of other pictures, left out": sorted(found.keys() - set(ids)),
              "pictures with the same caption again": [each for each in ids if len(found.get(each, ())) > 1]}
    problems = ", ".join(f"{len(which)} {what} (image_id {', '.join(map(str, which[:3]))}{', ...' * (len(which) > 3)})"
                         for what, which in (unusable | unused).items() if which)
    if any(unusable.values()):
        raise InputError(f"--captions {path}: {problems}; give each picture of the split one caption")
    if problems:
        print(f"--captions {path}: {problems}", file=sys.stderr)
    return [words if set(words := each.split()) <= word_map.keys() else words_in(each)
            for each in (found[one][0] for one in ids)]


# ---- the command -----------------------------------------------------------------------------------------------------

def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="%(prog)s [FLAG ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model and data").add_argument
    add("--checkpoint", nargs="+", metavar="FILE",
        help="the model, or several, whose probabilities are averaged (default: BEST_checkpoint_DATANAME.pth.tar in "
        "this folder)")
    add("--word_map", metavar="FILE", help="for checkpoints without one (default: the data folder's)")
    add("--data_folder", default="data", metavar="DIR", help="what create_input_files.py made (default: data)")
    add("--data_name", default="coco_5_cap_per_img_5_min_word_freq", metavar="NAME",
        help="base name of those files (default: coco_5_cap_per_img_5_min_word_freq)")
    add("--split", choices=("TEST", "VAL", "TRAIN"), default="TEST", help="(default: TEST)")
    add("--captions", metavar="FILE",
        help="score these instead of a model's: one for each picture of the split, in COCO's result format. White "
        "space separates words; a caption with words that the data do not know is put in lower case and loses its "
        "punctuation, as in a table")
    add = parser.add_argument_group("search").add_argument
    add("--beam_size", type=integer(1), nargs="+", default=[1, 3, 5], metavar="K", help="one row each (default: 1 3 5)")
    add_search_flags(add)
    add = parser.add_argument_group("results").add_argument
    add("--json", nargs="?", const="-", metavar="FILE", help="scores as JSON, into a file or instead of the table")
    add("--out", metavar="DIR", help="writes the table (Markdown, JSON) and the captions in COCO's result format")
    add("--gallery", metavar="FILE", help="an .html page: best and worst captions at the last --beam_size")
    add = parser.add_argument_group("running").add_argument
    add("--batch_size", type=integer(1), default=32, metavar="N", help="pictures searched at once (default: 32)")
    add("--workers", type=integer(0), metavar="N",
        help="processes that read pictures (default: 4 at most for a GPU, 0 on a CPU)")
    add_device_flags(add)
    return parser


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses, before the search rather than after it, flags that do not go together and unwritable places."""
    if args.captions and (args.checkpoint or args.gallery):
        raise UsageError(f"--captions {args.captions}: no model is used; leave out --checkpoint and --gallery")
    if (args.out and Path(args.out).is_file()) or (args.json and Path(args.json).is_dir()):
        raise UsageError(f"--out {args.out} --json {args.json}: --out is a folder, --json a file")
    if args.gallery and Path(args.gallery).suffix.lower() not in PAGES:
        raise UsageError(f"--gallery {args.gallery}: a page is an .html file; name one")
    files = [Path(each) for each in (args.json, args.gallery) if each not in (None, "-")]
    folders = [each.parent for each in files if each.is_file() or not each.exists()]  # not of /dev/null, or a pipe
    folders += [Path(args.out)] if args.out else []
    for folder in folders:
        if message := unwritable(folder):
            raise InputError(message)


def main(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Captions the split once for each beam size, prints the table of scores and returns its rows."""
    searches = [Search.from_args(args, beam_size=beam_size) for beam_size in args.beam_size]
    world, precision = setup_world(args.device, args.precision)
    is_main = world.rank == 0
    if is_main:
        check_outputs(args)
    word_map = load_word_map(args.data_folder, args.data_name)
    dataset = CaptionDataset(args.data_folder, args.data_name, args.split)
    if not dataset.n_images:
        raise InputError(f"the split {args.split} of {args.data_name} holds no pictures; name another with --split")
    references = dataset.references(word_map)
    if args.captions:
        return score_file(args, dataset, references, word_map) if is_main else []
    paths = args.checkpoint or [f"BEST_checkpoint_{args.data_name}.pth.tar"]
    model = load_models(paths, read_word_map(args.word_map) if args.word_map else word_map, world, precision)
    if is_main:
        say_if_java_is_missing()
        for line in cpu_advice(world.device, args.device, precision):
            print(line, file=sys.stderr)

    rows: list[dict[str, Any]] = []
    for search in searches:
        began = time.perf_counter()
        captions = generate_captions(model, dataset, search, world, args.batch_size,
                                     loader_workers(args.workers, world.device))
        seconds = time.perf_counter() - began
        if not is_main:
            continue
        rows.append({"beam": search.beam_size, "length penalty": search.length_penalty, "consensus": search.consensus,
                     "no repeat": search.no_repeat, "models": len(paths),
                     **score(references, [each.words for each in captions]),
                     "unfinished": sum(not each.finished for each in captions) / len(captions), "seconds": seconds,
                     "images/s": len(captions) / seconds})
        sentences = [" ".join(each.words) for each in captions]
        if args.out:
            with atomic_write(Path(args.out) / f"captions_{args.split}_beam{search.beam_size}.json") as file:
                json.dump([{"image_id": image_id, "caption": sentence} for image_id, sentence
                           in zip(dataset.image_ids, sentences, strict=True)], file)
        for warning in (warn_if_collapsed(sentences), warn_if_endless(rows[-1]["unfinished"], search.beam_size)):
            if warning:
                print(printable(warning), file=sys.stderr)
    if is_main:
        try:
            if args.gallery:
                write_gallery(args, model, dataset, references, captions, searches[-1])
        finally:
            write_table(args, rows)
    return rows


if __name__ == "__main__":
    run_script(main, get_parser())
