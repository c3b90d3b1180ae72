"""The probable tokens of each position, found in one pass over the logits."""

from __future__ import annotations

import mlx.core as mx

_CHUNK = 64  # as many chunks as there are values in those that are searched, at a vocabulary of 262,144


def top_ids(logits: mx.array, count: int) -> mx.array:
    """Logits (..., V) -> (..., k) ids of the k = min(count, V) largest, in no order; of equal ones, any."""
    *shape, V = logits.shape
    if V <= count * _CHUNK:
        return mx.argpartition(-logits, min(count, V) - 1, axis=-1)[..., : min(count, V)].astype(mx.int32)
    rows = logits.reshape(-1, V)
    if V % _CHUNK:
        rows = mx.pad(rows, [(0, 0), (0, -V % _CHUNK)], constant_values=-mx.inf)
    chunks = rows.reshape(len(rows), -1, _CHUNK)
    # the largest values are in the chunks with the largest maxima
    best = mx.argpartition(-chunks.max(axis=-1), count - 1, axis=-1)[:, :count, None]  # (N, k, 1)
    values = mx.take_along_axis(chunks, best, axis=1).reshape(len(rows), -1)
    places = mx.argpartition(-values, count - 1, axis=-1)[:, :count]
    ids = mx.take_along_axis(best[..., 0], places // _CHUNK, axis=1) * _CHUNK + places % _CHUNK
    return mx.minimum(ids, V - 1).reshape(*shape, count).astype(mx.int32)  # of NaN or -inf, padding might be left
