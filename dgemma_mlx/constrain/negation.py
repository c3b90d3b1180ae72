"""What the keywords of a JSON schema exclude: for ``not``, ``else``, and a ``oneOf`` whose branches overlap.

A value does not belong to a schema when one keyword refuses it, so the complement of a schema is the union of what its
keywords exclude. A part that cannot be expressed is left out: the complement may be too small, never too large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import reduce
from itertools import combinations
from typing import Any

from dgemma_mlx.constrain.document import REFERENCES, Document, Place
from dgemma_mlx.constrain.keywords import Keywords, required_names
from dgemma_mlx.constrain.terms import UNBOUNDED, Term
from dgemma_mlx.constrain.texts import Numbers, Strings
from dgemma_mlx.constrain.values import ANYTHING, NOTHING, Algebra, Array, Node, Region, Values, meet
from dgemma_mlx.constrain.wellformed import is_number

_OPPOSITE = {
    "minimum": "exclusiveMaximum", "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum", "exclusiveMaximum": "minimum",
}  # fmt: skip
_MOST_PAIRED = 5  # branches of a oneOf, of which any two may hold; pairs of more are left out


class Negation:
    """The complements of schemas."""

    def __init__(
        self, document: Document, keywords: Keywords, algebra: Algebra, strings: Strings, numbers: Numbers,
        values: Callable[[Node], Values],
    ) -> None:  # fmt: skip
        """``values`` says what a node allows."""
        self._document, self._keywords, self._algebra = document, keywords, algebra
        self._strings, self._numbers, self._values = strings, numbers, values

    def excluded(self, place: Place) -> Iterator[Values]:
        """Yield sets of values, each of which one keyword excludes."""
        a = self._algebra
        if "type" in place.keywords:
            yield self._other_types(place)
        for name in ("enum", "const"):
            if name in place.keywords:
                yield self._other_constants(place, [value for value, *_ in self._keywords.constants(place, name)])
        yield from (a.only(strings=term) for term in self._strings_outside(place))
        yield from (a.only(numbers=term) for term in self._numbers_outside(place))
        yield from (a.only(arrays=(shape,)) for shape in self._arrays_outside(place))
        yield from self._objects_outside(place)
        yield from self._combined(place)

    def _node(self, place: Place, schema: Any, *steps: object) -> Node:
        return self._document.node(place, schema, *steps, negated=True)

    # --- by type

    def _other_numbers(self, numbers: Term) -> Term:
        """Return numbers that do not belong to a term."""
        terms = self._algebra.numbers
        return terms.every([self._numbers.decimals, terms.other(numbers)])

    def _other_types(self, place: Place) -> Values:
        a, known, named = self._algebra, self._keywords.types(place), self._keywords.kinds(place)
        integer_only = "integer" in named and "number" not in named
        numbers = a.all.numbers if known.numbers is a.none.numbers else a.none.numbers
        return Values(
            not known.null,
            frozenset({True, False}) - known.booleans,
            self._other_numbers(self._numbers.integers) if integer_only else numbers,
            a.none.strings if "string" in named else a.all.strings,
            () if known.arrays else a.all.arrays,
            () if known.objects else a.all.objects,
        )

    def _other_constants(self, place: Place, listed: list[Any]) -> Values:
        a = self._algebra
        nested = [value for value in listed if isinstance(value, (list, dict))]
        plain = [value for value in listed if not isinstance(value, (list, dict))]
        known = a.either(self._keywords.constant(place, value) for value in plain)
        # A number has more texts than those in which a constant is written.
        numbers = [Fraction(Decimal(str(value))) for value in plain if is_number(value)]
        same = a.numbers.either(self._numbers.within({"minimum": n, "maximum": n}, place.path) for n in numbers)
        others = a.but(
            null=not known.null,
            booleans=frozenset({True, False}) - known.booleans,
            numbers=self._other_numbers(same) if numbers else a.all.numbers,
            strings=a.strings.every([a.all.strings, a.strings.other(known.strings)]),
        )
        return reduce(a.both, (self._another(place, value) for value in nested), others)

    def _another(self, place: Place, value: list[Any] | dict[str, Any]) -> Values:
        """Return all values but an array or an object."""
        a, size = self._algebra, len(value)
        if isinstance(value, list):
            arrays = [Array(least=size + 1)] + ([Array(most=size - 1)] if value else [])
            for n, item in enumerate(value):
                arrays.append(Array((ANYTHING,) * n + (self._keywords.equal(place, item, negated=True),), least=n + 1))
            return a.but(arrays=tuple(arrays))
        objects = [replace(a.any_object, least=size + 1)]
        for name, item in value.items():
            objects.append(self._keywords.with_name(name, NOTHING, needed=False))
            other = self._keywords.equal(place, item, negated=True)
            objects.append(self._keywords.with_name(name, other, needed=True))
        return a.but(objects=tuple(objects))

    def _strings_outside(self, place: Place) -> Iterator[Term]:
        """Yield strings. What is not of a format is left out: formats are only checked by some validators."""
        words = place.keywords
        least, most = self._keywords.count(place, "minLength"), self._keywords.count(place, "maxLength")
        if least:
            yield self._strings.lengths(0, least - 1)
        if most is not None:
            yield self._strings.lengths(most + 1, UNBOUNDED)
        if "pattern" in words:
            _, possible = self._keywords.searched(place, "pattern", words["pattern"])
            yield self._algebra.strings.other(possible)

    def _numbers_outside(self, place: Place) -> Iterator[Term]:
        for name, bound in self._keywords.bounds(place).items():
            if name in _OPPOSITE:
                yield self._numbers.within({_OPPOSITE[name]: bound}, place.path)
            else:
                yield self._other_numbers(self._numbers.within({name: bound}, place.path))

    def _arrays_outside(self, place: Place) -> Iterator[Array]:
        words, count = place.keywords, self._keywords.count
        prefix = words.get("prefixItems", [])
        for n, part in enumerate(prefix):
            yield Array((ANYTHING,) * n + (self._node(place, part, "prefixItems", n),), least=n + 1)
        if "items" in words:
            other = self._node(place, words["items"], "items")
            if other == ANYTHING:
                yield Array(least=len(prefix) + 1)
            elif not prefix:
                yield Array(contains=((other, 1, UNBOUNDED),))
            else:
                yield Array((ANYTHING,) * len(prefix) + (other,), least=len(prefix) + 1)
        if least := count(place, "minItems"):
            yield Array(most=least - 1)
        if (most := count(place, "maxItems")) is not None:
            yield Array(least=most + 1)
        if "contains" in words:
            least, most = count(place, "minContains"), count(place, "maxContains")
            if least is None or least == 1:
                yield Array(items=self._node(place, words["contains"], "contains"))
            elif least:
                yield Array(contains=((self._document.node(place, words["contains"], "contains"), 0, least - 1),))
            if most is not None:
                some = self._document.node(place, words["contains"], "contains")
                yield Array(contains=((some, most + 1, UNBOUNDED),))

    def _objects_outside(self, place: Place) -> Iterator[Values]:
        a, words, keywords = self._algebra, place.keywords, self._keywords
        objects = []
        for name, part in words.get("properties", {}).items():
            objects.append(keywords.with_name(name, self._node(place, part, "properties", name), needed=True))
        objects += [keywords.with_name(name, NOTHING, needed=False) for name in required_names(place)]
        if least := keywords.count(place, "minProperties"):
            objects.append(replace(a.any_object, most=least - 1))
        if (most := keywords.count(place, "maxProperties")) is not None:
            objects.append(replace(a.any_object, least=most + 1))
        for names, other in self._members_outside(place):
            if other != NOTHING and a.strings.least(names) < UNBOUNDED:
                objects.append(replace(a.any_object, some=(Region(names, other),)))
        for name, needs in words.get("dependentRequired", {}).items():
            for needed in needs:
                with_it = keywords.with_name(name, ANYTHING, needed=True)
                objects.append(a.both_objects(with_it, keywords.with_name(needed, NOTHING, needed=False)))
        yield a.only(objects=tuple(filter(a.is_possible, objects)))
        for name, part in words.get("dependentSchemas", {}).items():
            present = a.only(objects=(keywords.with_name(name, ANYTHING, needed=True),))
            yield a.both(present, self._values(self._node(place, part, "dependentSchemas", name)))

    def _members_outside(self, place: Place) -> Iterator[tuple[Term, Node]]:
        """Yield names and values that no property may have, by the keywords that judge properties without a name."""
        words, terms = place.keywords, self._algebra.strings
        rest = terms.other(terms.either(map(self._strings.text, words.get("properties", {}))))
        for pattern, part in words.get("patternProperties", {}).items():
            sure, possible = self._keywords.searched(place, "patternProperties", pattern)
            yield sure, self._node(place, part, "patternProperties", pattern)
            rest = terms.every([rest, terms.other(possible)])
        if "additionalProperties" in words:
            other = self._node(place, words["additionalProperties"], "additionalProperties")
            yield rest, other
        if "propertyNames" in words:
            names = self._values(self._node(place, words["propertyNames"], "propertyNames")).strings
            yield names, ANYTHING

    # --- combinations

    def _combined(self, place: Place) -> Iterator[Values]:
        words, node, values = place.keywords, self._document.node, self._values
        for name in ("anyOf", "oneOf"):
            if name in words:
                yield values(reduce(meet, (self._node(place, part, name, n) for n, part in enumerate(words[name]))))
        if len(words.get("oneOf", ())) <= _MOST_PAIRED:
            nodes = [node(place, part, "oneOf", n) for n, part in enumerate(words.get("oneOf", ()))]
            yield from (values(meet(one, other)) for one, other in combinations(nodes, 2))
        for n, part in enumerate(words.get("allOf", ())):
            yield values(self._node(place, part, "allOf", n))
        if "not" in words:
            yield values(node(place, words["not"], "not"))
        for name in REFERENCES:
            if name in words:
                yield values(self._node(place, self._document.target(place, name), name))
        if "if" in words:
            then, other = words.get("then", True), words.get("else", True)
            yield values(meet(node(place, words["if"], "if"), self._node(place, then, "then")))
            yield values(meet(self._node(place, words["if"], "if"), self._node(place, other, "else")))
