"""Examples -> batches: tokenized conversations, and one canvas chosen from each answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from dgemma_mlx.train.objective import Batch

Conversation = tuple[list[int], list[int]]
"""(prompt ids up to where the answer begins, answer ids with the end-of-text id)."""

_ROUND = 8  # sequence lengths are rounded up to a multiple, so that few shapes occur


def canvas_batch(conversations: Sequence[Conversation], canvas_length: int, pad_id: int,
                 rng: random.Random) -> Batch:
    """Picks one canvas of each answer at random; the prefix holds the clean canvases before it."""
    starts, canvases, sequences = [], [], []
    for prompt, answer in conversations:
        index = rng.randrange(-(-len(answer) // canvas_length))
        first = index * canvas_length
        starts.append(len(prompt) + first)
        canvases.append(answer[first : first + canvas_length])
        sequences.append(prompt + answer[: first + canvas_length])
    longest = max(map(len, sequences))
    return Batch(
        mx.array(_padded(sequences, -(-longest // _ROUND) * _ROUND, pad_id)),
        mx.array(np.array(starts, dtype=np.int32)),
        mx.array(_padded(canvases, canvas_length, pad_id)),
    )


def batch_pair_at(number: int, sample: Callable[[random.Random], Conversation], batch_size: int, canvas_length: int,
                  pad_id: int, seed: int) -> tuple[Batch, Batch]:
    """Batch ``number`` in two halves, the shorter conversations and the longer ones, in random order.

    A function of seed and number alone, so that a resumed run sees the same data. Every batch holds the whole mix
    of tasks: were conversations sorted by length across batches, they would be batches of one task each.
    """
    rng = random.Random(f"{seed}/{number}")
    drawn = sorted((sample(rng) for _ in range(batch_size)), key=lambda c: len(c[0]) + len(c[1]))
    halves = [drawn[: batch_size // 2], drawn[batch_size // 2 :]]
    rng.shuffle(halves)
    one, two = (canvas_batch(half, canvas_length, pad_id, rng) for half in halves)
    return one, two


def _padded(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> np.ndarray:
    out = np.full((len(rows), width), pad_id, dtype=np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out
