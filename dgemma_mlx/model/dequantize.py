"""Unpacking of a network's packed (quantized) weights at load, for machines without Metal.

MLX's CPU back end multiplies by packed weights 20 to 30 times slower than OpenBLAS multiplies by plain weights. With
the linear algebra of MLX's own wheel, plain weights are only a little faster (``model.packed`` gives the measurements).
On Metal packed weights are the faster ones and are kept. The caller decides whether to unpack them (option
``cpu_dequantize``).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from dgemma_mlx.model.experts import ExpertLinear, QuantizedExpertLinear
from dgemma_mlx.model.text import DiffusionGemma

_PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedExpertLinear)


def dequantized_bytes(model: DiffusionGemma) -> int:
    """Return the size in bytes of the packed weights after unpacking to the activations' dtype; 0 without any."""
    packed: list[Any] = [module for module in model.modules() if isinstance(module, _PACKED)]
    values: int = sum(module.weight.size * 32 // module.bits for module in packed)
    return values * model.dtype.size


def dequantize(model: DiffusionGemma) -> None:
    """Replace the network's packed modules by plain modules with the same values in the activations' dtype, lazily."""

    def plain(_: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, _PACKED):
            return module
        whole: nn.Module
        if isinstance(module, nn.QuantizedEmbedding):
            whole = nn.Embedding(1, 1)
        else:
            whole = nn.Linear(1, 1, bias=False) if isinstance(module, nn.QuantizedLinear) else ExpertLinear(1, 1, 1)
        weight = mx.dequantize(
            module.weight, module.scales, module.get("biases"), module.group_size, module.bits, module.mode
        )
        whole.weight = weight.astype(model.dtype)
        return whole.eval()

    model.update_modules(tree_map_with_path(plain, model.leaf_modules(), is_leaf=nn.Module.is_module))
