r"""Letter pictures: names in any script, in a font that has their characters, or else as escapes such as ``\u732b``."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from fastmem.reporter import escape, printable_character

# the font that comes with matplotlib
USUAL = "DejaVu Sans"
# fonts that draw a box, or nothing, for every character
EMPTY = ("Last Resort", ".LastResort", "Adobe Blank")
# a line of text that is longer is cut, and so is a name in a caption
LINE, CAPTION = 160, 18


def letter(figure: Figure) -> None:
    """Give all text of a figure the fonts that it needs, escape what no font has, and draw signs such as $ as they are.

    Labels of ticks are made anew when a figure is drawn, so their names must have gone through ``shorten`` before.
    """
    texts = [found for found in figure.findobj(Text) if isinstance(found, Text)]
    for text in texts:
        text.set_parse_math(False)
        text.set_usetex(False)
        text.set_text("\n".join(shorten(line, LINE) for line in text.get_text().split("\n")))
    needed = {_font_of(character) for text in texts for character in text.get_text()}
    fonts = [USUAL, *sorted(name for name in needed if name is not None and name != USUAL)]
    for text in texts:
        text.set_fontfamily(fonts)


def shorten(text: str, most: int = CAPTION) -> str:
    """The text on one line, with escapes for what would act, not show, or has no font, and cut to ``most`` letters.

    Characters that are twice as wide as others, such as Chinese ones, count as two letters.
    """
    # one sign or one escape each, so that a cut leaves no part of an escape
    pieces = [_piece(character) for character in text[: most + 1]]
    if len(text) <= most and sum(map(_width, pieces)) <= most:
        return "".join(pieces)
    kept, left = [], most - 1
    for piece in pieces:
        left -= _width(piece)
        if left < 0:
            break
        kept.append(piece)
    return "".join(kept) + "…"


def shorten_name(name: str) -> str:
    """The file name in an image name ``class/name``, without suffix, cut to the length of a caption."""
    file = name.rsplit("/", 1)[-1]
    return shorten(file.rsplit(".", 1)[0] or file)


def _piece(character: str) -> str:
    shown = printable_character(character)
    return shown if shown != character or _font_of(character) is not None else escape(character)


def _width(piece: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in piece)


@cache
def _font_of(character: str) -> str | None:
    """Name of an installed font that can draw a character, the usual one before others."""
    return next((name for name in _names() if _draws(name, character)), None)


@cache
def _names() -> Sequence[str]:
    """Names of the installed fonts that are upright and of usual weight, the usual one first."""
    fonts = [f for f in font_manager.fontManager.ttflist if f.style == "normal" and f.weight in (400, "normal")]
    names = {font.name for font in fonts} - {USUAL}
    return [USUAL, *sorted(name for name in names if not name.startswith(EMPTY))]


@cache
def _font(name: str) -> FT2Font | None:
    """The font that matplotlib takes for a name; None where it has none, or a damaged file."""
    try:
        return FT2Font(font_manager.findfont(font_manager.FontProperties(family=name), fallback_to_default=False))
    # the library has no kind of its own for a font that it cannot find or open
    except (OSError, RuntimeError, ValueError):
        return None


def _draws(name: str, character: str) -> bool:
    font = _font(name)
    if font is None or not font.get_char_index(ord(character)):
        return False
    try:
        # fonts of pictures have the character, but cannot be scaled
        font.set_size(10, 72)
        font.load_char(ord(character))
    except RuntimeError:
        return False
    return True
