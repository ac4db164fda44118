"""Names of any characters in sentences, tables and pictures: nothing acts on a terminal, and no font lacks a glyph."""

from __future__ import annotations

import re
import unicodedata
import warnings
from io import BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from fastmem.errors import InputFileError
from fastmem.report.lettering import CAPTION, letter, shorten, shorten_name
from fastmem.report.markdown import markdown_table
from fastmem.reporter import JOINERS, printable

# hypothesis draws no halves of characters unless it is told to
ANY_TEXT = st.text(st.characters(categories=("L", "M", "N", "P", "S", "Z", "C")), max_size=40)
MODEST = settings(derandomize=True, max_examples=50, deadline=None, database=None)

ROWS = {
    "end of a line": ("a\nb", "a\\nb"),
    "escape sequence": ("\x1b[31m", "\\x1b[31m"),
    "carriage return": ("a\rb", "a\\rb"),
    "nul": ("\0", "\\x00"),
    "c1": ("\x9b31m", "\\x9b31m"),
    "right to left": ("\u202egnp.exe", "\\u202egnp.exe"),
    "half of a character": ("\udcff", "\\udcff"),
    "tag beyond two bytes": ("\U000e0041", "\\U000e0041"),
    "line separator": ("a\u2028b", "a\\u2028b"),
    "chinese": ("\u732b", "\u732b"),
    "persian with a joiner": (
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    ),
    "wide space": ("a\u3000b", "a\u3000b"),
    "backslash and quotes": ("\\'\"", "\\'\""),
}


@pytest.mark.parametrize(("text", "shown"), ROWS.values(), ids=ROWS)
def test_what_would_act_is_escaped_and_the_rest_is_kept(text, shown):
    assert printable(text) == shown
    assert str(InputFileError(f"expected {text}, got x")) == f"expected {shown}, got x"


@MODEST
@given(ANY_TEXT)
def test_printable_text_acts_on_nothing_and_stays_as_it_is(text):
    shown = printable(text)
    shown.encode()
    assert not {unicodedata.category(c) for c in shown if c not in JOINERS} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert printable(shown) == shown


@MODEST
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), max_size=4))
def test_a_table_has_a_line_for_every_row_and_its_columns(rows):
    lines = markdown_table(("a", "b"), rows).split("\n")
    assert len(lines) == 2 + len(rows)
    assert {len(re.findall(r"(?<!\\)\|", line.replace(r"\\", ""))) for line in lines[:2]} == {3}
    assert len({len(line) for line in lines}) == 1
    assert all(line == printable(line) for line in lines)


@settings(MODEST, max_examples=12)
@given(ANY_TEXT)
def test_a_caption_is_short_and_can_be_drawn_without_a_warning(name):
    assert len(shorten(name)) <= CAPTION
    draw(name)


@pytest.mark.parametrize(
    "name", ["$", "$x_1^2$", r"\frac{", r"$\frac$", "a_b^c", "%", "\u732b" * 60, "x" * 5000, "\0", ""]
)
def test_signs_of_formulas_and_long_names_are_drawn_as_they_are(name):
    assert shorten(name)[:10] == name[:10] or "\\" in shorten(name)
    draw(name)


def draw(name: str) -> None:
    figure = Figure(figsize=(2, 2))
    axis = figure.subplots()
    axis.set_title(f"{shorten_name(name)}\n1.5")
    axis.text(0.5, 0.5, name)
    axis.set_xticks([0, 1], [shorten(name), "b"])
    figure.suptitle(name)
    letter(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(BytesIO(), dpi=20)


def test_names_lose_their_class_and_suffix():
    assert shorten_name("class/tree.png") == "tree"
    assert shorten_name("class/.png") == ".png"
    assert shorten_name("a/" + "x" * 40 + ".png") == "x" * 17 + "\u2026"


def test_an_escape_is_never_cut():
    # 16 signs leave room for one more, and an escape takes more
    assert shorten("x" * 16 + "\x1b" + "y" * 9) == "x" * 16 + "\u2026"
