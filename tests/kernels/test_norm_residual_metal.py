"""Tests of the kernels of both residual operations against float64 and against their references."""

from __future__ import annotations

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.kernels.attention_residual import (
    attention_residual,
    attention_residual_kernel,
    attention_residual_reference,
)
from dgemma_mlx.kernels.norm_residual import norm_residual, norm_residual_kernel, norm_residual_reference
from tests.kernels.conftest import UseMetal
from tests.kernels.norm_oracle import DTYPES, Doubles, assert_near, assert_same_bits, doubles, rms_norm, rounded
from tests.kernels.test_norm_residual import (
    assert_results,
    attention_arguments,
    attention_oracle,
    tail_arguments,
    tail_oracle,
)

pytestmark = pytest.mark.kernels
attention_module = import_module("dgemma_mlx.kernels.attention_residual")
tail_module = import_module("dgemma_mlx.kernels.norm_residual")

# Less than a SIMD group, one full group, a remainder in threads and in the values of a thread, several groups.
SHAPES = [(1, 7), (3, 64), (2, 3, 100), (1, 96), (3, 333), (2, 2816)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestFloat64:
    def test_tail(self, metal: UseMetal, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        metal(tail_module)
        given = tail_arguments(shape, dtype)
        found = norm_residual_kernel(*given)
        assert_results(found, tail_oracle(given), dtype, roundings=6)
        for array, expected in zip(found, norm_residual_reference(*given), strict=True):
            assert_near(array, expected, roundings=6)

    def test_attention(self, metal: UseMetal, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        metal(attention_module)
        given = attention_arguments(shape, dtype)
        found = attention_residual_kernel(*given)
        assert_results(found, attention_oracle(given), dtype, roundings=4)
        for array, expected in zip(found, attention_residual_reference(*given), strict=True):
            assert_near(array, expected, roundings=4)


class TestRoundsWhereTheModulesDo:
    """The kernels round after each norm, addition and product, and compute the rms of rounded values."""

    def test_tail(self, metal: UseMetal) -> None:
        metal(tail_module)
        given = tail_arguments((4, 333), mx.bfloat16)
        x, dense, routed, dense_weight, weight, next_weight, layer_scalar = map(doubles, given[:-1])
        both = _round(_round(rms_norm(dense, dense_weight)) + routed)
        stream = _round(_round(x + _round(rms_norm(both, weight))) * layer_scalar)
        found_stream, found_normed = norm_residual_kernel(*given)
        assert_same_bits(found_stream, stream)
        assert_same_bits(found_normed, rms_norm(stream, next_weight))

    def test_attention(self, metal: UseMetal) -> None:
        metal(attention_module)
        given = attention_arguments((4, 333), mx.bfloat16)
        x, attended, weight, dense_weight, experts_weight, router_scale = map(doubles, given[:-1])
        stream = _round(x + _round(rms_norm(attended, weight)))
        router_weight = _round(router_scale * _round(np.array(333**-0.5)))
        found = attention_residual_kernel(*given)
        assert_same_bits(found.x, stream)
        for array, w in zip(found[1:], (dense_weight, experts_weight, router_weight), strict=True):
            assert_same_bits(array, rms_norm(stream, w))


def _round(x: Doubles) -> Doubles:
    return rounded(x, mx.bfloat16)


@pytest.mark.parametrize("shape", [(256, 2816), (2, 8200)], ids=str)  # 8,200: more than 8 values per thread
def test_real_widths(metal: UseMetal, shape: tuple[int, ...]) -> None:
    metal(tail_module, check=False)
    metal(attention_module, check=False)
    tail, middle = tail_arguments(shape, mx.bfloat16), attention_arguments(shape, mx.bfloat16)
    assert_results(norm_residual_kernel(*tail), tail_oracle(tail), mx.bfloat16, roundings=6)
    assert_results(attention_residual_kernel(*middle), attention_oracle(middle), mx.bfloat16, roundings=4)


def test_kernels_agree_with_the_references_on_the_examples(metal: UseMetal) -> None:
    metal(tail_module, check=False)
    metal(attention_module, check=False)
    tail, middle = norm_residual.examples[0](mx.bfloat16), attention_residual.examples[0](mx.bfloat16)
    assert norm_residual.agree(norm_residual.kernel(*tail), norm_residual.reference(*tail))
    assert attention_residual.agree(attention_residual.kernel(*middle), attention_residual.reference(*middle))


def test_zeros_stay_zero(metal: UseMetal) -> None:
    """The rms of a row of zeros is 0. Because of eps, the result is not NaN."""
    metal(tail_module)
    metal(attention_module)
    zeros = mx.zeros((2, 40))
    middle = attention_residual_kernel(zeros, zeros, *attention_arguments((2, 40), mx.float32)[2:])
    end = norm_residual_kernel(zeros, zeros, zeros, *tail_arguments((2, 40), mx.float32)[3:])
    assert not any(array.any() for array in (*middle, *end))


def test_infinities_affect_only_their_own_row(metal: UseMetal) -> None:
    metal(tail_module)
    x, dense, routed, *rest = tail_arguments((3, 40), mx.bfloat16)
    routed[1, 39] = mx.inf
    for array in norm_residual_kernel(x, dense, routed, *rest):
        assert mx.isfinite(array).all(axis=-1).tolist() == [True, False, True]
