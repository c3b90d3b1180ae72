"""Tests of the kernel of ``qk_norm_rope`` against float64 and against its reference."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_kernel
from tests.kernels.conftest import UseMetal
from tests.kernels.norm_oracle import (
    DTYPES,
    Doubles,
    assert_near,
    assert_same_bits,
    doubles,
    rms_norm,
    rotate,
    rounded,
)
from tests.kernels.test_qk_norm_rope import (
    DEFAULT,
    LAST_POSITION,
    PROPORTIONAL,
    arguments,
    assert_rotated,
    reference_on_cpu,
)

pytestmark = pytest.mark.kernels
module = import_module("dgemma_mlx.kernels.qk_norm_rope")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rope", "shared"), [(DEFAULT, False), (PROPORTIONAL, True)], ids=["sliding", "full"])
@pytest.mark.parametrize(
    ("B", "L", "H", "Hk", "D"),
    [(1, 1, 2, 1, 64), (2, 3, 5, 3, 256), (3, 1, 9, 1, 512), (1, 3, 4, 2, 16), (1, 2, 1, 1, 8), (2, 2, 3, 2, 96)],
)
def test_float64(
    metal: UseMetal, B: int, L: int, H: int, Hk: int, D: int, rope: dict[str, Any], shared: bool, dtype: mx.Dtype
) -> None:
    """Cases have fewer and more heads than SIMD groups, a remainder, lanes without a pair, and large positions."""
    metal(module)
    given = arguments(B, L, H, Hk, D, dtype, rope=rope, shared=shared)
    found = qk_norm_rope_kernel(*given)
    assert_rotated(found, given, roundings=3)  # one after the norm, which the rotation spreads, and one after it
    for array, expected in zip(found, reference_on_cpu(given), strict=True):
        assert_near(array, expected, roundings=10)


@pytest.mark.parametrize("shared", [False, True], ids=["own v", "K = V"])
def test_reads_views(metal: UseMetal, shared: bool) -> None:
    """Projections are slices of one product, or transposed; weights and periods have gaps; positions are broadcast."""
    metal(module)
    B, L, H, Hk, D = 2, 3, 5, 3, 64
    positions = mx.broadcast_to(mx.array([7, 100, LAST_POSITION]), (B, L))
    q, k, v, q_weight, k_weight, periods, _, eps = arguments(B, L, H, Hk, D, mx.bfloat16)
    expected = qk_norm_rope_kernel(q, k, None if shared else v, q_weight, k_weight, periods, +positions, eps)
    slices = mx.split(mx.concatenate([q, k, v], axis=-1), [H * D, (H + Hk) * D], axis=-1)
    transposed = [mx.contiguous(x.T).T for x in (q, k, v)]
    vectors = [mx.repeat(x, 2)[::2] for x in (q_weight, k_weight, periods)]
    for q, k, v in (slices, transposed):
        found = qk_norm_rope_kernel(q, k, None if shared else v, *vectors, positions, eps)
        for array, right in zip(found, expected, strict=True):
            assert mx.array_equal(array, right)


def test_rounds_where_the_modules_do(metal: UseMetal) -> None:
    """The weighted norms and the rotated values are each rounded once."""
    metal(module)
    given = arguments(2, 3, 4, 2, 256, mx.bfloat16)
    q, k, v, q_weight, k_weight, periods, positions, _ = given
    found_q, found_k, found_v = qk_norm_rope_kernel(*given)

    def normed(y: mx.array, weight: Doubles | None) -> Doubles:
        return rounded(rms_norm(doubles(y).reshape(2, 3, -1, 256).swapaxes(1, 2), weight), mx.bfloat16)

    where = np.array(periods), np.array(positions)
    assert_same_bits(found_q, rotate(normed(q, doubles(q_weight)), *where))
    assert_same_bits(found_k, rotate(normed(k, doubles(k_weight)), *where))
    assert_same_bits(found_v, normed(v, None))


@pytest.mark.parametrize("offset", [[0, 0], [-5, 31], [LAST_POSITION - 3, 2]], ids=str)
def test_left_padding(metal: UseMetal, offset: list[int]) -> None:
    """Padding has negative positions, and each row of the batch has its own positions."""
    metal(module)
    positions = mx.array(offset)[:, None] + mx.arange(4)
    given = arguments(2, 4, 2, 1, 64, mx.float16, positions=positions)
    assert_rotated(qk_norm_rope_kernel(*given), given, roundings=3)


@pytest.mark.parametrize(("H", "Hk", "D", "rope"), [(16, 8, 256, DEFAULT), (16, 2, 512, PROPORTIONAL)])
def test_layers_of_the_published_model(metal: UseMetal, H: int, Hk: int, D: int, rope: dict[str, Any]) -> None:
    metal(module, check=False)
    positions = mx.arange(LAST_POSITION - 255, LAST_POSITION + 1)[None]
    given = arguments(1, 256, H, Hk, D, mx.bfloat16, rope=rope, shared=rope is PROPORTIONAL, positions=positions)
    assert_rotated(qk_norm_rope_kernel(*given), given, roundings=3)


def test_the_kernel_agrees_with_the_reference_on_the_examples(metal: UseMetal) -> None:
    metal(module, check=False)
    for example in qk_norm_rope.examples:
        given = example(mx.bfloat16)
        assert qk_norm_rope.agree(qk_norm_rope.kernel(*given), qk_norm_rope.reference(*given))


def test_a_head_of_zeros_stays_zero(metal: UseMetal) -> None:
    metal(module)
    q, k, v, *rest = arguments(1, 2, 2, 1, 64)
    found = qk_norm_rope_kernel(mx.zeros_like(q), k, v, *rest)
    assert not found[0].any() and found[1].any()


def test_infinities_affect_only_their_own_head(metal: UseMetal) -> None:
    metal(module)
    q, k, v, *rest = arguments(1, 2, 2, 1, 64)
    q[0, 1, 5] = mx.inf  # position 1, head 0
    rotated = qk_norm_rope_kernel(q, k, v, *rest)[0]
    assert mx.isfinite(rotated).all(axis=-1).tolist() == [[[True, False], [True, True]]]
