"""The layouts in which captions are published, known by their form and brought to Karpathy's."""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import read_json
from preparing.tables import BY_SEED, from_text, hold_out, naming_layout_errors, read_text
from safety.errors import InputError
from safety.words import words_in

COCO = ("COCO's layout", "It is a dict with a list `images`, each with id and file_name, and a list `annotations`, "
        "each with image_id and caption")
# COCO's pictures are the same in its releases of 2014 and 2017, but not their names and folders.
PARTS = ("train2014", "val2014", "train2017", "val2017")
COCO_NAME = re.compile(r"(?:COCO_(?:train|val)2014_)?(\d{12}\.jpg)")


def read_layout(sources: Sequence[Path], image_folder: Path) -> tuple[Any, str]:
    """Captions in whatever layout, in Karpathy's, and a few words on which it was and where its splits come from.

    Args:
        sources: one file; several only of COCO's captions_*.json.

    Raises:
        InputError: no layout that is known; the message says which it resembles.
    """
    if len(sources) == 1 and not is_json(sources[0]):
        data = from_text(sources[0])
        return data, f"captions as text, splits {data['splits']}"
    files = {path: read_json(path) for path in sources}
    if all(isinstance(data, dict) and "annotations" in data for data in files.values()):
        return from_coco(files, image_folder)
    if len(sources) > 1:
        raise InputError(f"{', '.join(map(str, sources))}: several files are read together only if all are COCO's "
                         "captions_*.json; name one")
    [(path, data)] = files.items()
    refuse_other_json(path, data)
    with naming_layout_errors(path):
        for image in data["images"]:
            if COCO_NAME.fullmatch(image["filename"]) and "filepath" in image:
                image["filepath"], image["filename"] = "", find(image_folder, image["filepath"], image["filename"])
    return data, "Karpathy's layout, splits as it says"


def is_json(path: Path) -> bool:
    return path.suffix == ".json" or (path.suffix != ".jsonl" and read_text(path).lstrip().startswith(("{", "[")))


def from_coco(files: dict[Path, Any], image_folder: Path) -> tuple[dict[str, Any], str]:
    """COCO's captions_*.json, one or several of them."""
    images = []
    for path, data in files.items():
        with naming_layout_errors(path, COCO):
            captions = defaultdict(list)
            for each in data["annotations"]:
                if "caption" not in each:
                    raise InputError(f"{path}: these are COCO's objects or people, without captions; give "
                                     "captions_train2014.json and captions_val2014.json of the same archive")
                captions[each["image_id"]].append({"tokens": words_in(each["caption"])})
            for image in data["images"]:
                part, split = part_of(path, image)
                images.append({"filepath": "", "filename": find(image_folder, part, image["file_name"]),
                               "cocoid": image["id"], "split": split, "sentences": captions.pop(image["id"], [])})
            if captions:
                raise ValueError(f"the picture {next(iter(captions))} has captions and is not in `images`")
    splits = {image["split"] for image in images}
    if len(splits) > 1 and None in splits:
        raise InputError(f"{', '.join(map(str, files))}: no train, val or test in some of the names of files and "
                         "pictures; call each captions_train.json, captions_val.json or captions_test.json")
    if len(splits) > 1:
        return {"images": images}, "COCO's layout, splits from the names of files and pictures"
    for image in images:
        image["split"] = "train"
    hold_out(list(images))
    only = next(iter(splits), None)
    return {"images": images}, (f"COCO's layout, splits {BY_SEED}, as "
                                f"{f'all are of {only}' if only else 'no name of a file or picture says which'}")


def part_of(path: Path, image: dict[str, Any]) -> tuple[str, str | None]:
    """The folder in which COCO keeps a picture, and its split, by the name of the captions' file or else its own."""
    own = re.search(r"(?:^|/|COCO_)((train|val|test)(?:20\d\d)?)(?:/|(?<=20\d\d)_)",
                    f"{image['file_name']} {image.get('coco_url')}")
    file = re.search(r"(?<![a-z])((train|val|test)(?:20\d\d)?)(?![a-z])", path.stem.lower())
    return (own or file or ["", ""])[1], (file or own or [None] * 3)[2]


def find(image_folder: Path, part: str, name: str) -> str:
    """Where a picture of COCO is in the folder: in its part's own folder, in none, or where another release has it."""
    places = [Path(part, name), Path(name)] if part in PARTS else [Path(name), Path(part, name)]
    if number := COCO_NAME.fullmatch(name):
        places += [Path(each, f"COCO_{each}_{number[1]}" if each.endswith("2014") else number[1]) for each in PARTS]
    return str(next((place for place in places if (image_folder / place).is_file()), places[0]))


def refuse_other_json(path: Path, data: Any) -> None:
    """Names the files that lie beside captions and are taken for them."""
    first = data[0] if isinstance(data, list) and data else None
    images = data.get("images") if isinstance(data, dict) else None
    hint = None
    if isinstance(first, dict) and first.keys() == {"image_id", "caption"}:
        hint = "COCO's results, a model's captions without pictures; give what people wrote"
    elif isinstance(first, dict) and "caption" in first:
        hint = "a list of captions, as BLIP has them; write it as a table with the columns image and caption"
    elif isinstance(first, list) or (isinstance(data, dict) and "<start>" in data):
        hint = "one of the files that create_input_files.py writes; give what they were made from"
    elif isinstance(images, list) and images and isinstance(images[0], dict) and "file_name" in images[0]:
        hint = "COCO's list of pictures without captions; give captions_train2014.json and captions_val2014.json"
    if hint:
        raise InputError(f"{path}: this looks like {hint}")
