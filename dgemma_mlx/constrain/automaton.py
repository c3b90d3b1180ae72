"""A deterministic automaton over UTF-8 bytes, made from a regular expression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.regex import weight
from dgemma_mlx.errors import DgemmaError

MAX_STATES = 20_000
MAX_MINIMIZED = 2_500
DEAD = -1
_FRONT = "X"
_HEAVIEST = 50_000
_SMALLER = "Make repetitions and lengths smaller."


@dataclass(frozen=True)
class Automaton:
    """Every state can be reached from the first one, 0, and leads to an accepting one."""

    table: NDArray[np.int32]
    """(Q, 256): the state after a byte, or ``DEAD``"""
    accepting: NDArray[np.bool_]
    """(Q,)"""

    @property
    def size(self) -> int:
        return len(self.accepting)

    def after(self, state: int, text: bytes) -> int:
        """The state that the bytes lead to, or ``DEAD``."""
        for byte in text:
            if state == DEAD:
                break
            state = int(self.table[state, byte])
        return state

    def matches(self, text: bytes) -> bool:
        state = self.after(0, text)
        return state != DEAD and bool(self.accepting[state])

    def completions(self) -> list[bytes]:
        """For each state the shortest text that leads to an accepting one; of several, that of the smallest bytes."""
        distance = np.where(self.accepting, 0, self.size)
        targets = np.where(self.table == DEAD, self.size, self.table)
        while True:
            shorter = np.minimum(distance, np.append(distance, self.size)[targets].min(axis=1) + 1)
            if (shorter == distance).all():
                break
            distance = shorter
        best = np.append(distance, self.size)[targets].argmin(axis=1)
        texts = [b""] * self.size
        for state in np.argsort(distance, kind="stable").tolist():
            if distance[state]:
                byte = int(best[state])
                texts[state] = bytes([byte]) + texts[int(self.table[state, byte])]
        return texts


@lru_cache(maxsize=8)
def automaton_of(regex: str, what: str) -> Automaton:
    """Compiles a regular expression (the syntax of Rust's ``regex``) that has to match the whole text.

    Raises ``DgemmaError`` (exit code 2), which calls it ``what``: where it is malformed, too large, or matches nothing.
    """
    from outlines_core import Index, Vocabulary

    if weight(regex) > _HEAVIEST:
        raise DgemmaError(f"{what} is too large", _SMALLER, exit_code=2)
    try:
        # outlines-core looks for the leftmost match, and of a|ab would take a alone: with \z it takes all. It cannot
        # have an empty text match \z, so there is a character in front (which also spares it seconds where a string
        # of bounded length follows a quote).
        index = Index(f"{_FRONT}(?:{regex})\\z", Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    except ValueError as error:
        reason = " ".join(str(error).split())
        if "incompatible" in reason:
            raise DgemmaError(f"{what} has a part that no text matches", exit_code=2) from None
        raise DgemmaError(
            f"{what} cannot be compiled: {reason}",
            "The syntax is that of Rust's regex; there are no look-arounds, back references or word boundaries.", 2,
        ) from None
    transitions = index.get_transitions()
    if len(transitions) > MAX_STATES:
        raise DgemmaError(
            f"{what} is too large: {len(transitions):,} states, {MAX_STATES:,} at most", _SMALLER, exit_code=2
        )
    front = transitions.get(index.get_initial_state(), {})
    if front.keys() - {256, ord(_FRONT)}:
        raise DgemmaError(f"{what} cannot be compiled: parentheses are not balanced", exit_code=2)
    table, accepting = _trimmed(*_dense(transitions, front.get(ord(_FRONT), -1), index.get_final_states()))
    if not len(accepting):
        raise DgemmaError(f"{what} matches no text at all", exit_code=2)
    # Long chains (a string of up to 1,000 characters) take a round for each state, and there is little to gain.
    return _minimal(table, accepting) if len(accepting) <= MAX_MINIMIZED else Automaton(table, accepting)


def _dense(
    transitions: Mapping[int, Mapping[int, int]], first: int, final: set[int]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The states that can be reached from the first one, which becomes 0: a table and which are final."""
    numbers = {first: 0}
    table = np.full((len(transitions) + len(final) + 1, 256), DEAD, np.int32)
    waiting = [first]
    while waiting:
        state = waiting.pop()
        for byte, to in transitions.get(state, {}).items():
            if byte < 256 and (to in transitions or to in final):
                if to not in numbers:
                    numbers[to] = len(numbers)
                    waiting.append(to)
                table[numbers[state], byte] = numbers[to]
    accepting = np.zeros(len(numbers), np.bool_)
    accepting[[numbers[state] for state in final if state in numbers]] = True
    return table[: len(numbers)], accepting


def _trimmed(
    table: NDArray[np.int32], accepting: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Without the states that lead to no accepting one; empty where the first is among them."""
    useful = accepting.copy()
    while True:
        more = useful | np.append(useful, False)[table].any(axis=1)  # DEAD, -1, is the one appended
        if (more == useful).all():
            break
        useful = more
    if not useful[0]:
        return table[:0], accepting[:0]
    numbers = np.append(np.where(useful, np.cumsum(useful) - 1, DEAD), DEAD).astype(np.int32)
    return numbers[table[useful]], accepting[useful]


def _minimal(table: NDArray[np.int32], accepting: NDArray[np.bool_]) -> Automaton:
    """Moore's algorithm: states are split until those of a class go to the same classes."""
    columns = np.unique(table, axis=1)  # bytes that do the same everywhere are one
    classes, count = accepting.astype(np.int64), len(np.unique(accepting))
    while True:
        rows = np.concatenate([classes[:, None], np.append(classes, DEAD)[columns]], axis=1)
        firsts, split = np.unique(rows, axis=0, return_index=True, return_inverse=True)[1:]
        classes = split.reshape(-1)
        if len(firsts) == count:
            break
        count = len(firsts)
    order = np.argsort(firsts)  # a class is numbered by its first state, so that the first state stays 0
    numbers = np.append(np.argsort(order), DEAD).astype(np.int32)
    states = firsts[order]
    return Automaton(numbers[np.append(classes, DEAD)[table[states]]], accepting[states])
