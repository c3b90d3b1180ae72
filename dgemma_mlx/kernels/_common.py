"""Helpers that several kernels share: constants as 0-d arrays, threadgroup sizes, and a sum over a threadgroup."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

SIMD = 32  # lanes in a SIMD group on every Apple GPU

BLOCK_SUM = """
// Returns to every thread the sum of value over a threadgroup of THREADS threads. partial holds THREADS / 32 floats.
// The caller must place a barrier before it uses partial again.
template <int THREADS>
inline float block_sum(float value, threadgroup float* partial, uint lane, uint group) {
    value = simd_sum(value);
    if (THREADS > 32) {
        if (lane == 0) {
            partial[group] = value;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        value = simd_sum(lane < THREADS / 32 ? partial[lane] : 0.0f);
    }
    return value;
}
"""


@lru_cache(maxsize=256)
def scalar(value: float, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return a 0-d array with this value, cached. A kernel receives it as a reference in the ``constant`` space."""
    return mx.array(value, dtype)


def row_threads(width: int, values_per_thread: int = 8) -> int:
    """Return the number of threads in a threadgroup that processes one row of ``width`` values.

    The result is a multiple of 32 (whole SIMD groups) from 32 to 1,024, with about ``values_per_thread`` values each.
    """
    groups = -(-width // (values_per_thread * SIMD))
    return SIMD * min(32, max(1, groups))
