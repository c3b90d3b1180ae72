"""Languages as terms, and what is left of a language after a symbol: Brzozowski's derivatives.

A term describes a set of words over an alphabet of ``size`` symbols: characters, or bytes. Equal terms are one object,
and small laws (``a|a = a``, ``a|b = b|a``, ``(ab)c = a(bc)``) are applied when a term is made, so that words lead to few
different terms. A term is the state of a deterministic automaton: the *row* of a term gives, for every symbol, the term
that describes what may follow it. Rows are computed when they are asked for, so an automaton costs what is visited of
it, not what it has (Brzozowski, *Derivatives of regular expressions*, 1964; Owens et al. 2009).

A set of symbols is an int, whose bit i says whether symbol i belongs to it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

UNBOUNDED = 1 << 60  # more words, symbols or repetitions than anything has


class Term:
    """A set of words. ``Terms`` makes all terms of an alphabet.

    Attributes:
        kind: What the term is: none, empty, set, both (concatenation), any (alternatives), all (intersection), not,
            repeat, or rule.
        parts: The terms and numbers it consists of.
        number: Its number among the terms of its alphabet, by time.
        nullable: Whether the empty word belongs to it.
    """

    __slots__ = ("kind", "least", "nullable", "number", "parts", "row")

    def __init__(self, kind: str, parts: tuple[Any, ...], number: int, nullable: bool) -> None:
        self.kind, self.parts, self.number, self.nullable = kind, parts, number, nullable
        self.row: Row | None = None
        self.least: int | None = None

    def __repr__(self) -> str:
        return f"{self.kind}{self.parts}" if self.parts else self.kind


Row = tuple[tuple[int, Term], ...]  # disjoint sets of symbols, and the term after each symbol of a set


class Terms:
    """The terms over one alphabet.

    Attributes:
        size: Number of symbols.
        none: No word.
        empty: The empty word alone.
        everything: All words.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.weights = [1] * size  # of each symbol, for ``least``
        self._all_symbols = (1 << size) - 1
        self._joined: dict[frozenset[Term], Term] = {}  # alternatives, for what many ambiguous texts share
        self._known: dict[tuple[Any, ...], Term] = {}
        self.none = self._term("none", (), False)
        self.empty = self._term("empty", (), True)
        self.everything = self._term("not", (self.none,), True)

    def _term(self, kind: str, parts: tuple[Any, ...], nullable: bool) -> Term:
        """Return the one term of this kind and parts."""
        key = (kind, *parts)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = Term(kind, parts, len(self._known), nullable)
        return found

    def symbols(self, mask: int) -> Term:
        """Return the words of one symbol out of a set."""
        return self._term("set", (mask,), False) if mask else self.none

    def sequence(self, *terms: Term) -> Term:
        """Return the words that consist of a word of each term."""
        result = self.empty
        for term in reversed(terms):
            result = self._both(term, result)
        return result

    def _both(self, first: Term, second: Term) -> Term:
        if first is self.none or second is self.none:
            return self.none
        if first is self.empty:
            return second
        if second is self.empty:
            return first
        if first.kind == "both":
            return self._both(first.parts[0], self._both(first.parts[1], second))
        if first.kind == "repeat" and first.parts[1:] == (0, UNBOUNDED):  # a*a* = a*
            if first is second or (second.kind == "both" and second.parts[0] is first):
                return second
        return self._term("both", (first, second), first.nullable and second.nullable)

    def either(self, terms: Iterable[Term]) -> Term:
        """Return the words that belong to at least one of the terms."""
        found: dict[Term, None] = {}
        mask = 0
        for term in terms:
            for part in term.parts if term.kind == "any" else (term,):
                if part is self.everything:
                    return part
                if part.kind == "set":
                    mask |= part.parts[0]
                elif part is not self.none:
                    found[part] = None
        if mask:
            found[self.symbols(mask)] = None
        key = frozenset(found)
        if key not in self._joined:
            self._joined[key] = self._join(found)
        return self._joined[key]

    def _join(self, found: dict[Term, None]) -> Term:
        """Return the alternatives of ``either`` as one term."""
        self._factor(found, 1)
        self._factor(found, 0)
        kept = sorted(found, key=lambda term: term.number)
        if not kept:
            return self.none
        if len(kept) == 1:
            return kept[0]
        if self.empty in found and any(term.nullable for term in kept if term is not self.empty):
            return self.either(term for term in kept if term is not self.empty)
        return self._term("any", tuple(kept), any(term.nullable for term in kept))

    def _factor(self, found: dict[Term, None], shared: int) -> None:
        """Replace alternatives by ac|bc = (a|b)c, for ``shared`` 1, or ca|cb = c(a|b) for a rule c, for ``shared`` 0.

        The second law keeps the alternatives few where a grammar is ambiguous for long.
        """
        groups: dict[Term, list[Term]] = {}
        for part in found:
            if part.kind == "both" and (shared or part.parts[0].kind == "rule"):
                groups.setdefault(part.parts[shared], []).append(part)
        for each, parts in groups.items():
            if len(parts) > 1:
                for part in parts:
                    del found[part]
                rest = self.either(part.parts[1 - shared] for part in parts)
                found[self._both(rest, each) if shared else self._both(each, rest)] = None

    def every(self, terms: Iterable[Term]) -> Term:
        """Return the words that belong to all of the terms."""
        found: dict[Term, None] = {}
        for term in terms:
            for part in term.parts if term.kind == "all" else (term,):
                if part is self.none:
                    return part
                if part is not self.everything:
                    found[part] = None
        kept = sorted(found, key=lambda term: term.number)
        if not kept:
            return self.everything
        if len(kept) == 1:
            return kept[0]
        if self.empty in found:
            return self.empty if all(term.nullable for term in kept) else self.none
        return self._term("all", tuple(kept), all(term.nullable for term in kept))

    def other(self, term: Term) -> Term:
        """Return the words that do not belong to a term."""
        return term.parts[0] if term.kind == "not" else self._term("not", (term,), not term.nullable)

    def repeat(self, term: Term, least: int, most: int = UNBOUNDED) -> Term:
        """Return the words that consist of ``least`` to ``most`` words of the term."""
        if least > most:
            return self.none
        if most == 0 or term is self.empty:
            return self.empty
        if term is self.none:
            return self.empty if least == 0 else self.none
        if term.nullable:
            least = 0
        if least == most == 1:
            return term
        if term.kind == "repeat" and least <= 1 and most == UNBOUNDED and term.parts[1] <= 1 and term.parts[2] == UNBOUNDED:
            return self.repeat(term.parts[0], min(least, term.parts[1]))
        return self._term("repeat", (term, least, most), least == 0)

    def rule(
        self, body: Callable[[], Term], name: Any, nullable: bool = False, weigh: Callable[[Term], int] | None = None
    ) -> Term:
        """Return a term that stands for another one, which is asked for when its row is: this makes recursion.

        ``name`` tells rules apart. ``nullable`` says whether the empty word belongs to the rule. The lightest word of a
        rule is searched by its rows; where rules nest, rows do not end, and ``weigh`` returns the weight.
        """
        found = self._term("rule", (name,), nullable)
        if len(found.parts) == 1:
            found.parts = (name, body)
            found.least = weigh(found) if weigh else None
        return found

    def row(self, term: Term) -> Row:
        """Return what may follow each symbol. Symbols that no word begins with are left out."""
        if term.row is None:
            term.row = self._merged(self._parts(term))
        return term.row

    def _parts(self, term: Term) -> Iterable[tuple[int, Term]]:
        """Return disjoint sets of symbols, with what follows."""
        kind, parts = term.kind, term.parts
        if kind == "set":
            return [(parts[0], self.empty)]
        if kind == "both":
            first = [(mask, self._both(after, parts[1])) for mask, after in self.row(parts[0])]
            return self._together([first, self.row(parts[1])], self.either) if parts[0].nullable else first
        if kind == "any":
            return self._together([self.row(part) for part in parts], self.either)
        if kind == "all":
            rows = [self.row(part) for part in parts]
            return self._together(rows, lambda terms: self.every(terms) if len(terms) == len(rows) else self.none)
        if kind == "not":
            known = [(mask, self.other(after)) for mask, after in self.row(parts[0])]
            left = self._all_symbols
            for mask, _ in known:
                left &= ~mask
            return [*known, (left, self.everything)] if left else known
        if kind == "repeat":
            inner, least, most = parts
            rest = self.repeat(inner, max(least - 1, 0), most if most == UNBOUNDED else most - 1)
            return [(mask, self._both(after, rest)) for mask, after in self.row(inner)]
        if kind == "rule":
            return self.row(parts[1]())
        return []

    @staticmethod
    def _together(rows: list[Any], join: Callable[[list[Term]], Term]) -> Iterator[tuple[int, Term]]:
        """Yield the pieces into which several rows divide the symbols, with the terms of all rows joined."""
        pieces: list[tuple[int, list[Term]]] = []
        for row in rows:
            for mask, after in row:
                new = []
                for known, terms in pieces:
                    shared = known & mask
                    if shared:
                        new.append((shared, [*terms, after]))
                        if known != shared:
                            new.append((known & ~shared, terms))
                        mask &= ~shared
                    else:
                        new.append((known, terms))
                if mask:
                    new.append((mask, [after]))
                pieces = new
        for mask, terms in pieces:
            yield mask, terms[0] if len(terms) == 1 and join is None else join(terms)

    def _merged(self, parts: Iterable[tuple[int, Term]]) -> Row:
        """Return a row in which each term occurs once, and ``none`` does not."""
        masks: dict[Term, int] = {}
        for mask, after in parts:
            if after is not self.none:
                masks[after] = masks.get(after, 0) | mask
        return tuple((mask, after) for after, mask in masks.items())

    def least(self, term: Term) -> int:
        """Return the weight of the lightest word of a term; ``UNBOUNDED`` when it has no word."""
        if term.least is None:
            term.least = self._least(term)
        return term.least

    def _least(self, term: Term) -> int:
        kind, parts = term.kind, term.parts
        if term.nullable:
            return 0
        if kind == "set":
            return min(weight for n, weight in enumerate(self.weights) if parts[0] >> n & 1)
        if kind == "both":
            return min(self.least(parts[0]) + self.least(parts[1]), UNBOUNDED)
        if kind == "any":
            return min(self.least(part) for part in parts)
        if kind == "repeat":
            return min(self.least(parts[0]) * parts[1], UNBOUNDED)
        if kind in ("all", "not", "rule"):
            return self._search(term)
        return UNBOUNDED

    def _hope(self, term: Term) -> int:
        """Return a weight that no word of a term is lighter than."""
        if term.least is not None:
            return term.least
        if term.kind == "all":
            return max(self._hope(part) for part in term.parts)
        if term.kind == "both":
            return min(self._hope(term.parts[0]) + self._hope(term.parts[1]), UNBOUNDED)
        if term.kind == "any":
            return min(self._hope(part) for part in term.parts)
        if term.kind in ("not", "rule"):
            return 0
        return self.least(term)

    def _search(self, start: Term) -> int:
        """Find the lightest word by A*."""
        best, done = {start: 0}, set()
        before: dict[Term, Term] = {}
        waiting = [(self._hope(start), 0, start.number, start)]
        while waiting:
            hope, weight, _, term = heapq.heappop(waiting)
            if term in done or hope >= UNBOUNDED:
                continue
            if term.nullable or (term.least is not None and term is not start):
                total = weight + (term.least or 0)
                if total >= UNBOUNDED:
                    continue
                while term is not start:  # what the lightest word passes through is known now
                    term.least = total - best[term]
                    term = before[term]
                return total
            done.add(term)
            for mask, after in self.row(term):
                step = weight + min(each for n, each in enumerate(self.weights) if mask >> n & 1)
                if after not in done and step < best.get(after, UNBOUNDED):
                    best[after], before[after] = step, term
                    heapq.heappush(waiting, (step + self._hope(after), step, after.number, after))
        return UNBOUNDED
