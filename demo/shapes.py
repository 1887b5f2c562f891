"""Draw the built-in "shapes" data set: small scenes of coloured shapes, five true captions each, and every box.

The captions come from a little grammar, so a small model has to learn words and how they combine; some pairs of
colour and shape are kept out of training (HELD_OUT), so a table of remembered pictures fails on the test split. The
boxes say where each object is, so one can check where the attention looked while a word was written.

Most scenes hold four things that have neither colour nor shape in common, and a caption asks, as it were, for one: "in
red a ..." Which colour it names nobody can foresee, so to go on one has to look at the thing of that colour. There is a
word between the colour and the shape because the model looks by its state before it reads the last word (equation 4).
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (210, 25, 30),
    "yellow": (245, 225, 45),
    "green": (30, 165, 60),
    "blue": (35, 85, 225),
    "purple": (150, 45, 190),
    "white": (245, 245, 245),
}
SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "heart": ("heart",),
}
SHAPES: tuple[str, ...] = tuple(SYNONYMS)
PLURALS = {word: word + ("es" if word[-1] in "sx" else "s") for words in SYNONYMS.values() for word in words}
SHAPE_OF = {form: shape for shape in SHAPES for word in SYNONYMS[shape] for form in (word, PLURALS[word])}
# One pair per shape and per colour, so training still meets every colour and every shape often.
HELD_OUT: frozenset[tuple[str, str]] = frozenset({
    ("red", "star"), ("blue", "heart"), ("green", "circle"), ("yellow", "cross"), ("purple", "square"),
    ("white", "triangle")})
ORDINARY = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT]
# Every n-th scene of a split holds a held-out pair; 0 is never.
HELD_OUT_EVERY = {"train": 0, "val": 4, "test": 2}

SIDE = 256  # pixels
EDGE = 4  # pixels between an object and the border; twice that between objects in neighbouring quadrants
GAP = 16  # pixels at least between two objects of which a caption says "above" or "left of"
SIZES = {"small": (64, 80), "large": (96, 112)}  # pixels, the longer side of the box
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATIONS = {"above": ("above", "over"), "below": ("below", "under"),
             "left": ("left of", "to the left of"), "right": ("right of", "to the right of")}
MAX_WORDS = 12
KINDS = {"one": 12, "pair": 20, "group": 8, "four": 60}  # of a hundred scenes, on average


class Thing(NamedTuple):
    color: str
    shape: str
    size: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive


def shape_of(word: str) -> str | None:
    """The canonical shape that a caption word, singular or plural, stands for; None for any other word."""
    return SHAPE_OF.get(word)


def outline(shape: str) -> np.ndarray:
    """Corners of the shape's outline, (corners, 2) as x right and y down, around (0, 0) in no particular unit."""
    if shape == "cross":
        arm = 0.36
        return np.array([(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
                         (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)])
    corners = {"circle": 120, "square": 4, "triangle": 3, "star": 10, "heart": 120}[shape]
    t = np.arange(corners) * 2 * math.pi / corners
    if shape == "heart":
        lobes = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([16 * np.sin(t) ** 3, -lobes], axis=1)
    if shape == "square":
        t = t + math.pi / 4
    radius = np.where(np.arange(corners) % 2, 0.42, 1.0) if shape == "star" else np.ones(corners)
    return np.stack([radius * np.sin(t), -radius * np.cos(t)], axis=1)


def draw_mask(shape: str, length: int, degrees: float) -> Image.Image:
    """The turned shape as a grey mask (0 to 255) cut to its tight box, whose longer side is `length` pixels."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    points = outline(shape) @ np.array([[cos, sin], [-sin, cos]])
    points -= points.min(axis=0)
    # Pillow's polygons have hard edges, so draw at four times the size and average.
    points *= (4 * length - 1) / points.max()
    mask = Image.new("L", (4 * length, 4 * length))
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in points], fill=255)
    mask = mask.reduce(4)
    return mask.crop(mask.getbbox())


def draw_background(noise: np.random.Generator) -> Image.Image:
    """A greyish picture, SIDE x SIDE RGB: a slope of light and two grains of soft noise, so no two are alike."""
    angle, line = noise.uniform(0, 2 * math.pi), np.linspace(-1, 1, SIDE)
    slope = math.cos(angle) * line[None, :] + math.sin(angle) * line[:, None]
    # Never lighter than a mid grey: white shapes must stand out too.
    grey = noise.uniform(80, 130) + noise.uniform(0, 20) * slope
    for cells, strength in ((8, 6), (64, 4)):
        grain = Image.fromarray(noise.normal(0, strength, (cells, cells)).astype(np.float32))
        grey = grey + np.asarray(grain.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    pixels = grey[:, :, None] + noise.uniform(-4, 4, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def place_one(sizes: list[tuple[int, int]], rng: random.Random) -> list[tuple[int, int]]:
    """Left top corner of one object of (width, height): near a border or the middle, so a caption can say which."""
    spans = [rng.choice(((0, 0.15), (0.42, 0.58), (0.85, 1))) for _ in "xy"]
    x, y = (EDGE + round(rng.uniform(*span) * (SIDE - 2 * EDGE - length))
            for span, length in zip(spans, sizes[0], strict=True))
    return [(x, y)]


def place_pair(sizes: list[tuple[int, int]], rng: random.Random) -> list[tuple[int, int]]:
    """Left top corners of two objects: the first left of the second or above it, and never both."""
    axis, sway = rng.randrange(2), 12
    first, second = sizes[0][axis], sizes[1][axis]
    spare = SIDE - 2 * EDGE - GAP - first - second
    before = rng.randint(0, spare)
    along = (EDGE + before, EDGE + before + first + GAP + rng.randint(0, spare - before))
    # Across the axis both stay near one line, or "above" would be as true as "left of".
    reach = EDGE + sway + max(size[1 - axis] for size in sizes) // 2 + 1
    line = rng.randint(reach, SIDE - reach)
    across = [line + rng.randint(-sway, sway) - size[1 - axis] // 2 for size in sizes]
    return list(zip(along, across, strict=True) if axis == 0 else zip(across, along, strict=True))


def place_group(sizes: list[tuple[int, int]], rng: random.Random) -> list[tuple[int, int]]:
    """Left top corners of two to four objects, each in a quadrant of its own."""
    half, corners = SIDE // 2, []
    for quadrant, (width, height) in zip(rng.sample(range(4), len(sizes)), sizes, strict=True):
        x, y = rng.randint(EDGE, half - EDGE - width), rng.randint(EDGE, half - EDGE - height)
        corners.append((quadrant % 2 * half + x, quadrant // 2 * half + y))
    return corners


def four_looks(rng: random.Random, held_out: bool) -> list[tuple[str, str]]:
    """Four pairs of colour and shape, no colour and no shape twice; with `held_out` one of the pairs is of those."""
    while True:
        looks = list(zip(rng.sample(tuple(COLORS), 4), rng.sample(SHAPES, 4), strict=True))
        if sum(look in HELD_OUT for look in looks) == held_out:
            return looks


def draw_scene(rng: random.Random, held_out: bool, kinds: dict[str, int] = KINDS) -> tuple[Image.Image, list[Thing]]:
    """A SIDE x SIDE RGB picture and its one to four objects; `held_out` asks for a pair that training never shows."""
    looks = [rng.choice(sorted(HELD_OUT) if held_out else ORDINARY)]
    kind = rng.choices(tuple(kinds), tuple(kinds.values()))[0]
    if kind == "four":
        looks = four_looks(rng, held_out)
    elif kind == "pair":
        looks.append(rng.choice([look for look in ORDINARY if look != looks[0]]))
        rng.shuffle(looks)
    elif kind == "group":
        looks *= rng.choice((2, 3))
    classes = [rng.choice(tuple(SIZES)) for _ in looks]
    if kind == "group":
        classes = classes[:1] * len(looks)
    masks = [draw_mask(shape, rng.randint(*SIZES[size]), rng.uniform(-12, 12))
             for (_, shape), size in zip(looks, classes, strict=True)]
    place = {"one": place_one, "pair": place_pair}.get(kind, place_group)
    corners = place([mask.size for mask in masks], rng)
    picture, things = draw_background(np.random.default_rng(rng.getrandbits(64))), []
    for (color, shape), size, mask, (x, y) in zip(looks, classes, masks, corners, strict=True):
        light = rng.randint(-15, 15)
        paint = tuple(min(255, max(0, channel + light)) for channel in COLORS[color])
        things.append(Thing(color, shape, size, (x, y, x + mask.width, y + mask.height)))
        picture.paste(paint, things[-1].box, mask)
    return picture, things


def relation(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> str:
    """Where box `a` is as seen from box `b`: a key of RELATIONS."""
    if a[2] <= b[0] or b[2] <= a[0]:
        return "left" if a[2] <= b[0] else "right"
    return "above" if a[3] <= b[1] else "below"


def places(box: tuple[int, int, int, int]) -> list[str]:
    """All that can be said of the place of a box, by the third of the picture that its centre lies in."""
    column = ("left", "", "right")[(box[0] + box[2]) * 3 // (2 * SIDE)]
    row = ("top", "", "bottom")[(box[1] + box[3]) * 3 // (2 * SIDE)]
    corner = [f"in the {row} {column} corner"] if row and column else []
    sides = [f"on the {column}"] * bool(column) + [f"at the {row}"] * bool(row)
    return corner + sides or ["in the middle"]


def phrase(thing: Thing, rng: random.Random, lead: str = "a") -> str:
    """A noun phrase such as "a small red disc"; any `lead` other than "a" and "the" makes it plural."""
    noun = rng.choice(SYNONYMS[thing.shape])
    words = [rng.choice(SIZE_WORDS[thing.size])] if rng.random() < 0.3 else []
    words += [thing.color, noun if lead in ("a", "the") else PLURALS[noun]]
    return " ".join([lead, *words])


def say_scene(things: list[Thing], rng: random.Random) -> str:
    """One random true caption, lower-case words between single spaces."""
    frame = rng.choice(("a picture of", "an image of"))
    color, noun = things[0].color, rng.choice(SYNONYMS[things[0].shape])
    if len(things) == 1:
        one, where = phrase(things[0], rng), rng.choice(places(things[0].box))
        return rng.choice((one, f"there is {one}", f"{frame} {one}", f"{one} on a grey background", f"{one} {where}",
                           f"there is {one} {where}", f"the {noun} is {color}"))
    if things[0][:2] == things[1][:2]:
        count = ("two", "three")[len(things) - 2]
        lead = rng.choice((count, "a pair of" if count == "two" else "a group of three"))
        many, verb = phrase(things[0], rng, lead), "are" if lead == count else "is"
        return rng.choice((many, f"there {verb} {many}", f"{frame} {many}", f"{many} on a grey background",
                           f"the {count} {PLURALS[noun]} are {color}"))
    a, b = rng.sample(things, 2)
    if len(things) == 4:
        noun, another = rng.choice(SYNONYMS[a.shape]), rng.choice(SYNONYMS[b.shape])
        return rng.choice((f"in {a.color} a {noun} and in {b.color} a {another}", f"the {a.color} one is a {noun}",
                           f"the {a.color} one is a {noun} and the {b.color} one a {another}"))
    one, other, where = phrase(a, rng), phrase(b, rng), rng.choice(RELATIONS[relation(a.box, b.box)])
    return rng.choice((f"{one} {where} {other}", f"{one} is {where} {other}", f"there is {one} {where} {other}",
                       f"{phrase(a, rng, 'the')} is {where} {phrase(b, rng, 'the')}", f"{one} and {other}",
                       f"there is {one} and {other}", f"{frame} {one} and {other}"))


def five_captions(things: list[Thing], rng: random.Random) -> list[str]:
    captions: list[str] = []
    while len(captions) < 5:
        caption = say_scene(things, rng)
        if caption not in captions and len(caption.split()) <= MAX_WORDS:
            captions.append(caption)
    return captions


def write_json(path: Path, content: dict) -> None:
    # Renamed when complete, so a run that was cut short leaves no half file under the final name.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def draw_data_set(folder: str | Path, train: int = 1000, val: int = 100, test: int = 100, seed: int = 0) -> Path:
    """Draw the three splits into `folder` and return the path of the captions, in Karpathy's JSON layout.

    `train`, `val` and `test` count pictures. A finished set made with the same arguments is left as it is.
    """
    folder, made_with = Path(folder), {"train": train, "val": val, "test": test, "seed": seed, "kinds": KINDS}
    path = folder / "dataset_shapes.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")).get("made_with") == made_with:
            return path
        # The old captions go first: beside new pictures they would pass for a finished set.
        path.unlink()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for old in (folder / "images").glob("shapes_*.png"):
        old.unlink()
    images: list[dict] = []
    boxes: dict[str, list[dict]] = {}
    for split, count in (("train", train), ("val", val), ("test", test)):
        for index in range(count):
            # Each scene has its own generator, so a longer train split leaves the test scenes as they were.
            rng, every = random.Random(f"{seed} {split} {index}"), HELD_OUT_EVERY[split]
            picture, things = draw_scene(rng, held_out=every > 0 and index % every == 0)
            name, imgid = f"shapes_{split}_{index:04d}.png", len(images)
            picture.save(folder / "images" / name, compress_level=4)  # the default takes three times as long
            boxes[name] = [{"color": t.color, "shape": t.shape, "box": list(t.box)} for t in things]
            sentids = list(range(5 * imgid, 5 * imgid + 5))
            sentences = [{"tokens": text.split(), "raw": text.capitalize() + ".", "imgid": imgid, "sentid": sentid}
                         for text, sentid in zip(five_captions(things, rng), sentids, strict=True)]
            images.append({"filename": name, "split": split, "imgid": imgid, "sentids": sentids,
                           "sentences": sentences})
    write_json(folder / "boxes.json", boxes)
    write_json(path, {"dataset": "shapes", "made_with": made_with, "images": images})
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the shapes data set: pictures, captions and boxes.")
    parser.add_argument("--folder", type=Path, default=Path("demo/output/shapes"))
    for split, count in (("train", 1000), ("val", 100), ("test", 100)):
        parser.add_argument(f"--{split}", type=int, default=count, help="pictures in this split")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = draw_data_set(args.folder, args.train, args.val, args.test, args.seed)
    print(f"{path}: {args.train} train, {args.val} val and {args.test} test pictures with five captions each")


if __name__ == "__main__":
    main()
