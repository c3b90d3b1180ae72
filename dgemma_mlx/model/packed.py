"""Matrix products with packed (quantized) weights.

On a CPU, a product with many rows unpacks the weights one block at a time and multiplies by the plain block, because
MLX's CPU ``quantized_matmul`` unpacks every weight again for each row and multiplies without BLAS.

Measured for 256 rows with matrices of 4,096 x 128 and 1,408 x 1,024 on 2 Linux cores: for affine 4 and 8 bits,
``quantized_matmul`` was 25 to 30 times slower than the blocks with OpenBLAS, and 1.1 to 1.5 times slower with the
linear algebra of MLX's own wheel. For mxfp8 it was 45 and 3 times slower. For 16 rows the blocks were 6 to 8 times
faster with OpenBLAS, and about equally fast with the wheel's linear algebra.

Two cases keep ``quantized_matmul``. The formats mxfp4 and nvfp4 would take twice as long in blocks with the wheel's
linear algebra. The product with a matrix that is not transposed (expected embeddings) would be 4 to 7 times faster in
blocks with OpenBLAS, but 1.5 to 3 times slower without.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

BLOCK_BYTES = 2 << 20  # size of a block of unpacked weights, as float32
LEAST_ROWS = 16  # rows of x from which the products are computed in blocks
WEIGHTS = ("weight", "scales", "biases")  # the arrays of a linear layer; plain ones have only the first
_UNPACKED = {("affine", 4), ("affine", 8), ("mxfp8", 8)}  # (mode, bits) of the formats that are unpacked in blocks


class Packed(Protocol):
    """A module with packed weights (O, I), or (E, O, I) for the matrices of E experts."""

    group_size: int
    bits: int
    mode: str
    weight: mx.array
    scales: mx.array

    @property
    def training(self) -> bool: ...

    def get(self, key: str, /) -> Any: ...


class Linear(nn.Linear):
    """A linear layer without bias. Quantizing it gives a ``PackedLinear``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine",
        quantize_input: bool = False,
    ) -> PackedLinear:
        """Return this layer with packed weights. ``mlx.nn.quantize`` calls this method.

        ``group_size`` and ``bits`` default to the values that MLX uses for the mode. ``quantize_input`` is ignored:
        inputs are never quantized.
        """
        from_linear: Any = PackedLinear.from_linear
        packed: PackedLinear = from_linear(self, group_size, bits, mode)
        return packed


class PackedLinear(nn.QuantizedLinear):
    """A linear layer without bias and with packed weights, which a CPU multiplies in unpacked blocks."""

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the layer to x (..., I) and return (..., O) in x's dtype, lazily."""
        if not in_blocks(x, self):
            return _quantized_matmul(x, self)
        parts: list[mx.array] = []
        for block in _blocks(self.weight.shape[0], x.shape[-1]):
            parts.append(_times_block(x, self, block, after=parts[-1:]))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def times_table(x: mx.array, table: nn.QuantizedEmbedding) -> mx.array:
    """Return x (..., M) times the transposed embedding table (V, M): (..., V), in x's dtype.

    When the product is computed in blocks, each block is evaluated before the next and written into one array. In a
    single evaluation, MLX would compute all blocks before it copied the first, which takes twice the memory of the
    logits.
    """
    if not in_blocks(x, table):
        return _quantized_matmul(x, table)
    product = mx.zeros((*x.shape[:-1], table.weight.shape[0]), x.dtype)
    for block in _blocks(table.weight.shape[0], x.shape[-1]):
        product[..., block] = _times_block(x, table, block)
        mx.eval(product)
    return product


def times_experts(x: mx.array, packed: Packed, experts: mx.array) -> mx.array:
    """Return each row of x (N, I) times the transposed matrix of its expert, in blocks: (N, O), in x's dtype.

    ``packed`` holds the matrices (E, O, I), and ``experts`` (N,) the expert of each row, ascending. They are evaluated,
    because the rows of an expert are multiplied together, and how many these are decides the shapes.
    """
    count, outputs, _ = packed.weight.shape
    ends = np.searchsorted(np.array(experts), np.arange(count), side="right").tolist()
    product = mx.zeros((x.shape[0], outputs), x.dtype)
    last: list[mx.array] = []
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        for block in _blocks(outputs, x.shape[-1]) if end > start else []:
            last = [_times_block(x[start:end], packed, (expert, block), after=last)]
            product[start:end, block] = last[0]
    return product


def weighted_rows(weights: mx.array, table: nn.QuantizedEmbedding) -> mx.array:
    """Return weights (..., V) times the embedding table (V, M): (..., M), in the dtype of ``weights``.

    On a CPU the product is computed in float32, because MLX accumulates in the dtype of its inputs there. For 2,000
    equal probabilities in bfloat16, the error of the sum was a quarter of the largest value.
    """
    wide, scales, biases = weights, table.scales, table.get("biases")
    if _on_cpu():
        wide = weights.astype(mx.float32)
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    product: mx.array = mx.quantized_matmul(
        wide, table.weight, scales, biases, transpose=False, group_size=table.group_size, bits=table.bits,
        mode=table.mode,
    )
    return product.astype(weights.dtype)


def _on_cpu() -> bool:
    """Return whether the CPU is MLX's default device."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def in_blocks(x: mx.array, packed: Packed) -> bool:
    """Return whether to multiply rows x (..., I) by unpacked blocks of a matrix, or of a stack of experts' matrices.

    In training this is False: a gradient would keep the blocks.
    """
    matrices = packed.weight.shape[0] if packed.weight.ndim == 3 else 1
    gains = (packed.mode, packed.bits) in _UNPACKED and x.size >= LEAST_ROWS * matrices * x.shape[-1]
    return gains and _on_cpu() and not packed.training


def _blocks(outputs: int, inputs: int) -> list[slice]:
    """Split the rows of a matrix (O, I) into slices of at most ``BLOCK_BYTES`` unpacked weights."""
    step = max(1, BLOCK_BYTES // (4 * inputs))
    return [slice(start, start + step) for start in range(0, outputs, step)]


def _times_block(
    x: mx.array, packed: Packed, rows: slice | tuple[int, slice], after: Sequence[mx.array] = ()
) -> mx.array:
    """Return x (N, I) times some rows of the transposed weights: (N, rows), in x's dtype.

    ``rows`` is an index into the packed weights: rows of the matrix, or an expert and rows of its matrix. The weights
    are unpacked to float32 and multiplied in float32, and not before the arrays in ``after`` exist.
    """
    weight, scales, biases = packed.weight[rows], packed.scales[rows], packed.get("biases")
    if after:
        [weight] = mx.depends([weight], list(after))
    if biases is not None:  # in half precision, MLX would round each unpacked value
        scales, biases = scales.astype(mx.float32), biases[rows].astype(mx.float32)
    plain = mx.dequantize(weight, scales, biases, packed.group_size, packed.bits, packed.mode)
    return (x.astype(mx.float32) @ plain.astype(mx.float32).T).astype(x.dtype)


def _quantized_matmul(x: mx.array, packed: Packed) -> mx.array:
    """Return x (..., I) times the transposed packed weights: (..., O)."""
    return mx.quantized_matmul(
        x, packed.weight, packed.scales, packed.get("biases"), transpose=True, group_size=packed.group_size,
        bits=packed.bits, mode=packed.mode,
    )
