"""Reading of regular expressions, in the syntax of Rust's ``regex`` crate, as nondeterministic automata.

Groups, alternatives and repetitions are read here, without recursion and with a bound on the size. What matches one
character (a class, ``.``, ``\\w``) is compiled by outlines-core, which knows Unicode.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, NoReturn

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain.limits import TooLargeError, check_time

MOST_NODES = 100_000  # of an expression whose repetitions are written out
_MOST_CHARACTERS = 1_000_000
_MOST_DEPTH = 250  # of groups, as in Rust
_MOST_CLASS = 12_000  # characters of a class; outlines-core takes 0.2 s for as many, and cannot be interrupted
_MOST_ATOM_STATES = 10_000  # of all different classes together; \w has 317
_MANY_NODES = f"it has more than {MOST_NODES:,} parts when its repetitions are written out"
BEGIN, END, NOTHING = -3, -2, -1  # what a node asserts in place of a character

_FLAGS = re.compile(r"\?([imsuxRU]*)(?:-([imsuxRU]+))?([:)])")
_NAME = re.compile(r"\?P?<[A-Za-z_][\w.\[\]]*>")
_UNKNOWN_GROUP = re.compile(r"\?(?:<?[=!]|.?)", re.DOTALL)
_COUNTS = re.compile(r"\{\s*(\d+)\s*(?:(,)\s*(\d*)\s*)?\}")
_SINGLE = re.compile(
    r"\\(?:[pP](?:\{[^{}]*\}|.)|[xuU]\{[^{}]*\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[dDwWsSafntrv])"
)
_VERBOSE = re.compile(r"(?:\s|#[^\n]*)+")

# The bytes that lead from a state of an atom to another; state 0 is the first, and -1 follows the character.
AtomStates = Sequence[dict[int, int]]


class _Fragment(NamedTuple):
    """A part of the automaton: the nodes from ``low`` to the last one when it was made, its entry and its exit."""

    low: int
    entry: int
    exit: int


class _Group(NamedTuple):
    """A group that is being read.

    Attributes:
        low: Its first node.
        flags: The flags around the group, for after it.
        branches: Its complete alternatives.
        items: The parts of the current alternative.
    """

    low: int
    flags: frozenset[str]
    branches: list[_Fragment]
    items: list[_Fragment]


class Expression:
    """A regular expression as an automaton of nodes, each with at most one character.

    Attributes:
        atoms: What the character of a node may be: the states of an automaton over its bytes.
        atom: For each node, the index of its atom, or ``BEGIN``, ``END`` or ``NOTHING``. The node after a node with an
            atom or an assertion is the next one in the list.
        following: For each node, the nodes that follow it without a character.
        entry, exit: The first and the last node of a text.
    """

    def __init__(self, text: str) -> None:
        """Read the expression.

        Raises ``ValueError`` when it is malformed or uses what is not supported, and ``TooLargeError``.
        """
        if len(text) > _MOST_CHARACTERS:
            raise TooLargeError(f"it has more than {_MOST_CHARACTERS:,} characters")
        self.atoms: list[AtomStates] = []
        self.atom: list[int] = []
        self.following: list[list[int]] = []
        self._text, self._place = text, 0
        self._flags: frozenset[str] = frozenset("u")
        self._known: dict[str, int] = {}
        self._atom_states = 0
        groups = [_Group(0, self._flags, [], [])]
        while self._place < len(text):
            check_time()
            self._read(groups)
        if len(groups) > 1:
            self._fail("a group is not closed")
        whole = self._closed(groups.pop())
        self.entry, self.exit = whole.entry, whole.exit

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
            closed = self._closed(groups.pop())
            groups[-1].items.append(closed)
        elif character == "|":
            self._place += 1
            group.branches.append(self._joined(group.items))
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
        elif unknown := _UNKNOWN_GROUP.match(self._text, self._place):
            around = unknown[0] in ("?=", "?!", "?<=", "?<!")
            self._fail("look-around is not supported" if around else f"({unknown[0]} begins no group that is supported")
        if len(groups) > _MOST_DEPTH:
            self._fail(f"groups are nested deeper than {_MOST_DEPTH}")
        groups.append(_Group(len(self.atom), flags, [], []))

    def _repetition(self, item: _Fragment) -> _Fragment:
        """Read a repetition of the item."""
        least, most = 0, None
        character = self._text[self._place]
        if character == "{":
            found = _COUNTS.match(self._text, self._place)
            if found is None:
                self._fail("a count is malformed")
            if max(len(found[1]), len(found[3] or "")) > 9:
                raise TooLargeError("a count has more than nine digits")
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
        return self._repeated(item, least, most)

    def _repeated(self, item: _Fragment, least: int, most: int | None) -> _Fragment:
        """Repeat the item, which has the last nodes of all, from ``least`` to ``most`` times."""
        low, size = item.low, len(self.atom) - item.low
        copies = max(least, 1) if most is None else most
        if len(self.atom) + size * copies > MOST_NODES:
            raise TooLargeError(_MANY_NODES)
        entry = self._node()
        exit, last = self._node(), entry
        for number in range(copies):
            check_time()
            shift = 0 if number == 0 else self._copy(low, size) - low
            self.following[last].append(item.entry + shift)
            if number >= least:
                self.following[last].append(exit)
            last = item.exit + shift
            if most is None and number + 1 == copies:
                self.following[last].append(item.entry + shift)
        self.following[last].append(exit)
        return _Fragment(low, entry, exit)

    def _copy(self, low: int, size: int) -> int:
        """Copy the nodes from ``low``, before any of them was linked to outside; return the first of the copies."""
        first = len(self.atom)
        self.atom += self.atom[low : low + size]
        shift, end = first - low, low + size
        self.following += [[to + shift for to in self.following[node] if low <= to < end] for node in range(low, end)]
        return first

    def _joined(self, items: Sequence[_Fragment]) -> _Fragment:
        """Return the items one after the other."""
        if not items:
            node = self._node()
            return _Fragment(node, node, node)
        for one, other in pairwise(items):
            self.following[one.exit].append(other.entry)
        return _Fragment(items[0].low, items[0].entry, items[-1].exit)

    def _closed(self, group: _Group) -> _Fragment:
        """Return the group's alternatives as one part."""
        branches = [*group.branches, self._joined(group.items)]
        if len(branches) == 1:
            return branches[0]._replace(low=group.low)
        entry, exit = self._node(), self._node()
        for branch in branches:
            self.following[entry].append(branch.entry)
            self.following[branch.exit].append(exit)
        return _Fragment(group.low, entry, exit)

    def _atom(self) -> _Fragment:
        """Read what matches one character, or the beginning or the end of the text."""
        text, place = self._text, self._place
        character = text[place]
        if character == "[":
            self._place = self._class_end(place)
        elif character == "\\":
            single = _SINGLE.match(text, place)
            self._place = place + 2 if single is None else single.end()
            if place + 1 == len(text):
                self._fail("a backslash is the last character", place)
        else:
            self._place += 1
        atom = text[place : self._place]
        if len(atom) > _MOST_CLASS:
            raise TooLargeError(f"a character class has more than {_MOST_CLASS:,} characters")
        if atom in ("^", "$", r"\A", r"\z"):
            if atom in "^$" and "m" in self._flags:
                self._fail("line anchors are not supported", place)
            kind = BEGIN if atom in ("^", r"\A") else END
        elif atom[0] == "\\" and (atom[1].isalnum() or atom[1] in "<>") and len(atom) == 2 and not _SINGLE.match(atom):
            self._fail(f"{atom} is not supported", place)
        else:
            kind = self._atom_number(atom, place)
        node = self._node(kind)
        return _Fragment(node, node, self._node())

    def _class_end(self, place: int) -> int:
        """Return where the character class that begins at ``place`` ends."""
        text, depth, first = self._text, 0, place
        while True:
            if place >= len(text):
                self._fail("a character class is not closed", first)
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

    def _atom_number(self, atom: str, place: int) -> int:
        """Return the index of the atom at ``place``."""
        plain = atom if len(atom) == 1 and atom != "." else atom[1:] if len(atom) == 2 and not atom[1].isalnum() else ""
        flags = "".join(sorted(self._flags & set("isuxR")))
        if plain and atom[0] not in "[" and not ("i" in flags and plain.isalpha()):
            key = f"={plain}"
        else:
            off = "".join(sorted(set("isuxR") - set(flags)))
            key = f"(?{flags}{'-' * bool(off)}{off}:{atom})"
        if key not in self._known:
            try:
                states = _literal(plain) if key[0] == "=" else _compiled(key)
            except ValueError as error:
                if "incompatible" in str(error):
                    self._fail(f"no character matches {shown(atom)}", place)
                self._fail(f"{shown(atom)} is malformed or not supported", place)
            self._atom_states += len(states)
            if self._atom_states > _MOST_ATOM_STATES:
                raise TooLargeError(f"its character classes have more than {_MOST_ATOM_STATES:,} states")
            self._known[key] = len(self.atoms)
            self.atoms.append(states)
        return self._known[key]

    def _node(self, atom: int = NOTHING) -> int:
        """Add a node and return its number."""
        if len(self.atom) >= MOST_NODES:
            raise TooLargeError(_MANY_NODES)
        self.atom.append(atom)
        self.following.append([])
        return len(self.atom) - 1

    def _fail(self, problem: str, place: int | None = None) -> NoReturn:
        """Raise ``ValueError`` about ``place``, or else about what is read next."""
        raise ValueError(f"{problem}, at character {(self._place if place is None else place) + 1}")


def _literal(character: str) -> AtomStates:
    """Return the states of one character's bytes."""
    data = character.encode()
    return [{byte: place + 1 if place + 1 < len(data) else -1} for place, byte in enumerate(data)]


@lru_cache(maxsize=256)
def _compiled(atom: str) -> AtomStates:
    """Return the states of a class of characters. Raises ``ValueError`` when it is malformed or empty."""
    from outlines_core import Index, Vocabulary

    index = Index(atom, Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    transitions, final = index.get_transitions(), index.get_final_states()
    numbers = {index.get_initial_state(): 0}
    states: list[dict[int, int]] = []
    waiting = [index.get_initial_state()]
    for state in waiting:  # grows
        row = {}
        for byte, to in sorted(transitions.get(state, {}).items()):
            if byte < 256:
                if to not in final and to not in numbers:
                    numbers[to] = len(numbers)
                    waiting.append(to)
                row[byte] = -1 if to in final else numbers[to]
        states.append(row)
    return states
