"""Tests of the routing kernels against float64 and against their reference."""

from __future__ import annotations

from importlib import import_module

import mlx.core as mx
import pytest

from dgemma_mlx.kernels.moe_route import moe_route, moe_route_kernel
from tests.kernels.conftest import UseMetal
from tests.kernels.test_moe_route import DTYPES, ODD_ROWS, SIZES, assert_route, logits_and_scale, odd_logits

pytestmark = pytest.mark.kernels
module = import_module("dgemma_mlx.kernels.moe_route")


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize(("experts", "top_k"), SIZES)
def test_kernel(metal: UseMetal, experts: int, top_k: int, rows: int) -> None:
    metal(module)
    logits, scale = logits_and_scale(rows, experts, mx.float32)
    assert_route(moe_route_kernel(logits, scale, top_k), logits, scale, top_k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [256, 700])
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (8, 2), (128, 8)])
def test_kernel_at_real_sizes(metal: UseMetal, experts: int, top_k: int, rows: int, dtype: mx.Dtype) -> None:
    metal(module, check=False)
    logits, scale = logits_and_scale(rows, experts, dtype)
    assert_route(moe_route_kernel(logits, scale, top_k), logits, scale, top_k)


@pytest.mark.parametrize(("rows", "experts", "top_k"), [(2000, 128, 8), (2, 4096, 32)])
def test_kernel_with_many_rows_and_at_its_limits(metal: UseMetal, rows: int, experts: int, top_k: int) -> None:
    metal(module, check=False)
    logits, scale = logits_and_scale(rows, experts, mx.bfloat16)
    assert_route(moe_route_kernel(logits, scale, top_k), logits, scale, top_k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ODD_ROWS)
@pytest.mark.parametrize(("experts", "top_k"), [(4, 3), (40, 8)])
def test_kernel_with_special_logits(metal: UseMetal, experts: int, top_k: int, kind: str, dtype: mx.Dtype) -> None:
    metal(module)
    logits, scale = odd_logits(kind, 3, experts, dtype), mx.ones(experts, dtype)
    assert_route(moe_route_kernel(logits, scale, top_k), logits, scale, top_k)


def test_kernel_and_reference_agree_on_the_example(metal: UseMetal) -> None:
    metal(module, check=False)
    arguments = moe_route.examples[0](mx.bfloat16)
    assert moe_route.agree(moe_route.kernel(*arguments), moe_route.reference(*arguments))


@pytest.mark.parametrize(("experts", "top_k"), [(4097, 2), (64, 33)])
def test_the_reference_runs_beyond_the_kernels_limits(experts: int, top_k: int) -> None:
    logits, scale = logits_and_scale(3, experts, mx.float32)
    assert_route(moe_route_kernel(logits, scale, top_k), logits, scale, top_k)
