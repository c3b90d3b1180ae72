"""Encoding of prompts, chunk by chunk."""

from __future__ import annotations

from collections.abc import Generator

import mlx.core as mx

from dgemma_mlx.generation.cancellation import Cancellation
from dgemma_mlx.generation.memory import Budget
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.text import DiffusionGemma


def prefill(
    network: DiffusionGemma, ids: mx.array, cache: PrefixCache, budget: Budget,
    cancellation: Cancellation | None = None, *, wants_hidden: bool = False,
) -> Generator[int, None, mx.array | None]:
    """Encode prompts (B, P) int32 into the cache, chunk by chunk within the budget, as the caller iterates.

    Yield the number of positions after each chunk. If ``wants_hidden``, return the hidden state (B, 1, M) of the last
    position, not evaluated; otherwise, or for an empty prompt, return None. Raises ``Cancelled`` between two chunks.
    The bound on attention scores stays with the cache.
    """
    cache.reserve(ids.shape[1])
    cache.score_bytes = budget.score_bytes
    step_size = max(1, budget.prefill_step_size // ids.shape[0])
    hidden = None
    for start in range(0, ids.shape[1], step_size):
        if cancellation is not None:
            cancellation.check()
        chunk = ids[:, start : start + step_size]
        if wants_hidden and start + step_size >= ids.shape[1]:
            hidden = network.encode(chunk, cache)[:, -1:]
        else:
            network.extend(chunk, cache)
        mx.eval(cache.state())
        if mx.get_cache_memory() > budget.idle_bytes:  # the sizes of scores grow with the prefix, and do not recur
            mx.clear_cache()
        yield chunk.shape[1]
    return hidden
