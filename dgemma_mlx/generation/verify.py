"""The encoder's check of a finished canvas, and its repair.

The causal encoder reads the canvas once. At each position it says which token it would have written after everything
before that position. Where that differs from the canvas, the encoder "doubts" the canvas.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from dgemma_mlx.diffusion.edits import Pins
from dgemma_mlx.diffusion.stopping import text_ids
from dgemma_mlx.events import Draft
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.text import DiffusionGemma

MAX_REPAIRS = 8  # repairs of one canvas; each extends the agreed text by at least one token


@dataclass(frozen=True)
class Reading:
    """What the encoder says of one canvas.

    Attributes:
        expected: The encoder's most probable token at each of the C positions.
        doubted: Positions, up to the end of the text, at which the canvas holds another token.
    """

    expected: Sequence[int]
    doubted: Sequence[int]


class Verifier:
    """Reads finished canvases with the encoder, which also appends them to the prefix cache."""

    def __init__(self, network: DiffusionGemma, eos_ids: Sequence[int]) -> None:
        self._network, self._eos_ids = network, eos_ids
        self._before: mx.array | None = None  # (B, 1, M): hidden state of the last encoded position

    def start_after(self, hidden: mx.array) -> None:
        """Store the hidden state (B, 1, M) of the last position before the next canvas."""
        mx.eval(hidden)
        self._before = hidden

    def keep(self, rows: list[int]) -> None:
        """Continue with these rows of the batch only."""
        if self._before is not None:
            self._before = self._before[mx.array(rows)]

    def read(self, cache: PrefixCache, drafts: Collection[Draft]) -> tuple[list[Reading], mx.array]:
        """Encode the canvases of all rows into the cache.

        Return a reading for each row, and the hidden state (B, 1, M) of the last canvas position.
        """
        assert self._before is not None, "the prompt was encoded"
        hidden = self._network.encode(mx.array([draft.tokens for draft in drafts], mx.int32), cache)
        shifted = mx.concatenate([self._before, hidden[:, :-1]], axis=1)
        rows: Any = mx.argmax(self._network.project(shifted), axis=-1).tolist()
        readings = []
        for draft, expected in zip(drafts, rows, strict=True):
            written = enumerate(text_ids(draft.tokens, self._eos_ids))
            readings.append(Reading(expected, [position for position, token in written if token != expected[position]]))
        return readings, hidden[:, -1:]


def repair_pins(drafts: Sequence[Draft], readings: Sequence[Reading], places: Sequence[int]) -> Pins:
    """Return pins that keep each canvas up to its place of repair, with the encoder's token there.

    The positions after it are free.
    """
    ids, free = [], []
    for draft, reading, place in zip(drafts, readings, places, strict=True):
        tokens = list(draft.tokens)
        tokens[place] = reading.expected[place]
        ids.append(tokens)
        free.append([position > place for position in range(len(tokens))])
    return Pins(mx.array(ids, mx.int32), mx.array(free))
