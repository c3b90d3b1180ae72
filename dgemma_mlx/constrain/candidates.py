"""Search for the most probable tokens of each position, in one pass over the logits."""

from __future__ import annotations

import mlx.core as mx

_CHUNK = 64  # ids per chunk: for 64 ids of a vocabulary of 262,144, both searches cover 4,096 values


def top_ids(logits: mx.array, count: int) -> mx.array:
    """Return the ids of the largest logits: (..., V) -> (..., k) int32, where k = min(count, V).

    The ids are in no particular order. Among equal logits the choice is arbitrary. NaN logits
    may give any ids, but always ids below V.
    """
    *shape, V = logits.shape
    if V <= count * _CHUNK:
        return mx.argpartition(-logits, min(count, V) - 1, axis=-1)[..., : min(count, V)].astype(mx.int32)
    rows = logits.reshape(-1, V)
    if V % _CHUNK:
        rows = mx.pad(rows, [(0, 0), (0, -V % _CHUNK)], constant_values=-mx.inf)
    chunks = rows.reshape(len(rows), -1, _CHUNK)
    # The `count` largest values are all in the `count` chunks with the largest maxima.
    best = mx.argpartition(-chunks.max(axis=-1), count - 1, axis=-1)[:, :count, None]  # (N, k, 1)
    values = mx.take_along_axis(chunks, best, axis=1).reshape(len(rows), -1)
    positions = mx.argpartition(-values, count - 1, axis=-1)[:, :count]
    ids = mx.take_along_axis(best[..., 0], positions // _CHUNK, axis=1) * _CHUNK + positions % _CHUNK
    return mx.minimum(ids, V - 1).reshape(*shape, count).astype(mx.int32)  # NaN or -inf may select the padding
