"""Texts with gaps: how people write gaps, and how the model is shown them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

from dgemma_mlx.checks import check_count, check_text
from dgemma_mlx.checks import shown as quoted
from dgemma_mlx.errors import DgemmaError

MARK = "___"


@dataclass(frozen=True)
class Gap:
    """A gap in a text.

    Attributes:
        size: Number of tokens. None searches for it.
        hint: What belongs here, for the model to read.
        original: The text that the gap replaces, where a text is edited.
        most: Largest number of tokens to search. None searches up to what a canvas holds.
    """

    size: int | None = None
    hint: str = ""
    original: str | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        """Raise ``DgemmaError`` (exit code 2) for a value of another type, and for a size below 1."""
        for name, count in (("size", self.size), ("largest size", self.most)):
            if count is not None:
                check_count(f"the {name} of a gap", count)
        check_text("the hint of a gap", self.hint)
        if self.original is not None:
            check_text("the original text of a gap", self.original)


Part = str | Gap


def parse_gaps(text: str, mark: str = MARK) -> list[Part]:
    """Split a text at its gaps, and return text, gap, text, ..., text.

    A gap is written ``mark``, ``mark:20mark`` (20 tokens) or ``{{fill: a hint}}``. When the mark repeats one character,
    a longer run of it is one gap as well. Texts may be empty. Raises ``DgemmaError`` (exit code 2) when there is no
    gap, or a gap of no tokens.
    """
    check_text("the mark of a gap", mark)
    if not mark.strip():
        raise DgemmaError("the mark of a gap must not be empty", "The default is ___.", exit_code=2)
    one = re.escape(mark)
    run = f"{re.escape(mark[0])}{{{len(mark)},}}" if len(set(mark)) == 1 else one
    pattern = rf"{one}:(?P<size>\d+){one}|\{{\{{fill(?::(?P<hint>[^{{}}]*))?\}}\}}|{run}"
    parts: list[Part] = []
    done = 0
    for found in re.finditer(pattern, text):
        size, hint = found["size"], found["hint"]
        if size is not None and len(size) > 9:
            raise DgemmaError(f"the gap {quoted(found[0])} is too long", "Give a length that a canvas holds.", 2)
        if size is not None and int(size) == 0:
            raise DgemmaError(
                f"the gap {found[0]} has no tokens", f"Give a length of at least 1, or write {mark}.", exit_code=2
            )
        parts += [text[done : found.start()], Gap(None if size is None else int(size), (hint or "").strip())]
        done = found.end()
    if not parts:
        raise DgemmaError(
            f"there is no gap in the text: no {mark} and no {{{{fill: ...}}}}",
            f"Write {mark} where something is missing; --hole names another mark.", exit_code=2,
        )
    return [*parts, text[done:]]


def lines_of(text: str) -> list[str]:
    """Return the lines with their line feeds. Only a line feed ends a line, as in editors and patch."""
    return StringIO(text, newline="\n").readlines()


def shown(parts: Sequence[Part]) -> str:
    """Return the text as the model is shown it: gaps as ``___``, with their hints."""
    return "".join(
        part if isinstance(part, str) else f"{MARK} ({part.hint})" if part.hint else MARK for part in parts
    )
