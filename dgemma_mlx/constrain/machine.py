"""The machine of a constraint: a deterministic automaton over symbols whose states are built when they are asked for.

A symbol below 256 is a byte of the text in UTF-8. Symbol 256 + i is the control token ``controls[i]``, such as
``<|tool_call>``: a token, not the characters of its name. A state is a term (``dgemma_mlx.constrain.terms``), what may
still follow. A machine is all that the projection needs to know of a constraint: the state after a symbol, whether a
text may end in a state, and the shortest text that ends it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.terms import UNBOUNDED, Term, Terms

BYTES = 256
_MOST_ROWS = 50_000  # some 1 KB each


class Row(NamedTuple):
    """What follows a state.

    Attributes:
        place: For each symbol, an index into ``states``, or -1 where no text goes on: (size,) int16.
        states: The different states that follow.
    """

    place: NDArray[np.int16]
    states: tuple[Term, ...]


class Machine:
    """The machine of one constraint.

    Attributes:
        terms: The algebra that the states belong to.
        start: The first state.
        controls: The control tokens that are symbols, by number.
        lock: Held by a thread that asks for states which may be new; threads share machines.
    """

    def __init__(self, terms: Terms, start: Term, controls: Sequence[str] = ()) -> None:
        """Create the machine of the language ``start``, a term over 256 + n symbols for n ``controls``."""
        self.terms, self.start, self.controls = terms, start, tuple(controls)
        self.lock = terms.lock
        self._rows: dict[Term, Row] = {}

    def is_alive(self, state: Term) -> bool:
        """Return whether a text can end from the state on."""
        return self.terms.least(state) < UNBOUNDED

    def row(self, state: Term) -> Row:
        """Return what follows a state, without the states from which no text can end."""
        row = self._rows.get(state)
        return self._new_row(state) if row is None else row

    def _new_row(self, state: Term) -> Row:
        """Make the row of a state."""
        check_time()
        with self.lock:
            place = np.full(self.terms.size, -1, np.int16)
            states: list[Term] = []
            for mask, after in self.terms.row(state):
                if self.is_alive(after):
                    members = mask.to_bytes((self.terms.size + 7) // 8, "little")
                    bits = np.unpackbits(np.frombuffer(members, np.uint8), bitorder="little")[: self.terms.size]
                    place[bits.view(np.bool_)] = len(states)
                    states.append(after)
            row = self._rows[state] = Row(place, tuple(states))
            return row

    def after(self, state: Term | None, symbols: Iterable[int]) -> Term | None:
        """Return the state after some symbols; None when no text goes on so."""
        for symbol in symbols:
            if state is None:
                break
            row = self.row(state)
            place = int(row.place[symbol])
            state = row.states[place] if place >= 0 else None
        return state

    def matches(self, symbols: Iterable[int]) -> bool:
        """Return whether the symbols (the bytes of a text, for example) are a text of the constraint."""
        state = self.after(self.start, symbols)
        return state is not None and state.nullable

    def step(self, state: Term) -> tuple[int, Term]:
        """Return the first symbol of the shortest text that ends from a state on, and the state after it.

        Of several such texts it is the first in the order of the symbols. The state must not be accepting.
        """
        row, distance = self.row(state), self.terms.least(state)
        steps = [
            (int((row.place == number).argmax()), after)
            for number, after in enumerate(row.states) if self.terms.least(after) == distance - 1
        ]
        return min(steps, key=lambda step: step[0])

    @property
    def is_full(self) -> bool:
        """Whether so many rows are known that it is time to ``forget`` them."""
        return len(self._rows) > _MOST_ROWS

    def forget(self) -> None:
        """Drop all rows, which are made again when they are asked for. States that nothing else holds are freed."""
        with self.lock:
            self._rows.clear()
            self.terms.forget()

    def explore(self, most: int) -> list[Term] | None:
        """Return all states, the first one first, or None when there are more than ``most``, or very many terms."""
        found, most_terms = {self.start: None}, len(self.terms) + 8 * most
        waiting = [self.start]
        for state in waiting:  # grows
            for after in self.row(state).states:
                if after not in found:
                    found[after] = None
                    waiting.append(after)
            if len(found) > most or len(self.terms) > most_terms:
                return None
        return list(found)
