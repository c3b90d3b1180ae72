"""Tests of the kernels of ``sparse_soft_embedding`` against float64 and against their references."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
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
    KERNEL_FORMATS,
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
@pytest.mark.parametrize("packing", KERNEL_FORMATS[1:], ids=str)
def test_packed_kernel(metal: UseMetal, packing: dict[str, Any], dtype: mx.Dtype) -> None:
    metal(module)
    table, lists = new_table(50, 384, dtype, packing), some_lists(50, PLACES, COUNTS)
    found = packed_soft_embedding_kernel(table.weight, table.scales, table.biases, *lists, table.group_size, table.bits)
    assert_soft(found, table, *lists)


@pytest.mark.parametrize("operation", [dense_soft_embedding, *packed_soft_embedding.values()], ids=lambda op: op.name)
def test_kernel_agrees_with_the_reference_on_the_example(
    metal: UseMetal, operation: DispatchedOperation[..., mx.array]
) -> None:
    metal(module, check=False)
    arguments = operation.examples[0](mx.bfloat16)
    some = [part[:16] if isinstance(part, mx.array) and len(part) == 32 else part for part in arguments]  # some lists
    assert operation.agree(operation.kernel(*some), operation.reference(*some))
