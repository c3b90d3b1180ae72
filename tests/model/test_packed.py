"""Tests that products with packed weights equal products with the unpacked weights, in blocks and without."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dgemma_mlx.model import packed as packed_module
from dgemma_mlx.model.experts import ExpertLinear, QuantizedExpertLinear
from dgemma_mlx.model.packed import LEAST_ROWS, Linear, PackedLinear, in_blocks, times_table

FORMATS: dict[str, dict[str, Any]] = {
    "affine 4": {"bits": 4, "group_size": 32},
    "affine 6": {"bits": 6, "group_size": 64},
    "affine 8": {"bits": 8, "group_size": 64},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}
WIDTH = 64
SHAPES = [(1,), (LEAST_ROWS - 1,), (LEAST_ROWS,), (2, LEAST_ROWS + 1), (1, 3, 40)]


def module(kind: str, outputs: int, dtype: mx.Dtype, packing: dict[str, Any]) -> Any:
    plain: Any = Linear(WIDTH, outputs) if kind == "linear" else nn.Embedding(outputs, WIDTH)
    plain.weight = mx.random.normal((outputs, WIDTH), key=mx.random.key(outputs)).astype(dtype)
    return plain.to_quantized(**packing).eval()


def product(packed: Any, x: mx.array) -> mx.array:
    return packed(x) if isinstance(packed, PackedLinear) else times_table(x, packed)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("packing", FORMATS)
@pytest.mark.parametrize("kind", ["linear", "table"])
@pytest.mark.parametrize("outputs", [1, 37, 64, 131])
def test_a_product_equals_that_of_unpacked_weights(
    monkeypatch: pytest.MonkeyPatch, kind: str, packing: str, dtype: mx.Dtype, outputs: int
) -> None:
    """With blocks of 32 rows, a matrix has less than one block, some blocks and a rest, or a whole number of blocks."""
    monkeypatch.setattr(packed_module, "BLOCK_BYTES", 32 * 4 * WIDTH)
    packed = module(kind, outputs, dtype, FORMATS[packing])
    parts = [packed.scales, packed.get("biases")]
    if parts[1] is not None:
        parts = [part.astype(mx.float32) for part in parts]
    weight = mx.dequantize(packed.weight, *parts, packed.group_size, packed.bits, packed.mode).astype(mx.float32)
    for shape in SHAPES:
        x = mx.random.normal((*shape, WIDTH), key=mx.random.key(len(shape))).astype(dtype)
        found = product(packed, x)
        assert (found.shape, found.dtype) == ((*shape, outputs), dtype)
        expected = np.array(x.astype(mx.float32), np.float64) @ np.array(weight, np.float64).T
        by_mlx = mx.quantized_matmul(
            x, packed.weight, packed.scales, packed.get("biases"), group_size=packed.group_size, bits=packed.bits,
            mode=packed.mode,
        )
        rounding = {mx.float32: 1e-5, mx.bfloat16: 0.06, mx.float16: 0.008}[dtype] * np.abs(expected).max()
        np.testing.assert_allclose(np.array(found.astype(mx.float32)), expected, atol=rounding)
        np.testing.assert_allclose(
            np.array(found.astype(mx.float32)), np.array(by_mlx.astype(mx.float32)), atol=2 * rounding
        )


@pytest.mark.parametrize("kind", ["linear", "table"])
def test_a_product_has_a_gradient(kind: str) -> None:
    packed = module(kind, 48, mx.float32, FORMATS["affine 4"]).train()
    weight = mx.dequantize(packed.weight, packed.scales, packed.biases, packed.group_size, packed.bits)
    x = mx.random.normal((2 * LEAST_ROWS, WIDTH))
    found, expected = (mx.grad(lambda x, by=by: (by(x) ** 2).sum())(x) for by in (
        lambda x: product(packed, x), lambda x: x @ weight.T,
    ))  # fmt: skip
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(mx.metal.is_available(), reason="nothing is unpacked on Metal")
@pytest.mark.parametrize(("kind", "most_blocks"), [("linear", 12), ("table", 8)])
def test_only_a_few_blocks_are_unpacked_at_a_time(kind: str, most_blocks: int) -> None:
    packed = module(kind, 16 * packed_module.BLOCK_BYTES // (4 * WIDTH), mx.float32, FORMATS["affine 4"])
    x = mx.random.normal((LEAST_ROWS, WIDTH))
    mx.eval(packed.parameters(), x)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = product(packed, x)
    mx.eval(result)
    copies = 1 if kind == "table" else 2
    assert mx.get_peak_memory() - before < copies * result.nbytes + most_blocks * packed_module.BLOCK_BYTES
    mx.clear_cache()
    assert mx.get_active_memory() - before <= result.nbytes + 4096  # no unpacked block remains


EXPERTS = 6


def expert_maps(packing: dict[str, Any], outputs: int, dtype: mx.Dtype = mx.float32) -> QuantizedExpertLinear:
    plain = ExpertLinear(EXPERTS, WIDTH, outputs)
    plain.weight = mx.random.normal((EXPERTS, outputs, WIDTH), key=mx.random.key(outputs)).astype(dtype)
    packed = plain.to_quantized(**packing)
    packed.eval()
    return packed


@pytest.mark.parametrize("counts", [
    [LEAST_ROWS] * EXPERTS, [0, 200, 1, 0, 7, 0], [200, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 200], [1, 0, 2, 0, 0, 3],
])  # fmt: skip
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("packing", FORMATS)
@pytest.mark.parametrize("outputs", [64, 131])
def test_the_product_with_experts_equals_that_of_unpacked_weights(
    monkeypatch: pytest.MonkeyPatch, packing: str, dtype: mx.Dtype, outputs: int, counts: list[int]
) -> None:
    """With blocks of 32 rows; some experts have no row, one row, or all rows."""
    monkeypatch.setattr(packed_module, "BLOCK_BYTES", 32 * 4 * WIDTH)
    packed, indices = expert_maps(FORMATS[packing], outputs, dtype), np.repeat(range(EXPERTS), counts)
    biases = packed.get("biases")
    scales, biases = (packed.scales, None) if biases is None else (
        packed.scales.astype(mx.float32), biases.astype(mx.float32)
    )  # fmt: skip
    weight = mx.dequantize(packed.weight, scales, biases, packed.group_size, packed.bits, packed.mode)
    x = mx.random.normal((len(indices), 1, WIDTH), key=mx.random.key(1)).astype(dtype)
    found = packed(x, mx.array(indices, mx.uint32), sorted_indices=True)
    assert (found.shape, found.dtype) == ((len(indices), 1, outputs), dtype)
    expected = np.einsum(
        "noi,ni->no", np.array(weight.astype(mx.float32), np.float64)[indices],
        np.array(x[:, 0].astype(mx.float32), np.float64),
    )  # fmt: skip
    rounding = {mx.float32: 1e-5, mx.bfloat16: 0.06, mx.float16: 0.008}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(np.array(found[:, 0].astype(mx.float32)), expected, atol=rounding)


def test_the_product_with_experts_has_a_gradient() -> None:
    packed = expert_maps(FORMATS["affine 4"], 48)
    packed.train()
    weight = mx.dequantize(packed.weight, packed.scales, packed.biases, packed.group_size, packed.bits)
    indices = mx.array(np.repeat(range(EXPERTS), 2 * LEAST_ROWS), mx.uint32)
    x = mx.random.normal((indices.size, 1, WIDTH))
    found, expected = (mx.grad(lambda x, by=by: (by(x) ** 2).sum())(x) for by in (
        lambda x: packed(x, indices, sorted_indices=True), lambda x: x @ weight[indices].swapaxes(-1, -2),
    ))  # fmt: skip
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(mx.metal.is_available(), reason="nothing is unpacked on Metal")
def test_only_a_few_blocks_of_experts_are_unpacked_at_a_time() -> None:
    packed = expert_maps(FORMATS["affine 4"], 4 * packed_module.BLOCK_BYTES // (4 * WIDTH))
    indices = mx.array(np.repeat(range(EXPERTS), LEAST_ROWS), mx.uint32)
    x = mx.random.normal((indices.size, 1, WIDTH))
    assert in_blocks(x, packed)
    mx.eval(packed.parameters(), x, indices)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    result = packed(x, indices, sorted_indices=True)
    mx.eval(result)
    assert mx.get_peak_memory() - before < 2 * result.nbytes + 10 * packed_module.BLOCK_BYTES  # of 24 blocks
    mx.clear_cache()
    assert mx.get_active_memory() - before <= result.nbytes + 4096
