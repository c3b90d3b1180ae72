"""The lightest words of terms.

The weight of a concatenation, of alternatives and of a repetition follows from those of their parts. The lightest word
of an intersection, of a complement or of a rule is searched along the rows by A*. Its estimate of what is left is
``Term.hope``, which is consistent: it shrinks by no more than the weight of a symbol from a term to the one after it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from dgemma_mlx.constrain.limits import give_up
from dgemma_mlx.constrain.term import UNBOUNDED, Row, Term, bits

_MOST_SEARCHED = 5_000  # terms that a search opens, apart from those of the word itself


class Lightest:
    """The weights of the lightest words of the terms of one algebra."""

    def __init__(self, weights: Sequence[int], row: Callable[[Term], Row]) -> None:
        """Weigh with the weights of the symbols, which are at least 1. ``row`` returns the row of a term."""
        self._weights, self._row = weights, row

    def begin(self, term: Term) -> None:
        """Set what the parts of a new term tell of its weight."""
        kind, parts = term.kind, [part for part in term.parts if isinstance(part, Term)]
        if kind == "set":
            weights = [self._weights[n] for n in bits(term.parts[0])]
            term.least, term.longest = min(weights), max(weights)
        elif kind in ("none", "empty"):
            term.least, term.longest = 0 if term.nullable else UNBOUNDED, 0
        elif kind == "all":
            term.hope, term.longest = max(map(estimate, parts)), min(part.longest for part in parts)
        elif kind in ("not", "rule"):
            term.hope = 1
        else:
            term.hope = self._combined(term, list(map(estimate, parts)))
            term.least = None if None in [part.least for part in parts] else term.hope
            longest = [part.longest for part in parts]
            repeated = term.parts[2] if kind == "repeat" else 1
            term.longest = max(longest) if kind == "any" else min(sum(longest) * repeated, UNBOUNDED)
        if term.nullable:
            term.least = 0

    def least(self, term: Term) -> int:
        """Return the weight of the lightest word of a term; ``UNBOUNDED`` when it has no word.

        A term of which no word is found after ``_MOST_SEARCHED`` others counts as one without any. In a block of
        ``limits.compiling``, this raises ``TooLargeError``.
        """
        waiting = [term]
        while waiting:
            last = waiting[-1]
            if last.least is None:
                part = self._doubtful(last)
                if part is not None:
                    waiting.append(part)
                    continue
                last.least = self._weight(last)
            waiting.pop()
        assert term.least is not None
        return term.least

    @staticmethod
    def _combined(term: Term, weights: Sequence[int]) -> int:
        """Return the weight of a concatenation, alternatives or a repetition of parts that have these weights."""
        if term.kind == "any":
            return min(weights)
        return min(sum(weights) if term.kind == "both" else weights[0] * int(term.parts[1]), UNBOUNDED)

    def _lightest(self, mask: int) -> int:
        """Return the weight of the lightest symbol of a set."""
        return min(self._weights[n] for n in bits(mask))

    @staticmethod
    def _doubtful(term: Term) -> Term | None:
        """Return a part of a term whose weight must be known for that of the term."""
        if term.kind not in ("both", "any", "repeat"):
            return None
        parts = [part for part in term.parts if isinstance(part, Term)]
        unknown = [part for part in parts if part.least is None]
        if term.kind == "any" and unknown:
            best = min((part.least for part in parts if part.least is not None), default=UNBOUNDED)
            unknown = [min(unknown, key=estimate)]
            return unknown[0] if unknown[0].hope < best else None
        return unknown[0] if unknown else None

    def _weight(self, term: Term) -> int:
        """Return the weight of the lightest word of a term whose parts are weighed."""
        if term.kind in ("both", "any", "repeat"):
            return self._combined(term, [estimate(part) for part in term.parts if isinstance(part, Term)])
        if term.kind == "rule" and term.parts[2]:
            return int(term.parts[2](term))
        return self._search(term)

    def _search(self, start: Term) -> int:
        """Find the lightest word by A*."""
        best = {start: 0}
        before: dict[Term, Term] = {}  # each term on its lightest known way
        waiting = [(start.hope, 0, start.number, start)]  # of equal estimates, the longest first
        opened = 0
        while waiting:
            _, minus, _, term = heapq.heappop(waiting)
            weight = -minus
            if weight > best[term]:
                continue
            if term.least is not None:
                total = weight + term.least
                while term is not start:  # what the lightest word passes through is known now
                    term.least = total - best[term]
                    term = before[term]
                return total
            opened += 1
            if opened > _MOST_SEARCHED + weight:
                give_up("its shortest text is not found")
                return UNBOUNDED
            for mask, after in self._row(term):
                step = weight + self._lightest(mask)
                if estimate(after) < UNBOUNDED and step < best.get(after, UNBOUNDED):
                    best[after], before[after] = step, term
                    heapq.heappush(waiting, (step + estimate(after), -step, after.number, after))
        for term in best:
            term.least = UNBOUNDED
        return UNBOUNDED


def estimate(term: Term) -> int:
    """Return the weight of a term's lightest word, or one that it is not lighter than."""
    return term.hope if term.least is None else term.least
