"""The texts of a shape of objects: named properties in their order, then others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations, islice, product

from dgemma_mlx.constrain.context import Context
from dgemma_mlx.constrain.distinct import Key, is_apart, keyed
from dgemma_mlx.constrain.terms import UNBOUNDED, Term
from dgemma_mlx.constrain.values import NOTHING, Algebra, Node, Object, Region

MOST_WAYS = 100  # of named properties to meet the demands of a shape
MOST_IN_ANY_ORDER = 4  # so many demands may be met in any order


class ObjectTexts:
    """The texts of one shape of objects.

    Named properties stand in the order of the schema, and optional ones may be left out. Required names that the
    schema does not describe follow, then properties with names that are none of these.

    Attributes:
        term: The texts.
    """

    def __init__(self, context: Context, shape: Object, narrowed: tuple[str, Term] | None = None) -> None:
        """Write the objects of a shape.

        ``narrowed`` is the name of a property, and the strings that it may be.
        """
        self._context, self._shape, self._narrowed = context, shape, narrowed
        names = {name: node for name, (node, _) in shape.names().items()}
        names |= {name: context.algebra.applied(shape, name)[0] for name in sorted(shape.required - set(names))}
        self._named = [(name, node) for name, node in names.items() if node != NOTHING]
        if context.spelling.sorts_names:
            self._named.sort(key=lambda pair: pair[0].lower())
        self._free = self._other_names(list(names))
        possible = all(names[name] != NOTHING for name in shape.required)
        terms = context.spelling.terms
        self.term = terms.sequence(context.spelling.object[0], self._after(0, 0)) if possible else terms.none

    def _other_names(self, names: list[str]) -> list[tuple[Term, Node]]:
        """Return the sets of names that are not among ``names``, and what their values must be."""
        strings = self._context.strings
        others = strings.terms.other(strings.terms.either(map(strings.text, names)))
        found = [(strings.terms.every([region.names, others]), region.node) for region in self._shape.regions]
        return [(term, node) for term, node in found if node != NOTHING and strings.terms.least(term) < UNBOUNDED]

    def _after(self, place: int, count: int) -> Term:
        """Return what may follow when ``count`` of the first ``place`` named properties are written.

        Counts that make no difference are the same: they lead to one rule.
        """
        terms, shape = self._context.spelling.terms, self._shape
        if shape.most >= UNBOUNDED:
            count = min(count, max(shape.least, 1))
        last = len(self._named) - 1
        required = next((n for n in range(place, last + 1) if self._named[n][0] in shape.required), None)

        def body() -> Term:
            stop = last if required is None else required
            options = [self._named_member(n, count) for n in range(place, stop + 1)] if count < shape.most else []
            return terms.either([*options, self._others(count)] if required is None else options)

        def lightest() -> Term:
            return self._others(count) if required is None else self._named_member(required, count)

        counted = shape.least > len(shape.required) or shape.most < len(shape.required)
        return self._context.rules.rule((self, place, count), body, None if counted else lightest)

    def _named_member(self, place: int, count: int) -> Term:
        """Return the texts of a named property and of what follows it."""
        context, (name, node) = self._context, self._named[place]
        if self._narrowed and self._narrowed[0] == name:
            strings = context.strings.terms.every([context.values(node).strings, self._narrowed[1]])
            value = context.spelling.string(strings)
        else:
            value = context.value(node)
        return self._member(context.spelling.name(name), value, count, self._after(place + 1, count + 1))

    def _other_member(self, names: Term, value: Term, count: int, after: Term) -> Term:
        """Return the texts of a property of one of several names, as ``_member`` does."""
        return self._member(self._context.spelling.names(names), value, count, after)

    def _member(self, name: Term, value: Term, count: int, after: Term) -> Term:
        """Return the texts of a property that follows ``count`` others, and of what follows it."""
        spelling = self._context.spelling
        comma = (spelling.comma,) if count else ()
        return spelling.terms.sequence(*comma, name, spelling.colon, value, after)

    def _others(self, count: int) -> Term:
        """Return what may follow when ``count`` properties are written, and no named ones follow."""
        if self._shape.least - count > 1:
            return self._distinct(count, frozenset())
        return self._with_demands(count) if self._shape.some else self._alike(count)

    def _alike(self, count: int) -> Term:
        """Return what may follow where neither the number of names nor any of them matters."""
        context, shape = self._context, self._shape
        terms = context.spelling.terms
        more = terms.either(
            self._other_member(names, context.value(node), 1, terms.empty) for names, node in self._free
        )
        if count:
            left = shape.most if shape.most >= UNBOUNDED else shape.most - count
            return terms.sequence(terms.repeat(more, max(shape.least - count, 0), left), context.spelling.object[1])
        left = shape.most if shape.most >= UNBOUNDED else shape.most - 1
        first = [
            self._other_member(names, context.value(node), 0, terms.repeat(more, 0, left)) for names, node in self._free
        ]
        options = [terms.empty] if shape.least == 0 else []
        return terms.sequence(terms.either([*options, *(first if shape.most else [])]), context.spelling.object[1])

    def _distinct(self, count: int, used: frozenset[Key]) -> Term:
        """Return what follows where the number of names matters: names that are different from each other.

        ``used`` are the keys of the names so far.
        """
        context, terms = self._context, self._context.spelling.terms
        if self._shape.least <= count:
            return self._others(count)
        if count >= self._shape.most:
            return terms.none

        def members() -> Iterator[tuple[Term, Term]]:
            for free, node in self._free:
                for key, names in keyed(context.strings.terms, free, 1):
                    if is_apart(key, used):
                        name, after = context.spelling.names(names), self._distinct(count + 1, used | {key})
                        yield name, self._member(name, context.value(node), count, after)

        def lightest() -> Term:  # where all values are alike, the lightest names make the lightest object
            return min(members(), key=lambda member: terms.least(member[0]), default=(terms.none, terms.none))[1]

        alike = len(self._free) == 1
        return context.rules.rule(
            (self, count, used), lambda: terms.either(text for _, text in members()), lightest if alike else None
        )

    def _with_demands(self, count: int) -> Term:
        """Return any properties, and then those that the shape demands: of equal names, the last one counts."""
        context, shape = self._context, self._shape
        demanded = self._demanded(count, shape.some, frozenset())
        if shape.most < UNBOUNDED:
            return demanded

        def body() -> Term:
            rest = self._with_demands(1)
            others = (self._other_member(names, context.value(node), count, rest) for names, node in self._free)
            return context.spelling.terms.either([demanded, *others])

        return context.rules.rule((self, min(count, 1), "others"), body, lambda: demanded)

    def _demanded(self, count: int, demands: tuple[Region, ...], used: frozenset[Key]) -> Term:
        """Return properties with different names that meet the demands; one property may meet several."""
        context = self._context
        strings, spelling = context.strings.terms, context.spelling
        if not demands:
            return spelling.object[1]
        if count >= self._shape.most:
            return spelling.terms.none

        def body() -> Term:
            options = []
            for met in _subsets(demands):
                left = tuple(each for each in demands if each not in met)
                for free, node in self._free:
                    names = strings.every([free, *(each.names for each in met)])
                    value = context.value(node.union(*(each.node for each in met)))
                    options += [
                        self._other_member(some, value, count, self._demanded(count + 1, left, used | {key}))
                        for key, some in keyed(strings, names, 1)
                        if is_apart(key, used)
                    ]
            return spelling.terms.either(options)

        return context.rules.rule((self, count, demands, used), body, at_least=4 + (count > 0))  # `,a:0}`


def _subsets(demands: tuple[Region, ...]) -> Iterator[tuple[Region, ...]]:
    """Yield the demands that one property may meet; of many demands, the first one or all."""
    if len(demands) > MOST_IN_ANY_ORDER:
        return iter([demands[:1], demands])
    return chain.from_iterable(combinations(demands, size + 1) for size in range(len(demands)))


def with_demands_at_names(shape: Object, algebra: Algebra) -> Iterator[Object]:
    """Yield shapes in which named properties meet some of the demands, or none; of very many, the first ones."""
    named = {name: node for name, (node, _) in shape.names().items()}
    named |= {name: algebra.applied(shape, name)[0] for name in sorted(shape.required - set(named))}
    fitting = [[None, *(name for name in named if algebra.contains(each.names, name))] for each in shape.some]
    for chosen in islice(product(*fitting), MOST_WAYS):
        nodes = dict(named)
        for name, demand in zip(chosen, shape.some, strict=True):
            if name is not None:
                nodes[name] |= demand.node
        left = tuple(each for name, each in zip(chosen, shape.some, strict=True) if name is None)
        required = shape.required.union(name for name in chosen if name is not None)
        properties = tuple((name, node, True) for name, node in nodes.items())
        yield replace(shape, properties=properties, required=required, some=left)
