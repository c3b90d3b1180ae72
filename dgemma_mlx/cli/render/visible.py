"""Make model text safe for a terminal and break it into rows as a terminal does."""

from __future__ import annotations

import codecs
import json
import math
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

_PICTURES = 0x2400  # U+2400 SYMBOL FOR NULL is the first of the pictures of the C0 controls
_KEPT = "\n\t"
_ISOLATES = range(0x2066, 0x206A)
_EMBEDDINGS = range(0x202A, 0x202F)
_SEPARATORS = (0x2028, 0x2029)  # the line separator and the paragraph separator
_SURROGATES = range(0xD800, 0xE000)  # UTF-8 cannot encode them
_EMOJI_STYLE = "\ufe0f"  # in some terminals, draws the character before it two cells wide


def _replacement(code: int) -> str:
    """Return what is shown in place of a character: its picture if it has one, else U+FFFD."""
    if code < 0x20:
        return chr(_PICTURES + code)
    return "\u2421" if code == 0x7F else "\ufffd"


_UNSAFE = {
    code: _replacement(code)
    for code in (*range(0x20), *range(0x7F, 0xA0), *_EMBEDDINGS, *_ISOLATES, *_SEPARATORS, *_SURROGATES)
    if chr(code) not in _KEPT
}
_ESCAPES = {code: f"\\u{code:04x}" for code in _UNSAFE}


def visible(text: str) -> str:
    """Replace every character that could control a terminal or reorder the text around it by a visible one.

    Line feeds, tabs, letters of all scripts, joiners and combining marks stay the same.
    """
    return text.translate(_UNSAFE)


def print_path(path: Path) -> None:
    """Print a path on a line of its own: made safe on a terminal, unchanged to a pipe."""
    print(visible(str(path)) if sys.stdout.isatty() else path)


def json_line(value: Any) -> str:
    """Return a value as one line of JSON that is safe for a terminal: characters that ``visible`` replaces are escaped.

    NaN and infinities become null, because JSON has neither. Where stdout is not UTF-8, all but ASCII is escaped.
    """
    escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    try:
        text = json.dumps(value, ensure_ascii=escaped, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=escaped)
    return text.translate(_ESCAPES)


def _finite(value: Any) -> Any:
    """Return the value with None in place of each NaN and infinity."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@lru_cache(maxsize=4096)
def cells(character: str) -> int:
    """Return the columns that a character takes by itself. Within a sequence, an emoji may take fewer."""
    from wcwidth import wcwidth

    return 1 if character == _EMOJI_STYLE else max(wcwidth(character), 0)


# A text and its style: an SGR parameter string such as "2" (dim) or "" (normal).
Piece = tuple[str, str]

# The pieces of one row on the screen, from left to right.
Row = list[Piece]


def wrap(pieces: Iterable[Piece], width: int) -> list[Row]:
    """Break the pieces into rows of at most ``width`` cells, where a terminal would. Tabs become spaces."""
    rows: list[Row] = [[]]
    column = 0
    for character, style in _characters(pieces):
        if character == "\n":
            rows.append([])
            column = 0
            continue
        text = " " * min(8 - column % 8, width - column) if character == "\t" else character
        size = len(text) if character == "\t" else cells(character)
        if column + size > width:
            rows.append([])
            column = 0
        row = rows[-1]
        if row and row[-1][1] == style:
            row[-1] = (row[-1][0] + text, style)
        else:
            row.append((text, style))
        column += size
    return rows


def _characters(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield each character with the style of its piece."""
    return ((character, style) for text, style in pieces for character in text)
