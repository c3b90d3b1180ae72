"""A constraint on a batch of canvases: its state after the text so far, and the projection of logits onto it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from dgemma_mlx.constrain.candidates import top_ids
from dgemma_mlx.constrain.projection import Projector
from dgemma_mlx.constrain.vocabulary import TokenAutomaton
from dgemma_mlx.diffusion.stopping import gap
from dgemma_mlx.kernels import CanvasSample

CANDIDATES = 64  # probable tokens considered at each position, in addition to those that the constraint needs


@dataclass
class ConstraintState:
    """Where one answer stands in its constraint.

    Attributes:
        automaton: The constraint, as an automaton over tokens.
        state: The automaton's state after the committed tokens.
    """

    automaton: TokenAutomaton
    state: int = 0

    def advance(self, tokens: Iterable[int]) -> None:
        """Advance the state by committed tokens."""
        self.state = self.automaton.advance(self.state, tokens)

    @property
    def shortest(self) -> int:
        """Number of tokens, including the end-of-text token, in the shortest text that completes the answer."""
        return int(self.automaton.shortest[self.state])


@dataclass(frozen=True)
class RowStart:
    """Where one row's canvas begins.

    Attributes:
        constraint: The constraint's state before the canvas.
        room: Number of tokens that the answer may still have, including the end-of-text token.
    """

    constraint: ConstraintState
    room: int


class CanvasProjection:
    """Projects a step onto the canvases that a constraint allows. It is a ``diffusion.edits.Projection``."""

    def __init__(self, rows: Sequence[RowStart]) -> None:
        """Prepare the projection of a batch of canvases that begin as ``rows`` say, with one automaton."""
        self._automaton = rows[0].constraint.automaton
        starts = [(start.constraint.state, start.room) for start in rows]
        projectors = {start: Projector(self._automaton, *start) for start in starts}
        self._projectors = [projectors[start] for start in starts]  # for each row; equal starts share their graph

    def gather(self, raw: mx.array, softcap: float | None) -> tuple[mx.array, mx.array]:
        """Return the ids (B, C, k) and logits (B, C, S + k) that the projection reads, lazily.

        ``raw`` are logits (B, C, V) before the softcap. The ids are those of the k probable tokens at each position.
        The logits are float32, of the S tokens of the automaton's skeleton and then of the probable tokens.
        """
        ids = top_ids(raw, CANDIDATES)
        skeleton = mx.array(self._automaton.skeleton)
        logits = mx.concatenate([raw[..., skeleton], mx.take_along_axis(raw, ids, axis=-1)], axis=-1)
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
        scores, S = np.array(logits, np.float64) / temperature, self._automaton.skeleton.size
        candidates, draws = np.array(ids), np.array(uniforms, np.float64)
        projected = [
            projector(scores[row, :, :S], candidates[row], scores[row, :, S:], draws[row])
            for row, projector in enumerate(self._projectors)
        ]
        argmax, sampled, entropy, ahead = (np.stack(parts) for parts in zip(*projected, strict=True))
        lead = mx.minimum(mx.array(ahead.astype(np.float32)), gap(sample))
        weights = mx.stack([lead, mx.zeros_like(lead)], axis=-1)
        return CanvasSample(
            mx.maximum(mx.array(entropy.astype(np.float32)), sample.entropy), mx.array(argmax.astype(np.int32)),
            mx.array(sampled.astype(np.int32)), mx.full(entropy.shape, 2, mx.int32),
            mx.zeros(weights.shape, mx.int32), weights, lead,
        )
