"""How JSON spells values: the marks between values, strings and numbers, as terms over bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from dgemma_mlx.constrain.characters import Ranges, ranges, without
from dgemma_mlx.constrain.leaf import bytes_of, utf8
from dgemma_mlx.constrain.machine import BYTES
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms
from dgemma_mlx.constrain.texts import Numbers, Strings

_ESCAPES = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}
_ESCAPED = ranges([(0, 31), (34, 34), (92, 92)])


class JsonSpelling:
    """The spelling of JSON. A space may follow a comma and a colon; each string and name has one spelling.

    Attributes:
        terms: The algebra of the terms.
        comma, colon: What stands between members, and between a name and its value.
        array, object: The first and the last symbols of arrays and objects.
        controls: The control tokens that are symbols, after the 256 bytes.
        patterns: Patterns of names that ``strings`` must tell apart.
        sorts_names: Whether the named properties of an object stand in the order of their names.
    """

    controls: Sequence[str] = ()
    patterns: frozenset[str] = frozenset()
    sorts_names = False

    def __init__(self, strings: Strings, numbers: Numbers) -> None:
        """Spell ``strings`` and ``numbers``, which are terms over characters."""
        self._strings, self._numbers = strings, numbers
        self.terms = Terms(BYTES + len(self.controls))
        self._utf8 = utf8(self.terms)
        self._known: dict[Ranges, Term] = {}
        space = self.terms.repeat(self.literal(" "), 0, 1)
        self.comma = self.terms.sequence(self.literal(","), space)
        self.colon = self.terms.sequence(self.literal(":"), space)
        self.array = self.literal("["), self.literal("]")
        self.object = self.literal("{"), self.literal("}")

    def literal(self, text: str) -> Term:
        """Return the UTF-8 bytes of a text."""
        return self.terms.word(text.encode())

    def number(self, texts: Term) -> Term:
        """Return the spellings of numbers, given as their texts."""
        if self._numbers.terms.least(texts) >= UNBOUNDED:
            return self.terms.none
        return bytes_of(self._numbers.letters, texts, self.terms, self._utf8)

    def string(self, strings: Term) -> Term:
        """Return the spellings of strings."""
        quote = self.literal('"')
        return self.terms.sequence(quote, self._characters(strings, self._escaped), quote)

    def names(self, names: Term) -> Term:
        """Return the spellings of names of properties."""
        return self.string(names)

    def name(self, name: str) -> Term:
        """Return the spelling of one name."""
        return self.literal(json.dumps(name, ensure_ascii=False))

    def _characters(self, strings: Term, encode: Callable[[Ranges], Term]) -> Term:
        """Return the spellings of strings without what stands around them. ``encode`` spells a set of characters."""
        if self._strings.terms.least(strings) >= UNBOUNDED:
            return self.terms.none
        return bytes_of(self._strings.letters, strings, self.terms, encode)

    def _escaped(self, characters: Ranges) -> Term:
        """Return how a string spells one of the characters."""
        if characters not in self._known:
            options = [self._utf8(plain)] if (plain := without(characters, _ESCAPED)) else []
            codes = (code for first, last in _ESCAPED for code in range(first, last + 1))
            special = (code for code in codes if any(first <= code <= last for first, last in characters))
            options += [self.literal("\\" + _ESCAPES.get(code, f"u{code:04x}")) for code in special]
            self._known[characters] = self.terms.either(options)
        return self._known[characters]
