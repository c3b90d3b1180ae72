"""Tests of expected embeddings of token lists against float64: kinds of tables, sizes, and lengths of lists."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dgemma_mlx.kernels.canvas_sampler import MAX_KEPT, canvas_sampler_reference
from dgemma_mlx.kernels.sparse_soft_embedding import sparse_soft_embedding

Array = np.ndarray[Any, Any]

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
PACKINGS: list[dict[str, Any]] = [
    *[{"bits": bits, "group_size": 64} for bits in (1, 2, 3, 4, 5, 6, 8)],
    *[{"bits": bits, "group_size": 32} for bits in (3, 4, 5, 6)],
    *[{"bits": bits, "group_size": 128} for bits in (5, 8)],
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    {"bits": 4, "group_size": 16, "mode": "nvfp4"},
]
PLACES = 20
COUNTS = [0, 1, 7, 8, 9, 19, 20, 21]  # the last list is incomplete


def new_table(vocab_size: int, width: int, dtype: mx.Dtype, packing: dict[str, Any] | None) -> Any:
    table = nn.Embedding(vocab_size, width)
    table.weight = mx.random.normal((vocab_size, width), dtype, key=mx.random.key(width))
    return table if packing is None else table.to_quantized(**packing)


def some_lists(vocab_size: int, places: int, counts: list[int]) -> tuple[mx.array, mx.array, mx.array]:
    """Return random lists. Places after a list's end hold valid ids and weights, whose use would change the result."""
    rng = np.random.default_rng(vocab_size)
    ids, weights = rng.integers(0, vocab_size, (len(counts), places)), rng.random((len(counts), places))
    return mx.array(ids, mx.int32), mx.array(weights, mx.float32), mx.array(counts, mx.int32)


def unpacked(table: Any) -> Array:
    """Return the table's values in float64, unpacked without rounding to the table's dtype."""
    if isinstance(table, nn.QuantizedEmbedding):
        parts = [table.scales, table.get("biases")]
        if table.mode == "affine":
            parts = [part.astype(mx.float32) for part in parts]
        values = mx.dequantize(table.weight, *parts, table.group_size, table.bits, table.mode)
    else:
        values = table.weight
    return np.array(values.astype(mx.float32), np.float64)


def assert_soft(found: mx.array, table: Any, ids: mx.array, weights: mx.array, counts: mx.array) -> None:
    """Assert that ``found`` equals the sums over the lists in float64, and 0 for an incomplete list."""
    values = unpacked(table)[np.array(ids)]  # (N, S, M)
    used = np.arange(ids.shape[1]) < np.array(mx.where(counts > ids.shape[1], 0, counts))[:, None]
    expected = (np.where(used, np.array(weights, np.float64), 0)[..., None] * values).sum(axis=1)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-5)



@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("packing", [None, *PACKINGS], ids=str)
def test_every_kind_of_table(packing: dict[str, Any] | None, dtype: mx.Dtype) -> None:
    table, lists = new_table(50, 128, dtype, packing), some_lists(50, PLACES, COUNTS)
    assert_soft(sparse_soft_embedding(table, *lists), table, *lists)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 2816])
def test_widths_and_dtypes(width: int, dtype: mx.Dtype) -> None:
    table, lists = new_table(50, width, dtype, None), some_lists(50, PLACES, COUNTS)
    assert_soft(sparse_soft_embedding(table, *lists), table, *lists)


def test_all_lists_are_empty() -> None:
    table, lists = new_table(50, 8, mx.bfloat16, None), some_lists(50, PLACES, [0, 21])
    assert not sparse_soft_embedding(table, *lists).any().item()


def test_leading_dimensions() -> None:
    table, (ids, weights, counts) = new_table(50, 8, mx.float32, None), some_lists(50, PLACES, COUNTS)
    shaped = ids.reshape(2, 4, PLACES), weights.reshape(2, 4, PLACES), counts.reshape(2, 4)
    found = sparse_soft_embedding(table, *shaped)
    assert found.shape == (2, 4, 8)
    assert_soft(found.reshape(8, 8), table, ids, weights, counts)


def test_with_the_sampler_it_is_close_to_the_expected_embedding() -> None:
    """The rows are nearly certain, so their lists hold nearly all of the probability."""
    logits = 8 * mx.random.normal((5, 1000), key=mx.random.key(0))
    table = new_table(1000, 16, mx.float32, None)
    sample = canvas_sampler_reference(logits, mx.zeros(5), None, 0.5)
    assert (sample.kept_count <= MAX_KEPT).all().item()
    found = sparse_soft_embedding(table, sample.kept_ids, sample.kept_weights, sample.kept_count)
    expected = mx.softmax(logits / 0.5, axis=-1) @ table.weight
    lost = 1 - sample.kept_mass.min().item()
    assert mx.abs(found - expected).max().item() < 4 * lost + 1e-5
