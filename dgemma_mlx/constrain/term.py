"""A term of an algebra (``dgemma_mlx.constrain.terms``), which is a set of words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

UNBOUNDED = 1 << 60  # more words, symbols or repetitions than anything has


class Term:
    """A set of words. ``Terms`` makes all terms of an alphabet.

    Attributes:
        kind: What the term is: none, empty, set, both (concatenation), any (alternatives), all (intersection), not,
            repeat, or rule.
        parts: The terms and numbers it consists of.
        number: Its number among the terms of its alphabet, by time.
        nullable: Whether the empty word belongs to it.
        least: Weight of its lightest word, once it is known; ``Terms.least`` finds it.
        hope: A weight that no word of it is lighter than.
        longest: A weight that no word of it is heavier than.
        row: What may follow each symbol, once it is known; ``Terms.row`` finds it.
    """

    __slots__ = ("__weakref__", "hope", "kind", "least", "longest", "nullable", "number", "parts", "row")

    def __init__(self, kind: str, parts: tuple[Any, ...], number: int, nullable: bool) -> None:
        self.kind, self.parts, self.number, self.nullable = kind, parts, number, nullable
        self.row: Row | None = None
        self.least: int | None = None
        self.hope, self.longest = 0, UNBOUNDED

    def __repr__(self) -> str:
        return f"<{self.kind} {self.number}>"


Row = tuple[tuple[int, Term], ...]  # disjoint sets of symbols, and the term after each symbol of a set


def bits(mask: int) -> Iterator[int]:
    """Yield the numbers of the symbols of a set."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
