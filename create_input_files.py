"""Karpathy's JSON and a folder of pictures to the files that train.py and eval.py read.

    python create_input_files.py --dataset coco --karpathy_json_path dataset_coco.json --image_folder .
    python create_input_files.py --dataset mine --captions_csv captions.csv

The second form is for your own pictures: a table with the columns `image` and `caption` (one row a caption) and, if
wanted, `split` (train, val or test). Karpathy's layout, to which a table is brought too, is

    {"images": [{"filename": "1.jpg", "imgid": 0, "split": "train", "sentences": [{"tokens": ["a", "dog", "runs"]}]}]}

and COCO's has `filepath`, a folder, and `cocoid` besides; its split `restval` counts as train.
"""
from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from datasets import read_json
from preparing.folder import check_space, finish_killed_run, input_hash, is_done, whole_folder, write_json
from preparing.pixels import write_images
from preparing.tables import SPLITS, checked_tokens, from_csv, naming_layout_errors
from safety.checkpoints import SPECIAL_WORDS
from safety.errors import InputError, UsageError, run_script
from safety.flags import integer

KARPATHY_SETS = ("coco", "flickr8k", "flickr30k")


class Picture(NamedTuple):
    path: Path
    image_id: int
    split: str                   # TRAIN, VAL or TEST
    captions: list[list[str]]    # those short enough to train on
    references: list[list[str]]  # all of them


def create_input_files(dataset: str, karpathy_json_path: str | Path | None, image_folder: str | Path,
                       captions_per_image: int, min_word_freq: int, output_folder: str | Path,
                       max_len: int = 100, *,  # the original's; the flag says 50
                       captions_csv: str | Path | None = None, workers: int = 1, overwrite: bool = False,
                       skip_unreadable: bool = False) -> str:
    """Writes the word map, and for each split pictures, captions, lengths and references.

    Returns:
        The base name of the files, for --data_name.

    Raises:
        InputError: a file is missing or wrong, there is no space, or other files of this name exist.
    """
    source, image_folder, folder = Path(captions_csv or karpathy_json_path), Path(image_folder), Path(output_folder)
    data = from_csv(source) if captions_csv else read_json(source)  # both in Karpathy's layout
    with naming_layout_errors(source):  # a key that is not there becomes one line that names the file
        pictures, word_freq = read_captions(data, dataset, image_folder, max_len)
    check_captions(pictures, word_freq, source, max_len)
    paths = [picture.path for picture in pictures]
    check_paths(paths, image_folder)
    word_map = make_word_map(word_freq, min_word_freq)

    base = f"{dataset}_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"
    made_from = input_hash(source, image_folder, paths, captions_per_image, min_word_freq, max_len)
    if finish_killed_run(folder, base, made_from):  # one that had written all files, and moved some
        print_summary(pictures, word_freq, word_map, folder, base)
        return base
    if is_done(folder, base, made_from, overwrite):
        print(f"{folder} holds these files already, made from the same pictures, captions and settings: nothing to do")
        return base

    check_space(folder, len(pictures))
    with whole_folder(folder, base, made_from) as place:  # whose files move to their places when all are complete
        write_json(place / f"WORDMAP_{base}.json", word_map)
        random = Random(123)  # the original's seed, for the same captions
        for split in ("TRAIN", "VAL", "TEST"):
            chosen = [picture for picture in pictures if picture.split == split]
            unreadable = write_images(place / f"{split}_IMAGES_{base}.hdf5", split, [each.path for each in chosen],
                                      [each.image_id for each in chosen],
                                      {"captions_per_image": captions_per_image, "made_from": made_from}, workers,
                                      skip_unreadable)
            pictures = [each for each in pictures if each.path not in unreadable]
            chosen = [each for each in chosen if each.path not in unreadable]
            captions = [words for picture in chosen
                        for words in sample_captions(picture.captions, captions_per_image, random)]
            write_json(place / f"{split}_CAPTIONS_{base}.json",
                       [encode_caption(words, word_map, max_len) for words in captions])
            write_json(place / f"{split}_CAPLENS_{base}.json", [len(words) + 2 for words in captions])
            write_json(place / f"{split}_REFERENCES_{base}.json", [picture.references for picture in chosen])
    print_summary(pictures, word_freq, word_map, folder, base)
    return base


def read_captions(data: Any, dataset: str, image_folder: Path, max_len: int) -> tuple[list[Picture], Counter[str]]:
    """The pictures that have captions, in the file's order, and how often each word occurs in all captions."""
    pictures, word_freq, left_out = [], Counter(), Counter()
    for index, image in enumerate(data["images"]):
        references = [checked_tokens(sentence["tokens"]) for sentence in image["sentences"]]
        for words in references:
            word_freq.update(words)
        captions = [words for words in references if len(words) <= max_len]  # one without a word is kept
        if image["split"] not in SPLITS:
            left_out[image["split"]] += 1
        elif captions:
            name = Path(image["filepath"], image["filename"]) if dataset == "coco" else Path(image["filename"])
            image_id = int(np.int64(image.get("cocoid", image.get("imgid", index))))  # it must fit into HDF5's int64
            pictures.append(Picture(image_folder / name, image_id, SPLITS[image["split"]], captions, references))
    if left_out:
        print(f"left out, of splits other than {', '.join(SPLITS)}: {dict(left_out)} pictures")
    return pictures, word_freq


def make_word_map(word_freq: Counter[str], min_word_freq: int) -> dict[str, int]:
    """The words that occur often enough, numbered from 1 in order of first appearance, and then the special ones."""
    words = [word for word, count in word_freq.items() if count > min_word_freq]
    return {word: index for index, word in enumerate([*words, "<unk>", "<start>", "<end>"], 1)} | {"<pad>": 0}


def sample_captions(captions: list[list[str]], n: int, random: Random) -> list[list[str]]:
    """n captions of a picture: where it has fewer, all of them and some again."""
    if len(captions) < n:
        return captions + [random.choice(captions) for _ in range(n - len(captions))]
    return random.sample(captions, k=n)


def encode_caption(words: list[str], word_map: dict[str, int], max_len: int) -> list[int]:
    """Words to ids: <start>, the words, <end>, and <pad> until all captions are of one length."""
    ids = [word_map.get(word, word_map["<unk>"]) for word in words]
    padding = [word_map["<pad>"]] * (max_len - len(words))
    return [word_map["<start>"], *ids, word_map["<end>"], *padding]


def print_summary(pictures: Sequence[Picture], word_freq: Counter[str], word_map: dict[str, int], folder: Path,
                  base: str) -> None:
    for split in ("TRAIN", "VAL", "TEST"):
        chosen = [picture for picture in pictures if picture.split == split]
        print(f"{split}: {len(chosen)} pictures, {sum(len(picture.references) for picture in chosen)} captions")
    unknown = sum(count for word, count in word_freq.items() if word not in word_map)
    print(f"vocabulary: {len(word_map)} words with the 4 special ones; {100 * unknown / word_freq.total():.2f} % of "
          f"all words are <unk>\nnext: python train.py --data_folder {folder} --data_name {base}")


# ---- what is refused -------------------------------------------------------------------------------------------------

def check_captions(pictures: Sequence[Picture], word_freq: Counter[str], source: Path, max_len: int) -> None:
    for (split, image_id), count in Counter((picture.split, picture.image_id) for picture in pictures).items():
        if count > 1:
            raise InputError(f"{source}: {count} pictures of {split} have the id {image_id}; number them (cocoid, or "
                             "imgid) each once")
    if not word_freq or not any(picture.split == "TRAIN" for picture in pictures):
        raise InputError(f"{source}: no picture of the split train has a caption of 1 to {max_len} words")
    if word_freq.keys() & set(SPECIAL_WORDS):
        raise InputError(f"{source}: {', '.join(SPECIAL_WORDS)} cannot be words of captions; rename or remove them")


def check_paths(paths: Sequence[Path], image_folder: Path) -> None:
    """All pictures must exist, and in the folder: a stranger's file may name any other that the user may read."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{len(missing)} of {len(paths)} pictures are missing: {', '.join(missing[:5])}"
                         f"{', ...' if len(missing) > 5 else ''}. Looked under {image_folder}; say where they are with "
                         "--image_folder")
    folder = image_folder.resolve()
    for path in paths:
        if not path.resolve().is_relative_to(folder):
            raise InputError(f"{path} leads to {path.resolve()}, outside {image_folder}; if that is meant, name a "
                             "folder that holds all pictures with --image_folder")


# ---- the command -----------------------------------------------------------------------------------------------------

def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="%(prog)s [FLAG ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to read").add_argument
    add("--dataset", default="coco", metavar="NAME",
        help="coco, flickr8k, flickr30k, or a name of your own for data in their layout (default: coco)")
    add("--karpathy_json_path", metavar="FILE", help="captions and splits (default: dataset_NAME.json)")
    add("--captions_csv", metavar="FILE", help="instead of a JSON: a table with columns image, caption and maybe split")
    add("--image_folder", metavar="DIR", help="where the pictures are (default: the folder of the captions' file)")
    add = parser.add_argument_group("what to keep").add_argument
    add("--captions_per_image", type=integer(1), default=5, metavar="N",
        help="captions sampled for each picture (default: 5)")
    add("--min_word_freq", type=integer(0), default=5, metavar="N",
        help="words that occur N times or less become <unk> (default: 5)")
    add("--max_len", type=integer(1), default=50, metavar="WORDS",
        help="longer captions are left out (default: 50)")
    add = parser.add_argument_group("running").add_argument
    add("--output_folder", default="data", metavar="DIR", help="where the files go (default: data)")
    add("--skip_unreadable", action="store_true", help="leave out pictures that cannot be read, and say which")
    add("--overwrite", action="store_true", help="replace files that were made from something else")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--workers", type=integer(1), default=cores, metavar="N", help="that read pictures (default: one a core)")
    return parser


def main(args: argparse.Namespace) -> str:
    if args.captions_csv and args.karpathy_json_path:
        raise UsageError("--captions_csv and --karpathy_json_path cannot be used together")
    if Path(args.dataset).name != args.dataset or (args.captions_csv and args.dataset == "coco"):
        raise UsageError("--dataset is a name, not a path; with --captions_csv choose one of your own")
    source = args.captions_csv or args.karpathy_json_path or f"dataset_{args.dataset}.json"
    if not Path(source).is_file():
        raise InputError(f"{source}: no such file; captions come from --karpathy_json_path FILE (for "
                         f"{', '.join(KARPATHY_SETS)}: search the web for \"Karpathy caption_datasets.zip\") or "
                         "--captions_csv FILE")
    return create_input_files(args.dataset, source, args.image_folder or Path(source).parent, args.captions_per_image,
                              args.min_word_freq, args.output_folder, args.max_len, captions_csv=args.captions_csv,
                              workers=args.workers, overwrite=args.overwrite, skip_unreadable=args.skip_unreadable)


if __name__ == "__main__":
    run_script(main, get_parser())
