"""A constraint on a batch of canvases: its state after the text so far, and the projection of logits onto it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.constrain.candidates import top_ids
from dgemma_mlx.constrain.paths import Indices
from dgemma_mlx.constrain.terms import Term
from dgemma_mlx.constrain.tokens import TokenMachine
from dgemma_mlx.diffusion.edits import Pins
from dgemma_mlx.diffusion.stopping import gap
from dgemma_mlx.kernels import CanvasSample

CANDIDATES = 64  # probable tokens considered at each position, in addition to those that the constraint needs


@dataclass
class ConstraintState:
    """Where one answer stands in its constraint.

    Attributes:
        machine: The constraint, over tokens.
        state: The machine's state after the committed tokens.
    """

    machine: TokenMachine
    state: Term

    @classmethod
    def first(cls, machine: TokenMachine) -> ConstraintState:
        """Return the state of an answer that has not begun."""
        return cls(machine, machine.start)

    def advance(self, tokens: Iterable[int]) -> None:
        """Advance the state by committed tokens, which must match."""
        state = self.machine.advance(self.state, tokens)
        assert state is not None, "the projection committed tokens that do not match"
        self.state = state

    @property
    def shortest(self) -> int:
        """Number of tokens, including the end-of-text token, that suffice to complete the answer."""
        return self.machine.shortest(self.state)


@dataclass(frozen=True)
class RowStart:
    """Where one row's canvas begins.

    Attributes:
        constraint: The constraint's state before the canvas.
        room: Number of tokens that the answer may still have, including the end-of-text token.
    """

    constraint: ConstraintState
    room: int

    def first_allowed(self, tokens: Sequence[int], others: Mapping[int, int]) -> int | None:
        """Return the first position of a matching canvas at which another token may stand; None without one.

        ``tokens`` are the canvas, and ``others`` the other token at some positions. It may stand there when a text that
        begins with the tokens before it, and with it, matches and still ends in time.
        """
        machine, state = self.constraint.machine, self.constraint.state
        for position, token in enumerate(tokens):
            if position in others:
                after = machine.advance(state, [others[position]])
                if after is not None and machine.shortest(after) < self.room - position:
                    return position
            following = machine.advance(state, [token])
            assert following is not None, "the canvas matches"
            state = following
        return None


class CanvasProjection:
    """Projects a step onto the canvases that a constraint allows. It is a ``diffusion.edits.Projection``."""

    def __init__(self, rows: Sequence[RowStart], pins: Pins | None = None) -> None:
        """Prepare the projection of a batch of canvases that begin as ``rows`` say, with one constraint.

        Pins hold the first positions of each canvas, which must be the beginning of a matching text.
        """
        self._pins = pins
        starts = [(start.constraint.state, start.room) for start in rows]
        machine = rows[0].constraint.machine
        projectors = {start: machine.projector(*start) for start in dict.fromkeys(starts)}
        # One for each row. Equal starts share the graph of an automaton; a beam is built for the scores of its row.
        self._projectors = [projectors[start] if machine.is_exact else machine.projector(*start) for start in starts]
        self._gathered = np.zeros(0, np.int32)  # the skeletons of all rows
        self._columns: list[Indices] = []  # where the skeleton of each row is among the gathered tokens

    def gather(self, raw: mx.array, softcap: float | None) -> tuple[mx.array, mx.array]:
        """Return the ids (B, C, k) and logits (B, C, S + k) that the projection reads, lazily.

        ``raw`` are logits (B, C, V) before the softcap. The ids are those of the k probable tokens at each position.
        The logits are float32, of the S tokens of all rows' skeletons and then of the probable tokens.
        """
        ids = top_ids(raw, CANDIDATES)
        if self._pins is not None:  # a pinned token is the first candidate at its position
            is_pinned = ~self._pins.free[..., None] & (mx.arange(ids.shape[-1]) == 0)
            ids = mx.where(is_pinned, self._pins.ids[..., None], ids)
        skeletons = [projector.skeleton for projector in self._projectors]
        self._gathered = together = skeletons[0] if len(skeletons) == 1 else np.unique(np.concatenate(skeletons))
        self._columns = [together.searchsorted(skeleton) for skeleton in skeletons]
        logits = mx.concatenate([raw[..., mx.array(together)], mx.take_along_axis(raw, ids, axis=-1)], axis=-1)
        logits = logits.astype(mx.float32)
        return ids, logits if softcap is None else softcap * mx.tanh(logits / softcap)

    def __call__(
        self, sample: CanvasSample, gathered: tuple[mx.array, ...], uniforms: mx.array, temperature: float
    ) -> CanvasSample:
        """Return the sample (B, C) of canvases that match.

        ``gathered`` is the result of ``gather``, and ``uniforms`` (B, C) are numbers in [0, 1). The entropy of a
        position is at least that of ``sample``. ``kept_weights`` holds (gap, 0), so that ``diffusion.stopping.gap``
        finds the gap; ``kept_ids`` is unused. The arguments are evaluated.
        """
        ids, logits = gathered
        scores, S = np.array(logits, np.float64) / temperature, logits.shape[-1] - ids.shape[-1]
        candidates, draws = np.array(ids), np.array(uniforms, np.float64)
        if self._pins is not None:
            self._pin(scores, S)
        projected = [
            projector(scores[row][:, columns], candidates[row], scores[row, :, S:], draws[row])
            for row, (projector, columns) in enumerate(zip(self._projectors, self._columns, strict=True))
        ]
        argmax, sampled, entropy, ahead = (np.stack(parts) for parts in zip(*projected, strict=True))
        lead = mx.minimum(mx.array(ahead.astype(np.float32)), gap(sample))
        weights = mx.stack([lead, mx.zeros_like(lead)], axis=-1)
        return CanvasSample(
            mx.maximum(mx.array(entropy.astype(np.float32)), sample.entropy), mx.array(argmax.astype(np.int32)),
            mx.array(sampled.astype(np.int32)), mx.full(entropy.shape, 2, mx.int32),
            mx.zeros(weights.shape, mx.int32), weights, lead,
        )

    def _pin(self, scores: NDArray[np.float64], S: int) -> None:
        """Make the pinned tokens the only ones that paths take, in scores (B, C, S + k)."""
        assert self._pins is not None
        pinned, ids = ~np.array(self._pins.free), np.array(self._pins.ids)
        chosen = np.zeros(scores.shape, np.bool_)
        chosen[..., :S] = ids[..., None] == self._gathered
        chosen[..., S] = True  # unused where the token is one of the skeleton
        scores[pinned] = np.where(chosen[pinned], 0.0, -np.inf)
