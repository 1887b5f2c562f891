"""Any picture gets its caption and a figure of where the model looked; no input is lost, and mistakes are named."""

import gc
import html
import itertools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image, features
from skimage.transform import pyramid_expand
from test_eval import Model

import caption
from caption import (
    Search,
    by_consensus,
    caption_image_beam_search,
    caption_images,
    to_caption,
    visualize_att,
)
from datasets import load_word_map, reverse, words_of
from drawing.panels import enlarge
from models import Caption
from safety.errors import InputError
from safety.pictures import find_pictures

REPOSITORY = Path(caption.__file__).parent
SEARCH = Search(beam_size=3, max_len=8)  # what `run` asks for


@pytest.fixture(scope="module")
def model(prepared) -> Model:
    return Model(load_word_map(prepared.folder, prepared.name))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    return model.save(tmp_path_factory.mktemp("model") / "BEST_checkpoint_x.pth.tar")


@pytest.fixture
def pictures(prepared, tmp_path) -> list[Path]:
    """Three pictures in a folder of their own; the model does not find the end of the first's caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    return [Path(shutil.copy(prepared.pictures / f"shapes_test_000{i}.png", folder)) for i in (1, 2, 4)]


@pytest.fixture
def run(checkpoint, monkeypatch, tmp_path):
    """Runs the script, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run_caption(*arguments: Any) -> list[dict[str, Any]]:
        fixed = ["--device", "cpu", "--model", checkpoint, "--max_len", SEARCH.max_len, "--beam_size", SEARCH.beam_size]
        return caption.main(caption.get_parser().parse_args([str(each) for each in (*fixed, *arguments)]))

    return run_caption


def sentence(found: Caption, model: Model) -> str:
    return " ".join(words_of(found.sequence, reverse(model.words)))


# ---- searching -------------------------------------------------------------------------------------------------------

def test_a_sequence_and_where_the_model_looked(model, pictures):
    start, end = model.words["<start>"], model.words["<end>"]
    endings = set()
    for path in pictures:
        sequence, alphas = caption_image_beam_search(model.encoder, model.decoder, str(path), model.words, 3)
        endings.add(sequence[-1] == end)
        assert sequence[0] == start and start not in sequence[1:] and end not in sequence[:-1]
        assert sequence[-1] == end or len(sequence) == 1 + 51
        assert isinstance(alphas, list) and np.shape(alphas) == (len(sequence), 3, 3)
        assert np.all(np.array(alphas[0]) == 1) and np.allclose(np.sum(alphas[1:], axis=(1, 2)), 1)
    assert endings == {True, False}


def test_weights_lie_as_the_pixels_do():
    """Row by row, from the top left: a picture's upper half is the first half of its pixels. What cannot form a square
    is one row."""
    words = {0: "<start>", 1: "<end>", 2: "a"}
    square, row = (to_caption([0, 2, 1], [0.0, -1.0, -3.0], np.arange(3 * pixels).reshape(3, pixels), words)
                   for pixels in (4, 6))
    assert square.sequence_alphas.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert square.alphas.tolist() == [[[4, 5], [6, 7]]]
    assert row.alphas.tolist() == [[[6, 7, 8, 9, 10, 11]]]


def test_the_decoder_does_not_drop_words_out(model, pictures):
    model.decoder.train()
    found = [caption_images(model.captioner, pictures, max_len=8) for _ in range(3)]
    assert not model.decoder.training and len({str([each[0].sequence for each in batch]) for batch in found}) == 1


def test_n_best_begins_with_the_best(model, pictures, run):
    results = run("--img", *pictures, "--beam_size", 5, "--n_best", 4)
    one = run("--img", *pictures, "--beam_size", 5)
    for result, best in zip(results, one, strict=True):
        found = result["captions"]
        assert len({each["caption"] for each in found}) == len(found) == 4 and found[:1] == best["captions"]
        assert found == sorted(found, key=lambda each: (not each["finished"], -each["log_prob"]))


def a_caption(words: list[int], log_prob: float, finished: bool = True) -> Caption:
    return Caption([str(word) for word in words], log_prob, finished, None, [0, *words, *[1] * finished], [], None)


@pytest.mark.parametrize("log_prob, expected", [(-2.3, [1, 2, 0]), (-2.4, [0, 1, 2])])
def test_two_that_agree_outvote_a_more_probable_one(log_prob, expected):
    """The pair has 2 words in common, of 2 and 3: likeness 4/5. So 1 vote against exp(log_prob / 4) * 9/5."""
    beam = [a_caption([2, 3], 0.0), a_caption([4, 5], log_prob), a_caption([4, 5, 6], log_prob)]
    assert by_consensus(beam) == [beam[i] for i in expected]
    unsure = [each._replace(log_prob=each.log_prob - 1000) for each in beam]  # of very long captions, say
    assert by_consensus(unsure) == [unsure[i] for i in expected]
    unfinished = [beam[0], beam[1], a_caption([4, 5, 6], log_prob, finished=False)]  # has no vote
    assert by_consensus(unfinished) == unfinished


def alike(one: list[int], other: list[int]) -> float:
    """Each word of one caption strikes an equal one from the other's."""
    shared, left = 0, [*other]
    for word in one:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / max(len(one) + len(other), 1)


@given(st.lists(st.tuples(st.lists(st.integers(2, 4), max_size=7), st.floats(-20, 0), st.booleans()), max_size=7))
def test_consensus_word_by_word(drawn):
    """Against the definition: likeness times the fourth root of probability, summed over the finished captions."""
    support = {}
    for i, (words, _, _) in enumerate(drawn):
        support[i] = sum(alike(words, other) * math.exp(log_prob) ** 0.25 for other, log_prob, end in drawn if end)
    beam = [a_caption(*each) for each in drawn]
    places = [next(i for i, each in enumerate(beam) if each is one) for one in by_consensus(beam)]
    assert sorted(places) == list(range(len(beam)))
    for i, after in itertools.pairwise(places):
        assert (beam[i].finished, support[i]) >= (beam[after].finished, support[after] - 1e-9)


def test_consensus_of_the_whole_beam(model, pictures, run):
    beams = caption_images(model.captioner, pictures, Search(beam_size=5, max_len=8, n_best=5))
    ranked = [by_consensus(beam)[:2] for beam in beams]
    assert any(best is not beam[0] for (best, _), beam in zip(ranked, beams, strict=True))
    results = run("--img", *pictures, "--beam_size", 5, "--n_best", 2, "--consensus")
    spoken = caption_images(model.captioner, pictures, beam_size=5, max_len=8, n_best=2, consensus=True)
    for best_two, result, captions in zip(ranked, results, spoken, strict=True):
        sentences = [sentence(each, model) for each in best_two]
        assert [each["caption"] for each in result["captions"]] == sentences
        assert [" ".join(each.words) for each in captions] == sentences


def test_captions_from_python(model, checkpoint, pictures, tmp_path, monkeypatch):
    """As the script's first lines say: files or open pictures in, words, scores and attention out."""
    monkeypatch.chdir(tmp_path)
    captioner = caption.load(checkpoint, device="cpu")
    frames = [Image.open(path).convert("RGB") for path in pictures[1:]]
    frames[0].save("two.tif", save_all=True, append_images=frames[1:])
    opened = Image.open("two.tif")
    found = caption_images(captioner, [str(pictures[0]), opened, pictures[2]], SEARCH, n_best=2, batch_size=2)
    opened.seek(1)  # it is still open
    expected = caption_images(model.captioner, pictures, SEARCH._replace(n_best=2))
    assert [len(each) for each in found] == [2, 2, 2]
    for captions, others in zip(found, expected, strict=True):
        for one, other in zip(captions, others, strict=True):
            assert (" ".join(one.words), one.finished) == (sentence(other, model), other.finished)
            assert one.log_prob == pytest.approx(other.log_prob, rel=1e-5)
            assert (one.alphas.shape, one.alphas.dtype) == ((len(one.words), 3, 3), np.float32)
            assert np.allclose(one.alphas, other.sequence_alphas[1:1 + len(one.words)], atol=1e-5)
            assert np.allclose(one.alphas.sum((1, 2)), 1)
    assert {each.finished for captions in found for each in captions} == {True, False}
    assert caption_images(captioner, []) == []
    with pytest.raises(InputError, match="no such picture"):
        caption_images(captioner, ["missing.jpg"])


def test_a_picture_may_be_a_file_or_in_memory(model, pictures, tmp_path):
    """A path, Pillow's picture, an array or a tensor, one by one, mixed, or all of them as one array or tensor."""
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for source, path in zip(pictures, paths, strict=True):
        with Image.open(source) as picture:
            picture.convert("RGB").resize((300, 200)).save(path)  # not square: height and width must not be confused
    opened = [Image.open(path) for path in paths]
    arrays = np.stack([np.asarray(picture) for picture in opened])              # (N, H, W, 3)
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)                      # (N, 3, H, W)
    expected = caption_images(model.captioner, paths, SEARCH, n_best=2)
    assert len({sentence(best, model) for best, _ in expected}) > 1
    for images in (list(map(str, paths)), opened, list(arrays), list(tensors), arrays, tensors, tensors.contiguous(),
                   [paths[0], arrays[1], tensors[2]]):
        for captions, others in zip(caption_images(model.captioner, images, SEARCH, n_best=2), expected, strict=True):
            for one, other in zip(captions, others, strict=True):
                assert one[:3] + one[4:6] == other[:3] + other[4:6]  # all but alphas
                assert np.array_equal(one.sequence_alphas, other.sequence_alphas)


def test_one_picture_is_a_list_of_one(model, pictures):
    """And any iterable is a list of many."""
    with Image.open(pictures[1]) as opened:
        array = np.array(opened.convert("RGB"))
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    [[expected]] = caption_images(model.captioner, [pictures[1]], SEARCH)
    for one in (pictures[1], str(pictures[1]), Image.fromarray(array), array, tensor):
        [[found]] = caption_images(model.captioner, one, SEARCH)
        assert found.sequence == expected.sequence
    for many in (tuple(pictures), iter(pictures), dict.fromkeys(pictures).keys()):
        assert len(caption_images(model.captioner, many, SEARCH)) == len(pictures)


@pytest.mark.parametrize("image, name", [
    (b"GIF87a", "bytes"), (bytearray(9), "bytearray"), (None, "NoneType"), (7, "int"), ({"image": "x.png"}, "dict"),
    (["x.png", None], "NoneType"), ([["x.png"]], "list"), ([b"x.png"], "bytes"), (open, "builtin_function_or_method")])
def test_what_is_no_picture_is_named_by_its_type(image, name, model):
    with refused(f"{name}: no picture", "(H, W, 3)", "(3, H, W)"):
        caption_images(model.captioner, image, SEARCH, skip_unreadable=True)


@pytest.mark.parametrize("shape", [(40, 30), (40, 30, 4), (2, 2, 2, 2, 2), ()])
def test_an_array_of_another_shape_is_not_printed(shape, model):
    with refused("a picture given as ndarray", f"its shape is {shape}") as _:
        caption_images(model.captioner, np.zeros(shape, np.uint8), SEARCH)


@pytest.mark.parametrize("settings, message", [
    ({"beam_size": 0}, "beam_size=0: a whole number of 1 or more"), ({"max_len": 0}, "max_len=0: a whole number"),
    ({"n_best": 0}, "n_best=0: a whole number"), ({"beam_size": 2.0}, "beam_size=2.0: a whole number"),
    ({"beam_size": "5"}, "beam_size=str: a whole number"), ({"max_len": None}, "max_len=NoneType: a whole number"),
    ({"beam_size": np.zeros((99, 99))}, "beam_size=ndarray: a whole number"),
    ({"n_best": 4}, "--n_best 4: a beam of 3 finds no more than that"),
    ({"length_penalty": -0.1}, "length_penalty: a number from 0 to 2"),
    ({"length_penalty": math.nan}, "length_penalty: a number from 0 to 2"),
    ({"length_penalty": "1"}, "length_penalty: a number from 0 to 2"),
    ({"length_penalty": 1, "consensus": True}, "--length_penalty and --consensus are two ways"),
    ({"forbidden": ["red", "grene", 7]}, "forbidden 'grene', 7: not among the model's"),
    ({"forbidden": "grene"}, "forbidden 'grene': not among the model's"),
    ({"forbidden": None}, "forbidden=None: words, as"), ({"beam_size": True}, "beam_size=True: a whole number")])
def test_settings_are_checked_as_flags_are(settings, message, model, pictures):
    with refused(message):
        caption_images(model.captioner, pictures[:1], SEARCH, **settings)
    with refused(message):
        features = torch.zeros(1, 3, 3, model.encoder.encoder_dim)
        caption.beam_search(model.decoder, features, model.words, SEARCH._replace(**settings))


def test_a_search_is_one_and_a_model_no_file(model, pictures):
    for search in (None, 5, {"beam_size": 5}):
        with refused("no Search; leave it out, or give Search(beam_size=5)"):
            caption_images(model.captioner, pictures, search)
    with refused("x.pth.tar: a file's name, and no model yet; give load('x.pth.tar')"):
        caption_images("x.pth.tar", pictures)


def test_a_batch_is_of_one_picture_at_least(model, pictures):
    with refused("batch_size=0: a whole number of 1 or more"):
        caption_images(model.captioner, pictures, SEARCH, batch_size=0)


def test_words_can_be_forbidden(model, pictures):
    [[before]] = caption_images(model.captioner, pictures[1], SEARCH)
    word = before.words[0]
    for forbidden in ((*Search().forbidden, word), {*Search().forbidden, word}):
        [found] = caption_images(model.captioner, pictures[1], SEARCH, n_best=3, forbidden=forbidden)
        assert all(each.words and word not in each.words for each in found)
    [[without]] = caption_images(model.captioner, pictures[1], SEARCH, forbidden=word)
    assert word not in without.words


def test_one_bad_file_of_many_gives_none_in_its_place(model, pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(pictures[0].read_bytes()[:200])
    first = np.array(Image.open(pictures[0]).convert("RGB"))
    images = [first, tmp_path / "bad.png", str(tmp_path / "missing.png"), pictures[1]]
    expected = caption_images(model.captioner, pictures[:2], SEARCH)
    for batch_size in (1, 2, 16):
        first, *nothing, last = caption_images(model.captioner, images, SEARCH, batch_size, skip_unreadable=True)
        assert nothing == [None, None]
        assert [each[0].sequence for each in (first, last)] == [each[0].sequence for each in expected]
    assert caption_images(model.captioner, images[1], skip_unreadable=True) == [None]
    with refused(str(tmp_path / "bad.png"), "cannot be read"):
        caption_images(model.captioner, images, SEARCH)
    with refused("float32, and not uint8"):  # a mistake of the program, and not of a file
        caption_images(model.captioner, np.zeros((1, 9, 9, 3), np.float32), skip_unreadable=True)


def test_threads_caption_beside_each_other(model, pictures):
    expected = [each.sequence for [each] in caption_images(model.captioner, pictures, SEARCH)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda path: caption_images(model.captioner, path, SEARCH)[0][0].sequence, pictures * 4))
    assert found == expected * 4


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool"])
def test_numbers_that_are_no_bytes_are_refused(dtype, model):
    """From 0 to 1 or from 0 to 255? A guess would give captions of black pictures."""
    array = np.random.default_rng(0).random((40, 30, 3)).astype(dtype)
    for image, kind in ((array, "ndarray"), (torch.from_numpy(array).permute(2, 0, 1), "Tensor")):
        with refused(f"a picture given as {kind}", dtype, "uint8"):
            caption_images(model.captioner, [image], SEARCH)


def test_arrays_and_tensors_have_their_own_layouts(model):
    """Colours last in an array, first in a tensor: the other way round is refused."""
    array = np.zeros((40, 30, 3), np.uint8)
    for image in (array.transpose(2, 0, 1), torch.from_numpy(array), array[None]):  # within a list
        with refused(f"a picture given as {type(image).__name__}: this picture cannot be read"):
            caption_images(model.captioner, [image], SEARCH)


def test_an_array_without_pixels_is_refused(model):
    """OpenCV's crop outside a picture is one."""
    with refused("a picture given as ndarray", "(0, 5, 3)"):
        caption_images(model.captioner, np.zeros((0, 5, 3), np.uint8), SEARCH)


def test_settings_go_before_the_searchs_own(model, pictures):
    found = caption_images(model.captioner, pictures, SEARCH._replace(n_best=3), n_best=2, max_len=4)
    expected = caption_images(model.captioner, pictures, Search(beam_size=3, max_len=4, n_best=2))
    assert [[each.sequence for each in captions] for captions in found] == [
        [each.sequence for each in captions] for captions in expected]
    assert {len(captions) for captions in found} == {2}
    [[plain]] = caption_images(model.captioner, pictures[:1], SEARCH, with_alphas=False)
    assert plain.alphas is plain.sequence_alphas is None and plain.words
    with pytest.raises(ValueError, match="beam_width"):
        caption_images(model.captioner, pictures, beam_width=3)


def test_the_pages_five_lines_run(checkpoint, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "captions.md").read_text(encoding="utf-8")
    code = re.search("```python\n(from caption .*?)```", page, re.DOTALL)[1]
    shutil.copy(checkpoint, re.search('load\\("([^"]*)"', code)[1])
    for name in ("photo.jpg", "cat.png"):
        Image.open(pictures[0]).save(name)
    exec(code, {})
    shown = capsys.readouterr().out.splitlines()
    assert len(code.splitlines()) == 5 and len(shown) == 4
    for said, shape in zip(shown[::2], shown[1::2], strict=True):
        *words, log_prob = said.split(" ")
        assert shape == str((len(words), 3, 3)) and float(log_prob) < 0


def test_a_model_of_the_original_tutorial_from_python(model, pictures, tmp_path):
    path = model.save(tmp_path / "model.pth.tar", word_map=None)
    with pytest.raises(InputError, match="--word_map"):
        caption.load(path)
    (tmp_path / "words.json").write_text(json.dumps(model.words))
    captioner = caption.load(path, tmp_path / "words.json", "cpu", "bfloat16")
    assert (captioner.word_map, captioner.precision) == (model.words, "bfloat16")


def test_batches_change_nothing(model, pictures, run):
    alone = [caption_images(model.captioner, [path], SEARCH)[0][0] for path in pictures]
    for batch_size in (1, 2, 16):
        results = run("--img", *pictures, "--batch_size", batch_size)
        assert [each["captions"][0]["caption"] for each in results] == [sentence(each, model) for each in alone]
        assert [each["image"] for each in results] == [str(path) for path in pictures]
    assert len({sentence(each, model) for each in alone}) > 1


# ---- which pictures --------------------------------------------------------------------------------------------------

def test_files_folders_and_patterns(tmp_path):
    names = ["a.png", "B.JPG", "c[1].png", "notes.txt", "deep/d.webp", "deep/e.png", "folder.png/f.gif"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*patterns: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in find_pictures([str(tmp_path / each) for each in patterns])]

    assert found("") == ["B.JPG", "a.png", "c[1].png"], "of a folder what is a picture, in order"
    assert found("c[1].png") == ["c[1].png"] and found("notes.txt") == ["notes.txt"], "a file as it is named"
    assert found("*.png") == ["a.png", "c[1].png"] and found("**/*.png") == ["a.png", "c[1].png", "deep/e.png"]
    assert found("deep", "a.png", "*/d*", "deep") == ["deep/d.webp", "deep/e.png", "a.png"], "each once"
    for nothing in ("*.bmp", "missing.png", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=r"--img .*: no picture there"):
            found("a.png", nothing)


def test_of_a_folder_what_pillow_opens_is_a_picture_and_the_rest_is_counted(run, tmp_path, capsys):
    """By its endings: JPEG's other ones, formats of later years; no program, nothing that it only recognises."""
    folder = tmp_path / "holiday"
    (folder / "more").mkdir(parents=True)
    taken = ["a.jfif", "b.JPE", "c.jp2", "d.ppm", "e.qoi", "f.tga", *["g.avif"] * features.check("avif")]
    for name in taken:
        Image.effect_noise((30, 30), 90).convert("RGB").save(folder / name)
    for name in ("._a.jfif", ".DS_Store", ".b.jpg", "h.heic", "i.HEIC", "j.txt", "notes", "k.eps", "l.pdf", "m.mpg",
                 "n.h5", "o.wmf"):
        (folder / name).write_bytes(b"%!PS")
    (folder / "p.jpg").symlink_to("nowhere.jpg")
    assert [Path(each["image"]).name for each in run("--img", folder, "--max_len", 1)] == taken
    counts = ("1 .eps, 1 .h5, 2 .heic, 1 .mpg, 1 .pdf, 1 .txt, 1 .wmf, 1 dead links, 1 folders, 3 hidden, "
              "1 without an ending")
    said = f"--img {folder}: {len(taken)} pictures; passed over: {counts}; name files to have them read all the same\n"
    assert capsys.readouterr().err.endswith(said)
    for name in taken:
        (folder / name).unlink()
    with refused(f"--img {folder}: no picture there; passed over: {counts}"):
        run("--img", folder)
    Image.effect_noise((30, 30), 90).save(folder / ".b.jpg")
    assert len(run("--img", folder / ".b.jpg", "--max_len", 1)) == 1, "as the message says"


def test_a_folder_of_pictures_alone_is_not_spoken_of(run, pictures, capsys):
    run("--img", pictures[0].parent)
    assert "passed over" not in capsys.readouterr().err


def test_any_kind_of_picture(run, tmp_path):
    names = {"L": "grey.png", "RGBA": "clear.png", "P": "few.gif", "CMYK": "ink.jpg", "I;16": "deep.png", "1": "x.tif"}
    for mode, name in names.items():
        Image.new("L", (30, 50), 128).convert(mode).save(tmp_path / name)
    results = run("--img", *(tmp_path / name for name in names.values()), "--out", "figures", "--max_len", 1)
    assert len(results) == 6 and {path.name for path in Path("figures").iterdir()} == {
        f"{Path(name).stem}_attention.png" for name in names.values()}


def test_an_unreadable_picture_is_named_when_the_others_have_their_captions(run, pictures, capsys):
    expected = run("--img", *pictures[2:])
    for broken in pictures[:2]:
        broken.write_bytes(broken.read_bytes()[:200])
    capsys.readouterr()
    with refused(f"{pictures[0]}: this picture cannot be read", f"(and 1 more: {pictures[1]})", "; --skip_unreadable"):
        run("--img", *pictures, "--batch_size", "2", "--json", "all.json", "--out", "figures")
    assert json.loads(Path("all.json").read_text()) == expected
    assert len(list(Path("figures").iterdir())) == len(expected) == len(pictures) - 2


def test_unreadable_pictures_can_be_left_out(run, pictures, capsys):
    """Without a failure, but not without a word."""
    expected = run("--img", *pictures[2:])
    for broken in pictures[:2]:
        broken.write_bytes(broken.read_bytes()[:200])
    capsys.readouterr()
    assert run("--img", *pictures, "--skip_unreadable", "--json", "all.json") == expected
    assert json.loads(Path("all.json").read_text()) == expected
    assert f"2 pictures left out, which cannot be read: {pictures[0]}, {pictures[1]}\n" in capsys.readouterr().err


def test_a_picture_of_one_colour_is_captioned_with_a_warning(run, pictures, command, checkpoint):
    Image.new("RGB", (30, 40), "black").save("black.png")
    flags = ["--model", checkpoint, "--max_len", 3, "--device", "cpu", "--json"]
    assert command(caption, "--img", "black.png", *pictures[:1], *flags) == (
        0, "warning: black.png is of one colour; what is said of it means nothing\n")


def test_where_no_picture_can_be_read_nothing_is_written(run, pictures):
    pictures[0].write_bytes(b"")
    for flags in ([], ["--skip_unreadable"]):
        with refused(f"{pictures[0]}: this picture cannot be read"):
            run("--img", pictures[0], "--json", "all.json", "--out", "page.html", *flags)
    assert not Path("all.json").exists() and not Path("page.html").exists()


# ---- results ---------------------------------------------------------------------------------------------------------

def test_captions_are_printed_by_picture(run, pictures, capsys):
    results = run("--img", pictures[0].parent, "--n_best", 2)
    expected = [f"{path}: {each['caption']}{'' if each['finished'] else ' ...'}\n"
                for path, result in zip(pictures, results, strict=True) for each in result["captions"]]
    assert capsys.readouterr().out == "".join(expected) and list(Path().iterdir()) == []


def test_unfinished_captions_are_marked(run, pictures, capsys):
    assert not run("--img", pictures[0], "--max_len", 1, "--beam_size", 1)[0]["captions"][0]["finished"]
    assert capsys.readouterr().out.endswith(" ...\n")


def test_json_in_a_file_or_instead_of_lines(run, pictures, capsys):
    results = run("--img", *pictures, "--json", "deep/captions.json")
    assert json.loads(Path("deep/captions.json").read_text()) == results
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert run("--img", *pictures, "--json") == json.loads(capsys.readouterr().out) == results
    assert list(results[0]) == ["image", "captions"]
    assert list(results[0]["captions"][0]) == ["caption", "log_prob", "finished", "word_log_probs"]


def test_how_sure_the_model_was_of_each_word(model, run, pictures, capsys):
    """In JSON as log-probabilities, <end>'s the last, and on request as percentages in the lines."""
    results = run("--img", *pictures, "--n_best", 2, "--probabilities", "--json", "captions.json")
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(Path("captions.json").read_text()) == results
    shown = [(path, each) for path, result in zip(pictures, results, strict=True) for each in result["captions"]]
    assert len(lines) == len(shown) == 6
    for line, (path, each) in zip(lines, shown, strict=True):
        words, log_probs = each["caption"].split(" "), each["word_log_probs"]
        assert len(log_probs) == len(words) + each["finished"]
        assert sum(log_probs) == pytest.approx(each["log_prob"], rel=1e-5)
        said = re.findall(r"(\S+) \((\d+)%\)", line)
        assert [word for word, _ in said] == words
        for (_, percent), log_prob in zip(said, log_probs, strict=False):
            assert int(percent) == pytest.approx(100 * math.exp(log_prob), abs=0.51)
        plain = re.sub(r" \(\d+%\)", "", line)
        assert plain == f"{path}: {each['caption']}{'' if each['finished'] else ' ...'}"
    expected = [each for captions in caption_images(model.captioner, pictures, SEARCH, n_best=2) for each in captions]
    for (_, each), other in zip(shown, expected, strict=True):
        assert each["word_log_probs"] == pytest.approx(other.word_log_probs, abs=1e-4)
    assert len({percent for line in lines for percent in re.findall(r"\d+%", line)}) > 3


def test_a_name_that_is_no_text_loses_no_results(run, pictures):
    odd = Path(os.fsdecode(b"caf\xe9.png"))
    shutil.copy(pictures[0], odd)
    results = run("--img", str(odd), pictures[0], "--json", "captions.json")
    (first, second) = json.loads(Path("captions.json").read_text())
    assert second == results[1]
    assert first["captions"] == results[0]["captions"]
    assert first["image"] == "caf\udce9.png"


@pytest.mark.parametrize("out, count, files", [
    ("figure.png", 1, ["figure.png"]), ("deep/figure.PNG", 1, ["deep/figure.PNG"]),
    ("folder", 1, ["folder/{}_attention.png"]), ("v1.2", 3, ["v1.2/{}_attention.png"] * 3),
    ("there.png", 1, ["there.png/{}_attention.png"])])
def test_figures_go_where_they_are_sent(out, count, files, run, pictures):
    Path("there.png").mkdir()
    run("--img", *pictures[:count], "--out", out, "--max_len", 2)
    expected = {file.format(path.stem) for file, path in zip(files, pictures, strict=False)}
    assert {str(path) for path in Path().glob("**/*") if path.is_file()} == expected
    for path in expected:
        with Image.open(path) as figure:
            assert figure.format == "PNG" and figure.size[0] == 1200


@pytest.mark.parametrize("flags, rendering", [([], "auto"), (["--dont_smooth"], "pixelated")])
def test_a_page_shows_all_pictures(flags, rendering, run, pictures):
    """Of a folder, with all captions and their scores, after a run in batches."""
    results = run("--img", pictures[0].parent, "--out", "deep/page.html", "--n_best", 2, "--batch_size", 2, *flags)
    assert [str(path) for path in Path().glob("**/*") if path.is_file()] == ["deep/page.html"]
    page = Path("deep/page.html").read_text()
    assert page.count("<figure") == page.count("<details") == 3 and f"image-rendering: {rendering}" in page
    shown = [[html.unescape(word) for word in re.findall("<button[^>]*>([^<]*)<", part)]
             for figure in page.split("<figure")[1:] for part in figure.split("<details")]
    assert [" ".join(words) for words in shown] == [each["caption"] for of in results for each in of["captions"]]
    for path, result in zip(pictures, results, strict=True):
        best, other = (format(each["log_prob"], ".2f") for each in result["captions"])
        assert f"{path.name} &middot; log-probability {best}<" in page and f"<small>{other}</small>" in page
    sure = [f"{math.exp(log_prob):.0%} sure" for result in results for each in result["captions"]
            for log_prob, _ in zip(each["word_log_probs"], each["caption"].split(" "), strict=False)]
    assert re.findall('<button[^>]* title="([^"]*)"', page) == sure
    assert re.findall('<button[^>]* aria-label="[^"]*, ([^ ]* sure)"', page) == sure


def test_a_gif_of_one_picture(run, pictures):
    words = run("--img", pictures[1], "--out", "gaze.GIF", "--n_best", 2)[0]["captions"][0]["caption"].split()
    with Image.open("gaze.GIF") as gif:
        assert (gif.format, gif.n_frames, gif.width) == ("GIF", len(words) + 2, 400)


@pytest.mark.parametrize("arguments", [
    ["--out", "all.gif", "{1}"], ["--json", "all.html"],
    ["--out", "{0}"], ["--out", "{folder}/../pictures/{name}"], ["--out", "link.png"], ["--json", "{0}"],
    ["--out", "{folder}", "{folder}/x.png", "{folder}/x_attention.png"],
    ["--out", "all", "{folder}/x.png", "more/x.png"], ["--out", "all.png", "{1}"], ["--out", "all.jpg"],
    ["--out", "all.pdf"]])
def test_no_picture_is_overwritten(arguments, run, pictures):
    """Neither inputs by figures or results, nor one figure by the next."""
    folder = pictures[0].parent
    Path("link.png").symlink_to(pictures[0])
    Path("more").mkdir()
    for path in (folder / "x.png", folder / "x_attention.png", Path("more", "x.png")):
        shutil.copy(pictures[2], path)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    flag, value, *more = [each.format(*pictures, folder=folder, name=pictures[0].name) for each in arguments]
    with pytest.raises(InputError, match=flag):
        run("--img", pictures[0], *more, flag, value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before and not Path("all").exists()


@pytest.mark.parametrize("names, message", [([], "this folder has no BEST_checkpoint"),
                                            (["a", "b"], "there are BEST_checkpoint_a.pth.tar, BEST_checkpoint_b")])
def test_which_model_is_not_guessed(names, message, run, pictures, monkeypatch, tmp_path):
    monkeypatch.setattr(caption, "PRETRAINED", tmp_path / "flickr8k.pth.tar")  # which is not there
    for name in names:
        Path(f"BEST_checkpoint_{name}.pth.tar").touch()
    with pytest.raises(InputError, match=rf"say which model with --model FILE: {message}"):
        caption.main(caption.get_parser().parse_args(["--img", str(pictures[0])]))


def test_the_only_model_is_taken(checkpoint, run, pictures):
    shutil.copy(checkpoint, Path())
    Path("checkpoint_x.pth.tar").touch()
    expected = run("--img", pictures[0])
    arguments = ["--img", str(pictures[0]), "--max_len", "8", "--beam_size", "3", "--device", "cpu"]
    assert caption.main(caption.get_parser().parse_args(arguments)) == expected


@pytest.mark.parametrize("arguments", [["--beam_size", 0], ["--n_best", 0], ["--n_best", 4], ["--max_len", 0],
                                       ["--batch_size", 0], ["--beam_size", "many"], ["--length_penalty", 2.1],
                                       ["--length_penalty", "nan"], ["--consensus", "--length_penalty", 1]])
def test_impossible_numbers_are_named(arguments, command, checkpoint, pictures):
    """In a line, with the exit status of wrong flags."""
    status, shown = command(caption, "--img", pictures[0], "--model", checkpoint, "--beam_size", 3, *arguments)
    assert status == 2 and arguments[0] in shown and shown.count("\n") == 1


# ---- figures ---------------------------------------------------------------------------------------------------------

WORDS = {0: "<start>", 1: "<end>", 2: "a", 3: "$$", 4: "$\\no$"}


@pytest.mark.parametrize("n_words, shape", [(1, (14, 14)), (20, (4, 4)), (3, (1, 1)), (4, (3, 4)), (5, (10, 7))])
def test_a_panel_for_each_word(n_words, shape, pictures):
    sequence = [0, *(2 + i % 3 for i in range(n_words)), 1]
    alphas = np.random.default_rng(0).random((n_words + 2, *shape))
    figure = visualize_att(pictures[0], sequence, alphas.tolist(), WORDS)
    assert [axes.get_title() for axes in figure.axes] == [WORDS[index] for index in sequence]
    assert [len(axes.images) for axes in figure.axes] == [1] + [2] * (n_words + 1), "nothing lies over <start>'s"
    places = [axes.get_subplotspec().get_geometry()[:3] for axes in figure.axes]
    assert places == [(-(-(n_words + 2) // 5), 5, i) for i in range(n_words + 2)]
    assert not any(axes.axison for axes in figure.axes)
    figure.draw_without_rendering()
    assert all(axes.title.get_window_extent().y1 <= figure.bbox.y1 for axes in figure.axes), "no title is cut off"


def test_any_word_is_drawn(pictures, tmp_path):
    """Formulas are not: two dollar signs would make one."""
    figure = visualize_att(pictures[0], [0, 3, 4, 1], np.ones((4, 2, 2)), WORDS)
    figure.savefig(tmp_path / "figure.png", dpi=10)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_as_many_weights_as_words(pictures):
    with pytest.raises(ValueError, match="zip"):
        visualize_att(pictures[0], [0, 2, 1], np.ones((2, 3, 3)), WORDS)


@pytest.mark.parametrize("smooth", [True, False])
def test_it_is_bright_where_the_model_looks(smooth, tmp_path):
    """On the pixels as they are drawn, of a picture all grey."""
    Image.new("RGB", (90, 60), "grey").save(tmp_path / "grey.png")
    alphas = np.full((2, 4, 4), 0.02)
    alphas[1, 3, 1] = 0.7
    visualize_att(tmp_path / "grey.png", [0, 2], alphas, WORDS, smooth).savefig(tmp_path / "out.png", dpi=100)
    drawn = np.array(Image.open(tmp_path / "out.png").convert("L")).astype(int)
    panel = drawn[40:310, 305:595]                                      # the second panel, with some of its margin
    inside = panel[:, panel.min(0) < 200][panel.min(1) < 200].astype(float)
    cells = inside[:inside.shape[0] // 4 * 4, :inside.shape[1] // 4 * 4]
    cells = cells.reshape(4, cells.shape[0] // 4, 4, -1).mean((1, 3))
    assert np.unravel_index(cells.argmax(), (4, 4)) == (3, 1) and cells.max() > 120 and cells[0].max() < 60


@pytest.mark.parametrize("shape", [(14, 14), (8, 8), (3, 4), (1, 1)])
def test_pixels_are_enlarged_as_they_are_or_smoothly(shape):
    alpha = np.random.default_rng(1).random(shape)
    plain, smooth = enlarge(alpha, 336, False), enlarge(alpha, 336, True)
    assert plain.shape == smooth.shape == (336, 336)
    assert set(np.unique(plain.round(9))) == set(alpha.round(9).flat)
    centres = [(np.arange(n) * 2 + 1) * 336 // (2 * n) for n in shape]
    assert np.allclose(plain[np.ix_(*centres)], alpha)
    assert np.abs(np.diff(smooth, axis=1)).max() < 0.1
    if shape == (14, 14):
        assert np.allclose(smooth, pyramid_expand(alpha, upscale=24, sigma=8)), "as in the original tutorial"


@pytest.mark.parametrize("flags, smooth", [([], True), (["--dont_smooth"], False)])
def test_the_best_caption_is_drawn(flags, smooth, model, run, pictures, monkeypatch):
    drawn = []
    monkeypatch.setattr("drawing.figure.visualize_att", lambda *arguments: drawn.append(arguments) or Figure((1, 1)))
    run("--img", *pictures, "--out", "figures", "--n_best", 3, "--batch_size", 2, *flags)
    assert len(drawn) == len(list(Path("figures").iterdir())) == 3
    for path, (of, sequence, alphas, rev_word_map, how) in zip(pictures, drawn, strict=True):
        [[best]] = caption_images(model.captioner, [path], SEARCH)
        assert of == path and sequence == best.sequence and how is smooth and rev_word_map[sequence[0]] == "<start>"
        assert np.allclose(alphas, best.sequence_alphas, atol=1e-5)


def test_no_display_is_asked_for(checkpoint, pictures, tmp_path):
    """As a command, without warnings, where a window cannot be opened. What started the command lives on."""
    code = """import gc, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert "matplotlib.pyplot" not in sys.modules and gc.isenabled()
print("alive")"""
    arguments = ["--img", pictures[0], "--model", checkpoint, "--max_len", "3", "--device", "cpu", "--out", "x.png"]
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment |= {"MPLBACKEND": "tkagg", "PYTHONPATH": str(REPOSITORY)}
    strict = ["-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning"]  # PyTorch 2.6's own, at its end
    done = subprocess.run([sys.executable, *strict, "-c", code, REPOSITORY / "caption.py", *arguments],
                          env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"{pictures[0]}: ")
    assert done.stdout.endswith("\nalive\n")
    assert (tmp_path / "x.png").is_file()


def caption_into(stdout: int, checkpoint: Path, picture: Path) -> tuple[int, bytes, bytes]:
    command = [sys.executable, REPOSITORY / "caption.py", "--img", picture, "--model", checkpoint, "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([*command, "--max_len", "3", "--device", "cpu"], env=environment, stdout=stdout,
                          stderr=subprocess.PIPE)
    return done.returncode, done.stdout, done.stderr


def test_a_command_that_fails_early_leaves_its_host_as_it_was(monkeypatch):
    """Such as IPython, whose %run is this; as %run stays in the process, garbage must be collected there again."""
    monkeypatch.setattr(sys, "argv", ["caption.py", "--img", "nothing", "--beam_size", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(REPOSITORY / "caption.py"), run_name="__main__")
    assert gc.isenabled()


def test_a_profile_of_the_command_is_written(checkpoint, pictures, tmp_path):
    arguments = ["--img", pictures[0], "--model", checkpoint, "--max_len", "3", "--device", "cpu"]
    command = [sys.executable, "-m", "cProfile", "-o", tmp_path / "profile", REPOSITORY / "caption.py", *arguments]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert (tmp_path / "profile").stat().st_size > 1000


def test_the_command_ends_at_once_but_loses_nothing(checkpoint, pictures):
    status, results, errors = caption_into(subprocess.PIPE, checkpoint, pictures[0])
    assert (status, errors) == (0, b"") and json.loads(results)[0]["image"] == str(pictures[0])


def test_what_cannot_be_printed_is_a_failure(checkpoint, pictures):
    reader, writer = os.pipe()
    os.close(reader)  # as of `caption.py ... | head`
    status, _, errors = caption_into(writer, checkpoint, pictures[0])
    os.close(writer)
    assert status == 1 and errors.startswith(b"caption.py: ") and errors.count(b"\n") == 1
