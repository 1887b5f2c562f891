"""Karpathy's JSON and a folder of pictures to the files that train.py and eval.py read.

    python create_input_files.py --dataset coco --karpathy_json_path dataset_coco.json --image_folder .
    python create_input_files.py --dataset mine --captions_csv captions.csv

The second form is for your own pictures: a table with the columns `image` and `caption` (one row a caption) and, if
wanted, `split` (train, val or test).
"""
from __future__ import annotations

import argparse
import csv
import functools
import glob
import hashlib
import json
import os
import shutil
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import h5py
import numpy as np
from torch.utils.data import DataLoader

from datasets import IMAGE_SIZE, all_unreadable, check_pixels, read_image, read_json
from safety.checkpoints import SPECIAL_WORDS
from safety.errors import InputError, UsageError, reason, run_script
from safety.files import lock, naming_write_errors, remove_stale
from safety.flags import integer
from safety.signals import ignore_signals
from utils import progress

KARPATHY_SETS = ("coco", "flickr8k", "flickr30k")
SPLITS = {"train": "TRAIN", "restval": "TRAIN", "val": "VAL", "test": "TEST"}
JSON_FILES = ("CAPTIONS", "CAPLENS", "REFERENCES")


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
    add("--overwrite", action="store_true", help="replace files that were made from something else")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--workers", type=integer(1), default=cores, metavar="N", help="that read pictures (default: one a core)")
    return parser


class Picture(NamedTuple):
    path: Path
    image_id: int
    split: str                  # TRAIN, VAL or TEST
    captions: list[list[str]]   # those short enough to train on
    references: list[list[str]]  # all of them


def create_input_files(dataset: str, karpathy_json_path: str | Path | None, image_folder: str | Path,
                       captions_per_image: int, min_word_freq: int, output_folder: str | Path, max_len: int = 100, *,
                       captions_csv: str | Path | None = None, workers: int = 1, overwrite: bool = False) -> str:
    """Writes the word map, and for each split pictures, captions, lengths and references.

    Returns:
        The base name of the files, for --data_name.

    Raises:
        InputError: a file is missing or wrong, there is no space, or other files of this name are there.
    """
    source = Path(captions_csv or karpathy_json_path)
    data = from_csv(source) if captions_csv else read_json(source)
    pictures, word_freq = read_captions(data, source, dataset, Path(image_folder), max_len)
    check_paths(pictures, image_folder)

    folder = Path(output_folder)
    base = f"{dataset}_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"
    digest = digest_of(source, Path(image_folder), pictures, captions_per_image, min_word_freq, max_len)
    remove_stale(folder / base)
    ready = folder / f".{base}.{digest[:16]}.ready"  # all files of a run that was killed before they had their names
    if not ready.exists() and is_done(folder, base, digest, overwrite):
        print(f"{folder} holds these files already, made from the same pictures, captions and settings: nothing to do")
        return base

    words = [word for word in word_freq if word_freq[word] > min_word_freq]
    word_map = {word: index for index, word in enumerate([*words, "<unk>", "<start>", "<end>"], 1)} | {"<pad>": 0}
    if not ready.exists():
        check_space(folder, len(pictures))
        with temporary_folder(folder / base) as partial:
            write_json(partial / f"WORDMAP_{base}.json", word_map)
            random = Random(123)  # the tutorial's seed: the same captions are drawn
            for split in ("TRAIN", "VAL", "TEST"):
                chosen = [picture for picture in pictures if picture.split == split]
                write_split(partial, base, split, chosen, word_map, random, captions_per_image, max_len, workers,
                            digest)
            partial.replace(ready)  # the files get their names only when all are whole
    for other in set(folder.glob(f".{glob.escape(base)}.*.ready")) - {ready}:  # killed, and now replaced
        shutil.rmtree(other, ignore_errors=True)
    for path in sorted(ready.iterdir(), key=lambda path: path.suffix == ".hdf5"):  # these say what all is made of
        path.replace(folder / path.name)
    ready.rmdir()
    is_done(folder, base, digest, overwrite=False)  # raises where a killed run's files were deleted since
    print_summary(pictures, word_freq, word_map, folder, base)
    return base


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside the path that is gone in the end, at the latest when the next run sweeps."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming_write_errors(folder):
        folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY) if os.name == "posix" else None
    try:
        if descriptor is not None:
            lock(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def from_csv(path: Path) -> dict[str, Any]:
    """A table of captions in Karpathy's layout; without a column `split`, 80/10/10 by a fixed seed."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, skipinitialspace=True, strict=True)
            rows = [(f"{path}, line {table.line_num}", row) for row in table]
            columns = table.fieldnames or []
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file (--captions_csv)") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a table in UTF-8 ({error})") from error
    if not rows or not {"image", "caption"} <= set(columns):
        raise InputError(f"{path}: the first line names the columns image, caption and maybe split, separated by "
                         "commas; each further line is a caption")
    without_punctuation = str.maketrans("", "", string.punctuation)
    images: dict[str, dict[str, Any]] = {}
    for where, row in rows:
        if None in row or None in row.values():
            raise InputError(f"{where}: not {len(columns)} values; a caption with commas needs quotes around it")
        name, split = row["image"].strip(), row.get("split", "train").strip().lower()
        tokens = row["caption"].lower().translate(without_punctuation).split()  # as in Karpathy's files
        if not name or not tokens:
            raise InputError(f"{where}: no picture, or no word of caption; fill it in, or take the line out")
        if split not in SPLITS:
            raise InputError(f"{where}: the split {row['split']!r} is none of {', '.join(SPLITS)}")
        image = images.setdefault(name, {"filename": name, "imgid": len(images), "split": split, "sentences": []})
        if image["split"] != split:
            raise InputError(f"{where}: {name} is in two splits, {image['split']} and {split}; keep one")
        image["sentences"].append({"tokens": tokens})
    if "split" not in columns:
        names = list(images)
        Random(0).shuffle(names)
        tenth = max(len(names) // 10, min(len(names) // 3, 1))  # of few pictures one each
        for i, name in enumerate(names[:2 * tenth]):
            images[name]["split"] = "val" if i < tenth else "test"
    return {"images": list(images.values())}


def read_captions(data: Any, source: Path, dataset: str, image_folder: Path,
                  max_len: int) -> tuple[list[Picture], Counter[str]]:
    """The pictures that have captions, in the file's order, and how often each word occurs in all captions."""
    pictures, word_freq, left_out = [], Counter(), Counter()
    try:
        for index, image in enumerate(data["images"]):
            references = [sentence["tokens"] for sentence in image["sentences"]]
            for tokens in references:
                if not isinstance(tokens, list) or not all(isinstance(word, str) for word in tokens):
                    raise TypeError(f"tokens {tokens!r} is no list of words")
                word_freq.update(tokens)
            captions = [tokens for tokens in references if len(tokens) <= max_len]
            if image["split"] not in SPLITS:
                left_out[image["split"]] += 1
            elif captions:
                name = Path(image["filepath"], image["filename"]) if dataset == "coco" else Path(image["filename"])
                image_id = int(np.int64(image.get("cocoid", image.get("imgid", index))))
                pictures.append(Picture(image_folder / name, image_id, SPLITS[image["split"]], captions, references))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        hint = " (only --dataset coco has it; for other data say --dataset NAME)" if error.args == ("filepath",) else ""
        raise InputError(f"{source}: not in Karpathy's layout, {reason(error)}{hint}. It is a dict with a list "
                         "`images`, each with filename, split and sentences, each of those with tokens") from error
    if left_out:
        print(f"left out, of splits other than {', '.join(SPLITS)}: {dict(left_out)} pictures")
    [(twice, count)] = Counter((picture.split, picture.image_id) for picture in pictures).most_common(1) or [((), 0)]
    if count > 1:
        raise InputError(f"{source}: {count} pictures of {twice[0]} have the id {twice[1]}; number them (cocoid, or "
                         "imgid) each once")
    if not word_freq or not any(picture.split == "TRAIN" for picture in pictures):
        raise InputError(f"{source}: no picture of the split train has a caption of 1 to {max_len} words")
    if word_freq.keys() & set(SPECIAL_WORDS):
        raise InputError(f"{source}: {', '.join(SPECIAL_WORDS)} cannot be words of captions; rename or remove them")
    return pictures, word_freq


def check_paths(pictures: Sequence[Picture], image_folder: str | Path) -> None:
    """All pictures must be there, and in the folder: a stranger's file may name any other that the user may read."""
    missing = [picture.path for picture in pictures if not picture.path.is_file()]
    if missing:
        raise InputError(f"{len(missing)} of {len(pictures)} pictures are missing: "
                         f"{', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}. "
                         f"Looked under {image_folder}; say where they are with --image_folder")
    folder = Path(image_folder).resolve()
    for picture in pictures:
        if not picture.path.resolve().is_relative_to(folder):
            raise InputError(f"{picture.path} leads to {picture.path.resolve()}, outside {image_folder}; if that is "
                             "meant, name a folder that holds all pictures with --image_folder")


def check_space(folder: Path, n_pictures: int) -> None:
    with naming_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    needed, free = n_pictures * (3 * IMAGE_SIZE ** 2 + 4000), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free; make space, or "
                         "name another --output_folder")
    print(f"{n_pictures} pictures need {needed / 1e9:.2f} GB in {folder}, {free / 1e9:.1f} GB are free")


def digest_of(source: Path, image_folder: Path, pictures: Sequence[Picture], *settings: int) -> str:
    """One number for all that the files are made of: captions, pictures (their folder and sizes) and settings."""
    digest = hashlib.sha256(source.read_bytes())
    sizes = [picture.path.stat().st_size for picture in pictures]
    digest.update(repr((str(image_folder.resolve()), sizes, settings)).encode())
    return digest.hexdigest()


def is_done(folder: Path, base: str, digest: str, overwrite: bool) -> bool:
    """Whether all files are there and of this input; refuses to touch those of another."""
    texts = [folder / f"{split}_{kind}_{base}.json" for split in ("TRAIN", "VAL", "TEST") for kind in JSON_FILES]
    archives = [folder / f"{split}_IMAGES_{base}.hdf5" for split in ("TRAIN", "VAL", "TEST")]
    there = [path.exists() for path in (folder / f"WORDMAP_{base}.json", *texts, *archives)]
    if overwrite or not any(there):
        return False
    if all(there):
        try:
            made_from = set()
            for path in archives:
                with h5py.File(path, "r") as file:
                    made_from.add(file.attrs.get("made_from"))
            if made_from == {digest}:
                return True
        except (OSError, TypeError):
            pass  # damaged: as good as made from something else
    raise InputError(f"{folder} holds files named {base} that are not whole or were made from other pictures, captions "
                     "or settings; replace them with --overwrite, or name another --output_folder")


def write_split(folder: Path, base: str, split: str, pictures: Sequence[Picture], word_map: dict[str, int],
                random: Random, captions_per_image: int, max_len: int, workers: int, digest: str) -> None:
    encoded, lengths = [], []
    for picture in pictures:
        captions, n = picture.captions, captions_per_image
        if len(captions) < n:
            captions = captions + [random.choice(captions) for _ in range(n - len(captions))]
        else:
            captions = random.sample(captions, k=n)
        for words in captions:
            encoded.append([word_map["<start>"], *(word_map.get(word, word_map["<unk>"]) for word in words),
                            word_map["<end>"], *[word_map["<pad>"]] * (max_len - len(words))])
            lengths.append(len(words) + 2)
    write_json(folder / f"{split}_CAPTIONS_{base}.json", encoded)
    write_json(folder / f"{split}_CAPLENS_{base}.json", lengths)
    write_json(folder / f"{split}_REFERENCES_{base}.json", [picture.references for picture in pictures])

    path = folder / f"{split}_IMAGES_{base}.hdf5"
    with naming_write_errors(path), h5py.File(path, "w") as file:
        file.attrs["captions_per_image"] = captions_per_image
        file.attrs["made_from"] = digest
        file["image_ids"] = np.array([picture.image_id for picture in pictures], dtype=np.int64)
        images = file.create_dataset("images", (len(pictures), 3, IMAGE_SIZE, IMAGE_SIZE), dtype="uint8")
        if not pictures:
            return
        images[0] = 0  # now HDF5 sets aside one block of the file for all pixels
        block = images.id.get_offset()
    # Each worker writes its pictures straight to their places: one process that wrote for all would hold them up.
    # A loader reads but little ahead, and ends at a bad picture or Ctrl-C, where multiprocessing's pool may hang.
    write = functools.partial(write_pictures, path, block)
    loader = DataLoader(list(enumerate(picture.path for picture in pictures)), batch_size=16, collate_fn=write,
                        num_workers=workers, worker_init_fn=ignore_signals)
    bar = progress(None, split, "picture", total=len(pictures))
    unreadable: list[tuple[Path, InputError]] = []
    for done in loader:
        if isinstance(done, InputError):
            raise done
        unreadable += done
        bar.update(min(loader.batch_size, bar.total - bar.n))
    bar.close()
    if unreadable:
        raise all_unreadable(unreadable)
    with h5py.File(path, "r") as file:
        check_pixels(file["images"], f"{split} ({pictures[0].path}, ...)")


def write_pictures(archive: Path, block: int,
                   pictures: Sequence[tuple[int, Path]]) -> list[tuple[Path, InputError]] | InputError:
    """Puts the i-th picture's pixels at their place in the block, and returns those that cannot be read.

    An error raised in a worker would arrive as its whole traceback; returned, it stays one line.
    """
    unreadable = []
    try:
        with open(archive, "r+b") as file:
            for i, path in pictures:
                try:
                    pixels = read_image(path)
                except InputError as error:
                    unreadable.append((path, error))
                    continue
                file.seek(block + i * pixels.size)
                file.write(pixels.tobytes())
        return unreadable
    except OSError as error:
        return InputError(f"{archive} could not be written ({error.strerror})")


def write_json(path: Path, value: Any) -> None:
    with naming_write_errors(path):
        path.write_text(json.dumps(value), encoding="utf-8")  # five times as fast as json.dump


def print_summary(pictures: Sequence[Picture], word_freq: Counter[str], word_map: dict[str, int], folder: Path,
                  base: str) -> None:
    for split in ("TRAIN", "VAL", "TEST"):
        chosen = [picture for picture in pictures if picture.split == split]
        print(f"{split}: {len(chosen)} pictures, {sum(len(picture.references) for picture in chosen)} captions")
    unknown = sum(count for word, count in word_freq.items() if word not in word_map)
    print(f"vocabulary: {len(word_map)} words with the 4 special ones; {100 * unknown / word_freq.total():.2f} % of "
          f"all words are <unk>\nnext: python train.py --data_folder {folder} --data_name {base}")


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
                              workers=args.workers, overwrite=args.overwrite)


if __name__ == "__main__":
    run_script(main, get_parser())
