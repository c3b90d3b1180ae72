"""Tests of the reference of ``moe_combine`` against float64: values and gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.kernels.moe_combine import moe_combine_reference

Array = np.ndarray[Any, Any]
Arguments = tuple[mx.array, mx.array, mx.array, mx.array, float]

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
UNIT = {mx.float32: 2**-24, mx.bfloat16: 2**-8, mx.float16: 2**-11}  # relative error of one rounding


def to_numpy(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32), np.float64)


def arguments(rows: int, top_k: int, width: int, dtype: mx.Dtype) -> Arguments:
    rng = np.random.default_rng(rows * 10000 + width)
    return (
        mx.array(rng.normal(size=(rows * top_k, width)), dtype),
        mx.array(rng.permutation(rows * top_k).reshape(rows, top_k).astype(np.uint32)),
        mx.array(rng.dirichlet(np.ones(top_k), rows).astype(np.float32)),
        mx.array(rng.uniform(0.5, 2, width), dtype),
        1e-6,
    )


def by_rows(given: Arguments) -> tuple[Array, Array]:
    """Return the result in float64, and the sum of absolute values, to which rounding errors are proportional."""
    y, w, norm = (to_numpy(given[i]) for i in (0, 2, 3))
    rows, sizes = [], []
    for n, slots in enumerate(given[1].tolist()):
        parts = [w[n, k] * y[slot] for k, slot in enumerate(slots)]
        row = sum(parts)
        scale = norm / np.sqrt((row**2).mean() + given[4])
        rows.append(row * scale)
        sizes.append(np.abs(parts).sum(axis=0) * scale)
    return np.array(rows), np.array(sizes)


def assert_combined(found: mx.array, given: Arguments, roundings: int) -> None:
    """Assert that errors are at most ``roundings`` rounding errors of the dtype, plus 5e-6 for float32 sums over a row.

    The kernel rounds once, its result. The reference rounds the weights, the sums, the norm's mean and its result.
    """
    dtype = given[0].dtype
    assert found.dtype == dtype
    expected, size = by_rows(given)
    assert (np.abs(to_numpy(found) - expected) <= (roundings * UNIT[dtype] + 5e-6) * size + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("top_k", "width"), [(1, 1), (2, 7), (2, 64), (3, 333), (8, 2816)])
@pytest.mark.parametrize("rows", [1, 3, 256])
def test_reference(rows: int, top_k: int, width: int, dtype: mx.Dtype) -> None:
    given = arguments(rows, top_k, width, dtype)
    assert_combined(moe_combine_reference(*given), given, roundings=4)


def test_rows_of_zeros_stay_zeros() -> None:
    outputs, *rest = arguments(3, 2, 40, mx.float32)
    assert (moe_combine_reference(mx.zeros_like(outputs), *rest) == 0).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_gradient(dtype: mx.Dtype) -> None:
    """Compare with central differences in float64 along one direction, for each argument that has a gradient."""
    outputs, slots, weights, norm_weight, eps = arguments(5, 2, 24, dtype)
    rng = np.random.default_rng(0)
    goal = rng.normal(size=(5, 24))

    def loss(outputs: mx.array, weights: mx.array, norm_weight: mx.array) -> mx.array:
        found = moe_combine_reference(outputs, slots, weights, norm_weight, eps)
        return (found.astype(mx.float32) * mx.array(goal, mx.float32)).sum()

    at = outputs, weights, norm_weight
    gradients = mx.grad(loss, argnums=(0, 1, 2))(*at)
    step = 1e-3
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (-1, 1):
            moved = [to_numpy(a) + (sign * step * direction if j == i else 0) for j, a in enumerate(at)]
            y = (moved[0][np.array(slots)] * moved[1][..., None]).sum(axis=1)
            ends.append((y / np.sqrt((y**2).mean(axis=1, keepdims=True) + eps) * moved[2] * goal).sum())
        expected = (ends[1] - ends[0]) / (2 * step)
        size = np.linalg.norm(to_numpy(gradient)) * np.linalg.norm(direction)
        assert abs((to_numpy(gradient) * direction).sum() - expected) < (1e-4 if dtype == mx.float32 else 1e-2) * size
