"""Values that are kept different: the items of a ``uniqueItems`` array, and names that are counted.

Few values are told apart exactly. Many are told apart by how their text begins: two strings that begin with different
characters are different. What is remembered of a value is its mark, so a machine remembers little.

A key of texts is their first symbols, or all symbols of one text with ``END`` after them. Neither of two texts with
different keys equals the other, unless one key is the beginning of the other one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from dgemma_mlx.constrain.context import Context
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms
from dgemma_mlx.constrain.texts import Numbers
from dgemma_mlx.constrain.values import Node, Object

MOST_KNOWN = 200  # so many strings, or numbers, are told apart exactly
END = -1
Key = tuple[int, ...]
Mark = tuple[str, Key]  # the type of a value, and the key of its text


class Item(NamedTuple):
    """Values that an item may have, which share a mark.

    Attributes:
        mark: The mark.
        term: The texts of the values.
        group: Items of a group differ in a string or a number only, and share no mark with items of another group.
        weight: The weight of the lightest such string or number.
    """

    mark: Mark
    term: Term
    group: Hashable
    weight: int = 0


class DistinctItems:
    """Items of an array, divided by marks. Items with different marks are different."""

    def __init__(self, context: Context, nodes: tuple[Node, ...]) -> None:
        """Divide the items of an array of which each one fits one of the nodes."""
        self._context = context
        self._known: dict[Node, list[Item]] = {}
        self._canonical = canonical_numbers(context.numbers)
        values = (context.values(node) for node in nodes)
        self._property = self._telling([shape for each in values for shape in each.objects])

    def divided(self, node: Node) -> list[Item]:
        """Return the texts of the values of a node, which is one of the array's nodes or stricter, by marks."""
        if node not in self._known:
            self._known[node] = list(self._divided(node))
        return self._known[node]

    def _divided(self, node: Node) -> Iterator[Item]:
        context, values = self._context, self._context.values(node)
        spelling, strings = context.spelling, context.strings.terms
        if values.null:
            yield Item(("null", ()), spelling.literal("null"), "null")
        for each in sorted(values.booleans):
            yield Item((str(each), ()), spelling.literal("true" if each else "false"), each)
        numbers = context.numbers.terms.every([values.numbers, self._canonical])
        for key, term in keyed(context.numbers.terms, numbers, 2):
            text = spelling.number(term)
            yield Item(("number", key), text, "number", spelling.terms.least(text))
        for key, term in keyed(strings, values.strings, 1):
            text = spelling.string(term)
            yield Item(("string", key), text, "string", spelling.terms.least(text))
        if values.arrays:
            arrays = replace(context.algebra.none, arrays=values.arrays)
            texts = context.rules.rule(("arrays", values.arrays), lambda: context.written(arrays))
            yield Item(("array", ()), texts, "array")
        for shape in values.objects:
            yield from self._objects(shape, alone=len(values.objects) == 1)

    def _objects(self, shape: Object, *, alone: bool) -> Iterator[Item]:
        """Divide objects by the string that one of their properties is. ``alone``: no other shape is divided."""
        context, name = self._context, self._property
        if name is None:
            texts = context.rules.rule(("objects", shape), lambda: context.objects(shape, None))
            yield Item(("object", ()), texts, shape)
            return
        strings = context.values(context.algebra.applied(shape, name)[0]).strings
        for key, term in keyed(context.strings.terms, strings, 1):
            objects = partial(context.objects, shape, (name, term))
            texts = context.rules.rule(("objects", shape, name, term), objects)
            weight = context.spelling.terms.least(context.spelling.string(term))
            yield Item(("object", key), texts, shape if alone else (shape, key), weight)

    def _telling(self, shapes: list[Object]) -> str | None:
        """Return a property that all objects have, and that may be a string in each of them."""
        context = self._context
        for name, _, _ in shapes[0].properties if shapes else ():
            if all(name in shape.required for shape in shapes):
                found = (context.values(context.algebra.applied(shape, name)[0]).strings for shape in shapes)
                if all(context.strings.terms.least(strings) < UNBOUNDED for strings in found):
                    return name
        return None


def canonical_numbers(numbers: Numbers) -> Term:
    """Return the decimals in their shortest spelling: equal numbers have equal texts."""
    terms, zero = numbers.terms, numbers.text("0")
    nonzero = terms.either(numbers.text(digit) for digit in "123456789")
    whole = terms.either([zero, terms.sequence(nonzero, terms.repeat(numbers.digit, 0))])
    fraction = terms.sequence(numbers.dot, terms.repeat(numbers.digit, 0), nonzero)
    number = terms.sequence(terms.repeat(numbers.minus, 0, 1), whole, terms.repeat(fraction, 0, 1))
    return terms.every([number, terms.other(numbers.text("-0"))])


def keyed(terms: Terms, texts: Term, length: int) -> Iterator[tuple[Key, Term]]:
    """Yield texts by their keys: one by one if they are few, else by their first ``length`` symbols."""
    known = _few(terms, texts)
    if known is None:
        yield from _beginnings(terms, texts, length)
    else:
        for key in known:
            yield (*key, END), terms.word(key)


def is_apart(key: Key, others: Iterable[Key]) -> bool:
    """Return whether a text with a key differs from all texts with the other keys."""
    return all(key[: len(other)] != other[: len(key)] for other in others)


def _beginnings(terms: Terms, texts: Term, length: int) -> Iterator[tuple[Key, Term]]:
    if length == 0:
        yield (), texts
        return
    if texts.nullable:
        yield (END,), terms.empty
    for mask, after in terms.row(texts):
        if terms.least(after) < UNBOUNDED:
            following = list(_beginnings(terms, after, length - 1))
            for symbol in _members(mask):
                for key, rest in following:
                    yield (symbol, *key), terms.sequence(terms.symbols(1 << symbol), rest)


def _few(terms: Terms, texts: Term) -> list[Key] | None:
    """Return all texts, if there are at most ``MOST_KNOWN``."""
    found: list[Key] = []
    begun: list[tuple[Key, Term]] = [((), texts)] if terms.least(texts) < UNBOUNDED else []
    while begun:
        found += [key for key, rest in begun if rest.nullable]
        longer: list[tuple[Key, Term]] = []
        for key, rest in begun:
            for mask, after in terms.row(rest):
                if terms.least(after) < UNBOUNDED:
                    if len(found) + len(longer) + mask.bit_count() > MOST_KNOWN:  # each one leads to a text at least
                        return None
                    longer += [((*key, symbol), after) for symbol in _members(mask)]
        begun = longer
    return found


def _members(mask: int) -> Iterator[int]:
    return (n for n in range(mask.bit_length()) if mask >> n & 1)
