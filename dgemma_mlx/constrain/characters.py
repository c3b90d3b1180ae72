"""Sets of characters, and how their UTF-8 bytes continue.

A set is a sorted tuple of disjoint ranges (first, last) of code points, without surrogates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Ranges = tuple[tuple[int, int], ...]
LAST = 0x10FFFF
ALL: Ranges = ((0, 0xD7FF), (0xE000, LAST))


def ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Return a set of characters from ranges in any order, which may overlap."""
    merged: list[list[int]] = []
    for first, last in sorted(pairs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        elif first <= last:
            merged.append([first, last])
    return tuple((first, last) for first, last in merged)


def without(one: Ranges, other: Ranges) -> Ranges:
    """Return the characters of one set that are not in the other."""
    found = []
    for first, last in one:
        for begin, end in other:
            if end < first or begin > last:
                continue
            if begin > first:
                found.append((first, begin - 1))
            first = end + 1
        if first <= last:
            found.append((first, last))
    return tuple(found)


def minterms(sets: Sequence[Ranges]) -> list[Ranges]:
    """Return the coarsest division of all characters in which each of the sets is a union of parts.

    The part of characters in none of the sets is the last one.
    """
    starts: dict[int, int] = {0: 0}
    for number, each in enumerate(sets):
        for first, last in each:
            starts[first] = starts.get(first, 0) ^ 1 << number
            starts[last + 1] = starts.get(last + 1, 0) ^ 1 << number
    parts: dict[int, list[tuple[int, int]]] = {}
    inside = 0
    places = sorted(starts)
    for place, following in zip(places, [*places[1:], LAST + 1]):
        inside ^= starts[place]
        if place < following:
            parts.setdefault(inside, []).append((place, following - 1))
    rest = parts.pop(0, [])
    return [*(ranges(part) for part in parts.values()), ranges(rest)]


def byte_sequences(characters: Ranges) -> list[tuple[tuple[int, int], ...]]:
    """Return the UTF-8 encodings of a set of characters as sequences of byte ranges.

    As in the utf8-ranges crate: a range of code points is cut where the length of the encoding changes, and where all
    later bytes are not whole ranges 0x80 to 0xBF.
    """
    found = []
    waiting = [pair for pair in without(characters, ((0xD800, 0xDFFF),))][::-1]
    while waiting:
        first, last = waiting.pop()
        for limit in (0x7F, 0x7FF, 0xFFFF):
            if first <= limit < last:
                waiting += [(limit + 1, last), (first, limit)]
                break
        else:
            for bits in (6, 12, 18):
                mask = (1 << bits) - 1
                if last > 0x7F and (first & ~mask) != (last & ~mask):
                    if first & mask:
                        waiting += [((first | mask) + 1, last), (first, first | mask)]
                        break
                    if last & mask != mask:
                        waiting += [(last & ~mask, last), (first, (last & ~mask) - 1)]
                        break
            else:
                found.append(tuple(zip(chr(first).encode(), chr(last).encode())))
    return found
