"""Tests of the reference against float64, against MLX's own calls, and of properties of rotations."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma_mlx.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from dgemma_mlx.model.rope import rope_periods
from tests.kernels.norm_oracle import DTYPES, EPS, Doubles, assert_near, doubles, random, rms_norm, rotate

DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25}
ROPES = [pytest.param(DEFAULT, id="default"), pytest.param(PROPORTIONAL, id="proportional")]
LAST_POSITION = 262_143

Arguments = tuple[Any, ...]  # the arguments of qk_norm_rope


def arguments(
    B: int, L: int, H: int, Hk: int, D: int, dtype: mx.Dtype = mx.float32, *,
    rope: dict[str, Any] = DEFAULT, shared: bool = False, positions: mx.array | None = None,
) -> Arguments:
    """Return random projections. Positions are random over the whole context unless they are given."""
    if positions is None:
        drawn = np.random.default_rng(0).integers(0, LAST_POSITION, (B, L), dtype=np.int32, endpoint=True)
        positions = mx.array(drawn)
    return (
        random((B, L, H * D), dtype, 1), random((B, L, Hk * D), dtype, 2),
        None if shared else random((B, L, Hk * D), dtype, 3),
        random((D,), dtype, 4, mean=1), random((D,), dtype, 5, mean=1), rope_periods(rope, D), positions, EPS,
    )


def oracle(given: Arguments) -> tuple[Doubles, Doubles, Doubles]:
    q, k, v, q_weight, k_weight, periods, positions, _ = given
    B, L, _ = q.shape

    def normed(y: mx.array, weight: mx.array | None) -> Doubles:
        heads = doubles(y).reshape(B, L, -1, q_weight.size).swapaxes(1, 2)
        return rms_norm(heads, None if weight is None else doubles(weight))

    where = np.array(periods), np.array(positions)
    values = normed(k if v is None else v, None)
    return rotate(normed(q, q_weight), *where), rotate(normed(k, k_weight), *where), values


def reference_on_cpu(given: Arguments) -> tuple[mx.array, mx.array, mx.array]:
    """Run the reference on the CPU, where MLX's cosines are precise. On a GPU they are imprecise at large positions."""
    with mx.stream(mx.cpu):
        return qk_norm_rope_reference(*given)


def assert_rotated(found: tuple[mx.array, ...], given: Arguments, roundings: int) -> None:
    for name, array, expected in zip("qkv", found, oracle(given), strict=True):
        assert array.dtype == given[0].dtype, name
        assert_near(array, expected, roundings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("shared", [False, True], ids=["own v", "K = V"])
@pytest.mark.parametrize(
    ("B", "L", "H", "Hk", "D"), [(1, 1, 2, 1, 64), (2, 3, 4, 2, 256), (3, 1, 3, 1, 512), (1, 256, 2, 2, 16)]
)
def test_float64(
    B: int, L: int, H: int, Hk: int, D: int, shared: bool, rope: dict[str, Any], dtype: mx.Dtype
) -> None:
    given = arguments(B, L, H, Hk, D, dtype, rope=rope, shared=shared)
    # On a CPU, MLX rounds the norm before it applies the weight, and it rounds cosines, sines and their products.
    assert_rotated(reference_on_cpu(given), given, roundings=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1000, LAST_POSITION - 6, [-3, 0, 250_000]], ids=str)
def test_consecutive_positions_equal_an_offset_in_mlx(offset: int | list[int], dtype: mx.Dtype) -> None:
    """All bits equal those of MLX's calls on (B, H, L, D), for one offset or, as with left padding, one per row."""
    B, L, H, D = 3, 7, 4, 64
    start = mx.array(offset, mx.int32)
    positions = mx.broadcast_to(start.reshape(-1, 1) + mx.arange(L), (B, L))
    given = arguments(B, L, H, H, D, dtype, rope=PROPORTIONAL, positions=positions)
    q, k, v, q_weight, k_weight, periods, _, _ = given

    def one_by_one(y: mx.array, weight: mx.array) -> mx.array:
        normed = mx.fast.rms_norm(y.reshape(B, L, H, D), weight, EPS).swapaxes(1, 2)
        return mx.fast.rope(normed, D, traditional=False, base=None, scale=1.0, offset=start, freqs=periods)

    values = mx.fast.rms_norm(v.reshape(B, L, H, D), None, EPS).swapaxes(1, 2)
    found = qk_norm_rope_reference(*given)
    for array, expected in zip(found, (one_by_one(q, q_weight), one_by_one(k, k_weight), values), strict=True):
        assert mx.array_equal(array, expected)


def test_scores_depend_on_distances_only() -> None:
    given = arguments(1, 5, 2, 2, 64, positions=mx.array([[7, 0, 3, 4, 90]]))
    *projections, positions, eps = given
    near = qk_norm_rope_reference(*given)
    far = qk_norm_rope_reference(*projections, positions + 500, eps)
    assert not mx.allclose(near[0], far[0], atol=1e-1)
    scores = [q @ k.swapaxes(-1, -2) for q, k, _ in (near, far)]
    assert mx.allclose(*scores, atol=1e-2)


def test_position_0_and_infinite_periods_do_not_rotate() -> None:
    *projections, _, positions, eps = arguments(1, 4, 2, 1, 64, mx.bfloat16)
    still = qk_norm_rope_reference(*projections, mx.full((32,), mx.inf), positions, eps)
    first = qk_norm_rope_reference(*projections, rope_periods(DEFAULT, 64), mx.zeros_like(positions), eps)
    normed = mx.fast.rms_norm(projections[0].reshape(1, 4, 2, 64), projections[3], EPS).swapaxes(1, 2)
    assert mx.array_equal(still[0], normed) and mx.array_equal(first[0], normed)


def test_v_is_computed_from_k() -> None:
    shared = arguments(2, 3, 4, 2, 32, shared=True)
    q, k, _, *rest = shared
    for array, expected in zip(qk_norm_rope_reference(*shared), qk_norm_rope_reference(q, k, k, *rest), strict=True):
        assert mx.array_equal(array, expected)


@settings(max_examples=25)
@given(st.permutations(range(6)), st.integers(0, LAST_POSITION - 6))
def test_each_position_is_processed_alone(order: list[int], start: int) -> None:
    """Shuffling the rows with their positions shuffles the result."""
    ids = mx.array(order)
    positions = start + mx.arange(6)[None]
    q, k, v, *weights, periods, _, eps = arguments(1, 6, 2, 1, 16, positions=positions)
    straight = qk_norm_rope(q, k, v, *weights, periods, positions, eps)
    shuffled = qk_norm_rope(q[:, ids], k[:, ids], v[:, ids], *weights, periods, positions[:, ids], eps)
    for array, expected in zip(shuffled, straight, strict=True):
        assert mx.array_equal(array, expected[:, :, ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_examples_have_the_published_models_sizes(dtype: mx.Dtype) -> None:
    sliding, full = (qk_norm_rope.reference(*example(dtype)) for example in qk_norm_rope.examples)
    assert [x.shape for x in sliding] == [(1, 16, 256, 256), (1, 8, 256, 256), (1, 8, 256, 256)]
    assert [x.shape for x in full] == [(1, 16, 256, 512), (1, 2, 256, 512), (1, 2, 256, 512)]
    assert {x.dtype for x in (*sliding, *full)} == {dtype}
