"""Examples -> batches: tokenized conversations, and one canvas chosen from each answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from dgemma_mlx.train.objective import Batch

Conversation = tuple[list[int], list[int]]
"""(prompt ids up to where the answer begins, answer ids with the end-of-text id)."""

_ROUND = 8  # sequence lengths are rounded up to a multiple, so that few shapes occur


Part = tuple[Batch, bool]
"""A part of a training step's batch, and whether it is self-conditioned."""


def canvas_batch(
    conversations: Sequence[Conversation], canvas_length: int, pad_id: int, rng: random.Random, *, causal: bool = True
) -> Batch:
    """Picks one canvas of each answer at random; the prefix holds the clean canvases before it, and, for the
    ``causal`` loss, that canvas."""
    starts, canvases, sequences = [], [], []
    for prompt, answer in conversations:
        index = rng.randrange(-(-len(answer) // canvas_length))
        first = index * canvas_length
        starts.append(len(prompt) + first)
        canvases.append(answer[first : first + canvas_length])
        sequences.append(prompt + answer[: first + (canvas_length if causal else 0)])
    longest = max(map(len, sequences))
    return Batch(
        mx.array(_padded(sequences, -(-longest // _ROUND) * _ROUND, pad_id)),
        mx.array(np.array(starts, dtype=np.int32)),
        mx.array(_padded(canvases, canvas_length, pad_id)),
    )


def batch_pair_at(number: int, sample: Callable[[random.Random], Conversation], batch_size: int, canvas_length: int,
                  pad_id: int, seed: int) -> list[Part]:
    """Batch ``number`` in two halves, the shorter conversations and the longer ones, in random order.

    A function of seed and number alone, so that a resumed run sees the same data. Every batch holds the whole mix
    of tasks: were conversations sorted by length across batches, they would be batches of one task each.
    """
    rng = random.Random(f"{seed}/{number}")
    drawn = sorted((sample(rng) for _ in range(batch_size)), key=lambda c: len(c[0]) + len(c[1]))
    halves = [drawn[: batch_size // 2], drawn[batch_size // 2 :]]
    rng.shuffle(halves)
    return [(canvas_batch(half, canvas_length, pad_id, rng), n == 0) for n, half in enumerate(halves)]


def parts_at(
    number: int, conversations: Sequence[Conversation], batch_size: int, accumulate: int, canvas_length: int,
    pad_id: int, seed: int, *, causal: bool,
) -> list[Part]:
    """Step ``number`` over a fixed set of conversations: ``accumulate`` batches, half of each self-conditioned.

    Each epoch goes through all of them once, in an order of its own. A function of seed and number alone. Of an odd
    number, the last conversation is self-conditioned or not by chance.
    """
    rng = random.Random(f"{seed}/{number}")
    count, first = len(conversations), number * batch_size * accumulate
    parts: list[Part] = []
    for start in range(first, first + batch_size * accumulate, batch_size):
        chosen = [conversations[_order(seed, i // count, count)[i % count]] for i in range(start, start + batch_size)]
        half = (batch_size + rng.randrange(2)) // 2
        for group, conditioned in ((chosen[:half], True), (chosen[half:], False)):
            if group:
                parts.append((canvas_batch(group, canvas_length, pad_id, rng, causal=causal), conditioned))
    return parts


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/order/{epoch}").shuffle(order)
    return order


def _padded(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> np.ndarray:
    out = np.full((len(rows), width), pad_id, dtype=np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out
