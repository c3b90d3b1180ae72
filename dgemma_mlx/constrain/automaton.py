"""Deterministic automata over UTF-8 bytes, from machines of few states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.limits import TooLargeError, check_time
from dgemma_mlx.constrain.machine import BYTES, Machine
from dgemma_mlx.constrain.terms import Term

DEAD = -1  # the state after a byte that no accepted text continues with


def equal_columns(table: NDArray[np.int32]) -> tuple[list[int], NDArray[np.intp]]:
    """Return the first of each set of equal columns, and the index in that list of what each column (n,) equals.

    ``np.unique`` with an axis does the same, but reports a Ctrl-C as a ``TypeError``.
    """
    first: dict[bytes, int] = {}
    equal = [first.setdefault(column.tobytes(), number) for number, column in enumerate(table.T)]
    return list(first.values()), np.searchsorted(list(first.values()), equal)


@dataclass(frozen=True)
class Automaton:
    """A deterministic automaton over bytes with Q states.

    State 0 is the start. Every state can be reached from the start, and an accepting state can be reached from every
    state.

    Attributes:
        table: (Q, 256) int32. The next state for each state and byte, or ``DEAD``.
        accepting: (Q,) bool. Whether a text may end in the state.

    Equal constraints share one automaton, so the arrays are read-only.
    """

    table: NDArray[np.int32]
    accepting: NDArray[np.bool_]

    def __post_init__(self) -> None:
        self.table.flags.writeable = self.accepting.flags.writeable = False

    @property
    def size(self) -> int:
        """The number of states, Q."""
        return len(self.accepting)

    def after(self, state: int, text: bytes) -> int:
        """Return the state that ``text`` leads to from ``state``, or ``DEAD``."""
        for byte in text:
            if state == DEAD:
                break
            state = int(self.table[state, byte])
        return state

    def matches(self, text: bytes) -> bool:
        """Return whether the automaton accepts the text."""
        state = self.after(0, text)
        return state != DEAD and bool(self.accepting[state])

    def completions(self, most: int | None = None) -> list[bytes]:
        """Return, for each state, the shortest text that leads from it to an accepting state, or its first bytes.

        Of several shortest texts it is the first in byte order. The list has Q entries of at most ``most`` bytes; those
        of accepting states are b"".
        """
        distance = np.append(distances(self.table, self.accepting), self.size)
        texts = [b""] * self.size
        for state in np.argsort(distance[:-1], kind="stable").tolist():
            check_time()
            if distance[state]:
                byte = int(distance[self.table[state]].argmin())
                texts[state] = (bytes([byte]) + texts[int(self.table[state, byte])])[:most]
        return texts


def automaton_of(machine: Machine, most: int) -> tuple[Automaton, dict[Term, int]]:
    """Return all states of a machine without control tokens as one automaton, minimized, and the number of each state.

    Raises ``TooLargeError`` when it has more than ``most`` states.
    """
    states = machine.explore(most)
    if states is None:
        raise TooLargeError(f"it needs more than {most:,} states")
    numbers = {state: number for number, state in enumerate(states)}
    table = np.empty((len(states), BYTES), np.int32)
    for number, state in enumerate(states):
        row = machine.row(state)
        table[number] = np.array([*(numbers[after] for after in row.states), DEAD], np.int32)[row.place]
    accepting = np.array([state.nullable for state in states])
    automaton, classes = _minimized(table, accepting)
    return automaton, dict(zip(states, classes.tolist(), strict=True))


def distances(table: NDArray[np.int32], accepting: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the number of bytes (Q,) from each state to the next accepting state, or -1 where there is none.

    ``table`` is (Q, 256) and ``accepting`` (Q,).
    """
    source, byte = (table != DEAD).nonzero()
    return steps_to(source, table[source, byte], accepting)


def steps_to(source: NDArray[np.intp], target: NDArray[Any], goal: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return the number of edges (n,) from each node to the next node of the ``goal`` (n,), or -1 where there is none.

    Edges (E,) lead from ``source`` to ``target``. Each edge is visited once.
    """
    order = target.argsort(kind="stable")
    sources = source[order]
    first = target[order].searchsorted(np.arange(len(goal) + 1))
    found = np.where(goal, 0, -1).astype(np.int32)
    level, distance = goal.nonzero()[0], 0
    while len(level):
        check_time()
        distance += 1
        parts = [sources[first[node] : first[node + 1]] for node in level.tolist()]
        before = np.unique(np.concatenate(parts))
        level = before[found[before] < 0]
        found[level] = distance
    return found


def _minimized(
    table: NDArray[np.int32], accepting: NDArray[np.bool_]
) -> tuple[Automaton, NDArray[np.intp]]:
    """Merge equivalent states by Moore's algorithm. Return the automaton, and the new number of each state (Q,).

    The states are divided into classes. Each pass splits a class whose states lead to different classes, until no pass
    splits any.
    """
    columns = table[:, equal_columns(table)[0]]  # bytes with the same column have the same effect in every state
    classes, count = accepting.astype(np.int64), len(np.unique(accepting))
    factors = np.random.default_rng(0).integers(0, 1 << 62, columns.shape[1] + 1) * 2 + 1
    while True:
        check_time()
        rows = np.concatenate([classes[:, None], np.append(classes, DEAD)[columns]], axis=1)
        # A pass compares sums in place of whole rows, modulo 2^64; the last pass compares the rows as well.
        firsts, classes = np.unique(rows @ factors, return_index=True, return_inverse=True)[1:]
        if len(firsts) == count:
            break
        count = len(firsts)
    if (rows != rows[firsts[classes]]).any():
        return Automaton(table, accepting), np.arange(len(table))
    order = np.argsort(firsts)  # number the classes by their first states, so that the start stays 0
    numbers = np.append(np.argsort(order), DEAD).astype(np.int32)
    states = firsts[order]
    automaton = Automaton(numbers[np.append(classes, DEAD)[table[states]]], accepting[states])
    return automaton, numbers[classes].astype(np.intp)
