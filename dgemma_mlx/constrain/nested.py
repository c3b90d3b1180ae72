"""Rules that may refer to each other and to themselves, and their lightest words.

The weight of a rule is that of a shortest derivation of a context-free grammar (Knuth, *A generalization of Dijkstra's
algorithm*, 1977). Only rules that a lightest word may need are opened: of a schema with a thousand definitions whose
properties are optional, ``{}`` needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cache

from dgemma_mlx.constrain.limits import check_time, give_up
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms

Body = Callable[[], Term]
_MOST_WORK = 1_000_000  # terms that are weighed for one rule, in about a second


class NestedRules:
    """The nested rules of an algebra. Their bodies are made when they are needed.

    No word of a rule may be empty, and each of its words begins with a symbol before it comes to another rule.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._bodies: dict[Term, Body] = {}
        self._at_least: dict[Term, int] = {}
        self._work = 0

    def rule(self, name: Hashable, body: Body, lightest: Body | None = None, at_least: int = 1) -> Term:
        """Return the rule of a name, which is unique among the rules of the algebra.

        ``lightest`` returns a term of which a lightest word is a lightest word of the body, too, where such a term is
        known; it may be quicker to make than the body. No word weighs less than ``at_least``: the better that is
        known, the fewer rules are opened.
        """
        body = cache(body)
        rule = self._terms.rule(body, name, False, self._weigh, at_least)
        self._bodies.setdefault(rule, cache(lightest) if lightest else body)
        self._at_least[rule] = at_least
        return rule

    def _weigh(self, start: Term) -> int:
        """Return the weight of the lightest word of a rule. What else that tells is kept in ``Term.least``.

        A rule whose lightest word takes too much work to find counts as one without any, as in ``Terms.least``.
        """
        self._work = 0
        opened: dict[Term, Term] = {}
        weights: dict[Term, int] = {}
        needed, missing = {start}, [start]
        while missing:
            for rule in missing:  # grows
                check_time()
                if rule not in opened:
                    opened[rule] = self._bodies[rule]()
                    missing += self._needed(opened[rule], {}, {})
            weights = self._weights(opened)
            if self._work > _MOST_WORK:
                give_up("its shortest text is not found")
                return UNBOUNDED
            needed = set(self._needed(start, opened, weights))
            missing = [rule for rule in needed if rule not in opened]
        for rule, weight in weights.items():
            if weight >= UNBOUNDED or rule in needed:
                rule.least = rule.hope = weight
        return weights[start]

    def _weights(self, opened: dict[Term, Term]) -> dict[Term, int]:
        """Return the weights of the opened rules, if all others weigh as little as they may."""
        weights = dict.fromkeys(opened, UNBOUNDED)
        changed = True
        while changed and self._work <= _MOST_WORK:
            check_time()
            changed = False
            for rule in reversed(opened):  # what was opened last is needed by what was opened first
                weight = self._weight(opened[rule], weights)
                if weight < weights[rule]:
                    weights[rule], changed = weight, True
        return weights

    def _weight(self, term: Term, weights: dict[Term, int]) -> int:
        """Return the weight of a term, given the weights of rules."""
        self._work += 1
        total = 0
        while term.kind == "both" and term.least is None and not term.nullable:
            total += self._weight(term.parts[0], weights)
            term = term.parts[1]
        return min(total + self._weight_of_one(term, weights), UNBOUNDED)

    def _weight_of_one(self, term: Term, weights: dict[Term, int]) -> int:
        """Return the weight of a term that is no sequence, or whose weight is known."""
        if term.least is not None or term.nullable:
            return term.least or 0
        if term in self._bodies:
            return weights.get(term, self._at_least[term])
        if term.kind == "any":
            return min(self._weight(part, weights) for part in term.parts)
        if term.kind == "repeat":
            return self._weight(term.parts[0], weights) * int(term.parts[1])
        return self._terms.least(term)

    def _needed(self, start: Term, opened: dict[Term, Term], weights: dict[Term, int]) -> Iterator[Term]:
        """Yield the rules of which a lightest word of ``start`` consists."""
        seen, waiting = {start}, [start]
        while waiting:
            term = waiting.pop()
            kind, parts = term.kind, term.parts
            following: tuple[Term, ...] = ()
            if term.least is not None or term.nullable:
                continue
            if term in self._bodies:
                yield term
                following = (opened[term],) if term in opened else ()
            elif kind == "any":
                following = (min(parts, key=lambda part: self._weight(part, weights)),)
            elif kind in ("both", "repeat"):
                following = parts[:2] if kind == "both" else parts[:1]
            waiting += [each for each in following if each not in seen]
            seen.update(following)
