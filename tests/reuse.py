"""Decoding of a canvas after a prompt that is encoded with a prompt cache."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from dgemma_mlx import Model, PromptCache

Logits = np.ndarray[Any, np.dtype[np.float32]]


def decoded(model: Model, prompt_cache: PromptCache, ids: list[int]) -> tuple[int, Logits]:
    """Encode ``ids`` with a prompt cache and decode a canvas of 32 fixed ids after them.

    Returns the number of positions that were reused, and the logits (1, 32, V) of the canvas.
    """
    cache = prompt_cache.reuse(model.network, ids)
    known = cache.offset
    if known < len(ids):
        model.network.encode(mx.array([ids[known:]]), cache)
        prompt_cache.append(ids[known:])
    return known, np.array(model.network.decode(mx.arange(32)[None], cache))
