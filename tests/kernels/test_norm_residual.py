"""Tests of the references of both residual operations against float64 and against a layer made of norm modules."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from dgemma_mlx.kernels.attention_residual import attention_residual, attention_residual_reference
from dgemma_mlx.kernels.norm_residual import norm_residual, norm_residual_reference
from tests.kernels.norm_oracle import DTYPES, EPS, Doubles, assert_near, doubles, random, rms_norm

Arguments = tuple[Any, ...]  # the arguments of an operation


def tail_arguments(shape: tuple[int, ...], dtype: mx.Dtype) -> Arguments:
    """Return x, dense, routed, dense_weight, weight, next_weight, layer_scalar and eps."""
    rows = [random(shape, dtype, seed) for seed in range(3)]
    weights = [random(shape[-1:], dtype, 3 + seed, mean=1) for seed in range(3)]
    return *rows, *weights, mx.array([0.7], dtype), EPS


def attention_arguments(shape: tuple[int, ...], dtype: mx.Dtype) -> Arguments:
    """Return x, attended, weight, dense_weight, experts_weight, router_scale and eps."""
    rows = [random(shape, dtype, seed) for seed in range(2)]
    weights = [random(shape[-1:], dtype, 2 + seed, mean=1) for seed in range(4)]
    return *rows, *weights, EPS


def tail_oracle(given: Arguments) -> tuple[Doubles, Doubles]:
    x, dense, routed, dense_weight, weight, next_weight, layer_scalar = map(doubles, given[:-1])
    x = (x + rms_norm(rms_norm(dense, dense_weight) + routed, weight)) * layer_scalar
    return x, rms_norm(x, next_weight)


def attention_oracle(given: Arguments) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    x, attended, weight, dense_weight, experts_weight, router_scale = map(doubles, given[:-1])
    x = x + rms_norm(attended, weight)
    weights = dense_weight, experts_weight, router_scale * x.shape[-1] ** -0.5
    dense, experts, router = (rms_norm(x, w) for w in weights)
    return x, dense, experts, router


def assert_results(found: tuple[mx.array, ...], expected: tuple[Doubles, ...], dtype: mx.Dtype, roundings: int) -> None:
    for array, wide in zip(found, expected, strict=True):
        assert array.dtype == dtype
        assert_near(array, wide, roundings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (3, 64), (2, 3, 100), (1, 256, 96), (3, 2816)], ids=str)
class TestFloat64:
    def test_tail(self, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        given = tail_arguments(shape, dtype)
        assert_results(norm_residual_reference(*given), tail_oracle(given), dtype, roundings=8)

    def test_attention(self, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        given = attention_arguments(shape, dtype)
        assert_results(attention_residual_reference(*given), attention_oracle(given), dtype, roundings=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_operations_equal_a_layer_of_norm_modules(dtype: mx.Dtype) -> None:
    """All bits equal those of the published layer, written with modules around any attention, MLP and experts."""
    M = 96
    x, attended, dense, experts = (random((2, 5, M), dtype, seed) for seed in range(4))
    names = ("attention", "pre", "pre_2", "post", "post_1", "post_2", "next_input")
    norms = {name: nn.RMSNorm(M, EPS) for name in names}
    for seed, norm in enumerate(norms.values()):
        norm.weight = random((M,), dtype, 10 + seed, mean=1)
    scale, scalar = random((M,), dtype, 20, mean=1), mx.array([0.3], dtype)

    h = x + norms["attention"](attended)
    router = mx.fast.rms_norm(h, scale * M**-0.5, EPS)
    after = (h + norms["post"](norms["post_1"](dense) + norms["post_2"](experts))) * scalar

    weights = {name: norm.weight for name, norm in norms.items()}
    middle = attention_residual(x, attended, weights["attention"], weights["pre"], weights["pre_2"], scale, EPS)
    routed, after_weights = norms["post_2"](experts), [weights[name] for name in ("post_1", "post", "next_input")]
    end = norm_residual(middle.x, dense, routed, *after_weights, scalar, EPS)
    expected = h, norms["pre"](h), norms["pre_2"](h), router, after, norms["next_input"](after)
    for found, array in zip((*middle, *end), expected, strict=True):
        assert mx.array_equal(found, array)
