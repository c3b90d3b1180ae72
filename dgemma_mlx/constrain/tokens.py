"""A constraint over the tokens of one model: the state of an answer, and the projectors of its canvases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol
from weakref import proxy

import numpy as np

from dgemma_mlx.constrain.automaton import automaton_of
from dgemma_mlx.constrain.beam import BeamProjector
from dgemma_mlx.constrain.limits import TooLargeError, trying
from dgemma_mlx.constrain.machine import Machine
from dgemma_mlx.constrain.paths import Floats, Ids
from dgemma_mlx.constrain.projection import Projected, Projector
from dgemma_mlx.constrain.terms import Term
from dgemma_mlx.constrain.visited import TOO_LONG, UNSPELLABLE, Spelling, Visited
from dgemma_mlx.constrain.vocabulary import TokenAutomaton
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.tokenizer import Tokenizer

_MOST_EXPLORED = 2_000  # states of a machine that is tried as one automaton ...
_MOST_STATES = 1_000  # ... which is used when it has at most so many, minimized; all of them fit into a projection


class CanvasProjector(Protocol):
    """Projects all steps of one canvas.

    Attributes:
        skeleton: (S,) int32, sorted. Tokens whose logits the next step needs besides the probable ones.
    """

    skeleton: Ids

    def __call__(self, skeleton_scores: Floats, ids: Ids, scores: Floats, uniforms: Floats) -> Projected: ...


class TokenMachine:
    """A machine whose steps are tokens.

    A state is a state of the machine, or ``ended`` after an end-of-text token. A machine of few states is used as one
    automaton, all of whose states are considered (``projection``); of others a beam is (``beam``).

    Attributes:
        start: The first state.
        ended: The state after an end-of-text token.
    """

    def __init__(
        self, machine: Machine, tokenizer: Tokenizer, eos_ids: Sequence[int], pad_id: int, vocab_size: int
    ) -> None:
        """Prepare the machine for a tokenizer.

        ``eos_ids`` are the tokens that end a text, and ``pad_id`` is the token after them. ``vocab_size`` is the
        model's vocabulary size; it may be smaller than the tokenizer's. Raises ``DgemmaError`` (exit code 2) when the
        vocabulary lacks the tokens to end a text, and when the shortest text is too long for any answer.
        """
        # A weak reference: what is kept for a tokenizer must not keep the tokenizer.
        self._machine = machine
        self._spelling = Spelling(machine, proxy(tokenizer), eos_ids, pad_id, vocab_size)
        self.start, self.ended = machine.start, machine.terms.none
        self._exact: TokenAutomaton | None = None
        self._numbers: dict[Term, int] = {}
        self._visited = Visited(machine, self._spelling)
        if not machine.controls:
            with machine.lock:
                self._try_automaton(tokenizer)
        shortest = self.shortest(self.start)
        if shortest == TOO_LONG:
            length = machine.terms.least(machine.start)
            raise DgemmaError(
                f"the shortest text that matches has {length:,} characters", "Loosen the constraint.", exit_code=2
            )
        if shortest >= UNSPELLABLE:
            raise DgemmaError(
                "this model's tokenizer lacks tokens for bytes that the constraint needs",
                "Leave out characters that the tokenizer cannot encode.", exit_code=2,
            )

    def _try_automaton(self, tokenizer: Tokenizer) -> None:
        """Make one automaton of the machine if it is small enough."""
        try:
            with trying():
                automaton, numbers = automaton_of(self._machine, _MOST_EXPLORED)
            if automaton.size <= _MOST_STATES:
                self._exact = TokenAutomaton(
                    automaton, tokenizer, self._spelling.eos_ids, self._spelling.pad_id, self._spelling.vocab_size
                )
                self._numbers = {**numbers, self.ended: self._exact.end}
        except TooLargeError:
            pass

    @property
    def is_exact(self) -> bool:
        """Whether projections consider all states."""
        return self._exact is not None

    def shortest(self, state: Term) -> int:
        """Return a number of tokens, with the end-of-text token, that completes a text from a state on.

        It is the smallest number of tokens of skeletons, or that of the state's spelling where there is no automaton.
        """
        if self._exact is not None:
            return int(self._exact.shortest[self._numbers[state]])
        with self._machine.lock:
            number = self._visited.number(state)
            self._visited.spell_out(np.array([number]))
            return int(self._visited.spell[number])

    def advance(self, state: Term, ids: Iterable[int]) -> Term | None:
        """Return the state that the tokens lead to from ``state``, or None when no text goes on so.

        Ids after an end-of-text id are ignored.
        """
        with self._machine.lock:
            after: Term | None = state
            for id in ids:
                if after is None or after is self.ended:
                    break
                if id in self._spelling.eos_ids:
                    after = self.ended if after.nullable else None
                else:
                    symbols = self._spelling.symbols(id)
                    after = self._machine.after(after, symbols) if symbols else None
            return after

    def projector(self, state: Term, room: int) -> CanvasProjector:
        """Return the projector of canvases that begin in a state; see ``Projector`` and ``BeamProjector``."""
        if self._exact is not None:
            return Projector(self._exact, self._numbers[state], room)
        with self._machine.lock:
            if self._visited.is_full or self._machine.is_full:
                self._visited = Visited(self._machine, self._spelling)
                self._machine.forget()
            return BeamProjector(self._visited, state, room)
