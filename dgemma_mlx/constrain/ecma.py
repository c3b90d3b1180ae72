r"""Reading of regular expressions in the syntax of ECMAScript, which JSON schemas use.

Validators do not agree on all of it: ``\d``, ``\w``, ``\s`` and ``.`` are other sets in Python than in ECMAScript. So a
pattern is read *narrowly*, with what all of them match, or *widely*, with what any of them may match. What must match a
pattern is then a text of the narrow one, and what must not match it is not a text of the wide one.
"""

from __future__ import annotations

import re
from functools import lru_cache

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain.characters import ALL, LAST, Ranges, ranges, single, without
from dgemma_mlx.constrain.pattern import (
    ANYTHING,
    Begin,
    Either,
    End,
    One,
    Pattern,
    Reader,
    Sequence,
    characters_of,
    matched,
)

_ESCAPE = re.compile(
    r"\\(?:u\{([0-9A-Fa-f]{1,6})\}|u([Dd][89ABab][0-9A-Fa-f]{2})\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})"
    r"|x([0-9A-Fa-f]{2})|c([A-Za-z])|([pP]\{[^{}]*\})|([dDwWsS])|(0(?!\d)|[tnvfr])|([^A-Za-z0-9]))",
    re.DOTALL,
)
_COUNT = re.compile(r"\{\d+(?:,\d*)?\}")
_PYTHON_COUNT = re.compile(r"\{,\d*\}")
_CONTROL = {"0": 0, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
_ANCHORS: dict[str, Pattern] = {"^": Begin(), r"\A": Begin(), "$": End(), r"\Z": End(), r"\z": End()}
_END_OF_PYTHON: Pattern = Either((End(), Sequence((One(single("\n")), End()))))  # or before a last line break

_FOREIGN = ((0x80, LAST),)
_SPACE = ((9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
          (0x205F, 0x205F), (0x3000, 0x3000))  # fmt: skip
# What ECMAScript and Python match, ...
_NARROW = {"d": ranges([(48, 57)]), "w": ranges([(48, 57), (65, 90), (95, 95), (97, 122)]), "s": _SPACE}
# ... and a simple set that holds what either matches.
_WIDE = {
    "d": ranges([*_NARROW["d"], *_FOREIGN]), "w": ranges([*_NARROW["w"], *_FOREIGN]),
    "s": ranges([*_SPACE, (0x1C, 0x1F), (0x85, 0x85), (0xFEFF, 0xFEFF)]),
}  # fmt: skip
_UNICODE = {"d": r"\d", "w": r"[\w\p{N}]"}  # of _WIDE, what is needed: for complements, which would lack all letters
_BREAKS = ranges([(10, 10), (13, 13), (0x2028, 0x2029)])


class _Reader(Reader):
    """A reader of one expression in ECMAScript's syntax, with Python's anchors, named groups and inline flags."""

    def __init__(self, text: str, *, wide: bool) -> None:
        super().__init__(text)
        self._wide = wide

    def looked(self, *negative: bool) -> None:
        self._wide ^= any(negative)

    def counts(self) -> bool:
        if _PYTHON_COUNT.match(self.text, self.place):
            self.fail("{, begins a count for some readers, and text for others")
        return _COUNT.match(self.text, self.place) is not None

    def repetition(self, item: Pattern) -> Pattern:
        found = super().repetition(item)
        if self.text.startswith(("*", "+", "?"), self.place) or _COUNT.match(self.text, self.place):
            self.fail("a repetition is repeated")
        return found

    def atom(self) -> Pattern:
        text, place = self.text, self.place
        anchor = text[place : place + (2 if text[place] == "\\" else 1)]
        if anchor in _ANCHORS:
            self.place += len(anchor)
            return self.anchor(anchor)
        if text[place] == "[":
            return One(self._class())
        if text[place] == "\\":
            found = self._escape(negated=False)
        else:
            self.place += 1
            found = single(text[place]) if text[place] != "." else self._dot()
        return One(self._folded(found))

    def anchor(self, atom: str) -> Pattern:
        if "m" in self.flags:
            self.fail("line anchors are not supported")
        return _END_OF_PYTHON if atom == "$" and self._wide else _ANCHORS[atom]

    def _dot(self) -> Ranges:
        return ALL if "s" in self.flags else without(ALL, single("\n") if self._wide else _BREAKS)

    def _escape(self, *, negated: bool) -> Ranges:
        """Read an escape. ``negated`` says whether it stands in a negated class."""
        found = _ESCAPE.match(self.text, self.place)
        if found is None:
            if self.place + 1 == len(self.text):
                self.fail("a backslash is the last character")
            self.fail(f"{shown(self.text[self.place : self.place + 2])} is not supported")
        long, high, low, code, byte, control, known, short, named, plain = found.groups()
        if known:
            try:
                characters = characters_of(f"\\{known}")
            except ValueError as error:
                self.fail(f"{shown(found[0])} {error}")
        elif short:
            characters = self._shorthand(short, negated=negated)
        elif plain:
            characters = single(plain)
        elif high:
            characters = single(bytes.fromhex(high + low).decode("utf-16-be"))
        else:
            number = _CONTROL[named] if named else ord(control) & 31 if control else int(long or code or byte, 16)
            if number > LAST:
                self.fail(f"{found[0]} is not a character")
            characters = ((number, number),)
        self.place = found.end()
        return characters

    def _shorthand(self, letter: str, *, negated: bool) -> Ranges:
        """Return the set that \\d, \\w, \\s or one of their complements stands for."""
        lower = letter.lower()
        if not self._wide ^ negated ^ letter.isupper():
            characters = _NARROW[lower]
        elif self._wide or lower not in _UNICODE:
            characters = _WIDE[lower]
        else:
            characters = characters_of(_UNICODE[lower])
        return without(ALL, characters) if letter.isupper() else characters

    def _class(self) -> Ranges:
        """Read a character class."""
        text, begin = self.text, self.place
        negated = text.startswith("[^", begin)
        self.place += 2 if negated else 1
        found: list[tuple[int, int]] = []
        while not text.startswith("]", self.place):
            first = self._member(begin, negated)
            if text.startswith("-", self.place) and not text.startswith("-]", self.place) and _is_single(first):
                dash = self.place
                self.place += 1
                last = self._member(begin, negated)
                if not _is_single(last):  # [a-\d]: a, a dash, and digits
                    found += [*first, *single("-"), *last]
                    continue
                if last < first:
                    self.fail("a range of characters ends before it begins", dash)
                first = ((first[0][0], last[0][0]),)
            found += first
        self.place += 1
        characters = self._folded(ranges(found))
        return without(ALL, characters) if negated else characters

    def _member(self, begin: int, negated: bool) -> Ranges:
        """Read a character or an escape in the class that begins at ``begin``."""
        if self.place >= len(self.text):
            self.fail("a character class is not closed", begin)
        if self.text.startswith(r"\b", self.place):
            self.place += 2
            return single("\b")
        if self.text[self.place] == "\\":
            return self._escape(negated=negated)
        self.place += 1
        return single(self.text[self.place - 1])

    def _folded(self, characters: Ranges) -> Ranges:
        """Return the characters, of upper and of lower case where the flag i says so."""
        if "i" not in self.flags or not characters:
            return characters
        pairs = without(characters, ((0xD800, 0xDFFF),))
        members = "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in pairs)
        return characters_of(f"(?i:[{members}])") if members else ()


def _is_single(characters: Ranges) -> bool:
    return len(characters) == 1 and characters[0][0] == characters[0][1]


@lru_cache(maxsize=64)
def read_search(text: str, *, wide: bool) -> Pattern:
    """Read an expression that must match somewhere in a text, narrowly or widely, as a pattern of whole texts.

    Raises ``ValueError`` when it is malformed or uses what is not supported.
    """
    return matched(Sequence((ANYTHING, _Reader(text, wide=wide).read(), ANYTHING)))
