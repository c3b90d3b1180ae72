"""A scripted model without the work: for many tests, and for the prompts of agents, of tens of thousands of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from dgemma_mlx import Model
from dgemma_mlx.model.cache import PrefixCache
from tests.server.scripted import ScriptedNetwork, scripted_model


class QuickNetwork(ScriptedNetwork):
    """A scripted network that computes nothing, because its script says what it writes."""

    def _run_layers(
        self, x: mx.array, cache: PrefixCache, masks: Any, attend: Any, *more: Any, **options: Any
    ) -> mx.array:
        """Give the cache zeros, and return the input."""
        config = self.config
        for layer, kind in enumerate(config.layer_types):
            zeros = mx.zeros((x.shape[0], config.kv_heads(kind), x.shape[1], config.layer_head_dim(kind)))
            attend(layer, zeros, zeros)
        return x


def quick_model(answer: Callable[[str], str], positions: int = 4096) -> Model:
    """Return the ``scripted_model`` with room for this many positions, and without the work of a network."""
    model = scripted_model(answer)
    network: Any = model.network
    network.__class__ = QuickNetwork
    text = replace(model.config.text, max_position_embeddings=positions)
    return replace(model, config=replace(model.config, text=text))
