"""Tests that arithmetic is float32 with one rounding per operation, as in MLX's operations on the CPU."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.metalsim.published import F32, normal
from tests.metalsim.simulate import simulate
from tests.metalsim.toolchain import available

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not available(), reason="needs Clang: pip install ziglang")]


def run(expression: str, **inputs: mx.array) -> NDArray[np.float32]:
    """Evaluate ``expression`` for each element i in a template where T is float."""
    kernel: Any = mx.fast.metal_kernel(
        name="each", input_names=list(inputs), output_names=["out"],
        source=f"uint i = thread_position_in_grid.x; out[i] = static_cast<T>({expression});",
    )
    size = next(iter(inputs.values())).size
    return np.array(simulate(
        kernel, inputs=list(inputs.values()), template=[("T", F32)], grid=(size, 1, 1), threadgroup=(256, 1, 1),
        output_shapes=[(size,)], output_dtypes=[F32],
    )[0])


@pytest.mark.parametrize("literal", ["0.1", "1e-1", ".1", "0.1f", "100e-3", "1.e-1"])
def test_a_literal_is_a_float(literal: str) -> None:
    x, tenth = normal(1000), np.float32(0.1)
    np.testing.assert_array_equal(run(f"x[i] * {literal} + {literal}", x=x), np.array(x) * tenth + tenth)


def test_products_and_sums_are_not_fused() -> None:
    x, y, z = (np.array(normal(1000, seed=seed)) for seed in range(3))
    found = run("x[i] * y[i] + z[i]", x=mx.array(x), y=mx.array(y), z=mx.array(z))
    np.testing.assert_array_equal(found, x * y + z)
    fused = (x.astype(np.float64) * y + z).astype(np.float32)
    assert (run("fma(x[i], y[i], z[i])", x=mx.array(x), y=mx.array(y), z=mx.array(z)) == fused).mean() > 0.99
