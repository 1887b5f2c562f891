"""create_input_files.py writes what the tutorial's script writes, whole or not at all, and names what it refuses."""
from __future__ import annotations

import errno
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import create_input_files
from create_input_files import get_parser, main
from datasets import CaptionDataset, load_word_map
from preparing.tables import from_text
from safety.errors import InputError

SPLITS = ("TRAIN", "VAL", "TEST")


def draw(path: Path, pixels: np.ndarray | None = None, seed: int = 0, size: tuple[int, int] = (9, 6)) -> None:
    """A picture file: of the pixels, or of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise if pixels is None else pixels).save(path)


def image(filename: str, split: str, *captions: str, **more: object) -> dict:
    return {"filename": filename, "split": split, "sentences": [{"tokens": text.split()} for text in captions], **more}


def write_set(folder: Path, images: list[dict]) -> Path:
    """Karpathy's JSON, and a picture of noise for each of its images that has none yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, each in enumerate(images):
        path = folder / each.get("filepath", "") / each["filename"]
        if not path.exists():
            draw(path, seed=seed)
    (folder / "set.json").write_text(json.dumps({"images": images}))
    return folder / "set.json"


def prepare(source: Path, cpi: int = 2, min_word_freq: int = 0, max_len: int = 5, dataset: str = "mine",
            out: str = "out", workers: int = 0, **options) -> tuple[Path, str]:
    """Runs the script's function on the pictures beside the source; folder and base name of what it wrote."""
    base = create_input_files.create_input_files(dataset, source, source.parent, cpi, min_word_freq,
                                                 source.parent / out, max_len, workers=workers, **options)
    return source.parent / out, base


def load(written: tuple[Path, str], kind: str):
    folder, base = written
    return json.loads((folder / f"{kind}_{base}.json").read_text())


def few(n: int = 3) -> list[dict]:
    return [image(f"{i}.png", "train", f"a picture {i}", "noise") for i in range(n)]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- the tutorial's files, entry by entry ----------------------------------------------------------------------------

def tutorial(data: dict, cpi: int, min_word_freq: int, max_len: int) -> dict:
    """The contract written a second time, plainly, with Python's global generator as in the tutorial."""
    occurrences: dict[str, int] = {}
    for each in data["images"]:
        for sentence in each["sentences"]:
            for word in sentence["tokens"]:
                occurrences[word] = occurrences.get(word, 0) + 1
    word_map: dict[str, int] = {}
    for word, count in occurrences.items():
        if count > min_word_freq:
            word_map[word] = len(word_map) + 1
    for word in ("<unk>", "<start>", "<end>"):
        word_map[word] = len(word_map) + 1
    word_map["<pad>"] = 0
    files: dict = {"WORDMAP": word_map}
    random.seed(123)
    for split, names in (("TRAIN", ("train", "restval")), ("VAL", ("val",)), ("TEST", ("test",))):
        files[f"{split}_CAPTIONS"], files[f"{split}_CAPLENS"] = [], []
        for each in data["images"]:
            captions = [sentence["tokens"] for sentence in each["sentences"] if len(sentence["tokens"]) <= max_len]
            if each["split"] not in names or len(captions) == 0:
                continue
            if len(captions) < cpi:
                captions = captions + [random.choice(captions) for _ in range(cpi - len(captions))]
            else:
                captions = random.sample(captions, k=cpi)
            for words in captions:
                row = [word_map["<start>"]]
                for word in words:
                    row.append(word_map[word] if word in word_map else word_map["<unk>"])
                row.append(word_map["<end>"])
                files[f"{split}_CAPLENS"].append(len(row))
                while len(row) < max_len + 2:
                    row.append(0)
                files[f"{split}_CAPTIONS"].append(row)
    return files


def assert_equal_to_tutorial(data: dict, written: tuple[Path, str], cpi: int, min_word_freq: int, max_len: int) -> None:
    for kind, expected in tutorial(data, cpi, min_word_freq, max_len).items():
        found = load(written, kind)
        assert found == expected, kind
        assert list(found) == list(expected)  # a word map's order too


any_caption = st.lists(st.sampled_from(["a", "dog", "dög", "runs", "2", "b"]), min_size=1, max_size=7)
any_split = st.sampled_from(["train", "restval", "val", "test", "other"])
any_images = st.lists(st.tuples(any_split, st.lists(any_caption, max_size=6)), max_size=6)


@given(any_images, st.integers(1, 4), st.integers(0, 3), st.integers(1, 6))
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_files_equal_the_tutorials(tmp_path_factory, images, cpi, min_word_freq, max_len):
    folder = tmp_path_factory.mktemp("any")
    data = {"images": [{"filename": "same.png", "split": split, "sentences": [{"tokens": words} for words in captions]}
                       for split, captions in [*images, ("train", [["a", "a"][:max_len]])]]}
    written = prepare(write_set(folder, data["images"]), cpi, min_word_freq, max_len)
    assert_equal_to_tutorial(data, written, cpi, min_word_freq, max_len)
    shutil.rmtree(folder)


@pytest.mark.parametrize("cpi, min_word_freq, max_len", [(5, 0, 50), (5, 2, 9), (3, 1, 12), (7, 5, 4)])
def test_the_shapes_files_equal_the_tutorials(prepared, tmp_path, cpi, min_word_freq, max_len):
    base = create_input_files.create_input_files("shapes", prepared.json_path, prepared.pictures, cpi, min_word_freq,
                                                 tmp_path, max_len)
    assert base == f"shapes_{cpi}_cap_per_img_{min_word_freq}_min_word_freq"
    assert_equal_to_tutorial(json.loads(prepared.json_path.read_text()), (tmp_path, base), cpi, min_word_freq, max_len)


def test_words_are_counted_everywhere_and_numbered_as_they_appear(tmp_path):
    """Over-long captions and all splits count; more than min_word_freq is asked for, not as much."""
    written = prepare(write_set(tmp_path, [
        image("1.png", "test", "b a"), image("2.png", "train", "a once c", "b c a a c"), image("3.png", "val", "b")]),
        min_word_freq=2, max_len=3)
    assert list(load(written, "WORDMAP").items()) == [("b", 1), ("a", 2), ("c", 3), ("<unk>", 4), ("<start>", 5),
                                                      ("<end>", 6), ("<pad>", 0)]
    assert load(written, "TRAIN_CAPTIONS") == [[5, 2, 4, 3, 6]] * 2  # `once` is unknown, the long caption is left out
    assert load(written, "TEST_CAPTIONS") == [[5, 1, 2, 6, 0]] * 2
    assert load(written, "TEST_CAPLENS") == [4, 4]


def test_thirteen_files_of_integers(tmp_path):
    folder, base = written = prepare(write_set(tmp_path, few()))
    assert base == "mine_2_cap_per_img_0_min_word_freq"
    kinds = ("IMAGES_{}.hdf5", "CAPTIONS_{}.json", "CAPLENS_{}.json", "REFERENCES_{}.json")
    names = [f"WORDMAP_{base}.json", *(f"{split}_{kind.format(base)}" for split in SPLITS for kind in kinds)]
    assert listing(folder) == sorted(names)
    rows = [load(written, "WORDMAP").values(), load(written, "TRAIN_CAPLENS"), *load(written, "TRAIN_CAPTIONS")]
    assert {type(number) for row in rows for number in row} == {int}


def test_pictures_are_pillows_bilinear_256_and_in_order(tmp_path):
    """The first is large, so that with two workers others are done before it."""
    images = [image(f"{i:02}.png", ["train", "restval"][i % 2], "a") for i in range(20)] + [image("none.png", "val")]
    for i in range(20):
        draw(tmp_path / f"{i:02}.png", seed=i, size=(300 - 9 * i, 40 + 20 * i) if i else (1600, 1500))
    folder, base = prepare(write_set(tmp_path, images), cpi=3, workers=2)
    with h5py.File(folder / f"TRAIN_IMAGES_{base}.hdf5") as file:
        pixels = file["images"]
        assert (pixels.shape, pixels.dtype, file.attrs["captions_per_image"]) == ((20, 3, 256, 256), np.uint8, 3)
        for i in range(20):
            with Image.open(tmp_path / f"{i:02}.png") as picture:
                expected = np.array(picture.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR))
            assert (pixels[i] == expected.transpose(2, 0, 1)).all()


def test_coco_joins_filepath_and_filename_and_others_do_not(tmp_path):
    images = [image("1.png", "train", "a", filepath="sub", cocoid=17, imgid=0)]
    folder, base = prepare(write_set(tmp_path, images), dataset="coco")
    assert CaptionDataset(folder, base, "TRAIN").image_ids == [17]
    with refused("1 of 1 pictures", str(tmp_path / "1.png")):
        prepare(tmp_path / "set.json", dataset="flickr8k")


def test_coco_without_filepath_is_told_of_dataset(tmp_path):
    with refused("set.json", "'filepath'", "--dataset"):
        prepare(write_set(tmp_path, few()), dataset="coco")


def test_references_are_all_captions_as_written(tmp_path):
    written = prepare(write_set(tmp_path, [image("1.png", "train", "a b", "one two three four five six", "a b"),
                                           image("2.png", "test", "seven six five four three two one"),
                                           image("3.png", "test", "b a")]), cpi=1, min_word_freq=1)
    assert load(written, "TRAIN_REFERENCES") == [[["a", "b"], "one two three four five six".split(), ["a", "b"]]]
    assert load(written, "TEST_REFERENCES") == [[["b", "a"]]]  # picture 2 has no caption short enough
    assert load(written, "VAL_REFERENCES") == []


def test_empty_val_and_test_are_files_too(tmp_path):
    folder, base = prepare(write_set(tmp_path, few()))
    for split in ("VAL", "TEST"):
        dataset = CaptionDataset(folder, base, split)
        assert (len(dataset), dataset.n_images, dataset.references(load_word_map(folder, base))) == (0, 0, [])


# ---- before any work -------------------------------------------------------------------------------------------------

def test_all_missing_pictures_are_told_before_any_work(tmp_path):
    source = write_set(tmp_path, few(9))
    for i in range(7):
        (tmp_path / f"{i}.png").unlink()
    with refused("7 of 9 pictures", *(str(tmp_path / f"{i}.png") for i in range(5)), f"under {tmp_path}",
                 "--image_folder"):
        prepare(source)
    with pytest.raises(InputError, match=r"4\.png, \.\.\.") as caught:
        prepare(source)
    assert "5.png" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_too_little_space_is_told_before_any_work(tmp_path, monkeypatch):
    source, pixels = write_set(tmp_path, few(100)), 100 * 3 * 256 * 256
    usage = SimpleNamespace(total=2 * pixels, free=pixels)  # the captions need some too
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with refused(str(tmp_path / "out"), "0.02 GB are needed and 0.02 GB free", "--output_folder"):
        prepare(source)
    assert listing(tmp_path / "out") == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))  # as some network folders
    prepare(write_set(tmp_path / "another", few(2)))


LAYOUTS = {
    "a list": [image("0.png", "train", "a")],
    "no images": {"pictures": []},
    "images without sentences": {"images": [{"filename": "0.png", "split": "train"}]},
    "images without split": {"images": [{"filename": "0.png", "sentences": [{"tokens": ["a"]}]}]},
    "images without filename": {"images": [{"split": "train", "sentences": [{"tokens": ["a"]}]}]},
    "sentences without tokens": {"images": [{"filename": "0.png", "split": "train", "sentences": ["a dog"]}]},
    "tokens not yet split": {"images": [{"filename": "0.png", "split": "train", "sentences": [{"tokens": "a dog"}]}]},
    "an id that is no number": {"images": [image("0.png", "train", "a", imgid="first")]},
    "no training pictures": {"images": [image("0.png", "val", "a")]},
    "only long captions": {"images": [image("0.png", "train", "a b c d e f")]},
    "captions without words": {"images": [image("0.png", "train", "")]},
    "special words in captions": {"images": [image("0.png", "train", "a <unk>")]},
}


@pytest.mark.parametrize("data", LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts_are_refused_by_name(tmp_path, data):
    draw(tmp_path / "0.png")
    (tmp_path / "set.json").write_text(json.dumps(data))
    with refused(str(tmp_path / "set.json")):
        prepare(tmp_path / "set.json")
    assert not (tmp_path / "out").exists()


def test_a_damaged_json_is_named(tmp_path):
    (tmp_path / "set.json").write_text('{"images": [')
    with refused(str(tmp_path / "set.json"), "not a JSON file"):
        prepare(tmp_path / "set.json")


# ---- what is there already -------------------------------------------------------------------------------------------

def test_the_same_input_is_reused_untouched(tmp_path, monkeypatch, capsys):
    """A relative path to the same pictures is the same input."""
    folder, base = prepare(write_set(tmp_path, few()))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(tmp_path / "set.json")[1] == base
    assert "nothing to do" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert create_input_files.create_input_files("mine", "set.json", ".", 2, 0, "out", 5) == base
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_a_killed_run_left_and_somebody_thinned_is_no_success(tmp_path):
    folder, base = prepare(write_set(tmp_path, few()))
    with h5py.File(folder / f"TRAIN_IMAGES_{base}.hdf5", "r") as file:
        ready = folder / f".{base}.{file.attrs['made_from'][:16]}.ready"
    ready.mkdir()
    for path in list(folder.glob("*_IMAGES_*")):
        path.rename(ready / path.name)
    for path in folder.glob("*.json"):
        path.unlink()
    with refused(f"files named {base} that are not whole", "--overwrite"):
        prepare(tmp_path / "set.json")


def change_a_word(folder: Path, base: str) -> None:
    write_set(folder.parent, [*few(2), image("2.png", "train", "another picture 2", "noise")])


def leave_out_a_picture(folder: Path, base: str) -> None:
    write_set(folder.parent, few(2))


def change_picture(folder: Path, base: str) -> None:
    draw(folder.parent / "0.png", seed=9, size=(20, 20))


def lose_file(folder: Path, base: str) -> None:
    (folder / f"VAL_CAPLENS_{base}.json").unlink()


def keep_only_the_word_map(folder: Path, base: str) -> None:
    for path in folder.glob("[!W]*"):
        path.unlink()


def damage_archive(folder: Path, base: str) -> None:
    os.truncate(folder / f"TRAIN_IMAGES_{base}.hdf5", 1000)


def make_it_the_tutorials(folder: Path, base: str) -> None:
    with h5py.File(folder / f"TEST_IMAGES_{base}.hdf5", "a") as file:
        del file.attrs["made_from"]


@pytest.mark.parametrize("change", [change_a_word, leave_out_a_picture, change_picture, lose_file,
                                    keep_only_the_word_map, damage_archive, make_it_the_tutorials])
def test_other_files_are_replaced_only_when_asked(tmp_path, change):
    folder, base = prepare(write_set(tmp_path, few()))
    change(folder, base)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with refused(str(folder), base, "--overwrite"):
        prepare(tmp_path / "set.json")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    prepare(tmp_path / "set.json", overwrite=True)
    assert len(listing(folder)) == 13
    pictures = json.loads((tmp_path / "set.json").read_text())["images"]
    assert len(CaptionDataset(folder, base, "TRAIN")) == 2 * len(pictures)


def test_other_settings_are_refused_too(tmp_path):
    prepare(write_set(tmp_path, few()))
    with refused("--overwrite"):
        prepare(tmp_path / "set.json", max_len=6)


def test_leftovers_of_a_killed_run_do_not_matter(tmp_path):
    left = tmp_path / "out" / ".mine_2_cap_per_img_0_min_word_freq.12345.tmp"
    left.mkdir(parents=True)
    (left / "rubbish.json").write_text("[")
    folder, _ = prepare(write_set(tmp_path, few()))
    assert len(listing(folder)) == 13


# ---- whole or not at all ---------------------------------------------------------------------------------------------

def test_an_unreadable_picture_leaves_nothing_behind(tmp_path):
    source = write_set(tmp_path, few(20) * 3)
    (tmp_path / "9.png").write_bytes((tmp_path / "9.png").read_bytes()[:60])
    with refused(str(tmp_path / "9.png"), "cannot be read"):
        prepare(source, workers=2)
    assert listing(tmp_path / "out") == []


def test_all_unreadable_pictures_are_named_together(tmp_path):
    source = write_set(tmp_path, few(20))
    for name in ("9.png", "11.png", "19.png"):
        (tmp_path / name).write_bytes(b"damaged")
    with refused(f"{tmp_path / '9.png'}: this picture cannot be read",
                 f"(and 2 more: {tmp_path / '11.png'}, {tmp_path / '19.png'})", "; --skip_unreadable leaves out"):
        prepare(source, workers=2)
    assert listing(tmp_path / "out") == []


def test_unreadable_pictures_can_be_left_out(tmp_path, capsys):
    """Counted and named; the rest is as if the captions' file had not held them, but for the words."""
    images = [image(f"{i}.png", ("train", "val", "test")[i % 3], f"a picture {i}", "noise") for i in range(24)]
    source = write_set(tmp_path, images)
    for name in ("9.png", "12.png", "13.png"):
        (tmp_path / name).write_bytes(b"damaged")
    written = prepare(source, workers=2, skip_unreadable=True)
    said = capsys.readouterr().out
    assert f"TRAIN: 2 pictures left out, which cannot be read: {tmp_path / '9.png'}, {tmp_path / '12.png'}\n" in said
    assert f"VAL: 1 picture left out, which cannot be read: {tmp_path / '13.png'}\n" in said
    assert "TRAIN: 6 pictures, 12 captions\nVAL: 7 pictures, 14 captions\nTEST: 8 pictures, 16 captions\n" in said
    words = load(written, "WORDMAP")
    assert "13" in words
    source.write_text(json.dumps({"images": [each for i, each in enumerate(images) if i not in {9, 12, 13}]}))
    without = prepare(source, out="without")
    reverse = {index: word for word, index in words.items()}
    for split in SPLITS:
        assert load(written, f"{split}_CAPLENS") == load(without, f"{split}_CAPLENS")
        assert load(written, f"{split}_REFERENCES") == load(without, f"{split}_REFERENCES")
        other = {index: word for word, index in load(without, "WORDMAP").items()}
        assert [[reverse[i] for i in row] for row in load(written, f"{split}_CAPTIONS")] == [
            [other[i] for i in row] for row in load(without, f"{split}_CAPTIONS")]
        one, two = (CaptionDataset(*each, split) for each in (written, without))
        assert np.array_equal(one.images[:], two.images[:]) and len(one.image_ids) == len(two.image_ids)
    assert one.image_ids == list(range(2, 24, 3))


@pytest.mark.parametrize("split", ["train", "val"])
def test_of_a_split_something_must_remain(tmp_path, split):
    """Else the flag would leave a set without validation, say; and it is not named as a remedy."""
    source = write_set(tmp_path, [*few(), image("x.png", split, "a"), image("y.png", "test", "a")])
    for i in range(3 if split == "train" else 0):
        (tmp_path / f"{i}.png").write_bytes(b"damaged")
    (tmp_path / "x.png").write_bytes(b"damaged")
    with pytest.raises(InputError) as caught:
        prepare(source, skip_unreadable=True)
    assert str(tmp_path / "x.png") in str(caught.value) and "--skip_unreadable" not in str(caught.value)
    assert listing(tmp_path / "out") == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_fills_up_is_named(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("preparing.pixels.PixelWriter.__getitem__", lambda *_: OSError(errno.ENOSPC, "no space"))
    with refused("TRAIN_IMAGES_mine", "could not be written (No space left on device)"):
        prepare(write_set(tmp_path, few()), workers=workers)
    assert listing(tmp_path / "out") == []


def test_a_failed_overwrite_leaves_the_old_files(tmp_path):
    folder, _ = prepare(write_set(tmp_path, few()))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    (tmp_path / "1.png").write_text("no picture")
    with refused("1.png"):
        prepare(tmp_path / "set.json", overwrite=True)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


def test_no_file_has_its_name_before_all_are_written(tmp_path, monkeypatch):
    seen = []
    images = [*few(), image("v.png", "val", "a"), image("t.png", "test", "a")]
    monkeypatch.setattr("preparing.pixels.check_pixels",
                        lambda *_: seen.append([name for name in listing(tmp_path / "out") if name[0] != "."]))
    prepare(write_set(tmp_path, images))
    assert seen == [[], [], []]


CHECKS = (np.indices((256, 256)).sum(0) % 2)[..., None].repeat(3, -1).astype(np.uint8)


@pytest.mark.parametrize("pixels, measured", [
    (CHECKS, "mean 0.50, spread 0.50"), (np.full_like(CHECKS, 200), "mean 200.00, spread 0.00"),
    (CHECKS * 2 + 120, "mean 121.00, spread 1.00")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_near_black_and_near_constant_pictures_stop_it(tmp_path, pixels, measured, split):
    images = [image(f"{i}.png", split, "a") for i in range(3)]
    for i in range(3):
        draw(tmp_path / f"{i}.png", pixels)
    with refused(split.upper(), str(tmp_path / "0.png"), measured):
        prepare(write_set(tmp_path, [*images, *[image("good.png", "train", "a")] * (split == "test")]))
    assert listing(tmp_path / "out") == []


def test_a_few_dark_pictures_among_good_ones_are_fine(tmp_path, capsys):
    """But they are counted, and named."""
    for i in range(4):
        draw(tmp_path / f"{i}.png", CHECKS * i)
    folder, base = prepare(write_set(tmp_path, few(10)))
    assert CaptionDataset(folder, base, "TRAIN").n_images == 10
    names = ", ".join(str(tmp_path / f"{i}.png") for i in range(4))
    assert f"TRAIN: 4 pictures of one colour; look at them: {names}\n" in capsys.readouterr().out


# ---- tables of one's own ---------------------------------------------------------------------------------------------

def table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    (folder / "mine.csv").write_text(text, encoding=encoding)
    return folder / "mine.csv"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_is_split_into_lower_case_words_without_punctuation(tmp_path, encoding):
    path = table(tmp_path, 'image, caption, split\n1.png, "A man, his Dog\'s ball (red).", Train\n'
                           "sub/2.png,Ein  Mädchen!,val\n1.png,#2 \"dogs\" run-around,train\n\n", encoding)
    assert from_text(path)["images"] == [
        image("1.png", "train", "a man his dogs ball red", "2 dogs runaround", imgid=0),
        image("sub/2.png", "val", "ein mädchen", imgid=1)]


@pytest.mark.parametrize("count, val, test", [(100, 10, 10), (29, 2, 2), (9, 1, 1), (3, 1, 1), (2, 0, 0)])
def test_without_a_split_pictures_fall_80_10_10(tmp_path, count, val, test):
    """Each picture with all its captions in one split, the same each time."""
    path = table(tmp_path, "caption,image\n" + "".join(f"a dog,{i % count}.png\n" for i in range(2 * count)))
    images = from_text(path)["images"]
    splits = [each["split"] for each in images]
    assert (splits.count("val"), splits.count("test"), splits.count("train")) == (val, test, count - val - test)
    assert [each["filename"] for each in images] == [f"{i}.png" for i in range(count)]
    assert all(len(each["sentences"]) == 2 for each in images)
    assert from_text(path)["images"] == images


def test_the_fixed_split_stays_what_it_was(tmp_path):
    """People's data sets would change under them: these very pictures have always been held out."""
    images = from_text(table(tmp_path, "image,caption\n" + "".join(f"{i},dog\n" for i in range(30))))["images"]
    assert [i for i in range(30) if images[i]["split"] == "val"] == [3, 10, 18]
    assert [i for i in range(30) if images[i]["split"] == "test"] == [0, 5, 17]


TABLES = {
    "nothing": ("", "columns image, caption"),
    "only a header": ("image,caption\n", "columns image, caption"),
    "other columns": ("file,text\n1.png,a\n", "columns image, caption"),
    "semicolons without quotes": ("image;caption\n1.png;a; b\n", "line 2: not 2 values; a caption with semicolons"),
    "a missing value": ("image,caption\n1.png,a\n1.png\n", "line 3"),
    "a comma without quotes": ("image,caption\n1.png,a dog, running\n", "line 2: not 2 values"),
    "no picture": ("image,caption\n1.png,a\n,b\n", "line 3"),
    "no caption": ("image,caption\n1.png,a\n1.png,\n", "line 3"),
    "a caption of punctuation": ("image,caption\n1.png,...\n", "line 2"),
    "a row of commas": ("image,caption,split\n1.png,a,train\n,,\n", "line 3"),
    "an unknown split": ("image,caption,split\n1.png,a,train\n2.png,b,validation\n", "line 3: the split 'validation'"),
    "a split left blank": ("image,caption,split\n1.png,a,train\n1.png,b,\n", "line 3: the split ''"),
    "two splits": ("image,caption,split\n1.png,a,train\n1.png,b,val\n", "line 3: 1.png is in two splits, train and"),
    "an open quote": ('image,caption\n1.png,"a\n2.png,b\n', "not a table"),
    "an early quote": ('image,caption\n1.png,"a dog\n2.png,"b cat\n', "not a table"),
    "an open quote's line": ('image,caption\n\n"1\n.png",b\n"2\n.png","a\n3.png,b\n', "line 6: not a table, the "
                             "quote that opens here is never closed"),
    "an open quote after a blank": ('image,caption\n1.png, "a, b"\n2.png, "a\n3.png,b\n', "line 3: not a table, the "
                                    "quote that opens here is never closed"),
    "an early quote's lines": ('image,caption\n1.png,"a dog\n2.png,"b cat\n', "line 2: not a table, the quote that "
                               "opens here ends in line 3"),
    "a quote out of place": ('image,caption\n1.png,b\n2.png,"Dogs" run\n', "line 3: not a table, the quote that opens "
                             "here ends in line 3 before the value does; put quotes around the whole value"),
    "a huge value": (f"image,caption\n1.png,b\n2.png,{'a ' * 70_000}\n", "line 3: not a table, a value of more than"),
    "a huge value in quotes": (f'image,caption\n1.png,"{"a " * 70_000}"\n', "line 2: not a table, a value of more "),
    "an open quote and much after it": (f'image,caption\n1.png,b\n2.png,"a\n{"3.png,b" * 70_000}', "line 3: not a "
                                        "table, the quote that opens here is never closed"),
    "a row of two lines": ('image,caption\n1.png,"a\nb",c\n', "line 2: not 2 values"),
}


@pytest.mark.parametrize("text, part", TABLES.values(), ids=TABLES)
def test_a_wrong_table_is_refused_with_the_line(tmp_path, text, part):
    with refused(str(tmp_path / "mine.csv"), part):
        from_text(table(tmp_path, text))


def test_a_table_that_is_not_there_or_not_text_is_named(tmp_path):
    with refused("mine.csv", "--captions_csv"):
        from_text(tmp_path / "mine.csv")
    (tmp_path / "mine.csv").write_bytes(b"image,caption\n\xff\xfe,a\n")
    with refused("mine.csv", "UTF-8"):
        from_text(tmp_path / "mine.csv")


# ---- the command -----------------------------------------------------------------------------------------------------

def test_main_prints_counts_vocabulary_and_unknown_words(tmp_path, capsys):
    write_set(tmp_path, [image("1.png", "train", "a dog runs", "a dog"), image("2.png", "restval", "a b c d e f"),
                         image("3.png", "val", "dog a"), image("4.png", "test", "a cat"), image("5.png", "extra", "a")])
    base = main(get_parser().parse_args(["--dataset", "mine", "--karpathy_json_path", str(tmp_path / "set.json"),
                                         "--captions_per_image", "3", "--min_word_freq", "1", "--max_len", "4",
                                         "--output_folder", str(tmp_path / "out"), "--workers", "1"]))
    assert base == "mine_3_cap_per_img_1_min_word_freq"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'set.json'}: Karpathy's layout, splits as it says"
    assert lines[1].startswith("3 pictures need 0.00 GB in")
    assert lines[2:5] == ["TRAIN: 1 pictures, 2 captions", "VAL: 1 pictures, 1 captions",
                          "TEST: 1 pictures, 1 captions"]
    assert lines[5].startswith("1 pictures left out: of the splits extra (1)")
    assert lines[6].startswith("1 pictures, 1 of 5 captions left out: longer than 4 words")
    assert lines[7].startswith("3 pictures have fewer than 3 captions")
    # a 6 times, dog 3; runs, b to f and cat once: 7 of 16 words
    assert lines[8] == ("vocabulary: 6 words with the 4 special ones; 43.75 % of all words are <unk>, as they occur 1 "
                        "times or less; --min_word_freq 0 keeps all")
    assert lines[9].startswith("warning: 44 % of all words are <unk> or occur only once")
    assert lines[10:] == [f"next: python train.py --data_folder {tmp_path / 'out'} --data_name {base}"]
    assert len(load((tmp_path / "out", base), "TRAIN_CAPLENS")) == 3


@pytest.mark.parametrize("mark", ["sep=;\n", "sep=;\r\n", '"sep=;"\n', "SEP=;\n"])
def test_a_table_may_begin_with_excels_separator(tmp_path, mark):
    path = table(tmp_path, f"{mark}image;caption\n1.png;A dog, running\n")
    [found] = from_text(path)["images"]
    assert found["sentences"] == [{"tokens": ["a", "dog", "running"]}]
    with refused("line 4: not 2 values"):
        from_text(table(tmp_path, f"{mark}image;caption\n1.png;a\n2.png;b;c\n"))


def test_main_reads_a_table(tmp_path):
    for i in range(10):
        draw(tmp_path / "pictures" / f"{i}.png", seed=i)
    path = table(tmp_path, "image,caption\n" + "".join(f"{i}.png,A dog.\n" for i in range(10)))
    base = main(get_parser().parse_args(["--dataset", "dogs", "--captions_csv", str(path), "--image_folder",
                                         str(tmp_path / "pictures"), "--output_folder", str(tmp_path / "out")]))
    assert [CaptionDataset(tmp_path / "out", base, split).n_images for split in SPLITS] == [8, 1, 1]
    assert load((tmp_path / "out", base), "VAL_REFERENCES") == [[["a", "dog"]]]


def test_flags_default_to_the_tutorials_values():
    args = get_parser().parse_args([])
    assert (args.dataset, args.captions_per_image, args.min_word_freq, args.max_len) == ("coco", 5, 5, 50)


@pytest.mark.parametrize("flag, value, part", [
    ("--captions_per_image", "0", "1 or more"), ("--max_len", "0", "1 or more"), ("--workers", "0", "1 or more"),
    ("--min_word_freq", "-1", "0 or more")])
def test_numbers_have_a_range(flag, value, part, capsys):
    with pytest.raises(SystemExit) as stop:
        get_parser().parse_args([flag, value])
    assert stop.value.code == 2 and f"argument {flag}: {value}: a whole number of {part}" in capsys.readouterr().err


@pytest.mark.parametrize("flags, part", [
    (["--captions_csv", "set.json"], "cannot be used together"),
    (["--karpathy_json_path", "nowhere.json"], "nowhere.json: no such file"), (["--dataset", "my/set"], "--dataset")])
def test_wrong_flags_are_told_in_one_line(tmp_path, monkeypatch, flags, part):
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path, few())
    with refused(part):
        main(get_parser().parse_args(["--dataset", "mine", "--karpathy_json_path", "set.json", *flags]))
    assert not (tmp_path / "data").exists()


def test_a_table_needs_a_name_of_its_own(tmp_path):
    with refused("--dataset", "--captions_csv"):
        main(get_parser().parse_args(["--captions_csv", str(table(tmp_path, "image,caption\n1.png,a\n"))]))
