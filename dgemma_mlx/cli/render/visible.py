"""Model text made safe for a terminal, and broken into rows as a terminal breaks it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

_PICTURES = 0x2400  # U+2400 SYMBOL FOR NULL and so on: one for each C0 control
_KEPT = "\n\t"
_ISOLATES = range(0x2066, 0x206A)
_EMBEDDINGS = range(0x202A, 0x202F)
_SEPARATORS = (0x2028, 0x2029)  # of lines and of paragraphs
_SURROGATES = range(0xD800, 0xE000)  # no text to encode
_EMOJI_STYLE = "\ufe0f"  # draws what is before it two cells wide, in some terminals


def _replacement(code: int) -> str:
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
    """The text with every character that could steer a terminal, or reorder what is around it, made visible.

    Line feeds and tabs stay, and so do letters of all scripts, joiners and combining marks.
    """
    return text.translate(_UNSAFE)


def json_line(value: Any) -> str:
    """A value as JSON on one line that steers no terminal either: what ``visible`` replaces is escaped.

    JSON has no NaN and no infinities; they become null.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False)
    return text.translate(_ESCAPES)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@lru_cache(maxsize=4096)
def cells(character: str) -> int:
    """Columns that a character takes by itself: with those around it, an emoji may take fewer."""
    from wcwidth import wcwidth

    return 1 if character == _EMOJI_STYLE else max(wcwidth(character), 0)


Piece = tuple[str, str]
"""Text and its style, an SGR parameter string such as "2" (dim) or "" (normal)."""

Row = list[Piece]


def wrap(pieces: Iterable[Piece], width: int) -> list[Row]:
    """Rows of at most ``width`` cells, broken where a terminal breaks them; tabs become spaces."""
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
    return ((character, style) for text, style in pieces for character in text)
