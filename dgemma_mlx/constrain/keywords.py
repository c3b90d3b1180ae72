"""What the keywords of a JSON schema allow, without those that combine schemas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

from dgemma_mlx.constrain.document import Document, Place
from dgemma_mlx.constrain.terms import UNBOUNDED, Term
from dgemma_mlx.constrain.texts import Numbers, Strings
from dgemma_mlx.constrain.values import ANYTHING, NOTHING, Algebra, Array, Node, Object, Region, Values, meet

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_STRING = ("minLength", "maxLength", "pattern", "format")
_ARRAY = ("items", "prefixItems", "minItems", "maxItems", "contains", "uniqueItems")
_OBJECT = (
    "properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties",
    "propertyNames",
)  # fmt: skip


def required_names(place: Place) -> list[str]:
    """Return the names of ``required``. A boolean, as in draft 3, says nothing."""
    value = place.keywords.get("required", [])
    return value if isinstance(value, list) else []


class Keywords:
    """What keywords allow. ``wellformed.check`` has found their values to be of the right form."""

    def __init__(
        self, document: Document, algebra: Algebra, strings: Strings, numbers: Numbers, values: Callable[[Node], Values]
    ) -> None:
        """``values`` says what a node allows."""
        self._document, self._algebra, self._strings, self._numbers = document, algebra, strings, numbers
        self._values = values
        self._constants: dict[str, dict[str, Any]] = {}

    def allowed(self, place: Place) -> Iterator[Values]:
        """Yield sets of values, all of which a value must belong to."""
        a, words = self._algebra, place.keywords
        if "type" in words:
            yield self.types(place)
        for name in ("enum", "const"):
            if name in words:
                constants = self.constants(place, name)
                yield a.either(self.constant(place, value, name, *step) for value, *step in constants)
        if not words.keys().isdisjoint(_STRING):
            yield a.but(strings=self._string(place))
        if not words.keys().isdisjoint(BOUNDS):
            yield a.but(numbers=self._numbers.within(self.bounds(place), place.path))
        if not words.keys().isdisjoint(_ARRAY):
            yield a.but(arrays=(self._array(place),))
        if not words.keys().isdisjoint(_OBJECT):
            yield a.but(objects=(self._object(place),))
        yield from self._dependencies(place)

    # --- values of keywords

    def count(self, place: Place, name: str) -> int | None:
        """Return the value of a keyword that counts; None when it is missing."""
        value = place.keywords.get(name)
        return None if value is None else min(int(value), UNBOUNDED)

    def bounds(self, place: Place) -> dict[str, Fraction]:
        """Return the bounds of numbers, by keyword."""
        words = place.keywords
        return {name: Fraction(Decimal(str(words[name]))) for name in BOUNDS if name in words}

    def constants(self, place: Place, name: str) -> list[tuple[Any, ...]]:
        """Return the values that ``enum`` or ``const`` lists, each with its place in the list."""
        value = place.keywords[name]
        return [(value,)] if name == "const" else [(each, n) for n, each in enumerate(value)]

    def searched(self, place: Place, keyword: str, pattern: str) -> tuple[Term, Term]:
        """Return the strings in which all validators find a pattern, and those in which any may find it.

        ``keyword`` says where the pattern stands.
        """
        return self._strings.searched(pattern, f"{place.path}/{keyword}")

    # --- types and constants

    def kinds(self, place: Place) -> list[str]:
        """Return the names of ``type``."""
        named = place.keywords["type"]
        return named if isinstance(named, list) else [named]

    def types(self, place: Place) -> Values:
        """Return the values of the named types."""
        a, types = self._algebra, self.kinds(place)
        numbers, named = a.none.numbers, not place.keywords.keys().isdisjoint((*BOUNDS, "const", "enum"))
        if "number" in types:  # of any size, where other keywords say which
            numbers = self._numbers.terms.everything if named else a.all.numbers
        elif "integer" in types:  # 1.0 is one from draft 6 on, but few readers make an int of it
            numbers = self._numbers.any_whole if named else self._numbers.whole
        return Values(
            "null" in types or "nullable" in place.keywords,
            frozenset({True, False} if "boolean" in types else ()),
            numbers,
            a.all.strings if "string" in types else a.none.strings,
            a.all.arrays if "array" in types else (),
            a.all.objects if "object" in types else (),
        )

    def constant(self, place: Place, value: Any, *steps: object) -> Values:
        """Return a value that stands at a place in the schema, as a set."""
        a = self._algebra
        if value is None:
            return a.only(null=True)
        if isinstance(value, bool):
            return a.only(booleans=frozenset({value}))
        if isinstance(value, (int, float)):
            return a.only(numbers=self._numbers.equal(value, "/".join([place.path, *map(str, steps)])))
        if isinstance(value, str):
            return a.only(strings=self._strings.text(value))
        if isinstance(value, list):
            items = tuple(self.equal(place, item) for item in value)
            return a.only(arrays=(Array(items, NOTHING, len(items), len(items)),))
        properties = tuple((name, self.equal(place, item), False) for name, item in value.items())
        regions = (Region(a.strings.everything, NOTHING),)
        return a.only(objects=(Object(properties, regions, frozenset(value)),))

    def equal(self, place: Place, value: Any, *, negated: bool = False) -> Node:
        """Return the node of one value within a constant."""
        schema = self._constants.setdefault(json.dumps(value, sort_keys=True), {"const": value})
        return self._document.node(place, schema, negated=negated)

    # --- strings, arrays and objects

    def _string(self, place: Place) -> Term:
        words, strings = place.keywords, self._strings
        least, most = self.count(place, "minLength"), self.count(place, "maxLength")
        terms = [strings.everything]
        if least is not None or most is not None:
            terms.append(strings.lengths(least or 0, UNBOUNDED if most is None else most))
        if "pattern" in words:
            terms.append(self.searched(place, "pattern", words["pattern"])[0])
        if "format" in words:
            terms.append(strings.format(words["format"]))
        return self._algebra.strings.every(terms)

    def _array(self, place: Place) -> Array:
        words, node = place.keywords, self._document.node
        prefix = words.get("prefixItems", [])
        contains: tuple[tuple[Node, int, int], ...] = ()
        if "contains" in words:
            least, most = self.count(place, "minContains"), self.count(place, "maxContains")
            some = node(place, words["contains"], "contains")
            contains = ((some, 1 if least is None else least, UNBOUNDED if most is None else most),)
        least, most = self.count(place, "minItems"), self.count(place, "maxItems")
        return Array(
            tuple(node(place, part, "prefixItems", n) for n, part in enumerate(prefix)),
            node(place, words.get("items", True), "items"),
            least or 0,
            UNBOUNDED if most is None else most,
            contains,
            words.get("uniqueItems", False),
            UNBOUNDED if "items" in words else len(prefix),
        )

    def _object(self, place: Place) -> Object:
        node, regions = self._document.node, self._regions(place)
        named = []
        for name, part in place.keywords.get("properties", {}).items():
            inner = node(place, part, "properties", name)
            for region in regions:
                if region.node != ANYTHING and self._algebra.contains(region.names, name):
                    inner = meet(inner, region.node)
            named.append((name, inner, True))
        if "additionalProperties" in place.keywords:
            extra = node(place, place.keywords["additionalProperties"], "additionalProperties")
            regions = [
                each if each.evaluated else Region(each.names, meet(each.node, extra), True) for each in regions
            ]
        least, most = self.count(place, "minProperties"), self.count(place, "maxProperties")
        most = UNBOUNDED if most is None else most
        shape = Object(tuple(named), tuple(regions), frozenset(required_names(place)), least or 0, most)
        return self._named_so(place, shape) if "propertyNames" in place.keywords else shape

    def _regions(self, place: Place) -> list[Region]:
        """Return the regions into which ``patternProperties`` divides all names.

        A name in which only some validators find a pattern fulfils what stands there, but is not judged by it.
        """
        a = self._algebra
        regions = [Region(a.strings.everything)]
        for pattern, part in place.keywords.get("patternProperties", {}).items():
            sure, possible = self.searched(place, "patternProperties", pattern)
            doubtful = a.strings.every([possible, a.strings.other(sure)])
            node, divided = self._document.node(place, part, "patternProperties", pattern), []
            for each in regions:
                inner = meet(each.node, node)
                divided += [
                    Region(a.names_in_both(each.names, sure), inner, True),
                    Region(a.names_in_both(each.names, doubtful), inner, each.evaluated),
                    replace(each, names=a.names_in_both(each.names, a.strings.other(possible))),
                ]
            regions = [each for each in divided if each.names is not a.strings.none]
        return regions

    def _named_so(self, place: Place, shape: Object) -> Object:
        """Return the objects of a shape with the names that ``propertyNames`` allows."""
        a = self._algebra
        names = self._values(self._document.node(place, place.keywords["propertyNames"], "propertyNames")).strings
        regions = [Region(a.names_in_both(each.names, names), each.node, each.evaluated) for each in shape.regions]
        regions.append(Region(a.names_in_both(a.strings.everything, a.strings.other(names)), NOTHING))
        properties = (
            (name, node if a.contains(names, name) else NOTHING, judged) for name, node, judged in shape.properties
        )
        kept = tuple(each for each in regions if each.names is not a.strings.none)
        return replace(shape, properties=tuple(properties), regions=kept)

    def with_name(self, name: str, node: Node, *, needed: bool) -> Object:
        """Return the objects in which a property, which must be there if ``needed``, is of a node."""
        return replace(
            self._algebra.any_object,
            properties=((name, node, False),),
            required=frozenset({name} if needed else ()),
        )

    def _dependencies(self, place: Place) -> Iterator[Values]:
        """Yield what holds because of the names that are there."""
        a = self._algebra
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, needs in place.keywords.get(keyword, {}).items():
                absent = self.with_name(name, NOTHING, needed=False)
                if isinstance(needs, list):
                    present = replace(a.any_object, required=frozenset([name, *needs]))
                    yield a.but(objects=(present, absent))
                else:
                    present = self.with_name(name, ANYTHING, needed=True)
                    shapes = [  # the name is written first, unless the schema says where
                        a.both_objects(shape, present) if name in shape.names() else a.both_objects(present, shape)
                        for shape in self._values(self._document.node(place, needs, keyword, name)).objects
                    ]
                    yield a.but(objects=(*filter(a.is_possible, shapes), absent))
