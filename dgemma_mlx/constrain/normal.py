"""Normal forms of JSON schemas: which values a schema allows, as ``values.Values``.

What a schema says of one value is combined here: its keywords, ``allOf``, ``anyOf``, ``oneOf``, ``not``, ``if``, and
references. What it says of items and properties stays a node until it is asked for. A set may be smaller than what the
schema allows, never larger; a complement is therefore never taken of a set, but of each keyword (``negation``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

from dgemma_mlx.constrain.apart import Apart
from dgemma_mlx.constrain.document import REFERENCES, Document, Place, reject
from dgemma_mlx.constrain.keywords import Keywords
from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.negation import Negation
from dgemma_mlx.constrain.texts import Numbers, Strings
from dgemma_mlx.constrain.values import (
    ANYTHING,
    Algebra,
    Node,
    Values,
    complement,
    judged_items,
    unjudged,
)

_MOST_NESTED = 60  # schemas that combine each other for one value; Python's recursion limit is not far above it


class Normalizer:
    """What the schemas of a document allow."""

    def __init__(self, document: Document, algebra: Algebra, strings: Strings, numbers: Numbers) -> None:
        """``strings`` and ``numbers`` make the terms of ``algebra``."""
        self._document, self._algebra = document, algebra
        self._keywords = Keywords(document, algebra, strings, numbers, self.values)
        self._negation = Negation(document, self._keywords, algebra, strings, numbers, self.values)
        self._apart = Apart(document)
        self._literals: dict[int, Values] = {}
        self._nodes: dict[Node, Values] = {}
        self._open: list[int] = []

    def values(self, node: Node) -> Values:
        """Return what a node allows, or less.

        Raises ``DgemmaError`` (exit code 2), with the path, for a malformed schema and one that refers to itself for
        the same value.
        """
        if node not in self._nodes:
            a = self._algebra
            found = reduce(a.both, (self._literal(each) for each in sorted(node) if each % 2 == 0 or each < 0), a.all)
            others = (self._literal(each) for each in sorted(node) if each % 2 and each > 0)
            self._nodes[node] = reduce(a.some_of_both, others, found)
        return self._nodes[node]

    def _literal(self, literal: int) -> Values:
        if literal < 0:
            return self._algebra.none
        found = self._literals.get(literal)
        if found is None:
            check_time()
            place = self._document.places[literal // 2]
            if literal in self._open:
                reject(place.path, "the schema refers to itself, without an array or object between")
            if len(self._open) >= _MOST_NESTED:
                reject(place.path, f"more than {_MOST_NESTED} schemas are combined for one value")
            self._open.append(literal)
            try:
                found = self._excluded(place) if literal % 2 else self._allowed(place)
            finally:
                self._open.pop()
            self._literals[literal] = found
        return found

    def _excluded(self, place: Place) -> Values:
        return unjudged(self._algebra.either(self._negation.excluded(place)))

    def _allowed(self, place: Place) -> Values:
        a, words, node = self._algebra, place.keywords, self._document.node
        found = reduce(a.both, [*self._keywords.allowed(place), *self._combined(place)], a.all)
        if "unevaluatedProperties" in words:
            rest = node(place, words["unevaluatedProperties"], "unevaluatedProperties")
            found = a.judged_properties(found, rest)
        if "unevaluatedItems" in words:
            found = judged_items(found, node(place, words["unevaluatedItems"], "unevaluatedItems"))
        return found

    def _combined(self, place: Place) -> Iterator[Values]:
        """Yield what the keywords that combine schemas allow."""
        words, node = place.keywords, self._document.node
        for n, part in enumerate(words.get("allOf", ())):
            yield self.values(node(place, part, "allOf", n))
        if "anyOf" in words:
            nodes = (node(place, part, "anyOf", n) for n, part in enumerate(words["anyOf"]))
            yield self._algebra.either(map(self.values, nodes))
        if "oneOf" in words:
            yield self._one(place)
        if "not" in words:
            yield self.values(node(place, words["not"], "not", negated=True))
        if "if" in words:
            yield self._if(place)
        for name in REFERENCES:
            if name in words:
                yield self.values(node(place, self._document.target(place, name), name))

    def _one(self, place: Place) -> Values:
        """Return what ``oneOf`` allows: of each branch, what the others do not."""
        a, parts = self._algebra, place.keywords["oneOf"]
        nodes = [self._document.node(place, part, "oneOf", n) for n, part in enumerate(parts)]
        branches = []
        for n, node in enumerate(nodes):
            found = self.values(node)
            for m, other in enumerate(nodes):
                if m != n and found is not a.none and not self._apart.apart(node, other):
                    found = a.some_of_both(found, self.values(complement(other)))
            branches.append(found)
        return a.either(branches)

    def _if(self, place: Place) -> Values:
        a, words, node = self._algebra, place.keywords, self._document.node
        then, other = (node(place, words.get(name, True), name) for name in ("then", "else"))
        if then == other == ANYTHING and not self._document.judges:
            return a.all
        yes = node(place, words["if"], "if")
        no = complement(yes)
        # Values that fulfil `then` need not fulfil `if` where there is no `else`, unless `if` judges them.
        if self._document.judges or other != ANYTHING:
            first = a.both(self.values(yes), self.values(then))
        else:
            first = self.values(then)
        if self._document.judges or then != ANYTHING:
            second = a.both(self.values(no), self.values(other))
        else:
            second = self.values(other)
        return a.either([first, second])
