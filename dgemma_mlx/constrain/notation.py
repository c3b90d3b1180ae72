"""How values are spelled, as terms: as JSON, or as Gemma 4 spells the arguments of a tool call.

Gemma writes the object ``{"city": "Rome", "days": 3}`` as ``{city:<|"|>Rome<|"|>,days:3}``. The string delimiter is a
control token, so nothing within a string is escaped. Names that are words stand bare, others as strings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

from dgemma_mlx.constrain.characters import Ranges, ranges, without
from dgemma_mlx.constrain.leaf import bytes_of, utf8
from dgemma_mlx.constrain.machine import BYTES
from dgemma_mlx.constrain.terms import Term, Terms
from dgemma_mlx.constrain.texts import Strings

DELIMITER = '<|"|>'
BARE_NAME = "^[A-Za-z_][A-Za-z0-9_.-]*$"  # names that Gemma's call syntax reads without delimiters

_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}
_ESCAPED = ranges([(0, 31), (34, 34), (92, 92)])


class Notation(Protocol):
    """How the parts of a value are spelled.

    Attributes:
        terms: The algebra of the spelled texts.
        controls: The control tokens that are symbols of it, from symbol 256 on.
        patterns: Patterns of names that ``strings`` must tell apart.
        strings: The strings of the schema, as terms over characters; set before anything is spelled.
        comma, colon: What separates two items, and a name from its value.
        sorts_names: Whether the properties of an object are written in the order of their names.
    """

    terms: Terms
    controls: Sequence[str]
    patterns: frozenset[str]
    strings: Strings
    comma: Term
    colon: Term
    sorts_names: bool

    def literal(self, text: str) -> Term:
        """Return a term for a text that is spelled as it stands."""

    def string(self, term: Term) -> Term:
        """Return the spellings of the strings of a term over characters."""

    def name(self, name: str) -> Term:
        """Return the spelling of a property's name."""

    def names(self, term: Term) -> Term:
        """Return the spellings of the names of a term over characters."""


class _Bytes:
    """What the spellings have in common: an algebra over bytes and control tokens, and texts as they stand."""

    strings: Strings

    def __init__(self, controls: Sequence[str]) -> None:
        self.controls = controls
        self.terms = Terms(BYTES + len(controls))
        self._utf8 = utf8(self.terms)

    def literal(self, text: str) -> Term:
        """Return a term for a text that is spelled as it stands."""
        return self.terms.sequence(*(self.terms.symbols(1 << byte) for byte in text.encode()))


class JsonNotation(_Bytes):
    """JSON: a space may follow a comma or colon, and a character is escaped only where it must be."""

    patterns: frozenset[str] = frozenset()
    sorts_names = False

    def __init__(self) -> None:
        super().__init__(())
        space = self.terms.repeat(self.literal(" "), 0, 1)
        self.comma, self.colon = (self.terms.sequence(self.literal(mark), space) for mark in ",:")
        self._escapes: dict[Ranges, Term] = {}

    def string(self, term: Term) -> Term:
        """Return the strings of a term over characters, in quotes."""
        quote = self.literal('"')
        return self.terms.sequence(quote, bytes_of(self.strings.letters, term, self.terms, self._escaped), quote)

    def name(self, name: str) -> Term:
        """Return the spelling of a property's name."""
        return self.literal(json.dumps(name, ensure_ascii=False))

    names = string

    def _escaped(self, characters: Ranges) -> Term:
        """Return the ways in which JSON writes one of the characters."""
        if characters not in self._escapes:
            options = [self._utf8(plain)] if (plain := without(characters, _ESCAPED)) else []
            escaped = [c for c in (*range(32), 34, 92) if any(first <= c <= last for first, last in characters)]
            options += [self.literal("\\" + _SHORT[c] if c in _SHORT else f"\\u{c:04x}") for c in escaped]
            self._escapes[characters] = self.terms.either(options)
        return self._escapes[characters]


class CallNotation(_Bytes):
    """The arguments of a tool call, as Gemma 4's chat template writes them: without spaces, and sorted by name."""

    patterns = frozenset({BARE_NAME})
    sorts_names = True

    def __init__(self) -> None:
        super().__init__((DELIMITER,))
        self.comma, self.colon = self.literal(","), self.literal(":")
        self._delimiter = self.terms.symbols(1 << BYTES)

    def string(self, term: Term) -> Term:
        """Return the strings of a term over characters, between delimiters."""
        return self.terms.sequence(self._delimiter, self._plain(term), self._delimiter)

    def name(self, name: str) -> Term:
        """Return the spelling of a property's name."""
        return self.names(self.strings.text(name))

    def names(self, term: Term) -> Term:
        """Return the names of a term over characters: words bare, others between delimiters."""
        both, other = self.strings.terms.every, self.strings.terms.other
        bare = self.strings.pattern(BARE_NAME, "#")
        return self.terms.either([self._plain(both([term, bare])), self.string(both([term, other(bare)]))])

    def _plain(self, term: Term) -> Term:
        return bytes_of(self.strings.letters, term, self.terms, self._utf8)
