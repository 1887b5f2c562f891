"""Figures are drawn with a font that has the letters; where there is none, that is said once."""
from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import font_manager, get_data_path
from PIL import Image, ImageDraw, ImageFont
from test_gallery import gaze, grey

from drawing import fonts
from drawing.figure import draw_figure, visualize_att
from drawing.panels import panel

LETTERS = "\u24b6\u24b7"  # in a circle; the first of these two fonts lacks them
OWN, OTHER = (str(Path(get_data_path(), "fonts", "ttf", f"{name}.ttf")) for name in ("DejaVuSans", "STIXGeneral"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says which fonts the machine has."""
    def has(*paths: str | Path) -> None:
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path) for path in paths])
        for each in (fonts.font_file, fonts.fonts_of_the_machine, fonts.letters_of, fonts.say_that_letters_are_missing):
            each.cache_clear()

    has()
    return has


def drawn(word: str, path: str) -> np.ndarray:
    """A word as this font has it, where and as large as a panel would write it."""
    canvas = Image.new("RGB", (240, 21), "white")
    ImageDraw.Draw(canvas).text((7, 7), word, "black", ImageFont.truetype(path, 14))
    return np.asarray(canvas)


def test_a_word_is_drawn_in_a_font_that_has_its_letters(machine, tmp_path, capsys) -> None:
    """In a GIF's panels and in the figure; other words keep theirs."""
    machine(OTHER)
    assert [fonts.font_file(word) for word in ("dog", LETTERS, "caf\u00e9")] == [OWN, OTHER, OWN]
    written = np.asarray(panel(grey(240, 60), [LETTERS]))[60:81]
    assert (written == drawn(LETTERS, OTHER)).all() and not (written == drawn(LETTERS, OWN)).all()
    grey(30, 20).save(tmp_path / "x.png")
    figure = visualize_att(tmp_path / "x.png", [0, 1], np.ones((2, 4, 4)), {0: "dog", 1: LETTERS})
    assert [axes.title.get_fontproperties().get_file() for axes in figure.axes] == [OWN, OTHER]
    assert [axes.title.get_fontsize() for axes in figure.axes] == [14, 14]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_where_no_font_has_them_that_is_said_once(suffix, machine, tmp_path, capsys) -> None:
    """By us, and not by a warning for each letter."""
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    machine(tmp_path / "broken.ttf", tmp_path / "missing.ttf", "/fonts/LastResort.otf", "/fonts/NotoColorEmoji.ttf")
    grey(30, 20).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(2):
            caption = gaze(f"a {LETTERS} \u72d7 {i}")
            draw_figure(tmp_path / "x.png", tmp_path / f"{i}{suffix}", caption,
                        dict(enumerate(["", *caption.words, ""])), True)
    assert (tmp_path / f"1{suffix}").stat().st_size > 1000
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "figures show boxes" in shown and ".html page" in shown


def test_upright_fonts_of_normal_weight_come_first(machine) -> None:
    machine("/fonts/A-Bold.ttf", "/fonts/B-Regular.ttf", "/fonts/AppleColorEmoji.ttc", "/fonts/LastResort.otf")
    assert list(fonts.fonts()) == [OWN, "/fonts/B-Regular.ttf", "/fonts/A-Bold.ttf"]
