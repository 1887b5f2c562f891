"""Numbers on the command line: what is outside a flag's range is refused in one sentence."""

import argparse
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safety.errors import run_script
from safety.flags import integer, real


@pytest.mark.parametrize("kind, good", [
    (integer(1), {"1": 1, "99": 99, " 7 ": 7}), (integer(0), {"0": 0, "-0": 0}),
    (integer(0, 3), {"0": 0, "3": 3}), (integer(-2, -2), {"-2": -2}), (integer(1), {"1" * 30: int("1" * 30)}),
    (real(0), {"0": 0, "1e300": 1e300}), (real(0, math.inf), {"inf": math.inf}),
    (real(0, ends="()"), {"5e-324": 5e-324, ".5": 0.5}),
    (real(0, 1), {"0": 0, "1": 1}), (real(0, 1, "[)"), {"0": 0, "0.999": 0.999}),
    (real(0, 1, "(]"), {"1e-9": 1e-9, "1": 1}), (real(-1, 2.5, "()"), {"-0.99": -0.99, "2.4": 2.4})])
def test_numbers_in_the_range_pass(kind, good):
    assert {text: kind(text) for text in good} == good
    assert all(type(kind(text)) is (float if kind.__qualname__.startswith("real") else int) for text in good)


@pytest.mark.parametrize("kind, bad, sentence", [
    (integer(1), ["0", "-1", "1.5", "x", "", "nan", "inf"], "a whole number of 1 or more"),
    (integer(0), ["-1"], "a whole number of 0 or more"),
    (integer(1, 256), ["0", "257", "1e2", "9" * 5000], "a whole number from 1 to 256"),
    (real(0), ["-1e-9", "inf", "-inf", "nan", "x", ""], "a number of 0 or more"),
    (real(0, ends="()"), ["0", "-0.0", "inf", "1e999"], "a number above 0"),
    (real(0, ends="(]"), ["0", "inf"], "a number above 0"),
    (real(0, 1), ["-0.1", "1.0001", "nan"], "a number from 0 to 1"),
    (real(0, 1, "[)"), ["1", "1.5", "-1"], "a number from 0 to below 1"),
    (real(0, 1, "(]"), ["0", "1.1"], "a number above 0, up to 1"),
    (real(-1, 2.5, "()"), ["-1", "2.5"], "a number above -1 and below 2.5")])
def test_other_numbers_are_refused_in_one_sentence(kind, bad, sentence):
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{re.escape(f'{text}: {sentence}')}$"):
            kind(text)


@given(number=st.floats(), low=st.integers(-9, 9), size=st.integers(1, 9) | st.just(math.inf),
       ends=st.sampled_from(["[]", "[)", "(]", "()"]))
def test_an_interval_is_that_of_mathematics(number, low, size, ends):
    high = low + size
    inside = low <= number <= high and not (
        (number == low and ends[0] == "(") or (number == high and ends[1] == ")"))
    try:
        assert real(low, high, ends)(repr(number)) == number and inside
    except argparse.ArgumentTypeError:
        assert not inside


def test_the_flag_is_named_and_the_status_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--dropout", "1.5"])
    parser = argparse.ArgumentParser()
    parser.add_argument("--dropout", type=real(0, 1, "[)"))
    with pytest.raises(SystemExit) as stop:
        run_script(lambda args: None, parser)
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("train.py: argument --dropout: 1.5: a number from 0 to below 1 "
                                       "(--help tells the flags)\n")
