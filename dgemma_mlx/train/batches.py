"""Training batches: tokenized conversations, with one canvas chosen from each answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from dgemma_mlx.train.objective import Batch

# (prompt ids up to the position where the answer begins, answer ids including the id that ends it)
Conversation = tuple[list[int], list[int]]

# (some rows of a training step's batch, whether they are trained with self-conditioning)
Part = tuple[Batch, bool]

_LENGTH_MULTIPLE = 8  # sequence lengths are rounded up to a multiple, so that few different shapes occur


def canvas_batch(
    conversations: Sequence[Conversation], canvas_length: int, pad_id: int, rng: random.Random, *, causal: bool = True
) -> Batch:
    """Return a batch with one randomly chosen canvas of each answer.

    The encoder's sequence of a row holds the prompt and the clean canvases before the chosen one. With ``causal``, it
    also holds the chosen canvas, because the causal loss predicts its tokens.
    """
    starts, canvases, sequences = [], [], []
    for prompt, answer in conversations:
        index = rng.randrange(-(-len(answer) // canvas_length))
        first = index * canvas_length
        starts.append(len(prompt) + first)
        canvases.append(answer[first : first + canvas_length])
        sequences.append(prompt + answer[: first + (canvas_length if causal else 0)])
    longest = max(map(len, sequences))
    return Batch(
        mx.array(_padded(sequences, -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, pad_id)),
        mx.array(np.array(starts, dtype=np.int32)),
        mx.array(_padded(canvases, canvas_length, pad_id)),
    )


def batch_pair_at(number: int, sample: Callable[[random.Random], Conversation], batch_size: int, canvas_length: int,
                  pad_id: int, seed: int) -> list[Part]:
    """Return batch ``number`` of freshly sampled conversations as two parts, in random order.

    One part holds the shorter half of the conversations and the other one the longer half. The first part is trained
    with self-conditioning. The result depends only on ``seed`` and ``number``, so that a resumed run sees the same
    data. Every batch holds the whole mix of tasks: sorting conversations by length across batches would give batches
    of one task each.
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
    """Return the batches of training step ``number`` over a fixed set of conversations, each split into two parts.

    A step takes ``accumulate`` batches of ``batch_size`` conversations. Half of each batch is trained with
    self-conditioning. If ``batch_size`` is odd, chance decides about the last conversation. Each epoch visits every
    conversation once, in an order of its own. The result depends only on ``seed`` and ``number``.
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
    """Return the order in which an epoch visits ``count`` conversations."""
    order = list(range(count))
    random.Random(f"{seed}/order/{epoch}").shuffle(order)
    return order


def _padded(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> np.ndarray:
    """Return the rows, padded on the right, as an array (len(rows), width) int32."""
    out = np.full((len(rows), width), pad_id, dtype=np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out
