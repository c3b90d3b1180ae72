"""Gradient checkpointing for the layers of the network (Chen et al., arXiv 1604.06174).

A checkpointed layer keeps only its inputs and outputs for the backward pass. Its intermediate results are computed
again when its gradient is computed. This takes less memory and more time.

``mlx.nn.utils.checkpoint`` tracks only the arguments and results of a function. A layer also writes keys and values to
a cache, reads the keys and values of the prefix from it, and logs the choices of its router. ``checkpointed`` turns all
of these into arguments and results of the checkpointed function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.model.layer import Layer
from dgemma_mlx.train.objective import TeacherCache


def checkpointed(layer: Layer, number: int, append: Callable[..., Any]) -> Callable[..., tuple[mx.array, mx.array]]:
    """Return a function that calls a layer with gradient checkpointing; pass it to ``DiffusionGemma.wrap_layers``.

    Args:
        layer: The layer to call.
        number: The layer's index in the network.
        append: ``update`` or ``with_canvas`` of a ``TeacherCache``. The first one means that the layer encodes.
    """
    cache: TeacherCache = append.__self__  # type: ignore[attr-defined]

    def call(
        x: mx.array, normed: mx.array, positions: mx.array, mask: Any, append_kv: Any, scalar: mx.array,
        next_norm: nn.RMSNorm, router_log: Any, score_bytes: int,
    ) -> tuple[mx.array, mx.array]:
        encoding = append == cache.update

        def inner(
            x: mx.array, normed: mx.array, scalar: mx.array, norm_weight: mx.array, *prefix: mx.array
        ) -> list[mx.array]:
            written: list[mx.array] = []
            routes: list[tuple[mx.array, mx.array]] = []

            def append_inner(k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
                if encoding:
                    written.extend((k, v))
                    return k, v
                keys, values = prefix
                return mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2)

            norm = nn.RMSNorm(norm_weight.shape[0], next_norm.eps)
            norm.weight = norm_weight
            log = None if router_log is None else routes
            out = layer(x, normed, positions, mask, append_inner, scalar, norm, log, score_bytes)
            return [*out, *written, *(array for route in routes for array in route)]

        prefix = () if encoding else cache.prefix(number)
        x, normed, *more = nn.utils.checkpoint(layer, inner)(x, normed, scalar, next_norm.weight, *prefix)
        if encoding:
            cache.update(number, *more[:2])
        if router_log is not None:
            router_log.append(tuple(more[-2:]))
        return x, normed

    return call
