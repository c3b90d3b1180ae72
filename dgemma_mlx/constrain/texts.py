"""Terms over characters for the strings of one JSON schema: lengths, patterns, formats, and given texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dgemma_mlx.constrain import pattern as p
from dgemma_mlx.constrain.characters import Ranges, single
from dgemma_mlx.constrain.document import reject
from dgemma_mlx.constrain.ecma import read_search
from dgemma_mlx.constrain.formats import FORMATS
from dgemma_mlx.constrain.leaf import Letters, sets_of, term_of
from dgemma_mlx.constrain.number_terms import Numbers
from dgemma_mlx.constrain.terms import UNBOUNDED, Term

__all__ = ["Numbers", "Strings"]


class Strings:
    """Terms for the strings of a schema, over the characters that its patterns, formats and texts tell apart.

    Attributes:
        letters: The alphabet.
        terms: Its algebra.
        everything: All strings.
    """

    def __init__(self, patterns: Iterable[str], formats: Iterable[str], texts: Iterable[str]) -> None:
        """Create the terms for what a schema may ask for: patterns, formats, and texts such as names and constants."""
        self._trees: dict[tuple[str, bool], p.Pattern | ValueError] = {}
        for pattern in patterns:
            for wide in (False, True):
                try:
                    self._trees[pattern, wide] = read_search(pattern, wide=wide)
                except ValueError as error:
                    self._trees[pattern, wide] = error
        self._formats = {name: p.read_pattern(FORMATS[name]) for name in formats if name in FORMATS}
        sets: set[Ranges] = {single(character) for text in texts for character in text}
        for tree in (*self._trees.values(), *self._formats.values()):
            sets |= set() if isinstance(tree, ValueError) else sets_of(tree)
        self.letters = Letters(sets | {p.CHARACTER.characters})
        self.terms = self.letters.terms
        self.everything = self.terms.everything
        self._character = self.letters.one(p.CHARACTER.characters)
        self._known: dict[int, Term] = {}  # by tree

    def lengths(self, least: int, most: int) -> Term:
        """Return the strings of ``least`` to ``most`` characters; ``UNBOUNDED`` is no limit."""
        return self.terms.repeat(self._character, least, most) if most < UNBOUNDED or least else self.everything

    def text(self, text: str) -> Term:
        """Return one of the texts that the terms were created for. A lone surrogate is not a string of any term."""
        return self.terms.sequence(*(self.letters.one(single(character)) for character in text))

    def pattern(self, pattern: Any, path: str) -> Term:
        """Return the strings that match a pattern; see ``searched``."""
        return self.searched(pattern, path)[0]

    def searched(self, pattern: Any, path: str) -> tuple[Term, Term]:
        """Return the strings in which all validators find a match of a pattern, and those in which any may find one.

        Raises ``DgemmaError``, which gives ``path``, when the pattern cannot be read.
        """
        if not isinstance(pattern, str):
            reject(path, "a pattern must be text")
        trees = self._trees[pattern, False], self._trees[pattern, True]
        for tree in trees:
            if isinstance(tree, ValueError):
                reject(path, f"the pattern cannot be read: {tree}")
        narrow, wide = (self._term(tree) for tree in trees if not isinstance(tree, ValueError))
        return narrow, wide

    def format(self, name: Any) -> Term:
        """Return the strings in a format. An unknown format is an annotation, which allows all strings."""
        return self._term(self._formats[name]) if isinstance(name, str) and name in self._formats else self.everything

    def _term(self, tree: p.Pattern) -> Term:
        if id(tree) not in self._known:
            self._known[id(tree)] = term_of(self.letters, tree)
        return self._known[id(tree)]
