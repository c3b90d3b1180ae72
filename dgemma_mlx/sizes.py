"""Bytes for people."""

from __future__ import annotations


def size(count: float) -> str:
    """``16.6 GB``; units of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} bytes"
