"""Linear layers that read the same input, multiplied as one matrix: one launch on a GPU instead of two or three."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from operator import is_not
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.model.packed import WEIGHTS


class SharedInput(nn.Module):
    """A module with several linear layers that read the same input, whose products ``join`` makes one product.

    Attributes:
        shared_input: The names of these layers. A module may lack some of them.
    """

    shared_input: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self._joined: _Joined | None = None

    def join(self) -> None:
        """Put the layers' matrices below each other in one array, lazily, if all are plain or all are packed alike.

        The layers keep their parameters, as slices that share the joined array, so this takes no memory that stays.
        The joined array is used only as long as the layers have these very slices and are not in training. After that
        it is forgotten for good. So a weight may be replaced, trained or adapted; but a slice that is changed in place
        (``weight[0] = 0``) is not noticed.
        """
        self._joined = _join(self._layers())

    def products(self, x: mx.array) -> list[mx.array]:
        """Return what each of the layers returns for x (..., I): (..., O) in x's dtype.

        Where the layers are joined, these are slices of one array.
        """
        layers = self._layers()
        if self._joined is not None and (self.training or any(map(is_not, self._joined.slices, _arrays(layers)))):
            self._joined = None
        if self._joined is None:
            return [layer(x) for layer in layers]
        products: Any = mx.split(self._joined.layer(x), self._joined.ends, axis=-1)
        return list(products)

    def _layers(self) -> list[Any]:
        """Return the layers, plain, packed or adapted."""
        return [getattr(self, name) for name in self.shared_input if hasattr(self, name)]


class _Joined:
    """Several linear layers in one.

    Attributes:
        layer: A layer with the matrices of all, below each other.
        ends: The outputs of ``layer`` at which those of a layer end, without the last.
        slices: The arrays of the layers, slices of those of ``layer``.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layer = copy.copy(layers[0])
        self.ends = list(accumulate(layer.weight.shape[0] for layer in layers))[:-1]
        for name in [name for name in WEIGHTS if name in self.layer]:
            self.layer[name] = mx.concatenate([layer[name] for layer in layers])
            for layer, rows in zip(layers, mx.split(self.layer[name], self.ends), strict=True):
                layer[name] = rows
        self.slices = _arrays(layers)


def _join(layers: Sequence[Any]) -> _Joined | None:
    """Join layers, if each is plain, or all are packed alike, and their dtypes are the same; else return None."""

    def kind(layer: Any) -> tuple[Any, ...]:
        packing = (layer.group_size, layer.bits, layer.mode) if "scales" in layer else None
        return type(layer), packing, [layer[name].dtype for name in WEIGHTS if name in layer]

    is_linear = isinstance(layers[0], nn.Linear | nn.QuantizedLinear)
    return _Joined(layers) if is_linear and all(kind(layer) == kind(layers[0]) for layer in layers) else None


def _arrays(layers: Sequence[Any]) -> list[mx.array | None]:
    """Return the arrays of each layer; None where it has none of a name, as an adapted layer."""
    return [layer.get(name) for layer in layers for name in WEIGHTS]


def join_projections(network: nn.Module) -> None:
    """Join, in each ``SharedInput`` of a network, the layers that can be joined, lazily."""
    for module in network.modules():
        if isinstance(module, SharedInput):
            module.join()
