"""Human-readable byte counts: written for people, and read from what people write."""

from __future__ import annotations

import re

from dgemma_mlx.errors import DgemmaError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?")
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size(count: float) -> str:
    """Formats a count of bytes as ``16.6 GB``, in units of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"


def parse_size(text: str) -> int:
    """Reads ``8GB``, ``7.5 GiB``, ``500M`` or plain bytes, in upper or lower case, and returns the number of bytes.

    Raises ``DgemmaError`` (exit code 2) for anything else, and for 0.
    """
    found = _SIZE.fullmatch(text.strip().upper())
    value = float(found[1]) * _UNITS.get(found[2], 0) if found else 0.0
    if not 1 <= value < float("inf"):
        raise DgemmaError(f"not a size: {text!r}", "Write a number and a unit: 8GB, 7.5GiB or 900MB.", exit_code=2)
    return int(value)
