"""Pieces of regular expressions, in the syntax of Rust's ``regex``."""

from __future__ import annotations

import re

from dgemma_mlx.errors import DgemmaError

_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")
_END = re.compile(r"(?<!\\)((?:\\\\)*)\$\Z")


def quoted(text: str) -> str:
    """Matches the text alone."""
    return _SPECIAL.sub(r"\\\g<0>", text)


def any_of(*alternatives: str) -> str:
    """A group."""
    return f"(?:{'|'.join(alternatives)})"


def repeated(item: str, least: int, most: int | None) -> str:
    """``item`` is one atom or a group."""
    return f"{item}{{{least},{'' if most is None else most}}}"


def without_anchors(pattern: str) -> str:
    """Without a ``^`` in front and a ``$`` behind, which say nothing where the whole text has to match."""
    return _END.sub(r"\1", pattern.removeprefix("^"))


def integers(least: int, most: int) -> str:
    """The decimal numbers in a range that is not empty."""
    parts = []
    if least < 0:
        parts.append(f"-{any_of(*naturals(max(1, -most), -least))}")
    if most >= 0:
        parts += naturals(max(0, least), most)
    return any_of(*parts)


def naturals(least: int, most: int) -> list[str]:
    """Alternatives for the numbers from least to most, neither negative."""
    if least > most:
        return []
    low, high = str(least), str(most)
    if len(low) < len(high):  # by their number of digits
        nines = 10 ** len(low) - 1
        return naturals(least, nines) + naturals(nines + 1, most)
    return [_digits(low, high)]


def _digits(low: str, high: str) -> str:
    """Numbers of the same number of digits, from low to high."""
    if not low or low == high:
        return low
    if low[0] == high[0]:
        return low[0] + _digits(low[1:], high[1:])
    rest = len(low) - 1
    first, last = int(low[0]), int(high[0])
    parts = []
    if low[1:].strip("0"):
        parts.append(low[0] + _digits(low[1:], "9" * rest))
        first += 1
    if high[1:].strip("9"):
        parts.append(high[0] + _digits("0" * rest, high[1:]))
        last -= 1
    if first <= last:
        parts.append(f"[{first}-{last}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return any_of(*parts)


_ATOM = re.compile(
    r"""(?P<class>\[\^?\]?(?:\\.|\[[^\]]*\]|[^\]\\])*\]+)|(?P<wide>\\[dDwWsSpP])|(?P<flags>\(\?[\w-]+\))
    |(?P<open>\((?:\?(?:[\w-]*:|P?<\w+>))?)|(?P<close>\))
    |\{(?P<least>\d+)(?:,(?P<most>\d*))?\}|(?P<atom>\\.|[^|*+?])""",
    re.VERBOSE | re.DOTALL,
)
_WEIGHTS = {"class": 10, "wide": 100, "atom": 1, "flags": 0}


def weight(regex: str) -> int:
    """About how many states it takes when repetitions are written out, worked out without writing them out."""
    totals, last = [0], 0  # of each open group, and of what a repetition would repeat
    for match in _ATOM.finditer(regex):
        kind = str(match.lastgroup)
        if kind == "open":
            totals.append(0)
        elif kind == "close":
            last = totals.pop() if len(totals) > 1 else 0
            totals[-1] += last
        elif kind in _WEIGHTS:
            last = _WEIGHTS[kind]
            totals[-1] += last
        else:
            times = max(int(match["most"] or match["least"]), 1)
            totals[-1] += last * (times - 1)
            last *= times
    return sum(totals)


def checked_text(value: object, what: str) -> str:
    """A text that has an encoding."""
    if not isinstance(value, str):
        raise DgemmaError(f"{what} is a text, not {type(value).__name__}", exit_code=2)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DgemmaError(f"{what} has a character that is no Unicode text", exit_code=2) from None
    return value
