"""What the kernels share: constants as 0-d arrays, threadgroup sizes, a sum over a threadgroup."""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

SIMD = 32  # lanes of a SIMD group on every Apple GPU

BLOCK_SUM = """
// The sum of value over a threadgroup of THREADS threads, in every thread; partial holds THREADS / 32 floats.
// The caller puts a barrier before it uses partial again.
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
    """A 0-d array, made once: a kernel takes it as a ``constant`` reference."""
    return mx.array(value, dtype)


def row_threads(width: int, values_per_thread: int = 8) -> int:
    """Threads of a threadgroup that handles one row of ``width`` values: whole SIMD groups, 32 to 1,024."""
    groups = -(-width // (values_per_thread * SIMD))
    return SIMD * min(32, max(1, groups))
