"""A scripted model for prompts of any length, such as those of agents, which begin with tens of thousands of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from dgemma_mlx import Model
from dgemma_mlx.model.cache import PrefixCache
from tests.server.scripted import ScriptedNetwork, scripted_model


class QuickNetwork(ScriptedNetwork):
    """A scripted network that encodes nothing, because nobody reads what it would make of a prompt."""

    def _encode(self, ids: mx.array, cache: PrefixCache, *more: Any, **options: Any) -> mx.array:
        """Append zeros to the cache."""
        config = self.config
        for layer, kind in enumerate(config.layer_types):
            zeros = mx.zeros((1, config.kv_heads(kind), ids.shape[1], config.layer_head_dim(kind)))
            cache.update(layer, zeros, zeros)
        cache.advance(ids.shape[1])
        return mx.zeros((*ids.shape, config.hidden_size))


def quick_model(answer: Callable[[str], str]) -> Model:
    """Return the ``scripted_model``, with room for 262,144 positions, and without the work of encoding them."""
    model = scripted_model(answer)
    network: Any = model.network
    network.__class__ = QuickNetwork
    text = replace(model.config.text, max_position_embeddings=1 << 18)
    return replace(model, config=replace(model.config, text=text))
