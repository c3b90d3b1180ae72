"""Reading of regular expressions, in the syntax of Rust's ``regex`` crate, as trees.

Groups, alternatives and repetitions are read here, without recursion. What matches one character (a class, ``.``,
``\\w``) is compiled by outlines-core, which knows Unicode. Look-aheads are read, too, although Rust has none.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import NamedTuple, NoReturn

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain.characters import ALL, Ranges, ranges, single
from dgemma_mlx.constrain.limits import check_time

_MOST_CHARACTERS = 1_000_000
_MOST_DEPTH = 250  # of groups, as in Rust
_MOST_LOOKING = 40  # of groups around and within a look-ahead
_MOST_CLASS = 12_000  # characters of a class; outlines-core is slow with more

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


class Ahead(NamedTuple):
    """A look-ahead: from here to its end, the text begins so, or does not."""

    item: Pattern
    negative: bool


Pattern = One | Begin | End | Sequence | Either | Repeated | Ahead
CHARACTER = One(ALL)
ANYTHING = Repeated(CHARACTER, 0, None)


def parts(node: Pattern) -> tuple[Pattern, ...]:
    """Return the patterns that a pattern consists of."""
    if isinstance(node, Sequence):
        return node.items
    if isinstance(node, Either):
        return node.branches
    return (node.item,) if isinstance(node, (Repeated, Ahead)) else ()


def nodes(tree: Pattern) -> list[Pattern]:
    """Return a pattern and all that it consists of, each one once, and after its parts."""
    found: dict[int, Pattern] = {}
    waiting = [(tree, False)]
    while waiting:
        node, opened = waiting.pop()
        if opened:
            found.setdefault(id(node), node)
        elif id(node) not in found:
            waiting.append((node, True))
            waiting += [(part, False) for part in parts(node)]
    return list(found.values())


def matched(tree: Pattern) -> Pattern:
    """Return a pattern that must match a whole text, with its look-aheads where all that follows them is known.

    Look-aheads then are items of sequences that end with the text: ``(?:(?=a)b|c)d`` becomes ``(?=a)bd|cd``. Raises
    ``ValueError`` for a look-ahead within a repetition.
    """
    looking: set[int] = set()
    for node in nodes(tree):
        if isinstance(node, Ahead) or any(id(part) in looking for part in parts(node)):
            looking.add(id(node))

    def followed(node: Pattern, rest: list[Pattern]) -> Pattern:
        """Return a pattern that looks ahead, followed by the rest."""
        if isinstance(node, Ahead):
            seen = followed(node.item, [ANYTHING]) if id(node.item) in looking else Sequence((node.item, ANYTHING))
            return Sequence((Ahead(seen, node.negative), *rest))
        if isinstance(node, Sequence):
            tail = rest[::-1]
            for item in reversed(node.items):
                tail = [followed(item, tail[::-1])] if id(item) in looking else [*tail, item]
            return Sequence(tuple(tail[::-1]))
        if isinstance(node, Repeated):
            if node.most != 1:
                raise ValueError("a look-ahead within a repetition is not supported")
            branches: tuple[Pattern, ...] = (node.item, Sequence(())) if node.least == 0 else (node.item,)
        else:
            branches = parts(node)
        after = Sequence(tuple(rest))
        return Either(tuple(followed(b, [after]) if id(b) in looking else Sequence((b, after)) for b in branches))

    return followed(tree, []) if looking else tree


class _Group(NamedTuple):
    """A group that is being read.

    Attributes:
        flags: The flags around it.
        branches: Its complete branches.
        items: The items of the current branch.
        looks: Whether it is a look-ahead: (), (False,), or (True,) for a negative one.
    """

    flags: frozenset[str]
    branches: list[Pattern]
    items: list[Pattern]
    looks: tuple[bool, ...] = ()

    def closed(self) -> Pattern:
        """Return the group."""
        branches = [*self.branches, _joined(self.items)]
        group = branches[0] if len(branches) == 1 else Either(tuple(branches))
        return Ahead(group, *self.looks) if self.looks else group


def _joined(items: list[Pattern]) -> Pattern:
    return items[0] if len(items) == 1 else Sequence(tuple(items))


class Reader:
    """A reader of one expression, in Rust's syntax. ``dgemma_mlx.constrain.ecma`` reads another one."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0
        self.flags: frozenset[str] = frozenset("u")
        self._known: dict[Ranges, One] = {}

    def read(self) -> Pattern:
        """Read the whole expression. Raises ``ValueError`` when it is malformed or uses what is not supported."""
        if len(self.text) > _MOST_CHARACTERS:
            self.fail("the expression is too long")
        groups = [_Group(self.flags, [], [])]
        while self.place < len(self.text):
            check_time()
            self._read(groups)
        if len(groups) > 1:
            self.fail("a group is not closed")
        return groups.pop().closed()

    def _read(self, groups: list[_Group]) -> None:
        """Read what is next in the text."""
        text, place = self.text, self.place
        character, group = text[place], groups[-1]
        if "x" in self.flags and (space := _VERBOSE.match(text, place)):
            self.place = space.end()
        elif character == "(":
            self._open(groups)
        elif character == ")":
            if len(groups) == 1:
                self.fail("a group is closed that was not opened")
            self.place += 1
            self.flags = group.flags
            closed = groups.pop().closed()
            self.looked(*group.looks)
            groups[-1].items.append(closed)
        elif character == "|":
            self.place += 1
            group.branches.append(_joined(group.items))
            group.items.clear()
        elif character in "*+?" or (character == "{" and self.counts()):
            if not group.items:
                self.fail("a repetition has nothing to repeat")
            group.items.append(self.repetition(group.items.pop()))
        else:
            atom = self.atom()
            group.items.append(self._known.setdefault(atom.characters, atom) if isinstance(atom, One) else atom)

    def _open(self, groups: list[_Group]) -> None:
        """Read the beginning of a group, or flags."""
        self.place += 1
        flags = self.flags
        looks: tuple[bool, ...] = ()
        if found := _FLAGS.match(self.text, self.place):
            self.place = found.end()
            on, off = found[1], found[2] or ""
            if found[3] == ")" and not on + off:
                self.fail("flags are empty")
            self.flags = (flags | set(on)) - set(off)
            if found[3] == ")":
                return
        elif name := _NAME.match(self.text, self.place):
            self.place = name.end()
        elif self.text.startswith(("?=", "?!"), self.place):
            looks = (self.text[self.place + 1] == "!",)
            self.place += 2
            self.looked(*looks)
        elif self.text.startswith("?", self.place):
            self.fail(f"({self.text[self.place : self.place + 3]} begins no group that is supported")
        depth = _MOST_LOOKING if any(group.looks for group in groups) else _MOST_DEPTH
        if len(groups) > depth:
            self.fail(f"groups are nested deeper than {depth}")
        groups.append(_Group(flags, [], [], looks))

    def repetition(self, item: Pattern) -> Pattern:
        """Read a repetition of the item."""
        character, text = self.text[self.place], self.text
        least, most = int(character == "+"), 1 if character == "?" else None
        if character == "{":
            found = _COUNTS.match(text, self.place)
            if found is None:
                self.fail("a count is malformed")
            if max(len(found[1]), len(found[3] or "")) > 9:
                self.fail("a count has more than nine digits")
            least = int(found[1])
            most = least if found[2] is None else int(found[3]) if found[3] else None
            if most is not None and most < least:
                self.fail("a count ends before it begins")
            self.place = found.end()
        else:
            self.place += 1
        if text.startswith("?", self.place):  # lazy, which matches the same texts
            self.place += 1
        return Repeated(item, least, most)

    def counts(self) -> bool:
        """Return whether the brace that is next begins a count."""
        return True

    def looked(self, *negative: bool) -> None:
        """Take note that a look-ahead begins or ends."""

    def atom(self) -> Pattern:
        """Read what matches one character, or the beginning or the end of the text."""
        text, place = self.text, self.place
        character = text[place]
        if character == "[":
            self.place = self._class_end(place)
        elif character == "\\":
            escape = _SINGLE.match(text, place)
            self.place = place + 2 if escape is None else escape.end()
            if place + 1 == len(text):
                self.fail("a backslash is the last character")
        else:
            self.place += 1
        atom = text[place : self.place]
        if atom in ("^", "$", r"\A", r"\z"):
            return self.anchor(atom)
        if atom[0] == "\\" and (atom[1].isalnum() or atom[1] in "<>") and len(atom) == 2 and not _SINGLE.match(atom):
            self.fail(f"{atom} is not supported", place)
        return One(self._characters(atom, place))

    def anchor(self, atom: str) -> Pattern:
        """Return what an anchor stands for."""
        if atom in "^$" and "m" in self.flags:
            self.fail("line anchors are not supported")
        return Begin() if atom in ("^", r"\A") else End()

    def _class_end(self, place: int) -> int:
        """Return where the character class that begins at ``place`` ends."""
        text, depth, begin = self.text, 0, place
        while place < len(text):
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
                    break
        if depth:
            self.fail("a character class is not closed", begin)
        return place

    def _characters(self, atom: str, place: int) -> Ranges:
        """Return the set of characters that an atom matches."""
        plain = atom if len(atom) == 1 and atom != "." else atom[1:] if len(atom) == 2 and not atom[1].isalnum() else ""
        flags = "".join(sorted(self.flags & set("isuxR")))
        if plain and atom[0] != "[" and not ("i" in flags and plain.isalpha()):
            return single(plain)
        if len(atom) > _MOST_CLASS:
            self.fail(f"a character class has more than {_MOST_CLASS:,} characters", place)
        off = "".join(sorted(set("isuxR") - set(flags)))
        try:
            return characters_of(f"(?{flags}{'-' * bool(off)}{off}:{atom})")
        except ValueError as error:
            self.fail(f"{shown(atom)} {error}", place)

    def fail(self, problem: str, place: int | None = None) -> NoReturn:
        """Raise ``ValueError`` with the place of a problem, which is the current one if none is given."""
        raise ValueError(f"{problem}, at character {(self.place if place is None else place) + 1}")


def read_pattern(text: str) -> Pattern:
    """Read a regular expression that must match whole texts.

    Raises ``ValueError`` when it is malformed or uses what is not supported.
    """
    return matched(Reader(text).read())


@lru_cache(maxsize=256)
def characters_of(atom: str) -> Ranges:
    """Return the characters that an expression for one character matches.

    Raises ``ValueError`` when it is malformed or matches none.
    """
    from outlines_core import Index, Vocabulary

    try:
        index = Index(atom, Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    except ValueError:
        raise ValueError("is malformed or not supported, or matches no character") from None
    transitions = index.get_transitions()

    @cache
    def rest(state: int, length: int) -> Ranges:
        """Return the low bits of the characters of which ``length`` bytes follow in a state."""
        pairs = []
        for byte, to in transitions.get(state, {}).items():
            if 0x80 <= byte < 0xC0:
                shift = (byte & 0x3F) << 6 * (length - 1)
                after = ((0, 0),) if length == 1 else rest(to, length - 1)
                pairs += [(shift + first, shift + last) for first, last in after]
        return ranges(pairs)

    found = []
    for byte, to in transitions.get(index.get_initial_state(), {}).items():
        if byte < 0x80:
            found.append((byte, byte))
        elif byte < 0x100:
            length = 1 if byte < 0xE0 else 2 if byte < 0xF0 else 3
            shift = (byte & 0x3F >> length) << 6 * length
            found += [(shift + first, shift + last) for first, last in rest(to, length)]
    return ranges(found)
