"""Tests of the routing's reference against float64, with ties, infinities and NaN among the logits."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.kernels.moe_route import Route, moe_route_reference

Array = np.ndarray[Any, Any]

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
SIZES = [(1, 1), (4, 2), (7, 3), (8, 8), (33, 5), (128, 8)]  # experts, top_k
ODD_ROWS = ["ties", "equal", "inf", "-inf", "huge", "nan", "all nan", "zeros"]


def to_numpy(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32), np.float64)


def logits_and_scale(rows: int, experts: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(rows * 1000 + experts)
    return mx.array(rng.normal(size=(rows, experts)) * 3, dtype), mx.array(rng.uniform(0.5, 2, experts), dtype)


def odd_logits(kind: str, rows: int, experts: int, dtype: mx.Dtype) -> mx.array:
    rng = np.random.default_rng(experts)
    x = rng.normal(size=(rows, experts))
    one = rng.integers(experts, size=rows)
    if kind == "ties":
        x = x.round()
    elif kind == "equal":
        x[:] = 0.7
    elif kind == "-inf":  # only -inf in the first row
        x[rng.random(x.shape) < 0.8] = -math.inf
        x[0] = -math.inf
    elif kind == "zeros":
        x = np.where(x < 0, -0.0, 0.0)
    elif kind == "all nan":
        x[:] = math.nan
    else:
        x[np.arange(rows), one] = {"inf": math.inf, "huge": 6e4, "nan": math.nan}[kind]
    return mx.array(x, dtype)


def by_rows(logits: mx.array, scale: mx.array, top_k: int) -> tuple[Array, list[list[int]], list[tuple[int, int]]]:
    """Return weights and experts of each row, and the sorted pairs (expert, row), computed in float64."""
    weights, experts = [], []
    factors = to_numpy(scale)
    for row in to_numpy(logits):
        chosen = sorted(range(len(row)), key=lambda e: (math.isnan(row[e]), -row[e], e))[:top_k]
        with np.errstate(invalid="ignore"):  # inf - inf
            p = np.exp(row[chosen] - row[chosen[0]])
        weights.append(p / p.sum() * factors[chosen])
        experts.append(chosen)
    work = sorted((e, n) for n, chosen in enumerate(experts) for e in chosen)
    return np.array(weights), experts, work


def assert_route(route: Route, logits: mx.array, scale: mx.array, top_k: int) -> None:
    weights, experts, work = by_rows(logits, scale, top_k)
    assert route.weights.dtype == mx.float32
    assert {x.dtype for x in route[1:]} == {mx.uint32}
    assert route.indices.tolist() == experts
    np.testing.assert_allclose(to_numpy(route.weights), weights, rtol=1e-5, atol=1e-30)
    assert list(zip(route.experts.tolist(), route.rows.tolist(), strict=True)) == work
    for n, slots in enumerate(route.slots.tolist()):
        assert [work[slot] for slot in slots] == [(e, n) for e in experts[n]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 256, 700])
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_reference(experts: int, top_k: int, rows: int, dtype: mx.Dtype) -> None:
    logits, scale = logits_and_scale(rows, experts, dtype)
    assert_route(moe_route_reference(logits, scale, top_k), logits, scale, top_k)


@pytest.mark.parametrize("kind", ODD_ROWS)
@pytest.mark.parametrize(("experts", "top_k"), SIZES[1:])
def test_reference_with_special_logits(experts: int, top_k: int, kind: str) -> None:
    logits = odd_logits(kind, 40, experts, mx.float32)
    scale = mx.ones(experts)
    assert_route(moe_route_reference(logits, scale, top_k), logits, scale, top_k)


def test_weights_are_the_renormalised_softmax_over_all_experts() -> None:
    logits, scale = logits_and_scale(50, 16, mx.float32)
    route = moe_route_reference(logits, scale, 4)
    p = np.exp(to_numpy(logits))
    p /= p.sum(axis=1, keepdims=True)
    chosen = np.take_along_axis(p, np.array(route.indices), axis=1)
    assert (chosen[:, -1] >= np.sort(p, axis=1)[:, -4]).all()
    chosen *= to_numpy(scale)[np.array(route.indices)] / chosen.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(route.weights), chosen, rtol=1e-5)


def test_the_gradient_equals_that_of_the_softmax_over_all_experts() -> None:
    logits, scale = logits_and_scale(9, 16, mx.float32)
    goal = mx.random.normal((9, 4), key=mx.random.key(0))

    def through_route(logits: mx.array, scale: mx.array) -> mx.array:
        return (moe_route_reference(logits, scale, 4).weights * goal).sum()

    def through_softmax(logits: mx.array, scale: mx.array) -> mx.array:
        indices = moe_route_reference(logits, scale, 4).indices
        chosen = mx.take_along_axis(mx.softmax(logits, axis=-1), indices, axis=-1)
        return (chosen / chosen.sum(axis=-1, keepdims=True) * scale[indices] * goal).sum()

    found, expected = (mx.grad(f, argnums=(0, 1))(logits, scale) for f in (through_route, through_softmax))
    for a, b in zip(found, expected, strict=True):
        assert mx.allclose(a, b, rtol=1e-4, atol=1e-6)
        assert mx.abs(a).max() > 0.01
