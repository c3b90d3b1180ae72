"""Deterministic automata from nondeterministic ones, by the subset construction, with a bound on the work."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.expression import BEGIN, END, NOTHING, Expression
from dgemma_mlx.constrain.limits import TooLargeError, check_time

_MOST_WORK = 1_500_000  # moves of single nodes, in all states together
_MUCH_WORK = f"its states take more than {_MOST_WORK:,} moves to build"
_ACCEPT = -1  # in a set of moves: the text may end here


class _Nodes:
    """The nodes that are reached without a character, computed once for each node."""

    def __init__(self, expression: Expression) -> None:
        self._expression = expression
        self._reached: dict[int, frozenset[int]] = {}
        self.work = 0

    def reached(self, node: int, at_start: bool = False) -> frozenset[int]:
        """Return the nodes with an atom that follow ``node``, and ``_ACCEPT`` where the text may end there."""
        if node in self._reached and not at_start:
            return self._reached[node]
        atom, following = self._expression.atom, self._expression.following
        found: set[int] = set()
        seen = {(node, False)}
        waiting = [(node, False)]  # a node, and whether the text must end there
        while waiting:
            place, ends = waiting.pop()
            if atom[place] >= 0:
                if not ends:
                    found.add(place)
                continue
            if place == self._expression.exit:
                found.add(_ACCEPT)
            nexts = following[place]
            if atom[place] == END or (atom[place] == BEGIN and at_start):
                nexts, ends = [place + 1], ends or atom[place] == END
            elif atom[place] != NOTHING:
                continue
            for to in nexts:
                if (to, ends) not in seen:
                    seen.add((to, ends))
                    waiting.append((to, ends))
        self.work += len(seen)
        check_time()
        if self.work > _MOST_WORK:
            raise TooLargeError(_MUCH_WORK)
        result = frozenset(found)
        if not at_start:
            self._reached[node] = result
        return result


def determine(expression: Expression, most_states: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Return the table (Q, 256) of a deterministic automaton, -1 where no text goes on, and which states accept (Q,).

    State 0 is the first; the others are in the order in which they are found, by the bytes that lead to them. Raises
    ``TooLargeError`` when there are more than ``most_states`` states, or when finding them takes too much work.
    """
    nodes = _Nodes(expression)
    byte_class, moves = _moves(expression)
    width = max((len(states) for states in expression.atoms), default=1)
    # A set has elements node * width + state of the node's atom, and _ACCEPT.
    scaled: dict[int, frozenset[int]] = {}

    def after(node: int) -> frozenset[int]:
        if node not in scaled:
            scaled[node] = frozenset(to * width if to >= 0 else to for to in nodes.reached(node))
        return scaled[node]

    first = frozenset(to * width if to >= 0 else to for to in nodes.reached(expression.entry, at_start=True))
    numbers = {first: 0}
    waiting = [first]
    rows: list[list[int]] = []
    classes, work = int(byte_class.max()) + 1, 0
    for current in waiting:  # grows
        parts: list[list[int]] = [[] for _ in range(classes)]
        for element in current:
            if element >= 0:
                node, state = divmod(element, width)
                step = moves[expression.atom[node]][state]
                work += len(step)
                for number, to in step:
                    parts[number].append(node * width + to if to >= 0 else ~node)
        targets: dict[tuple[int, ...], int] = {(): -1}
        row = []
        for part in parts:
            key = tuple(part)
            if key not in targets:
                sets = [after(~to + 1) if to < 0 else frozenset((to,)) for to in key]
                together = sets[0] if len(sets) == 1 else frozenset().union(*sets)
                work += len(together)
                if together not in numbers:
                    numbers[together] = len(numbers)
                    waiting.append(together)
                targets[key] = numbers[together]
            row.append(targets[key])
        rows.append(row)
        check_time()
        if len(numbers) > most_states:
            raise TooLargeError(f"it needs more than {most_states:,} states")
        if work > _MOST_WORK:
            raise TooLargeError(_MUCH_WORK)
    table = np.array(rows, np.int32)[:, byte_class]
    return table, np.array([_ACCEPT in state for state in waiting])


def equal_columns(table: NDArray[np.int32]) -> tuple[list[int], NDArray[np.intp]]:
    """Return the first of each set of equal columns, and the index in that list of what each column (n,) equals.

    ``np.unique`` with an axis does the same, but reports a Ctrl-C as a ``TypeError``.
    """
    first: dict[bytes, int] = {}
    equal = [first.setdefault(column.tobytes(), number) for number, column in enumerate(table.T)]
    return list(first.values()), np.searchsorted(list(first.values()), equal)


def _moves(expression: Expression) -> tuple[NDArray[np.intp], list[list[list[tuple[int, int]]]]]:
    """Return the class (256,) of each byte, and the moves of each state of each atom, as pairs (class, state).

    Bytes are in one class when all atoms treat them alike.
    """
    flat = [row for states in expression.atoms for row in states]
    columns = np.full((len(flat) + 1, 256), -2, np.int32)
    for number, row in enumerate(flat):
        columns[number, list(row)] = list(row.values())
    first, byte_class = equal_columns(columns)
    picked = columns[:-1, first]
    moves = [
        [(int(number), int(row[number])) for number in np.flatnonzero(row != -2)] for row in picked
    ]
    sizes = iter(moves)
    return byte_class, [[next(sizes) for _ in states] for states in expression.atoms]
