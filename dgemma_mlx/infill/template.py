"""Text with gaps: how gaps are written, and how they are shown to the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

from dgemma_mlx.errors import DgemmaError

MARK = "___"


@dataclass(frozen=True)
class Gap:
    """A gap in a text."""

    size: int | None = None
    """tokens; None: searched"""
    hint: str = ""
    """for the model: what belongs here"""
    original: str | None = None
    """what stands here now, where a text is edited"""


Part = str | Gap


def parse_gaps(text: str, mark: str = MARK) -> list[Part]:
    """``mark``, ``mark:20mark`` (20 tokens) and ``{{fill: a hint}}`` -> the parts of the text, gaps between texts.

    Of a mark that is one character over and over, a longer run is one gap too. Between two gaps there is always a
    text, perhaps an empty one. ``DgemmaError`` (exit code 2) where there is no gap, or a gap of no tokens.
    """
    if not mark.strip():
        raise DgemmaError("the mark of a gap must not be empty", "The default is ___.", exit_code=2)
    one = re.escape(mark)
    run = f"{re.escape(mark[0])}{{{len(mark)},}}" if len(set(mark)) == 1 else one
    pattern = rf"{one}:(?P<size>\d+){one}|\{{\{{fill(?::(?P<hint>[^{{}}]*))?\}}\}}|{run}"
    parts: list[Part] = []
    done = 0
    for found in re.finditer(pattern, text):
        size, hint = found["size"], found["hint"]
        if size is not None and int(size) == 0:
            raise DgemmaError(f"a gap of no tokens: {found[0]}", "Give it at least one, or leave it out.", exit_code=2)
        parts += [text[done : found.start()], Gap(None if size is None else int(size), (hint or "").strip())]
        done = found.end()
    if not parts:
        raise DgemmaError(
            f"there is no gap in the text: no {mark} and no {{{{fill: ...}}}}",
            f"Write {mark} where something is missing; --hole names another mark.", exit_code=2,
        )
    return [*parts, text[done:]]


def lines_of(text: str) -> list[str]:
    """The lines with their line feeds, which alone end a line, as editors and patch have it."""
    return StringIO(text, newline="\n").readlines()


def shown(parts: Sequence[Part]) -> str:
    """The text as the model is shown it: gaps as ``___``, with their hints."""
    return "".join(
        part if isinstance(part, str) else f"{MARK} ({part.hint})" if part.hint else MARK for part in parts
    )
