"""Deterministic automata over UTF-8 bytes, compiled from regular expressions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.determine import determine, equal_columns
from dgemma_mlx.constrain.expression import Expression
from dgemma_mlx.constrain.limits import check_time, compiling
from dgemma_mlx.errors import DgemmaError

MAX_STATES = 20_000
MAX_MINIMIZED = 2_500  # automata with more states are not minimized
DEAD = -1  # the state after a byte that no accepted text continues with


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


@lru_cache(maxsize=8)
def automaton_of(regex: str, label: str) -> Automaton:
    """Compile a regular expression, which must match the whole text, into an automaton.

    The syntax is that of Rust's ``regex`` crate. Raises ``DgemmaError`` (exit code 2) when the expression is malformed,
    has more than ``MAX_STATES`` states, or matches no text. ``label`` names the expression in the message.

    ``dgemma_mlx.constrain.limits`` describes the bounds.
    """
    with compiling(label):
        return _compiled(regex, label)


def _compiled(regex: str, label: str) -> Automaton:
    """Do the work of ``automaton_of``."""
    try:
        table, accepting = _trim(*determine(Expression(regex), MAX_STATES))
    except ValueError as error:
        raise DgemmaError(
            f"{label} cannot be compiled: {error}",
            "Use the syntax of Rust's regex crate, without look-arounds, back references and word boundaries.", 2,
        ) from None
    if not len(accepting):
        raise DgemmaError(f"{label} matches no text at all", "Loosen the constraint.", exit_code=2)
    # Minimization takes one pass per state of a long chain (a string of up to 1,000 characters) and gains little there.
    return _minimize(table, accepting) if len(accepting) <= MAX_MINIMIZED else Automaton(table, accepting)


def _trim(
    table: NDArray[np.int32], accepting: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Remove the states from which no accepting state can be reached.

    Return the smaller table and accepting states. Both are empty when the start itself is removed.
    """
    useful = distances(table, accepting) >= 0
    if not useful[0]:
        return table[:0], accepting[:0]
    numbers = np.append(np.where(useful, np.cumsum(useful) - 1, DEAD), DEAD).astype(np.int32)
    return numbers[table[useful]], accepting[useful]


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


def _minimize(table: NDArray[np.int32], accepting: NDArray[np.bool_]) -> Automaton:
    """Merge equivalent states by Moore's algorithm.

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
        return Automaton(table, accepting)
    order = np.argsort(firsts)  # number the classes by their first states, so that the start stays 0
    numbers = np.append(np.argsort(order), DEAD).astype(np.int32)
    states = firsts[order]
    return Automaton(numbers[np.append(classes, DEAD)[table[states]]], accepting[states])
