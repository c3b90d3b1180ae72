"""Tests of the kernels of ``sparse_soft_embedding`` against float64 and against their references."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.kernels.dispatch import DispatchedOperation
from dgemma_mlx.kernels.sparse_soft_embedding import (
    dense_soft_embedding,
    dense_soft_embedding_kernel,
    packed_soft_embedding,
    packed_soft_embedding_kernel,
)
from tests.kernels.conftest import UseMetal
from tests.kernels.test_sparse_soft_embedding import (
    COUNTS,
    DTYPES,
    PACKINGS,
    PLACES,
    assert_soft,
    new_table,
    some_lists,
)

pytestmark = pytest.mark.kernels
module = import_module("dgemma_mlx.kernels.sparse_soft_embedding")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(8, 1), (8, 7), (1, 64), (3, 517)])
def test_dense_kernel(metal: UseMetal, rows: int, width: int, dtype: mx.Dtype) -> None:
    metal(module)
    table, lists = new_table(50, width, dtype, None), some_lists(50, PLACES, COUNTS[-rows:])
    assert_soft(dense_soft_embedding_kernel(table.weight, *lists), table, *lists)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_packed_kernel(metal: UseMetal, packing: dict[str, Any], dtype: mx.Dtype) -> None:
    metal(module)
    table, lists = new_table(50, 384, dtype, packing), some_lists(50, PLACES, COUNTS)
    found = packed_soft_embedding_kernel(
        table.weight, table.scales, table.get("biases"), *lists, table.group_size, table.bits, table.mode
    )
    assert_soft(found, table, *lists)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_small_float(metal: UseMetal, mode: str) -> None:
    """The table holds every value of 4 or 8 bits but NaN, with scales from very small to large ones."""
    metal(module)
    bits, group_size = (8 if mode == "mxfp8" else 4), (16 if mode == "nvfp4" else 32)
    values = np.arange(256, dtype=np.uint8)
    if bits == 8:
        values[[127, 255]] = 0
    packed = mx.array(np.tile(values, (2, 1)).view(np.uint32))
    M = packed.shape[1] * 32 // bits
    largest = 126 if mode == "nvfp4" else 200  # 448 in E4M3, 2^73 in E8M0
    scales = np.linspace(1, largest, 2 * M // group_size).astype(np.uint8).reshape(2, -1)
    ids, counts = mx.array([[0], [1]]), mx.array([1, 1])
    found = packed_soft_embedding_kernel(
        packed, mx.array(scales), None, ids, mx.ones((2, 1)), counts, group_size, bits, mode
    )
    expected = mx.dequantize(packed, mx.array(scales), None, group_size, bits, mode, dtype=mx.float32)
    assert found.tolist() == expected.tolist()


def test_every_packing_has_a_kernel() -> None:
    assert {(packing.get("mode", "affine"), packing["bits"]) for packing in PACKINGS} == packed_soft_embedding.keys()


@pytest.mark.parametrize("operation", [dense_soft_embedding, *packed_soft_embedding.values()], ids=lambda op: op.name)
def test_kernel_agrees_with_the_reference_on_the_example(
    metal: UseMetal, operation: DispatchedOperation[..., mx.array]
) -> None:
    metal(module, check=False)
    arguments = operation.examples[0](operation.dtypes[0])
    assert operation.agree(operation.kernel(*arguments), operation.reference(*arguments))
