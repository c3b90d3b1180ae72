"""Sets of JSON values in a normal form: what a JSON schema allows, type by type.

Arrays and objects are unions of shapes. The schemas of their items and properties stand in a shape as nodes: sets of
schemas that all must hold, which are normalised when they are needed. This is how schemas may be recursive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms

Node = frozenset[int]  # literals, all of which hold: 2 n for schema n, and 2 n + 1 for its negation
ANYTHING: Node = frozenset()
NOTHING: Node = frozenset({-1})  # -1 stands for false
MOST_SHAPES = 400  # of a set; alternatives may multiply, and then the first ones are kept: less than is allowed
_SOME_SHAPES = 60  # of a complement, which may leave out others


def meet(one: Node, other: Node) -> Node:
    """Return the node of the values that belong to both nodes."""
    both = one | other
    return NOTHING if -1 in both or any(literal ^ 1 in both for literal in both) else both


def complement(node: Node) -> Node:
    """Return the node of the values that do not belong to a node of at most one literal."""
    if not node or node == NOTHING:
        return ANYTHING if node else NOTHING
    (literal,) = node
    return frozenset({literal ^ 1})


@dataclass(frozen=True)
class Array:
    """A shape of arrays.

    Attributes:
        prefix: What the first items must be.
        items: What the items after them must be.
        least, most: Numbers of items.
        contains: What some items must be, and the least and largest number of such items.
        unique: Whether no two items are equal.
        evaluated: Number of items that a keyword has judged.
    """

    prefix: tuple[Node, ...] = ()
    items: Node = ANYTHING
    least: int = 0
    most: int = UNBOUNDED
    contains: tuple[tuple[Node, int, int], ...] = ()
    unique: bool = False
    evaluated: int = 0

    def item(self, place: int) -> Node:
        """Return what the item at a place must be."""
        return self.prefix[place] if place < len(self.prefix) else self.items

    def is_possible(self) -> bool:
        """Return False when no array has the shape, True where that is not plain to see."""
        needed = range(min(self.least, len(self.prefix) + 1))
        return self.least <= self.most and all(NOTHING.isdisjoint(self.item(n)) for n in needed)

    def __and__(self, other: Array) -> Array:
        length = max(len(self.prefix), len(other.prefix))
        prefix = tuple(meet(self.item(n), other.item(n)) for n in range(length))
        return Array(
            prefix,
            meet(self.items, other.items),
            max(self.least, other.least),
            min(self.most, other.most),
            _different([*self.contains, *other.contains]),
            self.unique or other.unique,
            max(self.evaluated, other.evaluated),
        )


@dataclass(frozen=True)
class Region:
    """Names of properties that are not named one by one.

    Attributes:
        names: The names, as a term over characters.
        node: What a value with such a name must be.
        evaluated: Whether a keyword has judged such properties.
    """

    names: Term
    node: Node = ANYTHING
    evaluated: bool = False


@dataclass(frozen=True)
class Object:
    """A shape of objects.

    Attributes:
        properties: What the value of each named property must be, in the order in which they are written, and whether
            a keyword has judged it.
        regions: A division of all names; what is said of a named property does not stand here.
        required: Names that must be there.
        least, most: Numbers of properties.
        some: For each of these regions, an object has a property whose name and value it allows.
    """

    properties: tuple[tuple[str, Node, bool], ...] = ()
    regions: tuple[Region, ...] = ()
    required: frozenset[str] = frozenset()
    least: int = 0
    most: int = UNBOUNDED
    some: tuple[Region, ...] = ()

    def names(self) -> dict[str, tuple[Node, bool]]:
        """Return the named properties."""
        return {name: (node, evaluated) for name, node, evaluated in self.properties}


@dataclass(frozen=True)
class Values:
    """A set of JSON values.

    Attributes:
        null: Whether null belongs to it.
        booleans: Which booleans do.
        numbers: The texts of the numbers, as a term over characters.
        strings: The strings, as a term over characters.
        arrays, objects: Shapes; what fits any of them belongs to the set.
    """

    null: bool
    booleans: frozenset[bool]
    numbers: Term
    strings: Term
    arrays: tuple[Array, ...]
    objects: tuple[Object, ...]


class Algebra:
    """Unions and intersections of sets of values whose strings and numbers are terms over two alphabets."""

    def __init__(self, strings: Terms, numbers: Terms, number: Term, word: Callable[[str], Term]) -> None:
        self.strings, self.numbers, self._word = strings, numbers, word
        self.any_object = Object(regions=(Region(strings.everything),))
        self.all = Values(True, frozenset({True, False}), number, strings.everything, (Array(),), (self.any_object,))
        self.none = Values(False, frozenset(), numbers.none, strings.none, (), ())

    def only(self, **kinds: Any) -> Values:
        """Return the values of some types: fields of ``Values``, of which the others are empty."""
        return replace(self.none, **kinds)

    def but(self, **kinds: Any) -> Values:
        """Return all values, of which some types are restricted: fields of ``Values``."""
        return replace(self.all, **kinds)

    def both(self, one: Values, other: Values) -> Values:
        """Return the values that belong to both sets, or fewer (``MOST_SHAPES``)."""
        return self._both(one, other, MOST_SHAPES)

    def some_of_both(self, one: Values, other: Values) -> Values:
        """Return values that belong to both sets: of very many shapes only the first ones. For complements."""
        return self._both(one, other, _SOME_SHAPES)

    def _both(self, one: Values, other: Values, most: int) -> Values:
        if one is self.all or other is self.none:
            return other
        if other is self.all or one is self.none:
            return one
        arrays = (a & b for a in one.arrays for b in other.arrays)
        objects = (self.both_objects(a, b) for a in one.objects for b in other.objects)
        return Values(
            one.null and other.null,
            one.booleans & other.booleans,
            self.numbers.every([one.numbers, other.numbers]),
            self.strings.every([one.strings, other.strings]),
            _different(filter(Array.is_possible, arrays), most),
            _different(filter(self.is_possible, objects), most),
        )

    def either(self, several: Iterable[Values]) -> Values:
        """Return the values that belong to at least one of the sets, or fewer (``MOST_SHAPES``)."""
        parts = [part for part in several if part is not self.none]
        if len(parts) < 2:
            return parts[0] if parts else self.none
        return Values(
            any(part.null for part in parts),
            frozenset().union(*(part.booleans for part in parts)),
            self.numbers.either(part.numbers for part in parts),
            self.strings.either(part.strings for part in parts),
            _different(shape for part in parts for shape in part.arrays),
            _different(shape for part in parts for shape in part.objects),
        )

    def applied(self, shape: Object, name: str) -> tuple[Node, bool]:
        """Return what a shape says of a property, and whether a keyword has judged it."""
        found = shape.names().get(name)
        if found is None:
            found = next((each.node, each.evaluated) for each in shape.regions if self.contains(each.names, name))
        return found

    def both_objects(self, one: Object, other: Object) -> Object:
        """Return the shape of the objects that fit both."""
        if one == self.any_object:
            return other
        if other == self.any_object:
            return one
        known, others = one.names(), other.names()
        properties = []
        for name in dict.fromkeys([*known, *others]):
            a, judged = known.get(name) or self.applied(one, name)
            b, also = others.get(name) or self.applied(other, name)
            properties.append((name, meet(a, b), judged or also))
        regions = [
            Region(names, meet(a.node, b.node), a.evaluated or b.evaluated)
            for a in one.regions
            for b in other.regions
            if (names := self.names_in_both(a.names, b.names)) is not self.strings.none
        ]
        return Object(
            tuple(properties),
            tuple(regions),
            one.required | other.required,
            max(one.least, other.least),
            min(one.most, other.most),
            _different([*one.some, *other.some]),
        )

    def names_in_both(self, one: Term, other: Term) -> Term:
        """Return the names that belong to both sets; ``none`` where there are none."""
        both = self.strings.every([one, other])
        return both if self.strings.least(both) < UNBOUNDED else self.strings.none

    def contains(self, names: Term, name: str) -> bool:
        """Return whether a name belongs to a set of names."""
        both = self.strings.every([names, self._word(name)])
        return self.strings.least(both) < UNBOUNDED

    def is_possible(self, shape: Object) -> bool:
        """Return False when no object has the shape, True where that is not plain to see."""
        if max(shape.least, len(shape.required)) > shape.most:
            return False
        return all(NOTHING.isdisjoint(self.applied(shape, name)[0]) for name in shape.required)

    def judged_properties(self, values: Values, node: Node) -> Values:
        """Return the values whose properties fulfil a node where no keyword has judged them."""

        def judged(known: Node, evaluated: bool) -> Node:
            return known if evaluated else meet(known, node)

        shapes = []
        for shape in values.objects:
            properties = tuple((name, judged(known, done), True) for name, known, done in shape.properties)
            regions = tuple(Region(each.names, judged(each.node, each.evaluated), True) for each in shape.regions)
            shapes.append(replace(shape, properties=properties, regions=regions))
        return replace(values, objects=tuple(filter(self.is_possible, shapes)))


def judged_items(values: Values, node: Node) -> Values:
    """Return the values whose items fulfil a node where no keyword has judged them."""
    shapes = []
    for shape in values.arrays:
        done = shape.evaluated
        prefix = tuple(inner if n < done else meet(inner, node) for n, inner in enumerate(shape.prefix))
        items = shape.items if done == UNBOUNDED else meet(shape.items, node)
        shapes.append(replace(shape, prefix=prefix, items=items, evaluated=UNBOUNDED))
    return replace(values, arrays=tuple(filter(Array.is_possible, shapes)))


def unjudged(values: Values) -> Values:
    """Return the same values, as if no keyword had judged an item or a property: so they come out of a negation."""
    arrays = (replace(shape, evaluated=0) for shape in values.arrays)
    objects = (
        replace(
            shape,
            properties=tuple((name, node, False) for name, node, _ in shape.properties),
            regions=tuple(Region(each.names, each.node) for each in shape.regions),
        )
        for shape in values.objects
    )
    return replace(values, arrays=_different(arrays), objects=_different(objects))


_Shape = TypeVar("_Shape")


def _different(shapes: Iterable[_Shape], most: int = MOST_SHAPES) -> tuple[_Shape, ...]:
    """Return the different ones among some shapes, in their order, up to ``most``."""
    found: dict[_Shape, None] = {}
    for shape in shapes:
        check_time()
        found[shape] = None
        if len(found) == most:
            break
    return tuple(found)
