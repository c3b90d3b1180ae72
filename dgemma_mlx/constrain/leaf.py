"""Regular languages over characters, as terms: strings and numbers of a constraint.

The alphabet of a leaf are the minterms of all its character sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dgemma_mlx.constrain import pattern as p
from dgemma_mlx.constrain.characters import Ranges, byte_sequences, minterms
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms


class Letters:
    """An alphabet of classes of characters, and the terms over it."""

    def __init__(self, sets: Iterable[Ranges]) -> None:
        self.sets = list(dict.fromkeys(sets))
        self.classes = minterms(self.sets)
        self.terms = Terms(len(self.classes))
        self._masks = {each: sum(1 << n for n, part in enumerate(self.classes) if part and _within(part, each))
                       for each in self.sets}

    def one(self, characters: Ranges) -> Term:
        return self.terms.symbols(self._masks[characters])

    def characters(self, mask: int) -> Ranges:
        return tuple(sorted(pair for n, part in enumerate(self.classes) if mask >> n & 1 for pair in part))


def _within(part: Ranges, whole: Ranges) -> bool:
    return any(first <= part[0][0] <= last for first, last in whole)


def sets_of(tree: p.Pattern) -> set[Ranges]:
    """Return the character sets of a pattern."""
    found, waiting = set(), [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, p.One):
            found.add(node.characters)
        elif isinstance(node, p.Sequence):
            waiting += node.items
        elif isinstance(node, p.Either):
            waiting += node.branches
        elif isinstance(node, p.Repeated):
            waiting.append(node.item)
    return found


def term_of(letters: Letters, tree: p.Pattern) -> Term:
    """Return the texts that match a pattern as a whole."""
    return _Translator(letters).term(tree, True, True)


class _Translator:
    """Translator of patterns.

    An assertion depends on what stands around it, so each part is translated for a context: whether nothing stands
    before its text, and whether nothing stands after it.
    """

    def __init__(self, letters: Letters) -> None:
        self._letters, self._terms = letters, letters.terms
        self._asserts: dict[int, bool] = {}

    def term(self, tree: p.Pattern, first: bool, last: bool) -> Term:
        terms = self._terms
        if isinstance(tree, p.One):
            return self._letters.one(tree.characters)
        if isinstance(tree, p.Begin):
            return terms.empty if first else terms.none
        if isinstance(tree, p.End):
            return terms.empty if last else terms.none
        if isinstance(tree, p.Either):
            return terms.either(self.term(branch, first, last) for branch in tree.branches)
        if isinstance(tree, p.Sequence):
            if not self._has_assertion(tree):
                return terms.sequence(*(self.term(item, first, last) for item in tree.items))
            return self._sequence(tree.items, first, last)
        most = UNBOUNDED if tree.most is None else tree.most
        if not self._has_assertion(tree):
            return terms.repeat(self.term(tree.item, first, last), tree.least, most)
        return self._repeated(tree.item, tree.least, most, first, last)

    def _sequence(self, items: Sequence[p.Pattern], first: bool, last: bool) -> Term:
        """Translate items of which some assert something: the text of each one is empty or not."""
        terms = self._terms
        # of the items from the end to each place, by their context
        tails = dict.fromkeys(((a, b) for a in (False, True) for b in (False, True)), terms.empty)
        for n, head in enumerate(reversed(items)):
            found = {context: self._joined(head, tails, *context, alone=n == 0) for context in tails}
            tails = found
        return tails[first, last]

    def _joined(
        self, head: p.Pattern, tails: dict[tuple[bool, bool], Term], first: bool, last: bool, *, alone: bool
    ) -> Term:
        """Translate an item and what follows it, which is given for each context; ``alone`` when nothing follows."""
        terms = self._terms
        if alone:
            return self.term(head, first, last)
        found = [terms.sequence(self._full(self.term(head, first, False)), self._full(tails[False, last]))]
        if self.term(head, first, False).nullable:
            found.append(self._full(tails[first, last]))
        if tails[False, last].nullable:
            found.append(self._full(self.term(head, first, last)))
        if self.term(head, first, last).nullable and tails[first, last].nullable:
            found.append(terms.empty)
        return terms.either(found)

    def _repeated(self, item: p.Pattern, least: int, most: int, first: bool, last: bool) -> Term:
        """Translate a repetition of an item that asserts something: at most the first and the last have a context."""
        terms = self._terms
        single = self.term(item, first, last)
        before, after, inner = (self.term(item, *context) for context in ((first, False), (False, last), (False, False)))
        found = []
        if least == 0 or single.nullable:
            found.append(terms.empty)
        if most >= 1 and (least <= 1 or single.nullable):
            found.append(self._full(single))
        fill = before.nullable or inner.nullable or after.nullable
        if most >= 2:
            middle = terms.repeat(self._full(inner), 0 if fill else max(least - 2, 0), UNBOUNDED if most == UNBOUNDED else most - 2)
            found.append(terms.sequence(self._full(before), middle, self._full(after)))
        return terms.either(found)

    def _full(self, term: Term) -> Term:
        """Return the words of a term apart from the empty one."""
        terms = self._terms
        return terms.every([term, terms.other(terms.empty)]) if term.nullable else term

    def _has_assertion(self, tree: p.Pattern) -> bool:
        """Return whether a pattern asserts the beginning or the end of the text."""
        key = id(tree)
        if key not in self._asserts:
            if isinstance(tree, p.Sequence):
                found = any(self._has_assertion(item) for item in tree.items)
            elif isinstance(tree, p.Either):
                found = any(self._has_assertion(branch) for branch in tree.branches)
            elif isinstance(tree, p.Repeated):
                found = self._has_assertion(tree.item)
            else:
                found = isinstance(tree, (p.Begin, p.End))
            self._asserts[key] = found
        return self._asserts[key]


def bytes_of(letters: Letters, term: Term, bytes_: Terms, encode: Callable[[Ranges], Term]) -> Term:
    """Return a term over bytes for the texts of a term over characters."""
    def body(state: Term) -> Term:
        options = [bytes_.sequence(encode(letters.characters(mask)), leaf(after)) for mask, after in letters.terms.row(state)
                   if letters.terms.least(after) < UNBOUNDED]
        return bytes_.either([*options, *([bytes_.empty] if state.nullable else [])])

    def leaf(state: Term) -> Term:
        if state is letters.terms.none:
            return bytes_.none
        if state is letters.terms.empty:
            return bytes_.empty
        return bytes_.rule(lambda: body(state), (id(letters), state.number), state.nullable)

    return leaf(term)


def utf8(bytes_: Terms) -> Callable[[Ranges], Term]:
    """Return a function from a set of characters to a term for their UTF-8 bytes."""
    known: dict[Ranges, Term] = {}

    def encode(characters: Ranges) -> Term:
        if characters not in known:
            known[characters] = bytes_.either(
                bytes_.sequence(*(bytes_.symbols(_mask(*pair)) for pair in each)) for each in byte_sequences(characters)
            )
        return known[characters]

    return encode


def _mask(first: int, last: int) -> int:
    return (1 << last + 1) - (1 << first)
