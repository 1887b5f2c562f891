"""Captions and a folder of pictures to the files that train.py and eval.py read.

    python create_input_files.py --dataset coco --captions dataset_coco.json --image_folder .
    python create_input_files.py --dataset mine --captions captions.csv

The second form is for your own pictures: a table with the columns `image` and `caption` (one row a caption) and, if
wanted, `split` (train, val or test). The first is Karpathy's layout, to which all others are brought:

    {"images": [{"filename": "1.jpg", "imgid": 0, "split": "train", "sentences": [{"tokens": ["a", "dog", "runs"]}]}]}

and COCO's has `filepath`, a folder, and `cocoid` besides; its split `restval` counts as train. COCO's own
captions_*.json, Flickr8k.token.txt and Flickr30k's results.csv are read as they are, too.
"""
from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from datasets import read_word_map
from preparing.folder import check_space, finish_killed_run, input_hash, is_done, whole_folder, write_json
from preparing.layouts import read_layout
from preparing.notes import about_left_out, about_pictures, about_twice, about_words
from preparing.pixels import write_images
from preparing.tables import SPLITS, checked_tokens, naming_layout_errors
from safety.checkpoints import SPECIAL_WORDS, load_checkpoint
from safety.errors import InputError, UsageError, printable, run_script
from safety.flags import integer
from safety.pictures import check_paths
from safety.processes import cores
from safety.words import RULE, is_caption

KARPATHY_SETS = ("coco", "flickr8k", "flickr30k")


class Picture(NamedTuple):
    path: Path
    image_id: int
    split: str                   # TRAIN, VAL or TEST
    captions: list[list[str]]    # those short enough to train on
    references: list[list[str]]  # all of them


def create_input_files(dataset: str, karpathy_json_path: str | Path | Sequence[str | Path] | None,
                       image_folder: str | Path, captions_per_image: int, min_word_freq: int,
                       output_folder: str | Path, max_len: int = 100, *,  # the original's; the flag says 50
                       captions_csv: str | Path | None = None, word_map: str | Path | None = None, workers: int = 1,
                       overwrite: bool = False, skip_unreadable: bool = False) -> str:
    """Writes the word map, and for each split pictures, captions, lengths and references.

    Args:
        karpathy_json_path, captions_csv: one of them, in any layout; several files only of COCO's captions_*.json.
        word_map: a word map's file, or a checkpoint, whose words are taken; `min_word_freq` then counts for nothing.

    Returns:
        The base name of the files, for --data_name.

    Raises:
        InputError: a file is missing or wrong, there is no space, or other files of this name exist.
    """
    sources = captions_csv or karpathy_json_path
    sources = [Path(sources)] if isinstance(sources, (str, Path)) else [Path(each) for each in sources]
    source, image_folder, folder = ", ".join(map(str, sources)), Path(image_folder), Path(output_folder)
    data, layout = read_layout(sources, image_folder)  # in Karpathy's
    print(printable(f"{source}: {layout}"))
    with naming_layout_errors(source):  # a key that is not there becomes one line that names the file
        pictures, word_freq, notes = read_captions(data, dataset, image_folder, max_len, source)
    check_captions(pictures, word_freq, notes, source, max_len)
    check_paths([picture.path for picture in pictures], image_folder, source)
    vocabulary, chosen_by, about_vocabulary = choose_words(word_map, word_freq, min_word_freq)
    notes += [*about_pictures(pictures, captions_per_image, source), *about_vocabulary]

    base = f"{dataset}_{captions_per_image}_cap_per_img_{chosen_by}"
    made_from = input_hash(image_folder, pictures, vocabulary, captions_per_image, max_len)
    if finish_killed_run(folder, base, made_from):  # one that had written all files, and moved some
        print_summary(pictures, notes, folder, base)
        return base
    if is_done(folder, base, made_from, overwrite, pictures):
        print(f"{folder} holds these files already, made from the same pictures, captions and settings: nothing to do")
        return base

    check_space(folder, len(pictures))
    with whole_folder(folder, base, made_from) as place:  # whose files move to their places when all are complete
        write_json(place / f"WORDMAP_{base}.json", vocabulary)
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
                       [encode_caption(words, vocabulary, max_len) for words in captions])
            write_json(place / f"{split}_CAPLENS_{base}.json", [len(words) + 2 for words in captions])
            write_json(place / f"{split}_REFERENCES_{base}.json", [picture.references for picture in chosen])
    print_summary(pictures, notes, folder, base)
    return base


def read_captions(data: Any, dataset: str, image_folder: Path, max_len: int,
                  source: str) -> tuple[list[Picture], Counter[str], list[str]]:
    """The pictures that have captions, in the file's order; how often each word occurs in all captions; and what to
    say of those that are left out."""
    pictures, word_freq, other_splits, without, lengths, wrong = [], Counter(), Counter(), [], [], []
    listed: defaultdict[Path, list[str | None]] = defaultdict(list)  # of each picture the splits; None: uncaptioned
    for index, image in enumerate(data["images"]):
        name = Path(image["filepath"], image["filename"]) if dataset == "coco" else Path(image["filename"])
        references = [checked_tokens(sentence["tokens"]) for sentence in image["sentences"]]
        wrong += [f"{name} {words!r:.60}" for words in references if not is_caption(words)]
        for words in references:
            word_freq.update(words)
        captions = [words for words in references if len(words) <= max_len]
        if image["split"] not in SPLITS:
            other_splits[image["split"]] += 1
            continue
        listed[name].append(SPLITS[image["split"]] if references else None)
        if not references:
            without.append(name)
        else:
            lengths.append([len(words) for words in references])
            if captions:
                image_id = int(np.int64(image.get("cocoid", image.get("imgid", index))))  # it must fit HDF5's int64
                pictures.append(Picture(image_folder / name, image_id, SPLITS[image["split"]], captions, references))
    if wrong:
        raise InputError(f"{source}: {len(wrong)} captions have no word, or hold something else: {', '.join(wrong[:5])}"
                         f"{', ...' if len(wrong) > 5 else ''}; {RULE}: mend these captions, or delete them")
    without = [name for name in dict.fromkeys(without) if not any(listed[name])]  # nor elsewhere in the list
    return pictures, word_freq, [*about_left_out(other_splits, without, lengths, max_len), *about_twice(listed)]


def choose_words(given: str | Path | None, word_freq: Counter[str],
                 min_word_freq: int) -> tuple[dict[str, int], str, list[str]]:
    """The word map, how the files' name tells it, and what to say of it."""
    if given:
        word_map = known_words(given, word_freq)
        return word_map, f"{len(word_map)}_given_words", about_words(word_freq, word_map)
    word_map = make_word_map(word_freq, min_word_freq)
    return word_map, f"{min_word_freq}_min_word_freq", about_words(word_freq, word_map, min_word_freq)


def make_word_map(word_freq: Counter[str], min_word_freq: int) -> dict[str, int]:
    """The words that occur often enough, numbered from 1 in order of first appearance, and then the special ones."""
    words = [word for word, count in word_freq.items() if count > min_word_freq]
    return {word: index for index, word in enumerate([*words, "<unk>", "<start>", "<end>"], 1)} | {"<pad>": 0}


def known_words(path: str | Path, word_freq: Counter[str]) -> dict[str, int]:
    """The vocabulary of a word map or of a checkpoint, for whose model these captions are then; says what it lacks."""
    word_map = read_word_map(path) if Path(path).suffix == ".json" else load_checkpoint(path)["word_map"]
    lacking = [word for word, _ in word_freq.most_common() if word not in word_map]
    print(printable(f"{path}: {len(word_map)} words; of the {len(word_freq)} different ones of the captions "
                    f"{len(lacking)} are not among them and become <unk>{': ' * bool(lacking)}{', '.join(lacking[:10])}"
                    f"{', ...' * (len(lacking) > 10)}"))
    return word_map


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


def print_summary(pictures: Sequence[Picture], notes: Sequence[str], folder: Path, base: str) -> None:
    for split in ("TRAIN", "VAL", "TEST"):
        chosen = [picture for picture in pictures if picture.split == split]
        print(f"{split}: {len(chosen)} pictures, {sum(len(picture.references) for picture in chosen)} captions")
    for note in notes:
        print(printable(note))
    print(f"next: python train.py --data_folder {folder} --data_name {base}")


# ---- what is refused -------------------------------------------------------------------------------------------------

def check_captions(pictures: Sequence[Picture], word_freq: Counter[str], notes: Sequence[str], source: str,
                   max_len: int) -> None:
    for (split, image_id), count in Counter((picture.split, picture.image_id) for picture in pictures).items():
        if count > 1:
            raise InputError(f"{source}: {count} pictures of {split} have the id {image_id}; number them (cocoid, or "
                             "imgid) each once")
    if not any(picture.split == "TRAIN" for picture in pictures):
        raise InputError("; ".join([f"{source}: no picture of the split train has a caption of 1 to {max_len} words",
                                    *notes]))
    if word_freq.keys() & set(SPECIAL_WORDS):
        raise InputError(f"{source}: {', '.join(SPECIAL_WORDS)} cannot be words of captions; rename or remove them")


# ---- the command -----------------------------------------------------------------------------------------------------

def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(usage="%(prog)s [FLAG ...]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to read").add_argument
    add("--dataset", default="coco", metavar="NAME",
        help="coco, flickr8k, flickr30k, or a name of your own for other data (default: coco)")
    add("--captions", nargs="+", metavar="FILE",
        help="Karpathy's JSON, COCO's captions_*.json (one or several), Flickr8k's or Flickr30k's own file, or a table "
        "with columns image, caption and maybe split (default: dataset_NAME.json)")
    for older_name in ("--karpathy_json_path", "--captions_csv"):
        add(older_name, nargs="+", metavar="FILE", help="the same as --captions")
    add("--image_folder", metavar="DIR", help="where the pictures are (default: the folder of the captions' file)")
    add = parser.add_argument_group("what to keep").add_argument
    add("--captions_per_image", type=integer(1), default=5, metavar="N",
        help="captions sampled for each picture (default: 5)")
    add("--min_word_freq", type=integer(0), default=5, metavar="N",
        help="words that occur N times or less become <unk> (default: 5)")
    add("--word_map", metavar="FILE",
        help="take these words instead: of a word map, or of a checkpoint, whose model can then learn from the data")
    add("--max_len", type=integer(1), default=50, metavar="WORDS",
        help="longer captions are left out (default: 50)")
    add = parser.add_argument_group("running").add_argument
    add("--output_folder", default="data", metavar="DIR", help="where the files go (default: data)")
    add("--skip_unreadable", action="store_true", help="leave out pictures that cannot be read, and say which")
    add("--overwrite", action="store_true", help="replace files that were made from something else")
    add("--workers", type=integer(1), default=cores(), metavar="N",
        help="processes that read pictures (default: one a core)")
    return parser


def main(args: argparse.Namespace) -> str:
    given = [files for files in (args.captions, args.karpathy_json_path, args.captions_csv) if files]
    if len(given) > 1:
        raise UsageError("--captions, --captions_csv and --karpathy_json_path cannot be used together; one of them "
                         "takes several files")
    if Path(args.dataset).name != args.dataset:
        raise UsageError("--dataset is a name, not a path")
    sources = given[0] if given else [f"dataset_{args.dataset}.json"]
    for path in sources:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; captions come from --captions, formerly --karpathy_json_path "
                             f"(for {', '.join(KARPATHY_SETS)}: search the web for \"Karpathy caption_datasets.zip\")")
    if args.word_map and not Path(args.word_map).is_file():
        raise InputError(f"{args.word_map}: no such file; name a word map or a checkpoint with --word_map")
    return create_input_files(args.dataset, sources, args.image_folder or Path(sources[0]).parent,
                              args.captions_per_image, args.min_word_freq, args.output_folder, args.max_len,
                              word_map=args.word_map, workers=args.workers, overwrite=args.overwrite,
                              skip_unreadable=args.skip_unreadable)


if __name__ == "__main__":
    run_script(main, get_parser())
