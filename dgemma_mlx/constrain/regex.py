"""Functions that build regular expressions, in the syntax of Rust's ``regex`` crate."""

from __future__ import annotations

import re

from dgemma_mlx.errors import DgemmaError

_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")
_TRAILING_DOLLAR = re.compile(r"(?<!\\)((?:\\\\)*)\$\Z")


def quoted(text: str) -> str:
    """Return a regular expression that matches exactly this text."""
    return _SPECIAL.sub(r"\\\g<0>", text)


def any_of(*alternatives: str) -> str:
    """Return a group that matches any of the alternatives."""
    return f"(?:{'|'.join(alternatives)})"


def repeated(item: str, least: int, most: int | None) -> str:
    """Repeat an item from ``least`` to ``most`` times. None means any number. ``item`` must be one atom or a group."""
    return f"{item}{{{least},{'' if most is None else most}}}"


def without_anchors(pattern: str) -> str:
    """Remove a leading ``^`` and a trailing ``$``, which have no effect when the whole text must match."""
    return _TRAILING_DOLLAR.sub(r"\1", pattern.removeprefix("^"))


def integers(least: int, most: int) -> str:
    """Match the decimal integers from ``least`` to ``most``, without leading zeros. The range must not be empty."""
    parts = []
    if least < 0:
        parts.append(f"-{any_of(*naturals(max(1, -most), -least))}")
    if most >= 0:
        parts += naturals(max(0, least), most)
    return any_of(*parts)


def naturals(least: int, most: int) -> list[str]:
    """Return alternatives that match the integers from ``least`` to ``most``. Neither may be negative."""
    if least > most:
        return []
    low, high = str(least), str(most)
    if len(low) < len(high):  # treat each number of digits separately
        nines = 10 ** len(low) - 1
        return naturals(least, nines) + naturals(nines + 1, most)
    return [_digits(low, high)]


def _digits(low: str, high: str) -> str:
    """Match the numbers from ``low`` to ``high``, which have the same number of digits."""
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


def checked_text(value: object, label: str) -> str:
    """Return the value if it is text that UTF-8 can encode. Raises ``DgemmaError`` (exit code 2) otherwise.

    ``label`` names the value in the message.
    """
    if not isinstance(value, str):
        raise DgemmaError(f"{label} must be text, not {type(value).__name__}", "Give a string.", exit_code=2)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DgemmaError(
            f"{label} contains a lone surrogate, which is not a Unicode character",
            "Remove the characters U+D800 to U+DFFF.", exit_code=2,
        ) from None
    return value
