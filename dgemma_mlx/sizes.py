"""Formatting and parsing of human-readable byte counts; durations, rates and counts in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?")
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size(count: float) -> str:
    """Format a number of bytes with one decimal in a decimal unit, for example ``16.6 GB``.

    Units are powers of 1000, from kB to TB: 1,000 MB are ``1.0 GB``. Fewer than 1000 bytes are written as
    ``512 bytes``.
    """
    return _scaled(count, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))) or counted(round(count), "byte")


def amount(count: float) -> str:
    """Format a large count with one decimal, in billions or millions: ``25.8 B``, ``2.0 M``, ``12,345``."""
    return _scaled(count, (("T", 1e12), ("B", 1e9), ("M", 1e6))) or f"{count:,.0f}"


def _scaled(count: float, units: Sequence[tuple[str, float]]) -> str:
    """Return a count with one decimal in the largest unit that fits, or an empty text below the smallest one."""
    for unit, scale in units:
        if round(count / scale * 1000, 1) >= 1000:  # it would be 1000.0 of the next unit
            return f"{count / scale:.1f} {unit}"
    return ""


def parse_size(text: str) -> int:
    """Parse a size such as ``8GB``, ``7.5 GiB``, ``500M`` or ``1000`` and return the number of bytes.

    Case does not matter. K, M, G and T are powers of 1000; Ki, Mi, Gi and Ti are powers of 1024. Raises ``DgemmaError``
    (exit code 2) for any other text and for sizes below one byte.
    """
    found = _SIZE.fullmatch(text.strip().upper())
    value = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
    if not 1 <= value < float("inf"):
        raise DgemmaError(f"not a size: {shown(text)}", "Write a number and a unit: 8GB, 7.5GiB or 900MB.", exit_code=2)
    return int(value)


def duration(seconds: float) -> str:
    """Return a duration as ``2 h 1 min``, ``5 min`` or ``59 s``."""
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def rate(count: float, amount: float) -> float:
    """Return count / amount, or 0.0 when ``amount`` is 0: nothing was counted, or the clock has not moved."""
    return count / amount if amount else 0.0


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """Return a count with its noun, such as ``1 step`` and ``2 steps``; ``nouns`` is a plural without a plain s."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"
