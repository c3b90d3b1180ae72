"""The check that all weights of a network are finite numbers.

It reads every weight once, so commands that take long make it first. The others make it when a step has computed NaN,
which costs nothing before: the host reads the entropies of every step, and NaN or infinity in a weight that a step uses
ends in a norm or a softmax as NaN.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.names import source_name
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.text import DiffusionGemma


def not_finite(part: nn.Module, without: str | None = None) -> str | None:
    """Return the path of a floating-point parameter that holds NaN or infinity, or None when there is none.

    The child ``without`` of the part is left out. A sum is finite only if all its terms are. One that is not may also
    have overflowed, and its terms are looked at.
    """
    parameters: Any = tree_flatten({name: value for name, value in part.parameters().items() if name != without})
    sums = [(path, array, array.sum()) for path, array in parameters if mx.issubdtype(array.dtype, mx.floating)]
    mx.eval([total for _, _, total in sums])
    for path, array, total in sums:
        if not math.isfinite(total.item()) and not mx.isfinite(array).all().item():
            return str(path)
    return None


def require_finite(network: DiffusionGemma) -> None:
    """Raise ``DgemmaError``, which names the tensor, when a weight of the network is NaN or infinite."""
    for number, layer in enumerate(network.layers):
        if path := not_finite(layer):
            raise _damaged(f"layers.{number}.{path}")
    if path := not_finite(network, without="layers"):
        raise _damaged(path)


def _damaged(path: str) -> DgemmaError:
    """Return the error for a damaged parameter."""
    return DgemmaError(f"{source_name(path)} holds NaN or infinity", "Fetch, convert or train the model again.")
