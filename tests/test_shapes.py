"""The shapes data set keeps its promises: boxes fit the pixels, captions are true, held-out pairs are held out."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import shapes
from demo.shapes import COLORS, HELD_OUT, SHAPES, SYNONYMS, draw_data_set, shape_of

COUNTS = {"train": 160, "val": 16, "test": 40}
SMALL, LARGE = {"small", "little"}, {"large", "big"}
SIDES = {"above": "above", "over": "above", "below": "below", "under": "below", "left": "left", "right": "right"}
PLACES = {"left", "right", "top", "bottom", "middle"}
NUMBERS = {"two": 2, "pair": 2, "three": 3}
GLUE = set("a an the one is are there and of to on in at picture image group corner grey background".split())


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """Folder, list of images and {filename: objects} of one drawn data set."""
    folder = tmp_path_factory.mktemp("shapes")
    path = draw_data_set(folder, **COUNTS)
    return folder, json.loads(path.read_text())["images"], json.loads((folder / "boxes.json").read_text())


def mentions(tokens: list[str]) -> list[dict]:
    """What a caption names, in order: color, shape, size word or None, whether plural, and the noun's position."""
    found = []
    for i, word in enumerate(tokens):
        if shape := shape_of(word):
            before = tokens[i - 1] in COLORS
            size = next(iter({tokens[i - 2]} & (SMALL | LARGE)), None) if before and i > 1 else None
            color = next((each for each in reversed(tokens[:i]) if each in COLORS), tokens[-1])
            plural = word not in SYNONYMS[shape]
            found.append({"color": color, "shape": shape, "size": size, "plural": plural, "at": i})
    return found


def holds(side: str, a: list[int], b: list[int]) -> bool:
    """Whether box `a` is clearly on that side of box `b`, and on no other side."""
    apart = {"left": b[0] - a[2], "right": a[0] - b[2], "above": b[1] - a[3], "below": a[1] - b[3]}
    return apart[side] >= 8 and sum(gap >= 0 for gap in apart.values()) == 1


def at_place(word: str, box: list[int]) -> bool:
    x, y = (box[0] + box[2]) / 2 / 256, (box[1] + box[3]) / 2 / 256
    return {"left": x < 0.34, "right": x > 0.66, "top": y < 0.34, "bottom": y > 0.66,
            "middle": max(abs(x - 0.5), abs(y - 0.5)) < 0.1}[word]


def faults(tokens: list[str], objects: list[dict]) -> list[str]:
    """All that is untrue of the objects or ill-formed in one caption; empty for a good one."""
    found, wrong = mentions(tokens), []
    named = [[o for o in objects if (o["color"], o["shape"]) == (m["color"], m["shape"])] for m in found]
    if not named or not all(named) or sum(map(len, named)) != (len(found) if len(objects) == 4 else len(objects)):
        return ["objects"]
    for mention, group in zip(found, named, strict=True):
        longest = [max(o["box"][2] - o["box"][0], o["box"][3] - o["box"][1]) for o in group]
        if mention["size"] and not all((n <= 82) if mention["size"] in SMALL else (n >= 94) for n in longest):
            wrong.append("size")
        if mention["plural"] != (len(group) > 1):
            wrong.append("plural")
    if [NUMBERS[word] for word in tokens if word in NUMBERS] != [len(objects)] * found[0]["plural"]:
        wrong.append("count")
    if len(found) == 2:
        between = set(tokens[found[0]["at"] : found[1]["at"]]) & set(SIDES)
        if len(between) != ("and" not in tokens):
            wrong.append("no relation")
        if not all(holds(SIDES[word], named[0][0]["box"], named[1][0]["box"]) for word in between):
            wrong.append("relation")
    elif not all(at_place(word, objects[0]["box"]) for word in tokens if word in PLACES):
        wrong.append("place")
    known = GLUE | SMALL | LARGE | set(SIDES) | PLACES | set(NUMBERS) | set(COLORS)
    wrong += [f"unknown {word}" for word in tokens if word not in known and not shape_of(word)]
    wrong += ["article" for a, b in itertools.pairwise(tokens) if a in ("a", "an") and (a == "an") != (b[0] in "aeiou")]
    return wrong + ["length"] * (not 3 <= len(tokens) <= 12)


def test_synonyms_belong_to_one_shape():
    assert tuple(SYNONYMS) == SHAPES
    words = [word for group in SYNONYMS.values() for word in group]
    assert len(set(words)) == len(words) and all(word.isalpha() and word.islower() for word in words)
    assert not set(words) & (set(COLORS) | GLUE | set(SIDES) | PLACES)
    for shape, group in SYNONYMS.items():
        assert {shape_of(word) for word in group} == {shape_of(shapes.PLURALS[word]) for word in group} == {shape}
    assert len(set(shapes.PLURALS.values()) | set(words)) == 2 * len(words)
    assert [shape_of(word) for word in ("discs", "boxes", "crosses")] == ["circle", "square", "cross"]
    assert shape_of("left") is shape_of("red") is shape_of("") is None


def test_the_checker_finds_faults():
    red = {"color": "red", "shape": "circle", "box": [10, 100, 60, 150]}
    blue = {"color": "blue", "shape": "square", "box": [120, 90, 220, 190]}
    assert faults("a small red disc to the left of a big blue box".split(), [red, blue]) == []
    assert faults("a red disc is right of a blue box".split(), [red, blue]) == ["relation"]
    assert faults("a red disc above a blue box".split(), [red, blue]) == ["relation"]
    assert faults("a large red disc and a blue box".split(), [red, blue]) == ["size"]
    assert faults("a red disc".split(), [red, blue]) == ["objects"]
    assert faults("the circle is blue".split(), [red]) == ["objects"]
    assert faults("an red circle on the right".split(), [red]) == ["place", "article"]
    assert faults("three red circles".split(), [red, red]) == ["count"]
    four = [red, blue, {**red, "color": "white", "shape": "star"}, {**red, "color": "green", "shape": "heart"}]
    assert faults("in white a star and in blue a box".split(), four) == []
    assert faults("the green one is a heart and the red one a disc".split(), four) == []
    assert faults("in white a star and in blue a heart".split(), four) == ["objects"]


def test_captions_are_true(data_set):
    _, images, boxes = data_set
    bad = [(image["filename"], sentence["raw"], wrong) for image in images for sentence in image["sentences"]
           if (wrong := faults(sentence["tokens"], boxes[image["filename"]]))]
    assert not bad


def test_captions_are_varied(data_set):
    _, images, _ = data_set
    captions = [" ".join(sentence["tokens"]) for image in images for sentence in image["sentences"]]
    words = {word for caption in captions for word in caption.split()}
    assert 45 <= len(words) <= 60
    assert words >= set(SIDES) | PLACES | set(NUMBERS) | set(COLORS)
    assert len(set(captions)) > len(captions) / 2


def test_karpathy_layout(data_set):
    folder, images, boxes = data_set
    assert {split: sum(image["split"] == split for image in images) for split in COUNTS} == COUNTS
    assert [image["imgid"] for image in images] == list(range(len(images)))
    assert [image["filename"] for image in images] == list(boxes)
    assert images[0]["filename"] == "shapes_train_0000.png" and images[-1]["filename"] == "shapes_test_0039.png"
    assert sorted(file.name for file in (folder / "images").iterdir()) == sorted(boxes)
    sentids = [sentid for image in images for sentid in image["sentids"]]
    assert sentids == list(range(5 * len(images)))
    for image in images:
        assert [sentence["sentid"] for sentence in image["sentences"]] == image["sentids"]
        assert len({sentence["raw"] for sentence in image["sentences"]}) == 5
        for sentence in image["sentences"]:
            assert sentence["imgid"] == image["imgid"]
            assert sentence["raw"] == " ".join(sentence["tokens"]).capitalize() + "."


def test_boxes_lie_inside_and_apart(data_set):
    _, _, boxes = data_set
    for objects in boxes.values():
        assert 1 <= len(objects) <= 4
        for x0, y0, x1, y1 in (o["box"] for o in objects):
            assert 0 <= x0 < x1 <= 256 and 0 <= y0 < y1 <= 256
            assert 64 <= max(x1 - x0, y1 - y0) <= 80 or 96 <= max(x1 - x0, y1 - y0) <= 112
        for a, b in itertools.combinations([o["box"] for o in objects], 2):
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) >= 8


@pytest.mark.parametrize("place, count", [("place_one", 1), ("place_pair", 2), ("place_group", 2), ("place_group", 4)])
@pytest.mark.parametrize("size", [(112, 112), (64, 64), (112, 85), (50, 80)])
def test_objects_of_any_size_fit(place, count, size):
    rng = random.Random(0)
    for _ in range(300):
        corners = getattr(shapes, place)([size] * count, rng)
        for x, y in corners:
            assert 4 <= x <= 252 - size[0] and 4 <= y <= 252 - size[1]
        for (ax, ay), (bx, by) in itertools.combinations(corners, 2):
            assert abs(ax - bx) - size[0] >= 8 or abs(ay - by) - size[1] >= 8


def test_boxes_fit_the_pixels(data_set):
    folder, _, boxes = data_set
    names = list(COLORS)
    palette = np.array(list(COLORS.values()))
    for name, objects in boxes.items():
        picture = Image.open(folder / "images" / name)
        assert picture.size == (256, 256) and picture.mode == "RGB"
        pixels = np.asarray(picture).astype(int)
        rest = np.ones((256, 256), bool)
        for o in objects:
            x0, y0, x1, y1 = o["box"]
            rest[y0:y1, x0:x1] = False
            center = pixels[(y0 + y1) // 2, (x0 + x1) // 2]
            assert names[np.abs(palette - center).sum(axis=1).argmin()] == o["color"], name
            # Pixels of its color up to 4 beyond the box, where no other object can be.
            left, top = max(0, x0 - 4), max(0, y0 - 4)
            near = np.abs(pixels[top : y1 + 4, left : x1 + 4] - palette[names.index(o["color"])]).max(axis=2) < 45
            ys, xs = np.nonzero(near)
            found = np.array([xs.min() + left, ys.min() + top, xs.max() + left + 1, ys.max() + top + 1])
            # The tip of a star is thin and mixes with the background.
            assert np.abs(found - o["box"]).max() <= 3, (name, o, found)
        background = pixels[rest]
        assert np.ptp(background, axis=1).max() < 20, "the background is grey"
        assert background.std() > 1, "but not plain"


def test_of_four_things_none_is_like_another(data_set):
    """Neither in colour nor in shape, so that a colour that a caption names is of one thing alone."""
    _, _, boxes = data_set
    fours = [objects for objects in boxes.values() if len(objects) == 4]
    assert 0.5 * len(boxes) < len(fours) < 0.7 * len(boxes)
    assert all(len({o[what] for o in objects}) == 4 for objects in fours for what in ("color", "shape"))


def test_held_out_pairs(data_set):
    _, images, boxes = data_set
    held = {image["filename"]: [o for o in boxes[image["filename"]] if (o["color"], o["shape"]) in HELD_OUT]
            for image in images}
    by_split = {split: [bool(held[image["filename"]]) for image in images if image["split"] == split]
                for split in COUNTS}
    assert not any(by_split["train"])
    assert 0 < sum(by_split["val"]) < COUNTS["val"]
    assert sum(by_split["test"]) == COUNTS["test"] / 2
    train = [image for image in images if image["split"] == "train"]
    said = {(m["color"], m["shape"]) for image in train for s in image["sentences"] for m in mentions(s["tokens"])}
    assert not said & HELD_OUT
    drawn = [(o["color"], o["shape"]) for image in train for o in boxes[image["filename"]]]
    for name in (*COLORS, *SHAPES):
        assert sum(name in pair for pair in drawn) > len(drawn) / 20


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw_data_set(str(tmp_path / name), train=6, val=2, test=4, seed=seed)
    draw_data_set(tmp_path / "longer", train=8, val=2, test=4, seed=3)
    a, b, c, longer = (content(tmp_path / name) for name in ("a", "b", "c", "longer"))
    assert a == b and len(a) == 6 + 2 + 4 + 2
    assert all(a[name] != c[name] for name in a)
    assert all(a[name] == longer[name] for name in a if name.endswith("png")), "a longer train split changes no scene"


def test_finished_set_is_left_alone(tmp_path):
    path = draw_data_set(tmp_path, train=5, val=1, test=2)
    assert path == tmp_path / "dataset_shapes.json"
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert draw_data_set(tmp_path, train=5, val=1, test=2) == path
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    draw_data_set(tmp_path, train=2, val=1, test=2, seed=1)
    made = json.loads(path.read_text())
    assert made["made_with"] == {"train": 2, "val": 1, "test": 2, "seed": 1, "kinds": shapes.KINDS}
    assert len(made["images"]) == len(list((tmp_path / "images").iterdir())) == 5, "no picture of the old set is left"


def test_a_set_of_other_scenes_is_drawn_again(tmp_path, monkeypatch):
    """One that an older version drew, of other kinds of scenes, is no set of this one."""
    draw_data_set(tmp_path, train=2, val=1, test=1)
    monkeypatch.setattr(shapes, "KINDS", {"one": 1})
    path = draw_data_set(tmp_path, train=2, val=1, test=1)
    assert json.loads(path.read_text())["made_with"]["kinds"] == {"one": 1}


def test_cut_short_is_not_finished(tmp_path, monkeypatch):
    path = draw_data_set(tmp_path, train=1, val=1, test=1)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shapes, "five_captions", fail)
        draw_data_set(tmp_path, train=2, val=1, test=1)
    assert not path.exists()
    draw_data_set(tmp_path, train=2, val=1, test=1)
    assert len(json.loads(path.read_text())["images"]) == 4


def test_command_line(tmp_path):
    """Two processes that hash strings differently draw the same, so no set is walked in its own order."""
    for folder in ("1", "2"):
        command = [sys.executable, shapes.__file__, *"--train 1 --val 1 --test 8 --folder".split(), tmp_path / folder]
        environment = {**os.environ, "PYTHONHASHSEED": folder}
        shown = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        assert len(shown.splitlines()) == 1
    assert content(tmp_path / "1") == content(tmp_path / "2")
