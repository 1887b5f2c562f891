"""One definition of a word, at every way in; one spelling of each; and what a summary says of those left out."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused
from PIL import Image
from test_create_input_files import image, load, prepare, table, write_set
from test_datasets import BASE, WORDS, old, put  # noqa: F401 (a fixture)

from datasets import CaptionDataset, load_word_map, read_image
from preparing.tables import from_text
from safety.errors import InputError
from safety.pictures import find_pictures
from safety.words import is_caption, is_word, normal, words_in

# ---- one spelling ----------------------------------------------------------------------------------------------------

SPELLINGS = {
    "an apostrophe": ("man's", ["man\u2019s", "man\u2018s", "man\u02bcs", "man\u00b4s", "man\u2032s", "man\uff07s"]),
    "quotes": ('"dog"', ["\u201cdog\u201d", "\u201edog\u201c", "\u00abdog\u00bb", "\u2033dog\u2033"]),
    "a hyphen": ("t-shirt", ["t\u2010shirt", "t\u2011shirt", "t\u2013shirt", "t\u2014shirt", "t\u2212shirt"]),
    "an ellipsis": ("dog...", ["dog\u2026"]),
    "an accent": ("caf\u00e9", ["cafe\u0301"]),
    "two accents": ("Vi\u1ec7t", ["Vie\u0323\u0302t", "Vie\u0302\u0323t"]),
    "what is not seen": ("dog", ["dog\u200b", "\ufeffdog", "do\u00adg", "d\u2060og", "dog\u200d", "\u200edog",
                                 "do\u200cg"]),
    "a heart": ("\u2764", ["\u2764\ufe0f"]),
}


@pytest.mark.parametrize(("word", "others"), SPELLINGS.values(), ids=SPELLINGS)
def test_a_word_has_one_spelling(word: str, others: list[str]) -> None:
    assert {normal(each) for each in (word, *others)} == {word}
    assert len({tuple(words_in(f"A {each} runs")) for each in (word, *others)}) == 1


def test_ascii_stays_byte_for_byte() -> None:
    everything = "".join(map(chr, range(128)))
    assert normal(everything) == everything


@pytest.mark.parametrize(("caption", "words"), [
    ("A man, his Dog's ball (red).", "a man his dogs ball red"), ("#2 \"dogs\" run-around", "2 dogs runaround"),
    ("\u0631\u062c\u0644\u060c \u0643\u0644\u0628\u061f", "\u0631\u062c\u0644 \u0643\u0644\u0628"),
    ("\u0631\u062c\u0644\u060c\u0643\u0644\u0628", "\u0631\u062c\u0644 \u0643\u0644\u0628"),
    ("\u4e00\u4e2a \u7537\u4eba\uff0c\u9a91\u9a6c\u3002", "\u4e00\u4e2a \u7537\u4eba \u9a91\u9a6c"),
    ("\u300c\u72ac\u300d\u3000\u8d70\u308b", "\u72ac \u8d70\u308b"), ("\u00bfQu\u00e9 perro?", "qu\u00e9 perro"),
    ("una col\u00b7lecci\u00f3", "una collecci\u00f3"), ("a dog \u2014 a cat", "a dog a cat"),
    ("\u00c9t\u00e9", "\u00e9t\u00e9"), ("E\u0301te\u0301", "\u00e9t\u00e9"), ("a\u00a0dog", "a dog"),
    ("\u2026 \u200b \u060c", "")])
def test_a_caption_is_split_into_words_without_punctuation(caption: str, words: str) -> None:
    assert words_in(caption) == words.split()


def test_spellings_are_one_word_in_the_files(tmp_path: Path) -> None:
    """In tokens as in a table; and what is counted is the word, not its spelling."""
    source = write_set(tmp_path, [image("1.png", "train", "man's caf\u00e9 dog"),
                                  image("2.png", "train", "man\u2019s cafe\u0301 dog\u200b")])
    written = prepare(source, min_word_freq=1)
    assert list(load(written, "WORDMAP")) == ["man's", "caf\u00e9", "dog", "<unk>", "<start>", "<end>", "<pad>"]
    assert load(written, "TRAIN_REFERENCES") == [[["man's", "caf\u00e9", "dog"]]] * 2
    rows = from_text(table(tmp_path, "image,caption\n1.png,A man\u2019s dog\u2026\n1.png,a man's DOG...\n"))["images"]
    assert rows[0]["sentences"] == [{"tokens": ["a", "mans", "dog"]}] * 2


# ---- what is a word --------------------------------------------------------------------------------------------------

NO_WORDS = ["", "dog\n", " dog", "a dog", "dog\t", "a\u00a0dog", "a\u3000dog", "dog\x00", "\x1b[2J", "dog\x7f", "\x85",
            "\ud800"]


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("word", NO_WORDS)
def test_what_is_no_word_is_none_anywhere(word: str, tmp_path: Path) -> None:
    """In a JSON, a word map and references: the file is named, and the picture or the word."""
    assert not is_word(word) and not is_caption(["a", word])
    with refused("set.json: 1 captions", "1.png", "white space", "mend"):
        prepare(write_set(tmp_path / "set", [
            image("0.png", "train", "a"), {**image("1.png", "train"), "sentences": [{"tokens": ["a", word]}]}]))
    put(tmp_path, "VAL_REFERENCES", [[["a", word]]])
    with refused(f"VAL_REFERENCES_{BASE}.json", "picture 0", "words", "--overwrite"):
        CaptionDataset(tmp_path, BASE, "VAL").references(WORDS)
    put(tmp_path, "WORDMAP", {**WORDS, word: len(WORDS)})
    with refused(f"WORDMAP_{BASE}.json: {word!r} is no word", "--overwrite"):
        load_word_map(tmp_path, BASE)


@pytest.mark.parametrize("word", ["dog", "<unk>", "$\\frac{", "man's", "\u72d7", "\u2764\ufe0f",
                                  "\u0645\u06cc\u200c\u0631", ","])
def test_words_of_all_kinds_are_words(word: str) -> None:
    assert is_word(word) and is_caption([word])


def test_what_is_left_of_a_token_without_its_invisible_letters_must_be_a_word(tmp_path: Path) -> None:
    with refused("set.json", "1.png ['a', '']"):
        prepare(write_set(tmp_path, [image("1.png", "train", "a \u200b")]))


@pytest.mark.parametrize("split", ["train", "test", "another"])
def test_captions_without_a_word_are_named_by_their_pictures(split: str, tmp_path: Path) -> None:
    """Five of them, and how many there are; once they are deleted, as the message says, the rest is prepared."""
    images = [image("0.png", "train", "a dog"), *(image(f"{i}.png", split, "a cat", "") for i in range(1, 8))]
    with refused("set.json: 7 captions have no word", "1.png []", "5.png [], ...", "delete them"):
        prepare(write_set(tmp_path, images))
    for each in images[1:]:
        del each["sentences"][1]
    prepare(write_set(tmp_path, images))


def test_a_word_of_a_table_has_no_control_characters(tmp_path: Path) -> None:
    Image.effect_noise((30, 30), 90).save(tmp_path / "1.png")
    with refused("mine.csv: 1 captions", "1.png ['a', 'dog\\x07']"):
        prepare(tmp_path / "mine.csv", captions_csv=table(tmp_path, "image,caption\n1.png,a dog\x07\n"))


@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("references", [[["a dog"]], [[]], [["a"], "dog"], [[["a"]]], ["a"], {"a": 1}])
def test_references_are_lists_of_words(references: object, tmp_path: Path) -> None:
    put(tmp_path, "VAL_REFERENCES", [references])
    with refused(f"VAL_REFERENCES_{BASE}.json"):
        CaptionDataset(tmp_path, BASE, "VAL").references(WORDS)


@pytest.mark.usefixtures("old")
def test_an_old_folders_empty_captions_are_no_references(tmp_path: Path) -> None:
    """An empty caption would match an empty one; a picture that has no other is named."""
    put(tmp_path, "VAL_CAPTIONS", [[5, 6, 0, 0], [5, 1, 6, 0]])
    put(tmp_path, "VAL_CAPLENS", [2, 3])
    assert CaptionDataset(tmp_path, BASE, "VAL").references(WORDS) == [[["a"]]]
    put(tmp_path, "VAL_CAPTIONS", [[5, 6, 0, 0]] * 2)
    put(tmp_path, "VAL_CAPLENS", [2, 2])
    with refused("picture 0 has no captions"):
        CaptionDataset(tmp_path, BASE, "VAL").references(WORDS)


# ---- what a summary says ---------------------------------------------------------------------------------------------

def summary(capsys: pytest.CaptureFixture[str], folder: Path, images: list[dict], **options: object) -> list[str]:
    capsys.readouterr()
    prepare(write_set(folder, images), overwrite=True, **options)
    return capsys.readouterr().out.splitlines()


def test_captions_that_are_too_long_are_counted_and_what_keeps_them_is_named(tmp_path, capsys) -> None:
    images = [image(f"{i}.png", ("train", "val", "test")[i % 3], "a dog runs", "a b " * 4, "a b " * (i + 1))
              for i in range(6)] + [image("6.png", "val", "a b " * 7)]
    lines = summary(capsys, tmp_path, images, max_len=7)
    assert "1 pictures, 10 of 19 captions left out: longer than 7 words; --max_len 14 keeps all" in lines
    lines = summary(capsys, tmp_path, images, max_len=14)
    assert "VAL: 3 pictures, 7 captions" in lines and not [line for line in lines if "longer than" in line]


def test_a_split_that_is_left_empty_is_told(tmp_path, capsys) -> None:
    images = [image("0.png", "train", "a dog"), image("1.png", "val", "a " * 9)]
    lines = summary(capsys, tmp_path, images)
    assert "VAL: 0 pictures, 0 captions" in lines and "TEST: 0 pictures, 0 captions" in lines
    told = [line for line in lines if "is empty" in line]
    assert [line.split(" is")[0] for line in told] == ["VAL", "TEST"]
    assert "train.py" in told[0] and f"in {tmp_path / 'set.json'} give some the split val" in told[0]
    images += [image("2.png", "val", "a"), image("3.png", "test", "a")]
    assert not [line for line in summary(capsys, tmp_path, images) if "is empty" in line]


def test_where_all_captions_are_too_long_the_flag_is_named_and_helps(tmp_path) -> None:
    source = write_set(tmp_path, [image("0.png", "train", "a " * 9)])
    with refused("no picture of the split train", "1 of 1 captions left out: longer than 5 words; --max_len 9 keeps"):
        prepare(source)
    prepare(source, max_len=9)


def test_pictures_of_other_splits_and_without_captions_are_counted_and_named(tmp_path, capsys) -> None:
    images = [image("0.png", "train", "a"), image("1.png", "dev", "a"), image("2.png", "dev", "a"),
              image("3.png", "TRAIN", "a"), image("4.png", "train"), image("5.png", "val")]
    lines = summary(capsys, tmp_path, images)
    assert any(line.startswith("3 pictures left out: of the splits dev (2), TRAIN (1); ") and "rename" in line
               for line in lines)
    assert any(line.startswith("2 pictures left out, without captions: 4.png, 5.png; write") for line in lines)


def test_pictures_that_are_there_twice_are_counted_and_named(tmp_path, capsys) -> None:
    images = [image("0.png", "train", "a"), image("1.png", "val", "a"), image("2.png", "train", "a")]
    again = [image("0.png", "test", "b"), image("0.png", "val", "b"), image("2.png", "train", "b"),
             image("1.png", "train")]
    lines = summary(capsys, tmp_path, images)
    assert not [line for line in lines if "several splits" in line or "more than once" in line]
    lines = summary(capsys, tmp_path, images + again)
    assert ("warning: 1 picture in several splits: 0.png (TEST, TRAIN, VAL); keep each in one, or the model is scored "
            "on pictures that it was trained on") in lines
    assert "2 pictures listed more than once: 1.png, 2.png; put all captions of a picture together" in lines
    assert not [line for line in lines if "without captions" in line]  # 1.png has some
    lines = summary(capsys, tmp_path, [*images, image("3.png", "train"), image("3.png", "val")])
    assert [line for line in lines if line.startswith("1 picture left out, without captions: 3.png; write")]


def test_repeated_and_unused_captions_are_counted(tmp_path, capsys) -> None:
    images = [image("0.png", "train", "a"), image("1.png", "train", "a", "b", "c"), image("2.png", "val", *"aaabbbc")]
    lines = summary(capsys, tmp_path, images, cpi=5)
    assert any(line.startswith("2 pictures have fewer than 5 captions, so that 6 captions are repetitions; ") and
               line.endswith("--captions_per_image 1 repeats none") for line in lines)
    assert any(line.startswith("1 pictures have more than 5 captions, of which 2 are not trained on; ") and
               line.endswith("--captions_per_image 7 takes all") for line in lines)
    assert not [line for line in summary(capsys, tmp_path, images, cpi=1) if "repet" in line]
    assert not [line for line in summary(capsys, tmp_path, images, cpi=7) if "not trained" in line]


def test_unknown_words_come_with_the_flag_that_keeps_them(tmp_path, capsys) -> None:
    images = [image("0.png", "train", *["a dog runs"] * 9, "a cat")]
    lines = summary(capsys, tmp_path, images, min_word_freq=5)
    assert ("vocabulary: 7 words with the 4 special ones; 3.45 % of all words are <unk>, as they occur 5 times or "
            "less; --min_word_freq 0 keeps all") in lines
    lines = summary(capsys, tmp_path, images, min_word_freq=0)
    assert "vocabulary: 8 words with the 4 special ones; 0.00 % of all words are <unk>" in lines
    assert not [line for line in lines if "warning" in line]


@pytest.mark.parametrize("min_word_freq", [0, 5])
def test_a_vocabulary_that_cannot_work_is_a_warning(min_word_freq, tmp_path, capsys) -> None:
    """Chinese without spaces: each caption is one word, that occurs once, whether it is in the vocabulary or not."""
    captions = ["\u4e00\u4e2a\u7537\u4eba" + chr(0x4e00 + i) for i in range(30)]
    unsplit = [image(f"{i}.png", "train", each) for i, each in enumerate(captions)]
    lines = summary(capsys, tmp_path, unsplit, min_word_freq=min_word_freq, max_len=9)
    assert any(line.startswith("warning: 100 % of all words are <unk> or occur only once") and "spaces" in line
               for line in lines)
    split = [image(f"{i}.png", "train", " ".join(each)) for i, each in enumerate(captions)]
    assert not [line for line in summary(capsys, tmp_path, split, min_word_freq=min_word_freq, max_len=9)
                if "warning" in line]


# ---- where pictures are ----------------------------------------------------------------------------------------------

def test_links_in_the_image_folder_are_followed(tmp_path: Path) -> None:
    """A linked folder (COCO on another disk), links to single files (DVC, git-annex) and links to links (a hub)."""
    for i in range(3):
        (tmp_path / "disk" / "coco").mkdir(parents=True, exist_ok=True)
        Image.effect_noise((30, 30), 90 + i).save(tmp_path / "disk" / "coco" / f"{i}.png")
    own = tmp_path / "own"
    own.mkdir()
    (own / "train2014").symlink_to(tmp_path / "disk" / "coco")
    (own / "blob").symlink_to("../disk/coco/1.png")
    (own / "1.png").symlink_to("blob")
    (tmp_path / "linked").symlink_to(own)
    images = [image("train2014/0.png", "train", "a"), image("1.png", "train", "b"),
              image("train2014/2.png", "val", "a")]
    (own / "set.json").write_text(json.dumps({"images": images}))
    plain, base = prepare(own / "set.json")
    assert CaptionDataset(plain, base, "TRAIN").n_images == 2
    assert prepare(tmp_path / "linked" / "set.json", out="second")


@pytest.mark.parametrize("name", ["sub/../0.png", "../set/0.png", "link/../0.png", "{folder}/../set/0.png"])
def test_a_name_that_goes_upwards_is_refused(name: str, tmp_path: Path) -> None:
    """Even one that comes back, as after a link upwards is elsewhere."""
    folder = tmp_path / "set"
    write_set(folder, [image("0.png", "train", "a"), image("sub/1.png", "train", "a")])
    (tmp_path / "disk").mkdir()
    Image.effect_noise((30, 30), 90).save(tmp_path / "0.png")
    (folder / "link").symlink_to(tmp_path / "disk")
    (folder / "set.json").write_text(json.dumps({"images": [image(name.format(folder=folder), "train", "a")]}))
    with refused("leads to", "by way of '..'", "set.json", "write them without"):
        prepare(folder / "set.json")


def test_a_name_from_the_root_is_refused_unless_the_folder_is_named(tmp_path: Path, monkeypatch) -> None:
    """The remedy of the message works, through a link too."""
    from create_input_files import create_input_files
    folder, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.effect_noise((30, 30), 90).save(tmp_path / "real.png")
    (elsewhere / "0.png").symlink_to(tmp_path / "real.png")
    folder.mkdir()
    (folder / "set.json").write_text(json.dumps({"images": [image(str(elsewhere / "0.png"), "train", "a")]}))
    with refused(f"outside {folder}", "--image_folder"):
        prepare(folder / "set.json")
    assert create_input_files("mine", folder / "set.json", elsewhere, 1, 0, tmp_path / "out", workers=0)
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((30, 30), 90).save(elsewhere / "0.png")
    assert create_input_files("mine", folder / "set.json", "elsewhere", 1, 0, tmp_path / "second", workers=0)


def test_a_name_from_the_root_may_go_by_another_link(tmp_path: Path) -> None:
    """To the folder; and the pictures in it may be links themselves."""
    from create_input_files import create_input_files
    folder, alias = tmp_path / "set", tmp_path / "alias"
    (folder / "sub").mkdir(parents=True)
    alias.symlink_to(folder)
    Image.effect_noise((30, 30), 90).save(tmp_path / "real.png")
    (folder / "sub" / "0.png").symlink_to(tmp_path / "real.png")
    for named, given in ((folder, alias), (alias, folder)):
        (tmp_path / "set.json").write_text(json.dumps({"images": [image(str(named / "sub/0.png"), "train", "a")]}))
        assert create_input_files("mine", tmp_path / "set.json", given, 1, 0, tmp_path / "out", workers=0,
                                  overwrite=True)
    with refused(f"outside {folder / 'sub' / 'other'}"):
        create_input_files("mine", tmp_path / "set.json", folder / "sub" / "other", 1, 0, tmp_path / "out")


def test_a_caption_in_a_names_place_is_a_missing_picture(tmp_path: Path) -> None:
    source = write_set(tmp_path, [image("0.png", "train", "a")])
    source.write_text(json.dumps({"images": [image("a dog " * 50, "train", "a")]}))
    with refused("1 of 1 pictures are missing", "(longer than a file's name can be)", "--image_folder"):
        prepare(source)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are in Unicode")
def test_where_names_are_not_in_utf8_the_remedy_is_named_and_works(tmp_path: Path) -> None:
    Image.effect_noise((30, 30), 90).save(tmp_path / "caf\u00e9.png")
    (tmp_path / "x.csv").write_text("image,caption\ncaf\u00e9.png,a\n", encoding="utf-8")
    command = [sys.executable, "create_input_files.py", "--dataset", "x", "--captions", tmp_path / "x.csv", "--workers",
               "1", "--output_folder", tmp_path / "out"]
    locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=locale, capture_output=True, text=True)
    assert done.returncode == 1 and "caf\\u00e9.png (names of files are taken to be in ascii; if " in done.stderr
    [variable] = re.findall(r"set (\w+=1)", done.stderr)
    locale |= [variable.split("=")]
    assert subprocess.run(command, cwd=Path(__file__).parent.parent, env=locale, capture_output=True).returncode == 0


@pytest.mark.parametrize(("there", "named", "told"), [
    ("cafe\u0301.png", "caf\u00e9.png", ", its accents in another form of Unicode"),
    ("caf\u00e9.png", "cafe\u0301.png", ", its accents in another form of Unicode"),
    ("IMG.PNG", "img.png", ""), ("Sub/a.png", "sub/a.png", ""), ("sub/a.png", "sub\\a.png", ""),
    ("Sub/Cafe\u0301.PNG", "sub\\caf\u00e9.png", "")])
def test_a_missing_picture_is_looked_for_under_other_spellings(there, named, told, tmp_path: Path, monkeypatch) -> None:
    """And once both are named alike, as the message says, it is found."""
    source = write_set(tmp_path, [image(there, "train", "a")])
    source.write_text(json.dumps({"images": [image(named, "train", "a")]}))
    for ask, begin in ((lambda: prepare(source), "1 of 1 pictures are missing: "), (lambda: read_image(
            tmp_path / named), ""), (lambda: find_pictures([str(tmp_path / named)]), "--img ")):
        with refused(begin, f"{named}", f"(there is {tmp_path / there}{told}: name both alike)"):
            ask()
    monkeypatch.chdir(tmp_path)
    with refused(f"--img {named}: ", f"(there is {there}"):
        find_pictures([named])
    (tmp_path / named).parent.mkdir(exist_ok=True)
    (tmp_path / there).rename(tmp_path / named)
    assert prepare(source) and find_pictures([str(tmp_path / named)])


def test_a_picture_that_is_nowhere_is_only_missing(tmp_path: Path) -> None:
    source = write_set(tmp_path, [image("sub/0.png", "train", "a")])
    (tmp_path / "sub" / "0.png").unlink()
    (tmp_path / "1.png").symlink_to("annex/1.png")
    for name in ("sub/0.png", "sub/0.png/1.png", "/nowhere/0.png", "sub"):
        source.write_text(json.dumps({"images": [image(name, "train", "a")]}))
        with pytest.raises(InputError, match=r"/(0\.png|1\.png|sub)\. Looked under"):
            prepare(source)
    (tmp_path / "disk").symlink_to("/mnt/gone")
    for name, link, to in (("1.png", "1.png", "annex/1.png"), ("disk/1.png", "disk", "/mnt/gone")):
        source.write_text(json.dumps({"images": [image(name, "train", "a")]}))
        with refused(f"{name} ({tmp_path / link} is a link to {to}, which is not there)"):
            prepare(source)


@pytest.mark.parametrize("text", ["辻\U000e0100", "d\u034fog", "do\u180bg", "개\u3164", "dog\u200b"])
def test_what_cannot_be_seen_is_not_part_of_a_word(text):
    assert normal(text) == "".join(each for each in text if each in "辻개dog")
