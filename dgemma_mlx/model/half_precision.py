"""float16 for GPUs that have no bfloat16 arithmetic, and the check that a network stays within its range.

The GPUs of M1 and M2 convert bfloat16 to float32 for every product. float16 is native there, but its largest value is
65,504, where bfloat16 reaches 3e38. A network that was trained in bfloat16 may exceed that.

``float16_problem`` looks at all weights and at the activations of one short text, and leaves a margin. A later text may
still overflow. An activation that does is infinite, the next norm makes it NaN, and NaN spreads over the canvas, whose
entropies the host reads in every step. ``refuse_nan`` turns that into an error.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.experts import ExpertLinear, QuantizedExpertLinear
from dgemma_mlx.model.finite import not_finite, require_finite
from dgemma_mlx.model.layer import Layer
from dgemma_mlx.model.text import DiffusionGemma

LARGEST = 65_504.0  # of float16
MARGIN = 4.0  # the activations of the check must stay below LARGEST / MARGIN, because later texts may have larger ones

_FIRST_NATIVE = 15  # generation of Apple GPUs that introduced bfloat16: M3. M1 is 13 and M2 is 14.
_PREFIX, _CANVAS = 48, 64  # positions of the text with which the activations are checked
_ADVICE = "Use bfloat16: --dtype bfloat16, or dtype=mlx.core.bfloat16 in Python."
_PROJECTIONS = (nn.Linear, nn.QuantizedLinear, ExpertLinear, QuantizedExpertLinear)


def lacks_bfloat16(architecture: str) -> bool:
    """Return whether a GPU has no bfloat16 arithmetic.

    ``architecture`` is what ``mx.device_info()`` calls it, such as "applegpu_g13s". The answer is False for anything
    but an Apple GPU.
    """
    generation = re.match(r"applegpu_g(\d+)", architecture)
    return generation is not None and int(generation[1]) < _FIRST_NATIVE


def fastest(
    open_network: Callable[[mx.Dtype | None], DiffusionGemma], architecture: str, first_id: int
) -> DiffusionGemma:
    """Open a network in the dtype that is fastest on a GPU.

    A network that is stored in bfloat16 is opened in float16 where ``lacks_bfloat16(architecture)``, unless
    ``float16_problem`` finds a problem. Then it stays as it is stored, with a ``RuntimeWarning`` that says why.

    Args:
        open_network: Opens the network in a dtype, or as it is stored for None, lazily.
        architecture: The GPU's architecture, from ``mx.device_info()``.
        first_id: Id of the token that begins a text.
    """
    network = open_network(None)
    if network.dtype != mx.bfloat16 or not lacks_bfloat16(architecture):
        return network
    half = open_network(mx.float16)
    problem = float16_problem(half, first_id)
    if problem is None:
        return half
    warnings.warn(f"this model is computed in bfloat16: {problem}", RuntimeWarning, stacklevel=2)
    return network


def require_float16(network: DiffusionGemma, first_id: int) -> None:
    """Raise ``DgemmaError`` when a network that was converted to float16 exceeds its range."""
    if problem := float16_problem(network, first_id):
        raise DgemmaError(f"this model cannot be computed in float16: {problem}", _ADVICE)


def refuse_nan(network: DiffusionGemma, value: float, place: str) -> None:
    """Raise ``DgemmaError`` when a value that a network has computed is NaN.

    The error names the weight that is not finite, if there is one, or else the ``place`` of the computation. In a
    float16 network with finite weights, NaN means an overflow.
    """
    if not math.isnan(value):
        return
    require_finite(network)
    if network.dtype == mx.float16:
        raise DgemmaError("the activations of this text exceed the range of float16", _ADVICE)
    raise DgemmaError(f"the model computed NaN in {place}", "Its weights may be damaged. Fetch or convert it again.")


def float16_problem(network: DiffusionGemma, first_id: int) -> str | None:
    """Return in one line what exceeds the range of float16 in a float16 network, or None when nothing does.

    All weights are read. The activations are those of a short text: one ``encode`` and two ``decode`` passes, of which
    the second one is conditioned on the first. ``first_id`` is the id of the token that begins a text.
    """
    found = (not_finite(layer) for layer in network.layers)
    if path := next(filter(None, found), None) or not_finite(network, without="layers"):
        return f"float16 cannot hold the weights of {path}"
    largest = _largest_activation(network, first_id)
    if not math.isfinite(largest):
        return f"its activations exceed {LARGEST:,.0f}, the largest number of float16"
    if largest > LARGEST / MARGIN:
        return f"its activations reach {largest:,.0f}, and {LARGEST:,.0f} is the largest number of float16"
    return None


def _largest_activation(network: DiffusionGemma, first_id: int) -> float:
    """Return the largest absolute value among the activations of a short text; NaN or infinity after an overflow."""
    from dgemma_mlx.model.adapter import Adapted

    peaks: list[mx.array] = []
    layers, projections = network.layers, [
        (parent, name, child) for parent in network.modules() if not isinstance(parent, Adapted)
        for name, child in parent.children().items() if isinstance(child, (*_PROJECTIONS, *Adapted))
    ]  # fmt: skip
    try:
        for parent, name, child in projections:
            parent[name] = _Watched(child, peaks)
        network["layers"] = [_Watched(layer, peaks) for layer in layers]
        _run(network, first_id)
    finally:
        network["layers"] = layers
        for parent, name, child in projections:
            parent[name] = child
    return float(np.max(np.array(mx.stack(peaks))))  # unlike a comparison, it keeps NaN


def _run(network: DiffusionGemma, first_id: int) -> None:
    """Build the passes of the check, lazily: a prefix, a canvas of noise, and the canvas that this predicts."""
    ids = mx.random.randint(0, network.config.vocab_size, (1, _PREFIX + _CANVAS), key=mx.random.key(0))
    ids[:, 0] = first_id  # the first position of a text often has the largest activations
    cache = network.new_cache()
    network.encode(ids[:, :_PREFIX], cache)
    logits = network.decode(ids[:, _PREFIX:], cache)
    network.decode(mx.argmax(logits, axis=-1), cache, logits)


class _Watched(nn.Module):
    """A module in whose place all floating-point arguments and results are noted.

    With the layers and all projections in such a place, these are the residual stream and everything that is stored
    between two norms. What a norm has produced is bounded, and is an argument of the projection that reads it.
    """

    def __init__(self, inner: Any, peaks: list[mx.array]) -> None:
        super().__init__()
        self.inner, self._peaks = inner, peaks

    def __getattr__(self, name: str) -> Any:
        if name in self or "inner" not in self:  # an entry of its own, or still in __init__
            return super().__getattr__(name)
        return getattr(self["inner"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        results = self["inner"](*args, **kwargs)
        for array in (*args, *(results if isinstance(results, tuple) else (results,))):
            if isinstance(array, mx.array) and mx.issubdtype(array.dtype, mx.floating):
                self._note(array)
        if isinstance(self["inner"], Layer):  # the residual stream before the layer's factor is stored as well
            self._note(results[0].astype(mx.float32) / mx.maximum(mx.abs(args[5].astype(mx.float32)), 1e-6))
        return results

    def _note(self, array: mx.array) -> None:
        self._peaks.append(mx.abs(array).max().astype(mx.float32))
