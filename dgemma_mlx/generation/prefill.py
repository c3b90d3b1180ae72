"""Encoding of prompts, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import mlx.core as mx

from dgemma_mlx.generation.cancellation import Cancellation
from dgemma_mlx.generation.memory import Budget
from dgemma_mlx.generation.pictures import soft_tokens
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.text import DiffusionGemma


def prefill(
    network: DiffusionGemma, rows: Sequence[Sequence[int]], cache: PrefixCache, budget: Budget,
    cancellation: Cancellation | None = None, features: Callable[[int], mx.array] | None = None, *,
    wants_hidden: bool = False,
) -> Generator[int, None, mx.array | None]:
    """Encode the ids (B, P) of prompts into the cache, chunk by chunk within the budget, as the caller iterates.

    Yield the number of positions after each chunk. If ``wants_hidden``, return the hidden state (B, 1, M) of the last
    position, not evaluated; otherwise, or for an empty prompt, return None. Raises ``Cancelled`` between two chunks
    or pictures. The bound on attention scores stays with the cache.

    A negative id is a picture's key, for which ``features`` returns the features (n, M). The positions of a picture see
    each other, so no chunk ends within one; a chunk may therefore be longer than the budget says, by a picture.
    """
    length = len(rows[0])
    cache.reserve(length)
    cache.score_bytes = budget.score_bytes

    def encoded(key: int) -> mx.array:
        if cancellation is not None:
            cancellation.check()
        assert features is not None
        return features(key)

    step_size = max(1, budget.prefill_step_size // len(rows))
    hidden, start = None, 0
    while start < length:
        if cancellation is not None:
            cancellation.check()
        end = _chunk_end(rows, start, step_size)
        parts = [row[start:end] for row in rows]
        soft = None if features is None else soft_tokens(parts, encoded)
        chunk = mx.array(parts if soft is None else [[max(id, 0) for id in part] for part in parts], mx.int32)
        if wants_hidden and end == length:
            hidden = network.encode(chunk, cache, soft=soft)[:, -1:]
        else:
            network.extend(chunk, cache, soft)
        mx.eval(cache.state())
        if mx.get_cache_memory() > budget.idle_bytes:  # the sizes of scores grow with the prefix, and do not recur
            mx.clear_cache()
        yield end - start
        start = end
    return hidden


def _chunk_end(rows: Sequence[Sequence[int]], start: int, step_size: int) -> int:
    """Return where the chunk that begins at ``start`` ends: after ``step_size`` positions, but not within a picture.

    It ends before the picture, or after it where the chunk would be empty.
    """
    length = len(rows[0])
    step = -1
    end = min(start + step_size, length)
    while end < length and any(_is_within(row, end) for row in rows):
        end += step
        if end == start:
            step, end = 1, min(start + step_size, length)
    return end


def _is_within(row: Sequence[int], place: int) -> bool:
    """Return whether a boundary before ``place`` parts the positions of a picture."""
    return row[place] < 0 and row[place - 1] == row[place]
