"""Encoding of prompts, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from dgemma_mlx.generation.cancellation import Cancellation
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.text import DiffusionGemma


def prefill(
    network: DiffusionGemma, ids: mx.array, cache: PrefixCache, step_size: int,
    cancellation: Cancellation | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Encode prompts (B, P) int32 into the cache, ``step_size`` positions at a time, as the caller iterates.

    After each chunk, yield its number of positions and the hidden state (B, 1, M) of its last position, which is not
    evaluated. What a chunk needed on the way is freed before the next one. Raises ``Cancelled`` between two chunks.
    """
    cache.reserve(ids.shape[1])
    for start in range(0, ids.shape[1], step_size):
        if cancellation is not None:
            cancellation.check()
        chunk = ids[:, start : start + step_size]
        hidden = network.encode(chunk, cache)[:, -1:]
        mx.eval(cache.state())
        mx.clear_cache()
        yield chunk.shape[1], hidden
