"""The layouts in which captions are published: known by their form, read to the same files, named when they are not."""
from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ENCODER, Prepared, refused
from test_create_input_files import draw, image, listing, load, prepare, write_set

import create_input_files
import train
from create_input_files import get_parser, main
from preparing.layouts import read_layout
from preparing.tables import FLICKR8K_LISTS, FLICKR8K_STRAY, from_text
from safety.errors import UsageError

SPLITS = ("train", "train", "train", "val", "test")
# In the order of Flickr8k's lists and of Karpathy's JSON, which is not that of the names.
KARPATHY = [image(f"{name}.jpg", split, f"a dog {name} runs", "the dog", imgid=i)
            for i, (name, split) in enumerate(zip("dbeac", SPLITS, strict=True))]
CAPTIONS = [(each["filename"], " ".join(sentence["tokens"]), each["split"])
            for each in KARPATHY for sentence in each["sentences"]]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def write_lists(folder: Path) -> None:
    for split, name in FLICKR8K_LISTS.items():
        write(folder / name, "".join(f"{each['filename']}\r\n" for each in KARPATHY if each["split"] == split))


def token_lines(rows: list[tuple[str, str, str]]) -> str:
    return "".join(f"{name}#{i % 2}\t{caption}\n" for i, (name, caption, _) in enumerate(rows))


def flickr8k(folder: Path) -> list[Path]:
    """In the names' order, as it is published, with captions of pictures that nobody has and that are in no list."""
    write_lists(folder)
    more = [("f.jpg", "a cat", ""), ("f.jpg", "one cat", ""), (FLICKR8K_STRAY, "a lake", "")]
    return [write(folder / "Flickr8k.token.txt", token_lines(sorted(CAPTIONS + more, key=lambda row: row[0])))]


def kaggle(folder: Path) -> list[Path]:
    write_lists(folder)
    rows = "".join(f"{name},{caption}\n" for name, caption, _ in sorted(CAPTIONS, key=lambda row: row[0]))
    return [write(folder / "captions.txt", f"image,caption\n{rows}")]


def table(separator: str, encoding: str, name: str = "mine.csv") -> Any:
    def write_table(folder: Path) -> list[Path]:
        rows = [("image", "caption", "split"), *CAPTIONS]
        return [write(folder / name, "".join(separator.join(row) + "\r\n" for row in rows), encoding)]
    return write_table


def karpathy_in_utf16(folder: Path) -> list[Path]:
    return [write(folder / "set.json", json.dumps({"images": KARPATHY}), "utf-16")]


def coco_data(*splits: str) -> dict[str, Any]:
    """COCO's own layout: sentences as written, pictures and captions in two lists."""
    images = [each for each in KARPATHY if each["split"] in splits]
    return {"info": {}, "images": [{"id": each["imgid"], "file_name": each["filename"]} for each in images],
            "annotations": [{"id": 10 * each["imgid"] + i, "image_id": each["imgid"],
                             "caption": " ".join(sentence["tokens"]).capitalize() + ".\n"}
                            for i in (0, 1) for each in images for sentence in [each["sentences"][i]]]}


def coco_apart(folder: Path) -> list[Path]:
    return [write(folder / f"captions_{split}2014.json", json.dumps(coco_data(split)))
            for split in ("train", "val", "test")]


LAYOUTS = {"Flickr8k's tokens": flickr8k, "Kaggle's captions": kaggle, "UTF-16": table("\t", "utf-16"),
           "big-endian UTF-16": table(";", "utf-16"), "semicolons and a mark": table(";", "utf-8-sig"),
           "tabs": table("\t", "utf-8"), "bars": table("|", "utf-8"), "a name of no meaning": table(",", "utf-8", "x"),
           "JSON in UTF-16": karpathy_in_utf16, "COCO's, apart": coco_apart}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_in_every_layout_the_files_are_the_same_byte_by_byte(tmp_path, layout):
    """All thirteen are those of Karpathy's JSON with the same splits."""
    folder, base = prepare(write_set(tmp_path, KARPATHY), out="karpathy")
    other = tmp_path / "other"
    assert create_input_files.create_input_files("mine", layout(tmp_path), tmp_path, 2, 0, other, 5) == base
    assert len(listing(folder)) == 13
    assert listing(other) == listing(folder)
    assert [name for name in listing(folder) if (folder / name).read_bytes() != (other / name).read_bytes()] == []


def splits_of(sources: list[Path], folder: Path) -> tuple[list[tuple[str, str]], str]:
    """Each picture's place and split, and what is said of the layout."""
    data, said = read_layout(sources, folder)
    return [(each["filename"], each["split"]) for each in data["images"]], said


# ---- Flickr8k and Flickr30k ------------------------------------------------------------------------------------------

def test_flickr8ks_lists_are_said_and_what_is_in_none_of_them(tmp_path):
    images, said = splits_of(flickr8k(tmp_path), tmp_path)
    assert images == [(each["filename"], each["split"]) for each in KARPATHY]
    assert "splits from Flickr8k's lists of names beside it (2 pictures that are in none of them are left out)" in said


def test_without_the_lists_a_fixed_seed_is_said_and_the_picture_that_nobody_has(tmp_path):
    [source] = flickr8k(tmp_path)
    for name in FLICKR8K_LISTS.values():
        (tmp_path / name).unlink()
    images, said = splits_of([source], tmp_path)
    assert [name for name, _ in images] == [f"{name}.jpg" for name in "abcdef"]
    assert [split for _, split in images].count("train") == 4
    assert "splits by a fixed seed, a tenth of the pictures each for VAL and TEST" in said
    assert FLICKR8K_STRAY in said


def test_lists_of_other_pictures_do_not_matter(tmp_path):
    write_lists(tmp_path)
    images, said = splits_of([write(tmp_path / "x", "1.jpg#0\tA dog\n2.jpg#0\tA dog\n3.jpg#0\tA cat")], tmp_path)
    assert "a fixed seed" in said
    assert len(images) == 3


def test_a_column_split_is_said_and_counts_more_than_the_lists(tmp_path):
    write_lists(tmp_path)
    images, said = splits_of([write(tmp_path / "x", "Image,Caption,Split\na.jpg,A dog,Test\n")], tmp_path)
    assert images == [("a.jpg", "test")]
    assert "splits from its column split" in said


def test_a_wrong_line_among_tokens_is_named(tmp_path):
    for line in ("1.jpg#1 a dog", "1.jpg\ta dog", "1.jpg#1\t "):
        with refused("x, line 3: not name#number, a tab and a caption"):
            from_text(write(tmp_path / "x", f"1.jpg#0\tA dog\n\n{line}\n"))
    with refused("x, line 2: ", "no word of caption"):
        from_text(write(tmp_path / "x", "1.jpg#0\tA dog\n1.jpg#1\t .\n"))


def test_flickr30ks_results(tmp_path):
    """Bars and blanks around them, quotes that are never closed, commas, and the one line that lacks a bar."""
    data = from_text(write(tmp_path / "results.csv", "image_name| comment_number| comment\n"
                          '7.jpg| 0| "Two" men , in hats .\n7.jpg| 1| "A man\n8.jpg| 4   A dog runs .\n'))
    assert [(each["filename"], [" ".join(sentence["tokens"]) for sentence in each["sentences"]])
            for each in data["images"]] == [("7.jpg", ["two men in hats", "a man"]), ("8.jpg", ["a dog runs"])]
    with refused("results.csv, line 2: not 3 values; a caption with bars cannot be quoted"):
        from_text(write(tmp_path / "results.csv", "image_name| comment_number| comment\n7.jpg| 0| a | b\n"))
    bars = write(tmp_path / "captions.txt", "image|caption\n7.jpg| 4 dogs\n")
    assert from_text(bars)["images"][0]["sentences"] == [{"tokens": ["4", "dogs"]}]
    commas = write(tmp_path / "captions.txt", "image_name,comment_number,comment\n7.jpg,0, A dog\n")
    assert from_text(commas)["images"][0]["sentences"] == [{"tokens": ["a", "dog"]}]


# ---- COCO's own ------------------------------------------------------------------------------------------------------

YEARS = {"train2014": "COCO_train2014_{:012}.jpg", "val2014": "COCO_val2014_{:012}.jpg", "train2017": "{:012}.jpg",
         "val2017": "{:012}.jpg"}


def coco_release(folder: Path, *parts: str, url: bool = False) -> list[Path]:
    """A release of COCO: in each part pictures 1 and 2, or 3 and 4, and a file of captions."""
    for part in parts:
        numbers = (1, 2) if part.startswith("train") else (3, 4)
        images = [{"id": i, "file_name": YEARS[part].format(i)} for i in numbers]
        for each in images:
            draw(folder / part / each["file_name"], seed=each["id"])
            each |= {"coco_url": f"http://images.cocodataset.org/{part}/{each['file_name']}"} if url else {}
        write(folder / f"captions_{part}.json", json.dumps({
            "images": images, "annotations": [{"image_id": i, "id": i, "caption": f"A dog {i}."} for i in numbers]}))
    return [folder / f"captions_{part}.json" for part in parts]


@pytest.mark.parametrize("year", [2014, 2017])
def test_cocos_two_files_are_two_splits_in_two_folders(tmp_path, year, capsys):
    parts = [f"train{year}", f"val{year}"]
    sources = coco_release(tmp_path, *parts)
    base = main(get_parser().parse_args(["--captions", *map(str, sources), "--output_folder", str(tmp_path / "out"),
                                         "--min_word_freq", "0", "--workers", "1"]))
    assert base.startswith("coco_5_cap_per_img")
    assert load((tmp_path / "out", base), "TRAIN_REFERENCES") == [[["a", "dog", "1"]], [["a", "dog", "2"]]]
    assert load((tmp_path / "out", base), "VAL_REFERENCES") == [[["a", "dog", "3"]], [["a", "dog", "4"]]]
    assert "COCO's layout, splits from the names of files and pictures" in capsys.readouterr().out
    assert splits_of(sources, tmp_path)[0] == [
        (f"{part}/{YEARS[part].format(i)}", part[:-4]) for i, part in enumerate([parts[0]] * 2 + [parts[1]] * 2, 1)]


def test_a_picture_that_coco_lists_twice_is_named(tmp_path, capsys):
    sources = coco_release(tmp_path, "train2014", "val2014")
    data = json.loads(sources[0].read_text())
    write(sources[0], json.dumps({**data, "images": [*data["images"], data["images"][0]]}))
    main(get_parser().parse_args(["--captions", *map(str, sources), "--output_folder", str(tmp_path / "out"),
                                  "--workers", "1"]))
    shown = capsys.readouterr().out
    assert f"1 picture listed more than once: train2014/{YEARS['train2014'].format(1)}; put all captions" in shown
    assert "TRAIN: 2 pictures, 2 captions" in shown and "without captions" not in shown


@pytest.mark.parametrize("stem", ["captions_TRAIN", "Captions_Train", "TRAIN2017"])
def test_cocos_files_are_known_in_capitals_too(tmp_path, stem):
    sources = [write(tmp_path / f"{stem}.json", json.dumps(coco_data("train"))),
               write(tmp_path / "captions_VAL.json", json.dumps(coco_data("val")))]
    images, said = splits_of(sources, tmp_path)
    assert {split for _, split in images} == {"train", "val"} and "splits from the names of files" in said


@pytest.mark.parametrize(("names", "url"), [("train2014 val2014", False), ("train2017 val2017", True)])
def test_coco_together_is_split_by_the_pictures_names_or_addresses(tmp_path, names, url):
    data = [json.loads(path.read_text()) for path in coco_release(tmp_path, *names.split(), url=url)]
    together = write(tmp_path / "captions_trainval.json", json.dumps({
        name: [each for part in data for each in part[name]] for name in ("images", "annotations")}))
    images, said = splits_of([together], tmp_path)
    assert [split for _, split in images] == ["train", "train", "val", "val"]
    assert all((tmp_path / name).is_file() for name, _ in images)
    assert "names of files and pictures" in said


def test_one_part_of_coco_alone_is_split_by_a_fixed_seed(tmp_path):
    [source, _] = coco_release(tmp_path, "val2014", "train2014")
    data = json.loads(source.read_text())
    data["images"] += [{"id": i, "file_name": "COCO_val2014_000000000003.jpg"} for i in range(5, 13)]
    images, said = splits_of([write(source, json.dumps(data))], tmp_path)
    assert sorted(split for _, split in images) == ["test"] + ["train"] * 8 + ["val"]
    assert "splits by a fixed seed, a tenth of the pictures each for VAL and TEST, as all are of val" in said
    images, said = splits_of([write(tmp_path / "mine.json", json.dumps(coco_data(*SPLITS)))], tmp_path)
    assert "as no name of a file or picture says which" in said
    assert [name for name, _ in images] == [each["filename"] for each in KARPATHY]


def test_coco_where_only_some_have_a_split_is_refused(tmp_path):
    sources = [write(tmp_path / name, json.dumps(coco_data(split)))
               for name, split in (("train.json", "train"), ("more.json", "val"))]
    with refused("train.json", "more.json: no train, val or test", "captions_val.json"):
        read_layout(sources, tmp_path)
    sources[1] = sources[1].rename(tmp_path / "captions_val.json")  # the remedy
    assert [split for _, split in splits_of(sources, tmp_path)[0]] == ["train"] * 3 + ["val"]


@pytest.mark.parametrize("karpathy, there", [("2014", "2017"), ("2017", "2014")])
def test_pictures_of_another_release_of_coco_are_found(tmp_path, karpathy, there):
    """The same pictures in other folders: val2014's are mostly in train2017."""
    sources = coco_release(tmp_path, f"train{karpathy}", f"val{karpathy}")
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / f"{split}{karpathy}")
    places = [f"train{there}/{YEARS[f'train{there}'].format(i)}" for i in (1, 2, 3)]
    places += [f"val{there}/{YEARS[f'val{there}'].format(4)}"]
    for place in places:
        draw(tmp_path / place)
    assert [name for name, _ in splits_of(sources, tmp_path)[0]] == places


def test_karpathys_json_finds_the_pictures_of_2017(tmp_path):
    name = "COCO_val2014_000000000007.jpg"
    source = write_set(tmp_path, [image(name, "train", "a dog", filepath="val2014", cocoid=7)])
    with refused("1 of 1 pictures are missing", str(tmp_path / "val2014" / name)):
        shutil.move(tmp_path / "val2014", tmp_path / "elsewhere")
        prepare(source, dataset="coco")
    draw(tmp_path / "train2017" / "000000000007.jpg")
    prepare(source, dataset="coco")


def test_each_file_in_cocos_layout_may_have_a_folder_of_its_own_name(tmp_path):
    """As VizWiz has: train.json and train/, val.json and val/, and pictures with names of their own."""
    sources = [write(tmp_path / f"{split}.json", json.dumps(coco_data(split))) for split in ("train", "val")]
    for each in KARPATHY:
        draw(tmp_path / each["split"] / each["filename"])
    assert splits_of(sources, tmp_path)[0] == [(f"{each['split']}/{each['filename']}", each["split"])
                                               for each in KARPATHY if each["split"] != "test"]


@pytest.mark.parametrize("change, part", [
    (lambda data: data["images"].pop(), "has captions and is not in `images`"),
    (lambda data: data["annotations"].append({"image_id": 0, "caption": None}), "AttributeError"),
    (lambda data: data["images"].append(7), "TypeError"), (lambda data: data.pop("images"), "KeyError: 'images'")])
def test_a_wrong_coco_file_is_refused_by_name(tmp_path, change, part):
    data = coco_data(*SPLITS)
    change(data)
    with refused("mine.json: not in COCO's layout", part, "each with id and file_name"):
        read_layout([write(tmp_path / "mine.json", json.dumps(data))], tmp_path)


# ---- what is none of them --------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[str, str | bytes, list[str]]] = {
    "COCO's objects": ("instances.json", '{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}',
                       ["COCO's objects", "captions_train2014.json"]),
    "COCO's results": ("results.json", '[{"image_id": 1, "caption": "a dog"}]', ["COCO's results", "people wrote"]),
    "BLIP's records": ("coco_karpathy_train.json", '[{"image": "1.jpg", "caption": "a dog", "image_id": 1}]',
                       ["BLIP", "a table with the columns image and caption"]),
    "COCO's pictures alone": ("image_info_test2014.json", '{"images": [{"id": 1, "file_name": "1.jpg"}]}',
                              ["COCO's list of pictures", "captions_train2014.json"]),
    "a word map": ("WORDMAP_x.json", '{"a": 1, "<start>": 2}', ["create_input_files.py writes", "made from"]),
    "prepared captions": ("TRAIN_CAPTIONS_x.json", "[[1, 2, 3]]", ["create_input_files.py writes"]),
    "JSON lines": ("metadata.jsonl", '{"file_name": "1.jpg", "text": "a"}\n{"file_name": "2.jpg"}\n', ["JSON lines"]),
    "Hugging Face's table": ("metadata.csv", "file_name,text\n1.jpg,a\n", ["Hugging Face's", "columns image, caption"]),
    "addresses": ("train.tsv", "caption\turl\na dog\thttps://x.org/1.jpg\n", ["nothing is fetched"]),
    "ratings": ("ExpertAnnotations.txt", "1.jpg\t2.jpg#2\t1\t1\t1\n", ["ratings", "Flickr8k.token.txt"]),
    "names": ("Flickr_8k.trainImages.txt", "1.jpg\n2.jpg\n", ["a list of names", "Flickr8k.token.txt"]),
    "a table without its first line": ("x.csv", "1.jpg,A dog\n", ["the first line names the columns image, caption"]),
    "a workbook": ("captions.xlsx", b"PK\x03\x04\x14\x00\x06\x00\xff\xfe\xff", ["workbook", "CSV"]),
    "an old workbook": ("captions.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", ["older Excel", "save its table as CSV"]),
    "Parquet": ("captions.parquet", b"PAR1\x15\x00PAR1", ["this is Parquet", "save its table as CSV"]),
    "a packed table": ("captions.csv.gz", gzip.compress(b"image,caption\n"), ["compressed by gzip", "unpack it"]),
    "Latin-1": ("x.csv", b"image,caption\n1.jpg,a\r\n2.jpg,caf\xe9\n", ["x.csv, line 3", "UTF-8"]),
    "UTF-16 without a mark": ("x.csv", "image,caption\n1.jpg,a\n".encode("utf-16-le"), ["x.csv, line 1", "UTF-16"]),
    "a long line": ("x.csv", "x" * 200_000, ["columns image, caption"]),
}


@pytest.mark.parametrize("name, content, parts", OTHERS.values(), ids=OTHERS)
def test_what_is_no_known_layout_is_named_by_what_it_resembles(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with refused(str(tmp_path / name), *parts):
        read_layout([tmp_path / name], tmp_path)


def test_several_files_are_for_coco_alone(tmp_path):
    with refused("several files", "COCO's captions_*.json"):
        read_layout([write_set(tmp_path, KARPATHY), *coco_apart(tmp_path)], tmp_path)


# ---- flags -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", ["--captions", "--karpathy_json_path", "--captions_csv"])
def test_each_flag_takes_each_layout(tmp_path, flag):
    write_set(tmp_path, KARPATHY)
    fixed = ["--dataset", "mine", "--min_word_freq", "0", "--workers", "1", flag]
    names = {main(get_parser().parse_args([*fixed, *map(str, sources), "--output_folder", str(tmp_path / "out")]))
             for sources in ([tmp_path / "set.json"], flickr8k(tmp_path), coco_apart(tmp_path))}
    assert names == {"mine_5_cap_per_img_0_min_word_freq"}  # and the second and the third time there was nothing to do


def test_a_table_is_not_cocos(tmp_path):
    with pytest.raises(UsageError, match="--dataset NAME"):
        main(get_parser().parse_args(["--captions", str(flickr8k(tmp_path)[0])]))


# ---- files that are there, and were made from other captions ---------------------------------------------------------

def test_what_was_added_since_is_counted(tmp_path):
    prepare(write_set(tmp_path, KARPATHY))
    for changed, said in (
            ([*KARPATHY, image("f.jpg", "val", "a", "b"), image("g.jpg", "val", "a", "b", "c")],
             "(there are 2 pictures more and 5 captions more now)"),
            (KARPATHY[:-1], "(there are 1 pictures fewer and 2 captions fewer now)"),
            ([*KARPATHY[:-1], image("c.jpg", "test", "a", "b", "c")], "(there are 1 captions more now)"),
            ([*KARPATHY[:-1], image("c.jpg", "test", "a", "b")], "or settings; replace them")):
        with refused(said, "--overwrite"):
            prepare(write_set(tmp_path, changed))


# ---- a given vocabulary ----------------------------------------------------------------------------------------------

def test_a_given_word_map_is_taken_as_it_is(tmp_path, capsys):
    words = {"<pad>": 0, "the": 1, "<unk>": 2, "runs": 3, "<end>": 4, "<start>": 5, "zebra": 6}
    given = write(tmp_path / "WORDMAP_other.json", json.dumps(words))
    written = prepare(write_set(tmp_path, KARPATHY), word_map=given, min_word_freq=7)
    assert written[1] == "mine_2_cap_per_img_7_given_words"
    assert list(load(written, "WORDMAP").items()) == list(words.items())
    assert load(written, "VAL_CAPTIONS")[0] in ([5, 2, 2, 2, 3, 4, 0], [5, 1, 2, 4, 0, 0, 0])
    out = capsys.readouterr().out
    assert (f"{given}: 7 words; of the 8 different ones of the captions 6 are not among them and become <unk>: "
            "dog, a, d, b, e, c\n") in out
    assert "66.67 % of all words are <unk>" in out
    other = write(tmp_path / "WORDMAP_another.json", json.dumps(words | {"zebra": 3, "runs": 6}))
    with refused("made from other pictures, captions or settings"):  # as many words, but others
        prepare(tmp_path / "set.json", word_map=other, min_word_freq=7)


@pytest.mark.parametrize("name, content, part", [
    ("nowhere.json", None, "no such file"), ("x.json", '{"a": 0}', "not a word map"),
    ("x.pth.tar", "no checkpoint", "no checkpoint that can be read")])
def test_a_wrong_vocabulary_is_named(tmp_path, name, content, part):
    source = write_set(tmp_path, KARPATHY)
    if content:
        write(tmp_path / name, content)
    with refused(name, part):
        main(get_parser().parse_args(["--dataset", "mine", "--captions", str(source), "--output_folder",
                                      str(tmp_path / "out"), "--word_map", str(tmp_path / name)]))


def test_a_trained_model_goes_on_with_pictures_of_ones_own(prepared: Prepared, tmp_path: Path, capsys):
    """Refused with another vocabulary, with the remedy; by it, training begins anew with the model's weights."""
    tiny = ["--encoder", ENCODER, "--encoder_weights", "none", "--encoded_image_size", 4, "--emb_dim", 8,
            "--attention_dim", 8, "--decoder_dim", 8, "--batch_size", 20, "--whole_images", "--workers", 0, "--device",
            "cpu", "--stage", 1, "--epochs", 1]

    def learn(data: Path, name: str, out: Path, *more: object) -> list[dict[str, Any]]:
        flags = ["--data_folder", data, "--data_name", name, "--output_folder", out, *tiny, *more]
        return train.main(train.get_parser().parse_args([str(flag) for flag in flags]))

    (old,) = learn(prepared.folder, prepared.name, tmp_path / "shapes")
    best = tmp_path / "shapes" / f"BEST_checkpoint_{prepared.name}.pth.tar"
    source = write_set(tmp_path / "mine", [*KARPATHY, image("g.jpg", "train", "a red star", "a zebra")])
    folder, other = prepare(source)
    with refused(f"{best} was trained with", f"create_input_files.py --word_map {best}"):
        learn(folder, other, tmp_path / "new", "--checkpoint", best)

    folder, base = prepare(source, word_map=best)
    before = torch.load(best, weights_only=True)
    assert load((folder, base), "WORDMAP") == before["word_map"]
    capsys.readouterr()
    (row,) = learn(folder, base, tmp_path / "new", "--checkpoint", best, "--decoder_lr", 1e-9)
    said = capsys.readouterr().out
    assert f"was trained on {prepared.name}: with its weights, training on {base} begins anew" in said
    assert row["val_loss"] != old["val_loss"]
    after = torch.load(tmp_path / "new" / f"BEST_checkpoint_{base}.pth.tar", weights_only=True)
    assert after["training"]["best_bleu4"] == row["bleu4"]
    assert all(torch.allclose(after["decoder"][name], before["decoder"][name], atol=1e-6) for name in before["decoder"])

    with refused("checkpoint_mine", "another run"):
        learn(folder, base, tmp_path / "new", "--checkpoint", best)
    shutil.copy(tmp_path / "new" / f"checkpoint_{base}.pth.tar", best.parent)  # as without --output_folder
    with refused(f"checkpoint_{base}.pth.tar would be overwritten", "--output_folder"):
        learn(folder, base, best.parent, "--checkpoint", best)


@pytest.mark.parametrize("header", ["image,caption,caption", "image,image,caption"])
def test_a_column_that_is_there_twice_is_named(tmp_path, header):
    """Or all captions but the last would vanish."""
    path = tmp_path / "captions.csv"
    path.write_text(f"{header}\n1.png,a dog,one dog\n", encoding="utf-8")
    with refused(str(path), "several columns", "each caption a line of its own"):
        from_text(path)
