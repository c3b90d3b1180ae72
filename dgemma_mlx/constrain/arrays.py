"""The texts of a shape of arrays."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import islice, product
from typing import NamedTuple

from dgemma_mlx.constrain.context import Context
from dgemma_mlx.constrain.distinct import DistinctItems, Item, Key, Mark, is_apart
from dgemma_mlx.constrain.terms import UNBOUNDED, Term
from dgemma_mlx.constrain.values import ANYTHING, NOTHING, Array, Node

MOST_IN_ANY_ORDER = 4  # so many ``contains`` may be fitted in any order
MOST_WAYS = 100  # for an item to fit them


class State(NamedTuple):
    """What matters of the items so far.

    Attributes:
        place: Their number, as far as it makes a difference.
        counts: For each ``contains``, the number of items that were written to fit it, as far as it matters.
        used: The marks of the items, where they must be different.
    """

    place: int
    counts: tuple[int, ...]
    used: frozenset[Mark] = frozenset()


class ArrayTexts:
    """The texts of one shape of arrays.

    Attributes:
        term: The texts.
    """

    def __init__(self, context: Context, shape: Array) -> None:
        """Write the arrays of a shape."""
        self._context, self._shape = context, shape
        self._distinct = DistinctItems(context, (*shape.prefix, shape.items)) if shape.unique else None
        terms, start = context.spelling.terms, State(0, (0,) * len(shape.contains))
        self.term = terms.sequence(context.spelling.array[0], self._after(start))

    def _after(self, state: State) -> Term:
        """Return what may follow some items."""
        shape, terms = self._shape, self._context.spelling.terms
        if state.place >= max(len(shape.prefix), 1) and not shape.unique and not shape.contains:
            return self._alike(state.place)

        end, comma = self._end(state), (self._context.spelling.comma,) if state.place else ()

        def body() -> Term:
            following = (terms.sequence(*comma, item, self._after(then)) for item, then in self._next(state))
            return terms.either([end, *following])

        def lightest() -> Term:
            if end is not terms.none:
                return end
            following = self._next(state, lightest=True)
            return terms.either(terms.sequence(*comma, item, self._after(then)) for item, then in following)

        return self._context.rules.rule((self, state), body, lightest, self._at_least(state))

    def _at_least(self, state: State) -> int:
        """Return a weight of which nothing that follows is lighter: of the items that are missing, and of the end."""
        wanted = (least - count for count, (_, least, _) in zip(state.counts, self._shape.contains, strict=True))
        missing = max(self._shape.least - state.place, *wanted, 0)
        return 1 + 2 * missing - (missing > 0 and state.place == 0)  # an item and its comma

    def _alike(self, place: int) -> Term:
        """Return what may follow ``place`` items when all that follow are alike."""
        shape, spelling = self._shape, self._context.spelling
        more = spelling.terms.sequence(spelling.comma, self._context.value(shape.items))
        most = shape.most if shape.most >= UNBOUNDED else shape.most - place
        if most < 0:
            return spelling.terms.none
        rest = spelling.terms.repeat(more, max(shape.least - place, 0), most)
        return spelling.terms.sequence(rest, spelling.array[1])

    def _end(self, state: State) -> Term:
        """Return the end of the array; ``none`` where it may not end."""
        enough = all(count >= least for count, (_, least, _) in zip(state.counts, self._shape.contains, strict=True))
        may_end = enough and state.place >= self._shape.least
        return self._context.spelling.array[1] if may_end else self._context.spelling.terms.none

    def _next(self, state: State, *, lightest: bool = False) -> Iterator[tuple[Term, State]]:
        """Yield what the next item may be, and the state after it.

        ``lightest`` leaves out items of which another one is as good where the whole array is to be light.
        """
        shape = self._shape
        if state.place >= shape.most:
            return
        alike = state.place >= len(shape.prefix) and not shape.contains
        place = state.place + 1
        if shape.most >= UNBOUNDED:
            place = min(place, max(len(shape.prefix), shape.least, 1))
        for node, counts in self._claims(shape.item(state.place), state.counts):
            if self._distinct is None:
                yield self._context.value(node), State(place, counts)
                continue
            for item in self._different(node, state, lightest=lightest and alike):
                yield item.term, State(place, counts, state.used | {item.mark})

    def _different(self, node: Node, state: State, *, lightest: bool) -> list[Item]:
        """Return the values of a node that none of the items so far has; ``lightest``: of each group, the best one."""
        assert self._distinct is not None
        used: dict[str, list[Key]] = {}
        for kind, key in state.used:
            used.setdefault(kind, []).append(key)
        items = [item for item in self._distinct.divided(node) if is_apart(item.mark[1], used.get(item.mark[0], ()))]
        if not lightest:
            return items
        best: dict[Hashable, Item] = {}
        for item in items:
            if item.group not in best or item.weight < best[item.group].weight:
                best[item.group] = item
        return list(best.values())

    def _claims(self, item: Node, counts: tuple[int, ...]) -> Iterator[tuple[Node, tuple[int, ...]]]:
        """Yield what an item may be, and how often each ``contains`` is fitted then.

        An item that is not counted may fit all the same, except where the number is limited: then it must not. Where
        there are many, they are fitted in their order, and of many ways to fit, the first ones are taken. Items that
        must be different begin with those that are counted.
        """
        choices: list[list[tuple[Node, int]]] = []
        is_open = False
        for count, (node, least, most) in zip(counts, self._shape.contains, strict=True):
            if most < UNBOUNDED:
                outside = [frozenset({literal ^ 1}) for literal in node] if node != NOTHING else [ANYTHING]
                choices.append([(each, count) for each in outside])
                if count < most:
                    choices[-1].append((node, count + 1))
                continue
            choices.append([(ANYTHING, count)])
            if count < least and not (is_open and len(counts) > MOST_IN_ANY_ORDER):
                choices[-1].append((node, count + 1))
                is_open = True
        ways: Iterator[tuple[tuple[Node, int], ...]] = islice(product(*choices), MOST_WAYS)
        if self._shape.unique:
            missing = (n for n, (_, least, _) in enumerate(self._shape.contains) if counts[n] < least)
            first = next(missing, None)
            ways = (chosen for chosen in ways if first is None or chosen[first][1] > counts[first])
        for chosen in ways:
            yield item.union(*(node for node, _ in chosen)), tuple(count for _, count in chosen)
