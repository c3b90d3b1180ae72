"""Products with packed weights. On a CPU, many rows are multiplied by plain blocks of them, unpacked on the way.

MLX's CPU ``quantized_matmul`` unpacks a weight anew for each row and multiplies without BLAS. Measured for 256 rows (2
Linux cores, matrices of 4,096 x 128 and 1,408 x 1,024): affine 4 and 8 bits 25 to 30 times slower than this with
OpenBLAS, 1.1 to 1.5 times with the linear algebra in MLX's own wheel; mxfp8 45 and 3 times. At 16 rows this was 6 to 8
times faster with OpenBLAS, and about even with the wheel's own. Other formats stay: with the latter, mxfp4 and nvfp4
would take twice as long. So does the product with a matrix as it is stored, not transposed (expected embeddings): 4 to
7 times faster with OpenBLAS, but 1.5 to 3 times slower without.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

BLOCK_BYTES = 2 << 20
"""Of weights unpacked at a time, float32."""
LEAST_ROWS = 16
_UNPACKED = {("affine", 4), ("affine", 8), ("mxfp8", 8)}

Packed = nn.QuantizedLinear | nn.QuantizedEmbedding


class Linear(nn.Linear):
    """Without bias; packed it becomes a ``PackedLinear``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine",
        quantize_input: bool = False,
    ) -> PackedLinear:
        """Called by ``mlx.nn.quantize``; None stands for the mode's own value. Inputs are never quantized."""
        from_linear: Any = PackedLinear.from_linear
        packed: PackedLinear = from_linear(self, group_size, bits, mode)
        return packed


class PackedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        """x (..., I) -> (..., O), lazily."""
        if not _in_blocks(x, self):
            return _quantized_matmul(x, self)
        parts: list[mx.array] = []
        for block in _blocks(self, x.shape[-1]):
            parts.append(_times_block(x, self, block, after=parts[-1:]))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def times_table(x: mx.array, table: nn.QuantizedEmbedding) -> mx.array:
    """x (..., M) times the transposed table (V, M) -> (..., V), in x's dtype.

    In blocks it is evaluated, one after the other into one array: in one evaluation MLX works out all blocks before it
    puts the first in its place, which takes twice the logits.
    """
    if not _in_blocks(x, table):
        return _quantized_matmul(x, table)
    product = mx.zeros((*x.shape[:-1], table.weight.shape[0]), x.dtype)
    for block in _blocks(table, x.shape[-1]):
        product[..., block] = _times_block(x, table, block)
        mx.eval(product)
    return product


def weighted_rows(weights: mx.array, table: nn.QuantizedEmbedding) -> mx.array:
    """weights (..., V) times the table (V, M) -> (..., M), in weights' dtype.

    On a CPU in float32: there MLX adds up in the weights' dtype, and for 2,000 equal probabilities in bfloat16 the sum
    was off by a quarter of the largest value.
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
    return bool(mx.default_device() == mx.Device(mx.cpu))


def _in_blocks(x: mx.array, packed: Packed) -> bool:
    """Not while training: a gradient would keep what was unpacked."""
    gains = (packed.mode, packed.bits) in _UNPACKED and x.size >= LEAST_ROWS * x.shape[-1]
    return gains and _on_cpu() and not packed.training


def _blocks(packed: Packed, inputs: int) -> list[slice]:
    """Of a module's output rows."""
    step = max(1, BLOCK_BYTES // (4 * inputs))
    return [slice(start, start + step) for start in range(0, packed.weight.shape[0], step)]


def _times_block(x: mx.array, packed: Packed, rows: slice, after: list[mx.array] | None = None) -> mx.array:
    """x (..., I) -> (..., rows): products and unpacked weights in float32. Nothing is unpacked before ``after``."""
    weight, scales, biases = packed.weight[rows], packed.scales[rows], packed.get("biases")
    if after:
        [weight] = mx.depends([weight], after)
    if biases is not None:  # float32, or MLX rounds each value
        scales, biases = scales.astype(mx.float32), biases[rows].astype(mx.float32)
    plain = mx.dequantize(weight, scales, biases, packed.group_size, packed.bits, packed.mode)
    return (x.astype(mx.float32) @ plain.astype(mx.float32).T).astype(x.dtype)


def _quantized_matmul(x: mx.array, packed: Packed) -> mx.array:
    return mx.quantized_matmul(
        x, packed.weight, packed.scales, packed.get("biases"), transpose=True, group_size=packed.group_size,
        bits=packed.bits, mode=packed.mode,
    )
