"""The demo's last step: does it count gazes rightly, and does the model need its pictures?"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import demo.demo
from models import Caption

CIRCLE = {"color": "red", "shape": "circle", "box": [0, 0, 128, 64]}    # of a 4 x 4 map: two cells of the first row
SQUARE = {"color": "blue", "shape": "square", "box": [192, 192, 256, 256]}  # the last cell

CROSS = {"color": "red", "shape": "cross", "box": [100, 100, 140, 140]}     # touches the four cells in the middle


def gaze(words: list[str], *pixels: int) -> Caption:
    """A caption whose words look at these pixels of a 4 x 4 map."""
    alphas = np.full((len(words), 16), 0.01, np.float32)
    for row, pixel in enumerate(pixels):
        alphas[row, pixel] = 0.5
    return Caption(words, 0.0, True, alphas.reshape(-1, 4, 4), [], [], None)


@pytest.mark.parametrize(("words", "pixels", "expected"), [
    (["a", "circle"], (9, 0), [(True, 2 / 16, 0.51 / 0.56, 2 / 7)]),
    (["a", "disc"], (0, 2), [(False, 2 / 16, 0.02 / 0.07, 2 / 7)]),
    (["circles", "and", "squares"], (1, 0, 15), [(True, 2 / 16, 0.51 / 0.56, 2 / 7),
                                                 (True, 1 / 16, 0.5 / 0.56, 1 / 7)]),
    (["a", "star"], (0, 0), []),
    (["a", "cross"], (0, 10), [(True, 4 / 16, 0.53 / 0.56, 4 / 7)])])
def test_a_gaze_counts_where_the_named_shape_is(words: list[str], pixels: tuple[int, ...],
                                                expected: list[tuple[float, ...]]) -> None:
    found = demo.demo.looks(gaze(words, *pixels), [CIRCLE, SQUARE, CROSS])
    assert [tuple(each) for each in found] == [pytest.approx(each) for each in expected]


def test_a_colour_is_looked_at_too() -> None:
    found = demo.demo.looks(gaze(["a", "red", "circle"], 0, 15, 0), [CIRCLE, SQUARE, CROSS], "color")
    assert [tuple(each) for each in found] == [pytest.approx((False, 6 / 16, 0.06 / 0.56, 6 / 7))]


def test_means_are_in_per_cent_and_of_scenes_of_several_kinds() -> None:
    """Where there is but one kind of shape, all weight on shapes is on the named one."""
    (alone,) = demo.demo.looks(gaze(["circle"], 0), [CIRCLE])
    assert alone == (True, 2 / 16, None, None)
    beside, = demo.demo.looks(gaze(["circle"], 5), [CIRCLE, SQUARE])
    means = demo.demo.in_per_cent([alone, beside], "x_")
    assert means == {"x_on_object": 50.0, "x_by_chance": 12.5, "x_on_named": pytest.approx(200 / 3),
                     "x_on_named_by_chance": pytest.approx(200 / 3)}
    assert demo.demo.in_per_cent([], "")["on_named"] == 0


@pytest.mark.parametrize(("caption", "expected"), [
    ("in red a disc and in blue a box", [("red", "circle"), ("blue", "square")]),
    ("the red one is a star and the white one a plus", [("red", "star"), ("white", "cross")]),
    ("the stars are green", [("green", "star")]), ("a small red box above a white heart", [("red", "square"),
                                                                                    ("white", "heart")]),
    ("there is a circle", []), ("it is red", [])])
def test_what_a_caption_names(caption: str, expected: list[tuple[str, str]]) -> None:
    assert demo.demo.things_named(caption.split()) == expected


def test_two_objects_of_a_shape_are_both_right() -> None:
    other = {"color": "green", "shape": "square", "box": [0, 192, 64, 256]}
    assert demo.demo.looks(gaze(["square"], 12), [SQUARE, other]) == [(True, 2 / 16, None, None)]
    assert demo.demo.looks(gaze(["square"], 15), [SQUARE, other]) == [(True, 2 / 16, None, None)]


def test_the_demos_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    """Its flags are ones that the scripts have, and its last words name what it found."""
    import caption
    import create_input_files
    import eval as evaluation
    import train

    scripts = {"create_input_files.py": create_input_files, "train.py": train, "eval.py": evaluation,
               "caption.py": caption}
    parsed = []
    monkeypatch.setattr(demo.demo, "call", lambda script, *arguments: parsed.append(
        scripts[script].get_parser().parse_args([str(each) for each in arguments])))
    monkeypatch.setattr(demo.demo, "examine", lambda folder: {
        "bleu4": 40.0, "bleu4_blind": 12.0, "things": 11, "there": 70.0, "shape_words": 9, "on_object": 60.0,
        "by_chance": 15.0, "on_named": 50.0, "on_named_by_chance": 25.0})
    monkeypatch.setattr(demo.demo, "draw_data_set", lambda folder, train: folder / "dataset_shapes.json")
    demo.demo.main(demo.demo.get_parser().parse_args(["--folder", str(tmp_path)]))
    assert len(parsed) == 4
    shown = capsys.readouterr().out
    assert "greedy: 40.0; of the same captions held against other scenes: 12.0" in shown
    assert "of 11 things it named by colour and shape, 70 % were there" in shown
    assert "the named one had 50 %; by its area: 25 %" in shown
    assert json.loads((tmp_path / "examination.json").read_text())["on_named"] == 50
    page, = [Path(each.gallery) for each in parsed if "gallery" in each]
    assert page.parent == tmp_path
    assert shown.splitlines()[-1].endswith(str(page))
