"""Reading of regular expressions, in the syntax of Rust's ``regex`` crate, as trees.

Groups, alternatives and repetitions are read here, without recursion. What matches one character (a class, ``.``,
``\\w``) is compiled by outlines-core, which knows Unicode.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple, NoReturn

from dgemma_mlx.constrain.characters import Ranges, ranges

_MOST_CHARACTERS = 1_000_000
_MOST_DEPTH = 250  # of groups, as in Rust

_FLAGS = re.compile(r"\?([imsuxRU]*)(?:-([imsuxRU]+))?([:)])")
_NAME = re.compile(r"\?P?<[A-Za-z_][\w.\[\]]*>")
_COUNTS = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d*)\s*)?\}")
_SINGLE = re.compile(
    r"\\(?:[pP](?:\{[^{}]*\}|.)|[xuU]\{[^{}]*\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[dDwWsSafntrv])"
)
_VERBOSE = re.compile(r"(?:\s|#[^\n]*)+")


class One(NamedTuple):
    """One character of a set."""

    characters: Ranges


class Begin(NamedTuple):
    """The beginning of the text."""


class End(NamedTuple):
    """The end of the text."""


class Sequence(NamedTuple):
    """The items, one after the other."""

    items: tuple[Pattern, ...]


class Either(NamedTuple):
    """One of the branches."""

    branches: tuple[Pattern, ...]


class Repeated(NamedTuple):
    """An item, repeated; ``most`` is None without a limit."""

    item: Pattern
    least: int
    most: int | None


Pattern = One | Begin | End | Sequence | Either | Repeated


class _Group(NamedTuple):
    """A group that is being read: the flags around it, its complete branches, and the items of the current one."""

    flags: frozenset[str]
    branches: list[Pattern]
    items: list[Pattern]

    def closed(self) -> Pattern:
        """Return the group."""
        branches = [*self.branches, _joined(self.items)]
        return branches[0] if len(branches) == 1 else Either(tuple(branches))


def _joined(items: list[Pattern]) -> Pattern:
    return items[0] if len(items) == 1 else Sequence(tuple(items))


class _Reader:
    """A reader of one expression."""

    def __init__(self, text: str) -> None:
        self._text, self._place = text, 0
        self._flags: frozenset[str] = frozenset("u")

    def read(self) -> Pattern:
        """Read the whole expression."""
        if len(self._text) > _MOST_CHARACTERS:
            self._fail("the expression is too long")
        groups = [_Group(self._flags, [], [])]
        while self._place < len(self._text):
            self._read(groups)
        if len(groups) > 1:
            self._fail("a group is not closed")
        return groups.pop().closed()

    def _read(self, groups: list[_Group]) -> None:
        """Read what is next in the text."""
        text, place = self._text, self._place
        character, group = text[place], groups[-1]
        if "x" in self._flags and (space := _VERBOSE.match(text, place)):
            self._place = space.end()
        elif character == "(":
            self._open(groups)
        elif character == ")":
            if len(groups) == 1:
                self._fail("a group is closed that was not opened")
            self._place += 1
            self._flags = group.flags
            closed = groups.pop().closed()
            groups[-1].items.append(closed)
        elif character == "|":
            self._place += 1
            group.branches.append(_joined(group.items))
            group.items.clear()
        elif character in "*+?{":
            if not group.items:
                self._fail("a repetition has nothing to repeat")
            group.items.append(self._repetition(group.items.pop()))
        else:
            group.items.append(self._atom())

    def _open(self, groups: list[_Group]) -> None:
        """Read the beginning of a group, or flags."""
        self._place += 1
        found = _FLAGS.match(self._text, self._place)
        flags = self._flags
        if found:
            self._place = found.end()
            on, off = found[1], found[2] or ""
            if found[3] == ")" and not on + off:
                self._fail("flags are empty")
            self._flags = (flags | set(on)) - set(off)
            if found[3] == ")":
                return
        elif name := _NAME.match(self._text, self._place):
            self._place = name.end()
        elif self._text.startswith("?", self._place):
            self._fail("look-around is not supported")
        if len(groups) > _MOST_DEPTH:
            self._fail(f"groups are nested deeper than {_MOST_DEPTH}")
        groups.append(_Group(flags, [], []))

    def _repetition(self, item: Pattern) -> Pattern:
        """Read a repetition of the item."""
        least, most = 0, None
        character = self._text[self._place]
        if character == "{":
            found = _COUNTS.match(self._text, self._place)
            if found is None:
                self._fail("a count is malformed")
            if max(len(found[1]), len(found[3] or "")) > 9:
                self._fail("a count is too large")
            least = int(found[1])
            most = least if found[2] is None else int(found[3]) if found[3] else None
            if most is not None and most < least:
                self._fail("a count ends before it begins")
            self._place = found.end()
        else:
            least, most = int(character == "+"), 1 if character == "?" else None
            self._place += 1
        if self._text.startswith("?", self._place):  # lazy, which matches the same texts
            self._place += 1
        return Repeated(item, least, most)

    def _atom(self) -> Pattern:
        """Read what matches one character, or the beginning or the end of the text."""
        text, place = self._text, self._place
        character = text[place]
        if character == "[":
            self._place = self._class_end(place)
        elif character == "\\":
            single = _SINGLE.match(text, place)
            self._place = place + 2 if single is None else single.end()
            if place + 1 == len(text):
                self._fail("a backslash is the last character")
        else:
            self._place += 1
        atom = text[place : self._place]
        if atom in ("^", "$", r"\A", r"\z"):
            if atom in "^$" and "m" in self._flags:
                self._fail("line anchors are not supported")
            return Begin() if atom in ("^", r"\A") else End()
        if atom[0] == "\\" and (atom[1].isalnum() or atom[1] in "<>") and len(atom) == 2 and not _SINGLE.match(atom):
            self._fail(f"{atom} is not supported")
        return One(self._characters(atom))

    def _class_end(self, place: int) -> int:
        """Return where the character class that begins at ``place`` ends."""
        text, depth = self._text, 0
        while True:
            if place >= len(text):
                self._fail("a character class is not closed")
            character = text[place]
            place += 1
            if character == "\\":
                place += 1
            elif character == "[":
                depth += 1
                if text.startswith("^", place):
                    place += 1
                if text.startswith("]", place):
                    place += 1
            elif character == "]":
                depth -= 1
                if not depth:
                    return place

    def _characters(self, atom: str) -> Ranges:
        """Return the set of characters that an atom matches."""
        plain = atom if len(atom) == 1 and atom != "." else atom[1:] if len(atom) == 2 and not atom[1].isalnum() else ""
        flags = "".join(sorted(self._flags & set("isuxR")))
        if plain and atom[0] not in "[" and not ("i" in flags and plain.isalpha()):
            return ranges([(ord(plain), ord(plain))])
        off = "".join(sorted(set("isuxR") - set(flags)))
        return characters_of(f"(?{flags}{'-' * bool(off)}{off}:{atom})")

    def _fail(self, problem: str) -> NoReturn:
        """Raise ``ValueError``."""
        raise ValueError(f"{problem}, at character {self._place + 1}")


def read_pattern(text: str) -> Pattern:
    """Read a regular expression. Raises ``ValueError`` when it is malformed or uses what is not supported."""
    return _Reader(text).read()


@lru_cache(maxsize=256)
def characters_of(atom: str) -> Ranges:
    """Return the characters that an expression for one character matches.

    Raises ``ValueError`` when it is malformed or matches none.
    """
    from outlines_core import Index, Vocabulary

    index = Index(atom, Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    transitions, final = index.get_transitions(), set(index.get_final_states())
    known: dict[int, Ranges] = {}

    def rest(state: int, length: int) -> Ranges:
        """Return the low bits of the characters of which ``length`` bytes follow in a state."""
        if state not in known:
            pairs = []
            for byte, to in transitions.get(state, {}).items():
                if 0x80 <= byte < 0xC0:
                    shift = (byte & 0x3F) << 6 * (length - 1)
                    after = ((0, 0),) if length == 1 else rest(to, length - 1)
                    pairs += [(shift + first, shift + last) for first, last in after]
            known[state] = ranges(pairs)
        return known[state]

    found = []
    for byte, to in transitions.get(index.get_initial_state(), {}).items():
        if byte < 0x80:
            found.append((byte, byte))
        elif byte < 0x100:
            length = 1 if byte < 0xE0 else 2 if byte < 0xF0 else 3
            shift = (byte & 0x3F >> length) << 6 * length
            found += [(shift + first, shift + last) for first, last in rest(to, length)]
    if not final:
        raise ValueError(f"{atom} matches no character")
    return ranges(found)
