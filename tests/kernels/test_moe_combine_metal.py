"""Tests of the kernel of ``moe_combine`` against float64 and against its reference."""

from __future__ import annotations

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.kernels.moe_combine import moe_combine, moe_combine_kernel
from dgemma_mlx.kernels.moe_route import moe_route_reference
from tests.kernels.conftest import UseMetal
from tests.kernels.test_moe_combine import DTYPES, arguments, assert_combined

pytestmark = pytest.mark.kernels
module = import_module("dgemma_mlx.kernels.moe_combine")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("top_k", "width"), [(1, 1), (2, 7), (2, 64), (3, 333), (8, 1025)])
@pytest.mark.parametrize("rows", [1, 3])
def test_kernel(metal: UseMetal, rows: int, top_k: int, width: int, dtype: mx.Dtype) -> None:
    metal(module)
    given = arguments(rows, top_k, width, dtype)
    assert_combined(moe_combine_kernel(*given), given, roundings=1)


@pytest.mark.parametrize("width", [2816, 33000])  # 33,000: more than 8 values for each of 1,024 threads
def test_kernel_at_real_widths(metal: UseMetal, width: int) -> None:
    metal(module, check=False)
    given = arguments(16, 8, width, mx.bfloat16)
    assert_combined(moe_combine_kernel(*given), given, roundings=1)


def test_kernel_and_reference_agree_on_the_example(metal: UseMetal) -> None:
    metal(module, check=False)
    given = moe_combine.examples[0](mx.bfloat16)
    assert moe_combine.agree(moe_combine.kernel(*given), moe_combine.reference(*given))


def test_a_route_leads_back_to_its_rows(metal: UseMetal) -> None:
    """With experts that return their input, every row comes back, normed."""
    metal(module)
    keys = mx.random.split(mx.random.key(0), 2)
    x = mx.random.normal((37, 48), key=keys[0])
    route = moe_route_reference(mx.random.normal((37, 16), key=keys[1]), mx.ones(16), 4)
    found = moe_combine_kernel(x[route.rows], route.slots, route.weights, mx.ones(48), 1e-6)
    np.testing.assert_allclose(np.array(found), np.array(mx.fast.rms_norm(x, None, 1e-6)), rtol=1e-5, atol=1e-6)


def test_infinite_outputs_affect_only_their_own_row(metal: UseMetal) -> None:
    metal(module)
    outputs, slots, *rest = arguments(3, 2, 40, mx.float32)
    outputs[slots[1, 0], 5] = mx.inf
    found = moe_combine_kernel(outputs, slots, *rest)
    assert mx.isfinite(found).all(axis=1).tolist() == [True, False, True]
