"""Regular languages over characters, as terms: strings and numbers of a constraint.

The symbols of such a language are classes of characters: the parts into which its character sets divide all characters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from dgemma_mlx.constrain import pattern as p
from dgemma_mlx.constrain.characters import Ranges, byte_sequences, minterms, ranges
from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms

_Contexts = tuple[Term, Term, Term, Term]  # see ``_Translator``


class Letters:
    """An alphabet of classes of characters, and the terms over it. A symbol weighs its bytes in UTF-8, at least.

    Attributes:
        terms: The algebra over the classes. Its ``everything`` are all texts.
    """

    def __init__(self, sets: Iterable[Ranges]) -> None:
        """Create the coarsest alphabet that tells the sets apart."""
        self._sets = list(dict.fromkeys(sets))
        self._classes, masks = minterms(self._sets)
        self._masks = dict(zip(self._sets, masks, strict=True))
        self._weights = [len(chr(part[0][0]).encode()) for part in self._classes]
        self._known: dict[int, Ranges] = {}
        self._exact: dict[Callable[[Ranges], Term], bool] = {}
        self.terms = Terms(len(self._classes), self._weights)

    def one(self, characters: Ranges) -> Term:
        """Return the texts of one character of a set, which is one of those that the alphabet was created for."""
        return self.terms.symbols(self._masks[characters])

    def characters(self, mask: int) -> Ranges:
        """Return the characters of some classes."""
        if mask not in self._known:
            self._known[mask] = ranges(pair for n, part in enumerate(self._classes) if mask >> n & 1 for pair in part)
        return self._known[mask]

    def weighs(self, bytes_: Terms, encode: Callable[[Ranges], Term]) -> bool:
        """Return whether each symbol is known to weigh as much as its lightest encoding."""
        if encode not in self._exact:
            pairs = zip(self._classes, self._weights, strict=True)
            self._exact[encode] = all(
                any(bytes_.least(encode(((code, code),))) == weight for code in itertools.chain(*part[:3]))
                for part, weight in pairs
            )
        return self._exact[encode]


def sets_of(tree: p.Pattern) -> set[Ranges]:
    """Return the character sets of a pattern."""
    return {node.characters for node in p.nodes(tree) if isinstance(node, p.One)}


def term_of(letters: Letters, tree: p.Pattern) -> Term:
    """Return the texts that match a pattern as a whole."""
    translator, found = _Translator(letters), dict[int, _Contexts]()
    for node in p.nodes(tree):
        check_time()
        found[id(node)] = translator.translated(node, [found[id(part)] for part in p.parts(node)])
    return found[id(tree)][3]


class _Translator:
    """Translator of patterns.

    An assertion depends on what stands around it, so each part is translated for four contexts. Context 2a + b is that
    where nothing stands before its text, if a, and nothing after it, if b. Without assertions, all four are one term.
    """

    def __init__(self, letters: Letters) -> None:
        self._letters, self._terms = letters, letters.terms

    def translated(self, node: p.Pattern, parts: list[_Contexts]) -> _Contexts:
        """Translate a node, given its translated parts."""
        terms = self._terms
        if isinstance(node, p.One):
            return (self._letters.one(node.characters),) * 4
        if isinstance(node, p.Begin):
            return terms.none, terms.none, terms.empty, terms.empty
        if isinstance(node, p.End):
            return terms.none, terms.empty, terms.none, terms.empty
        if isinstance(node, p.Sequence):
            return self._sequence(node.items, parts)
        if isinstance(node, p.Repeated):
            most = UNBOUNDED if node.most is None else node.most
            if _is_plain(parts[0]):
                return (terms.repeat(parts[0][0], node.least, most),) * 4
            return _of_contexts(lambda first, last: self._repeated(parts[0], node.least, most, first, last))
        if isinstance(node, p.Ahead):
            return parts[0]
        found = {options: terms.either(options) for options in set(zip(*parts, strict=True))}
        return _of_contexts(lambda first, last: found[tuple(part[2 * first + last] for part in parts)])

    def _sequence(self, items: tuple[p.Pattern, ...], parts: list[_Contexts]) -> _Contexts:
        """Translate items, from the last one to the first."""
        terms = self._terms
        if all(map(_is_plain, parts)) and not any(isinstance(item, p.Ahead) for item in items):
            return (terms.sequence(*(part[0] for part in parts)),) * 4
        tail: _Contexts | None = None
        for item, head in zip(reversed(items), reversed(parts), strict=True):
            if isinstance(item, p.Ahead):
                tail = self._ahead(head, item.negative, tail or (terms.empty,) * 4)
            elif tail is None:
                tail = head
            else:
                tail = self._joined(head, tail)
        return tail or (terms.empty,) * 4

    def _ahead(self, seen: _Contexts, negative: bool, tail: _Contexts) -> _Contexts:
        """Translate a look-ahead and all that follows it up to the end of the text."""
        terms = self._terms
        return _of_contexts(lambda first, last: terms.every(
            [tail[2 * first + last], terms.other(seen[2 * first + 1]) if negative else seen[2 * first + 1]]
        ))  # fmt: skip

    def _joined(self, head: _Contexts, tail: _Contexts) -> _Contexts:
        """Translate an item and what follows it. The text of each one is empty or not."""
        terms = self._terms
        if _is_plain(head) and not head[0].nullable:
            return tuple(terms.sequence(head[0], tail[last]) for last in (0, 1)) * 2  # type: ignore[return-value]

        def joined(first: int, last: int) -> Term:
            here = 2 * first + last
            found = [terms.sequence(self._full(head[2 * first]), self._full(tail[last]))]
            if head[2 * first].nullable:
                found.append(self._full(tail[here]))
            if tail[last].nullable:
                found.append(self._full(head[here]))
            if head[here].nullable and tail[here].nullable:
                found.append(terms.empty)
            return terms.either(found)

        return _of_contexts(joined)

    def _repeated(self, item: _Contexts, least: int, most: int, first: int, last: int) -> Term:
        """Translate a repetition of an item that asserts something: at most the first and the last have a context."""
        terms = self._terms
        single, before, after, inner = item[2 * first + last], item[2 * first], item[last], item[0]
        found = []
        if least == 0 or single.nullable:
            found.append(terms.empty)
        if most >= 1 and (least <= 1 or single.nullable):
            found.append(self._full(single))
        if most >= 2:
            may_be_fewer = before.nullable or inner.nullable or after.nullable
            fewest = 0 if may_be_fewer else max(least - 2, 0)
            middle = terms.repeat(self._full(inner), fewest, UNBOUNDED if most == UNBOUNDED else most - 2)
            found.append(terms.sequence(self._full(before), middle, self._full(after)))
        return terms.either(found)

    def _full(self, term: Term) -> Term:
        """Return the words of a term apart from the empty one."""
        terms = self._terms
        if term.kind == "repeat" and not term.parts[0].nullable:
            return terms.repeat(term.parts[0], max(term.parts[1], 1), term.parts[2])
        return terms.every([term, terms.other(terms.empty)]) if term.nullable else term


def _is_plain(contexts: _Contexts) -> bool:
    """Return whether a translation does not depend on the context."""
    return contexts[0] is contexts[1] is contexts[2] is contexts[3]


def _of_contexts(function: Callable[[int, int], Term]) -> _Contexts:
    return function(0, 0), function(0, 1), function(1, 0), function(1, 1)


def bytes_of(letters: Letters, term: Term, bytes_: Terms, encode: Callable[[Ranges], Term]) -> Term:
    """Return a term over bytes for the texts of a term over characters. ``encode`` returns the bytes of characters."""
    bytes_.within.add(letters.terms)
    return _Encoded(letters, bytes_, encode).term(term)


class _Encoded:
    """Terms over bytes for terms over characters: rules that are opened character by character."""

    def __init__(self, letters: Letters, bytes_: Terms, encode: Callable[[Ranges], Term]) -> None:
        self._letters, self._bytes, self._encode = letters, bytes_, encode

    def term(self, state: Term) -> Term:
        """Return the texts of a term."""
        terms = self._letters.terms
        if state is terms.none or state is terms.empty:
            return self._bytes.empty if state.nullable else self._bytes.none
        weigh = (lambda _: terms.least(state)) if self._letters.weighs(self._bytes, self._encode) else None
        name = (self._letters, self._encode, state)
        return self._bytes.rule(lambda: self._body(state), name, state.nullable, weigh, terms.least(state))

    def _body(self, state: Term) -> Term:
        terms = self._letters.terms
        options = [
            self._bytes.sequence(self._encode(self._letters.characters(mask)), self.term(after))
            for mask, after in terms.row(state) if terms.least(after) < UNBOUNDED
        ]
        return self._bytes.either([*options, *([self._bytes.empty] if state.nullable else [])])


def utf8(bytes_: Terms) -> Callable[[Ranges], Term]:
    """Return a function from a set of characters to a term for their UTF-8 bytes."""
    known: dict[Ranges, Term] = {}

    def encode(characters: Ranges) -> Term:
        if characters not in known:
            known[characters] = bytes_.either(
                bytes_.sequence(*(bytes_.symbols((1 << last + 1) - (1 << first)) for first, last in each))
                for each in byte_sequences(characters)
            )
        return known[characters]

    return encode
