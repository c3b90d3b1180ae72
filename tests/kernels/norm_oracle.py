"""Norms and rotations in float64, and assertions that a result is as close to them as its dtype allows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
EPS = 1e-6
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
_ROUNDING = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}  # relative error of one rounding
_FLOAT32_SUM = 2e-6  # relative error of sums over a row in float32


def random(shape: tuple[int, ...], dtype: mx.Dtype, seed: int, mean: float = 0.0) -> mx.array:
    """Return normal values around ``mean`` whose scale differs from row to row, as in a residual stream."""
    generator = np.random.default_rng(seed)
    sizes = 2.0 ** generator.uniform(-3, 3, (*shape[:-1], 1))
    return mx.array((mean + generator.standard_normal(shape) * sizes).astype(np.float32)).astype(dtype)


def doubles(x: mx.array) -> Doubles:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def rms_norm(x: Doubles, weight: Doubles | None = None) -> Doubles:
    normed: Doubles = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)
    return normed if weight is None else normed * weight


def rounded(x: Doubles, dtype: mx.Dtype) -> Doubles:
    return doubles(mx.array(x.astype(np.float32)).astype(dtype))


def rotate(x: Doubles, periods: NDArray[np.float32], positions: NDArray[np.int32]) -> Doubles:
    """Rotate x (B, H, L, D) by positions (B, L) in float64.

    The angles are computed in float32 as in the kernels, because their rounding matters at large positions.
    """
    angles = (positions.astype(np.float32)[:, None, :, None] * (np.float32(1) / periods)).astype(np.float64)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)], axis=-1
    )


def assert_near(found: mx.array, expected: Doubles | mx.array, roundings: int) -> None:
    """Assert that the errors are at most ``roundings`` rounding errors of the dtype, plus the error of a float32 sum.

    Errors are relative to the largest value of a row.
    """
    wide = doubles(expected) if isinstance(expected, mx.array) else expected
    assert found.shape == wide.shape
    bound = (roundings * _ROUNDING[found.dtype] + _FLOAT32_SUM) * np.abs(wide).max(axis=-1, keepdims=True)
    excess = np.abs(doubles(found) - wide) - bound
    assert (excess <= 0).all(), f"{(excess > 0).sum()} of {wide.size} values are off"


def assert_same_bits(found: mx.array, expected: Doubles) -> None:
    """Assert that 99 % of the values are equal to the rounded ``expected``.

    The error of a float32 sum may change the direction of a rounding in rare cases.
    """
    assert (doubles(found) == rounded(expected, found.dtype)).mean() > 0.99
