"""Sets of characters, and how their UTF-8 bytes continue.

A set is a sorted tuple of disjoint ranges (first, last) of code points.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

Ranges = tuple[tuple[int, int], ...]
LAST = 0x10FFFF
ALL: Ranges = ((0, 0xD7FF), (0xE000, LAST))  # surrogates are code points, but not characters


def ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Return a set of characters from ranges in any order, which may overlap."""
    merged: list[list[int]] = []
    for first, last in sorted(pairs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1][1] = max(merged[-1][1], last)
        elif first <= last:
            merged.append([first, last])
    return tuple((first, last) for first, last in merged)


def single(character: str) -> Ranges:
    """Return the set of one character."""
    return ((ord(character), ord(character)),)


def without(one: Ranges, other: Ranges) -> Ranges:
    """Return the characters of one set that are not in the other."""
    found, place = [], 0
    for start, last in one:
        first = start
        while place < len(other) and other[place][1] < first:
            place += 1
        for begin, end in itertools.islice(other, place, None):
            if begin > last:
                break
            if begin > first:
                found.append((first, begin - 1))
            first = end + 1
        if first <= last:
            found.append((first, last))
    return tuple(found)


def minterms(sets: Sequence[Ranges]) -> tuple[list[Ranges], list[int]]:
    """Return the coarsest division of ``ALL`` in which each of the sets is a union of parts.

    Return the parts, and a mask for each set, of which bit i says whether part i belongs to it. Code points that are
    not characters are left out.
    """
    starts: dict[int, int] = {first: 0 for first, _ in ALL}
    for number, each in enumerate(sets):
        for first, last in each:
            starts[first] = starts.get(first, 0) ^ 1 << number
            starts[last + 1] = starts.get(last + 1, 0) ^ 1 << number
    parts: dict[int, list[tuple[int, int]]] = {}  # by the sets that a part belongs to
    inside = 0
    places = sorted(starts)
    for place, following in zip(places, [*places[1:], LAST + 1], strict=True):
        inside ^= starts[place]
        if place < following:
            parts.setdefault(inside, []).append((place, following - 1))
    surrogates = without(((0, LAST),), ALL)
    characters = {inside: found for inside, part in parts.items() if (found := without(ranges(part), surrogates))}
    masks = [sum(1 << n for n, inside in enumerate(characters) if inside >> number & 1) for number in range(len(sets))]
    return list(characters.values()), masks


def byte_sequences(characters: Ranges) -> list[tuple[tuple[int, int], ...]]:
    """Return the UTF-8 encodings of a set of characters as sequences of byte ranges.

    As in the utf8-ranges crate: a range of code points is cut where the length of the encoding changes, and where all
    later bytes are not whole ranges 0x80 to 0xBF.
    """
    found = []
    waiting = list(without(characters, without(((0, LAST),), ALL)))[::-1]
    while waiting:
        first, last = waiting.pop()
        cuts = [limit + 1 for limit in (0x7F, 0x7FF, 0xFFFF) if first <= limit < last]
        for mask in (0x3F, 0xFFF, 0x3FFFF) if last > 0x7F else ():
            if first & ~mask != last & ~mask:
                cuts += [(first | mask) + 1] if first & mask else [last & ~mask] if last & mask != mask else []
        if cuts:
            waiting += [(cuts[0], last), (first, cuts[0] - 1)]
        else:
            found.append(tuple(zip(chr(first).encode(), chr(last).encode(), strict=True)))
    return found
