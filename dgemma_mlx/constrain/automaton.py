"""Deterministic automata over UTF-8 bytes, compiled from regular expressions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.regex import estimated_states
from dgemma_mlx.errors import DgemmaError

MAX_STATES = 20_000
MAX_MINIMIZED = 2_500  # automata with more states are not minimized
DEAD = -1  # the state after a byte that no accepted text continues with
_START = "X"  # an arbitrary character that precedes every text during compilation
_MAX_ESTIMATED_STATES = 50_000
_TOO_LARGE_HINT = "Use smaller repetitions and shorter lengths."


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

    def completions(self) -> list[bytes]:
        """Return, for each state, the shortest text that leads from it to an accepting state.

        Of several shortest texts it is the first in byte order. The list has Q entries; those of accepting states are
        b"".
        """
        distance = np.where(self.accepting, 0, self.size)
        targets = np.where(self.table == DEAD, self.size, self.table)
        while True:
            shorter = np.minimum(distance, np.append(distance, self.size)[targets].min(axis=1) + 1)
            if (shorter == distance).all():
                break
            distance = shorter
        best_byte = np.append(distance, self.size)[targets].argmin(axis=1)
        texts = [b""] * self.size
        for state in np.argsort(distance, kind="stable").tolist():
            if distance[state]:
                byte = int(best_byte[state])
                texts[state] = bytes([byte]) + texts[int(self.table[state, byte])]
        return texts


@lru_cache(maxsize=8)
def automaton_of(regex: str, label: str) -> Automaton:
    """Compile a regular expression, which must match the whole text, into an automaton.

    The syntax is that of Rust's ``regex`` crate. Raises ``DgemmaError`` (exit code 2) when the expression is malformed,
    has more than ``MAX_STATES`` states, or matches no text. ``label`` names the expression in the message.

    outlines-core compiles the expression: with a vocabulary of the 256 single bytes, its index is an automaton over
    bytes.
    """
    from outlines_core import Index, Vocabulary

    if estimated_states(regex) > _MAX_ESTIMATED_STATES:
        raise DgemmaError(f"{label} is too large", _TOO_LARGE_HINT, exit_code=2)
    try:
        # outlines-core searches for the leftmost match, so that a|ab would match only a. A \z at the end makes it match
        # the whole text. outlines-core cannot match \z against an empty text, so a character precedes every text. That
        # character also saves seconds of compilation for a string of bounded length that follows a quote.
        index = Index(f"{_START}(?:{regex})\\z", Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    except ValueError as error:
        reason = " ".join(str(error).split())
        if "incompatible" in reason:
            raise DgemmaError(
                f"{label} has a part that no text matches", "Remove that part, such as an empty character class.", 2
            ) from None
        raise DgemmaError(
            f"{label} cannot be compiled: {reason}",
            "Use the syntax of Rust's regex crate, without look-arounds, back references and word boundaries.", 2,
        ) from None
    transitions = index.get_transitions()
    if len(transitions) > MAX_STATES:
        raise DgemmaError(
            f"{label} is too large: {len(transitions):,} states; the limit is {MAX_STATES:,}", _TOO_LARGE_HINT, 2
        )
    from_start = transitions.get(index.get_initial_state(), {})
    if from_start.keys() - {256, ord(_START)}:
        raise DgemmaError(
            f"{label} cannot be compiled: its parentheses are not balanced",
            "Escape a literal parenthesis with a backslash.", exit_code=2,
        )
    table, accepting = _trim(*_dense_table(transitions, from_start.get(ord(_START), -1), index.get_final_states()))
    if not len(accepting):
        raise DgemmaError(f"{label} matches no text at all", "Loosen the constraint.", exit_code=2)
    # Minimization takes one pass per state of a long chain (a string of up to 1,000 characters) and gains little there.
    return _minimize(table, accepting) if len(accepting) <= MAX_MINIMIZED else Automaton(table, accepting)


def _dense_table(
    transitions: Mapping[int, Mapping[int, int]], first: int, final: set[int]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Number the states that can be reached from ``first``, which becomes state 0.

    Return their table (Q, 256) and which of them accept (Q,).
    """
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


def _trim(
    table: NDArray[np.int32], accepting: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Remove the states from which no accepting state can be reached.

    Return the smaller table and accepting states. Both are empty when the start itself is removed.
    """
    useful = accepting.copy()
    while True:
        more = useful | np.append(useful, False)[table].any(axis=1)  # DEAD is -1, so it indexes the appended entry
        if (more == useful).all():
            break
        useful = more
    if not useful[0]:
        return table[:0], accepting[:0]
    numbers = np.append(np.where(useful, np.cumsum(useful) - 1, DEAD), DEAD).astype(np.int32)
    return numbers[table[useful]], accepting[useful]


def _minimize(table: NDArray[np.int32], accepting: NDArray[np.bool_]) -> Automaton:
    """Merge equivalent states by Moore's algorithm.

    The states are divided into classes. Each pass splits a class whose states lead to different classes, until no pass
    splits any.
    """
    columns = np.unique(table, axis=1)  # bytes with the same column have the same effect in every state
    classes, count = accepting.astype(np.int64), len(np.unique(accepting))
    while True:
        rows = np.concatenate([classes[:, None], np.append(classes, DEAD)[columns]], axis=1)
        firsts, split = np.unique(rows, axis=0, return_index=True, return_inverse=True)[1:]
        classes = split.reshape(-1)
        if len(firsts) == count:
            break
        count = len(firsts)
    order = np.argsort(firsts)  # number the classes by their first states, so that the start stays 0
    numbers = np.append(np.argsort(order), DEAD).astype(np.int32)
    states = firsts[order]
    return Automaton(numbers[np.append(classes, DEAD)[table[states]]], accepting[states])
