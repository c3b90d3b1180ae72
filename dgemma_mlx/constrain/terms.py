"""Languages as terms, and what is left of a language after a symbol: Brzozowski's derivatives.

A term describes a set of words over an alphabet of ``size`` symbols: characters, or bytes. Equal terms are one object,
and small laws (``a|a = a``, ``a|b = b|a``, ``(ab)c = a(bc)``) are applied when a term is made, so that words lead to
few different terms. A term is the state of a deterministic automaton: the *row* of a term gives, for every symbol, the
term that describes what may follow it. Rows are computed when they are asked for, so an automaton costs what is visited
of it, not what it has (Brzozowski, *Derivatives of regular expressions*, 1964; Owens et al. 2009).

A set of symbols is an int, whose bit i says whether symbol i belongs to it. Nothing here recurses into a term, so terms
may be as long and as deep as memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

from dgemma_mlx.constrain.lightest import Lightest, estimate
from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.term import UNBOUNDED, Row, Term

__all__ = ["UNBOUNDED", "Row", "Term", "Terms"]


class Terms:
    """The terms over one alphabet. It holds a term only as long as something else does, such as the row of another.

    Attributes:
        size: Number of symbols.
        none: No word.
        empty: The empty word alone.
        everything: All words.
        within: Other algebras, of which rules of this one hold terms.
        lock: Held by a thread that makes terms; threads share an algebra.
    """

    def __init__(self, size: int, weights: Sequence[int] | None = None) -> None:
        """Create the algebra. ``weights`` are those of the symbols, at least 1; without them, each weighs 1."""
        self.size = size
        self.within: set[Terms] = set()
        self.lock = RLock()
        self._lightest = Lightest([1] * size if weights is None else weights, self.row)
        self._all_symbols = (1 << size) - 1
        self._known: WeakValueDictionary[tuple[Any, ...], Term] = WeakValueDictionary()
        self._count = 0
        self.none = self._term("none", (), False)
        self.empty = self._term("empty", (), True)
        self.everything = self._term("not", (self.none,), True)

    def __len__(self) -> int:
        """Return the number of terms that something holds."""
        return len(self._known)

    def _term(self, kind: str, parts: tuple[Any, ...], nullable: bool) -> Term:
        """Return the one term of this kind and parts."""
        found = self._known.get((kind, parts))
        if found is None:
            found = self._known[kind, parts] = Term(kind, parts, self._count, nullable)
            self._count += 1
            self._lightest.begin(found)
        return found

    def symbols(self, mask: int) -> Term:
        """Return the words of one symbol out of a set."""
        return self._term("set", (mask,), False) if mask else self.none

    def word(self, symbols: Iterable[int]) -> Term:
        """Return the one word of some symbols."""
        return self.sequence(*(self.symbols(1 << symbol) for symbol in symbols))

    def sequence(self, *terms: Term) -> Term:
        """Return the words that consist of a word of each term."""
        result = self.empty
        for term in reversed(terms):
            result = self._both(term, result)
        return result

    def _both(self, first: Term, second: Term) -> Term:
        """Return the concatenation of two terms, of which the first item is not one itself."""
        items = []
        while first.kind == "both":
            items.append(first.parts[0])
            first = first.parts[1]
        for item in (first, *reversed(items)):
            second = self._before(item, second)
        return second

    def _before(self, item: Term, rest: Term) -> Term:
        """Return the concatenation of an item that is not a concatenation, and a term."""
        if item is self.none or rest is self.none:
            return self.none
        if item is self.empty:
            return rest
        if rest is self.empty:
            return item
        following, tail = rest.parts if rest.kind == "both" else (rest, self.empty)
        if item.kind == following.kind == "repeat" and item.parts[0] is following.parts[0]:  # a{1,2}a{3,4} = a{4,6}
            inner, least, most = item.parts
            least, most = min(least + following.parts[1], UNBOUNDED), min(most + following.parts[2], UNBOUNDED)
            return self._before(self._term("repeat", (inner, least, most), least == 0), tail)
        return self._term("both", (item, rest), item.nullable and rest.nullable)

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
        if len(found) > 1:
            self._join_repeats(found)
            self._join_sequences(found, 1)
            self._join_sequences(found, 0)
        if self.empty in found and any(term.nullable for term in found if term is not self.empty):
            del found[self.empty]
        if len(found) < 2:
            return next(iter(found), self.none)
        kept = sorted(found, key=lambda term: term.number)
        return self._term("any", tuple(kept), any(term.nullable for term in kept))

    def _join_sequences(self, found: dict[Term, None], shared: int) -> None:
        """Join alternatives: ac|bc|c = (a|b|)c with ``shared`` 1; ca|cb|c = c(a|b|) with ``shared`` 0, if c is a rule.

        The first law keeps the terms few that repetitions lead to, the second those of grammars with long ambiguities.
        """
        groups: dict[Term, list[Term]] = {}
        for part in found:
            if part.kind == "both" and (shared or part.parts[0].kind == "rule"):
                groups.setdefault(part.parts[shared], []).append(part)
        for each, parts in groups.items():
            left = [part for part in parts if part in found]  # another group may have joined the others
            rests = [part.parts[1 - shared] for part in left]
            if each in found:
                left.append(each)
                rests.append(self.empty)
            if len(left) > 1:
                for part in left:
                    del found[part]
                rest = self.either(rests)
                found[self._both(rest, each) if shared else self._both(each, rest)] = None

    def _join_repeats(self, found: dict[Term, None]) -> None:
        """Join alternatives: a{1,3}|a{2,5} = a{1,5}."""
        groups: dict[Term, list[Term]] = {}
        for part in found:
            if part.kind == "repeat":
                groups.setdefault(part.parts[0], []).append(part)
        for inner, parts in groups.items():
            if len(parts) > 1:
                for part in parts:
                    del found[part]
                ranges = sorted(part.parts[1:] for part in parts)
                least, most = ranges[0]
                for begin, end in ranges[1:]:
                    if begin > most + 1:
                        found[self._term("repeat", (inner, least, most), least == 0)] = None
                        least = begin
                    most = max(most, end)
                found[self._term("repeat", (inner, least, most), least == 0 or inner.nullable)] = None

    def every(self, terms: Iterable[Term]) -> Term:
        """Return the words that belong to all of the terms."""
        found: dict[Term, None] = {}
        mask = self._all_symbols
        for term in terms:
            for part in term.parts if term.kind == "all" else (term,):
                if part is self.none:
                    return part
                if part.kind == "set":
                    mask &= part.parts[0]
                if part is not self.everything:
                    found[part] = None
        if any(part.kind == "set" for part in found):
            found = {part: None for part in found if part.kind != "set"} | {self.symbols(mask): None}
        if self.none in found or any(part.kind == "not" and part.parts[0] in found for part in found):
            return self.none
        if self.empty in found:
            return self.empty if all(term.nullable for term in found) else self.none
        if len(found) < 2:
            return next(iter(found), self.everything)
        if max(map(estimate, found)) > min(term.longest for term in found):
            return self.none
        kept = sorted(found, key=lambda term: term.number)
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
        if term.kind == "repeat":
            inner, low, high = term.parts
            if least == most or (least + 1) * low <= least * high + 1:  # a{1,3}{2,4} = a{2,12}: no number is left out
                return self.repeat(inner, min(least * low, UNBOUNDED), min(most * high, UNBOUNDED))
        return self._term("repeat", (term, least, most), least == 0)

    def rule(
        self, body: Callable[[], Term], name: Hashable, nullable: bool = False,
        weigh: Callable[[Term], int] | None = None, hope: int = 1,
    ) -> Term:
        """Return a term that stands for another one, which is asked for when its row is: this makes recursion.

        ``name`` tells rules apart. ``nullable`` says whether the empty word belongs to the rule. The lightest word of a
        rule is searched by its rows; where rules nest, rows do not end, and ``weigh`` returns the weight. ``hope`` is a
        weight that no word but the empty one is lighter than.
        """
        found = self._term("rule", (name,), nullable)
        if len(found.parts) == 1:
            found.parts = (name, body, weigh)
            if not nullable:
                found.hope = hope
        return found

    def row(self, term: Term) -> Row:
        """Return what may follow each symbol. Symbols that no word begins with are left out."""
        with self.lock:
            return term.row if term.row is not None else self._row(term)

    def _row(self, term: Term) -> Row:
        """Compute a row that is not known, and those of the parts that it needs."""
        waiting, bodies = [term], {}
        while waiting:
            last = waiting[-1]
            if last.row is None:
                if last.kind == "rule" and last not in bodies:
                    bodies[last] = last.parts[1]()
                opened = (bodies[last],) if last in bodies else self._opened(last)
                missing = [part for part in opened if part.row is None]
                if missing:
                    waiting += missing
                    continue
                check_time()
                last.row = opened[0].row if last in bodies else self._merged(self._divided(last))
            waiting.pop()
        assert term.row is not None
        return term.row

    @staticmethod
    def _opened(term: Term) -> Sequence[Term]:
        """Return the parts of a term whose rows its own consists of."""
        if term.kind == "both":
            return term.parts if term.parts[0].nullable else term.parts[:1]
        if term.kind in ("any", "all", "not"):
            return term.parts
        return term.parts[:1] if term.kind == "repeat" else ()

    def _divided(self, term: Term) -> Iterable[tuple[int, Term]]:
        """Return disjoint sets of symbols, with what follows. The rows of the parts are known."""
        kind, parts = term.kind, term.parts
        rows = [part.row or () for part in self._opened(term)]
        if kind == "set":
            return [(parts[0], self.empty)]
        if kind == "both":
            first = [(mask, self._both(after, parts[1])) for mask, after in rows[0]]
            return _together([first, rows[1]], self.either) if len(rows) > 1 else first
        if kind == "any":
            return _together(rows, self.either)
        if kind == "all":
            return _together(rows, lambda terms: self.every(terms) if len(terms) == len(rows) else self.none)
        if kind == "not":
            known = [(mask, self.other(after)) for mask, after in rows[0]]
            left = self._all_symbols & ~sum(mask for mask, _ in known)
            return [*known, (left, self.everything)] if left else known
        if kind == "repeat":
            inner, least, most = parts
            rest = self.repeat(inner, max(least - 1, 0), most if most == UNBOUNDED else most - 1)
            return [(mask, self._both(after, rest)) for mask, after in rows[0]]
        return []

    def _merged(self, parts: Iterable[tuple[int, Term]]) -> Row:
        """Return a row in which each term occurs once, and ``none`` does not."""
        masks: dict[Term, int] = {}
        for mask, after in parts:
            if after is not self.none:
                masks[after] = masks.get(after, 0) | mask
        return tuple((mask, after) for after, mask in masks.items())

    def forget(self) -> None:
        """Drop all rows, which are computed again when they are asked for. This frees the terms that only rows hold."""
        with self.lock:
            for term in list(self._known.values()):
                term.row = None
        for other in self.within:
            other.forget()

    def least(self, term: Term) -> int:
        """Return the weight of the lightest word of a term; ``UNBOUNDED`` when it has no word.

        A term of which no word is found after a long search counts as one without any. While a constraint is compiled,
        that raises ``TooLargeError``.
        """
        with self.lock:
            return self._lightest.least(term)


def _together(
    rows: Iterable[Iterable[tuple[int, Term]]], join: Callable[[list[Term]], Term]
) -> Iterator[tuple[int, Term]]:
    """Yield the pieces into which several rows divide the symbols, with the terms of all rows joined."""
    pieces: dict[int, list[Term]] = {}  # disjoint
    covered = 0
    for row in rows:
        for mask, after in row:
            if mask in pieces:
                pieces[mask].append(after)
            elif not mask & covered:
                pieces[mask] = [after]
                covered |= mask
            else:
                pieces = _divided(pieces, mask, after)
                covered |= mask
    for mask, terms in pieces.items():
        yield mask, join(terms)


def _divided(pieces: dict[int, list[Term]], mask: int, after: Term) -> dict[int, list[Term]]:
    """Return the pieces divided by one more set of symbols, and with the term after it."""
    divided = {}
    for piece, terms in pieces.items():
        shared = piece & mask
        if shared:
            divided[shared] = [*terms, after]
        if piece != shared:
            divided[piece ^ shared] = terms
        mask ^= shared
    if mask:
        divided[mask] = [after]
    return divided
