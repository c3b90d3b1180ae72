"""The end of a layer: what its two feed-forward branches add to the residual stream, and the next layer's norm.

Every row is read once and stays in registers through its three norms. Each step is rounded to the dtype where the
reference rounds it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from dgemma_mlx.kernels._common import BLOCK_SUM, row_threads, scalar
from dgemma_mlx.kernels.dispatch import DispatchedOperation

INVERSE_RMS = BLOCK_SUM + """
// 1 / rms of a row of M values, of which each of THREADS threads holds N, zeros behind the end of the row.
template <int M, int N, int THREADS>
inline float inverse_rms(const thread float* values, float eps, threadgroup float* partial, uint lane, uint group) {
    float sum = 0.0f;
    for (int n = 0; n < N; n++) {
        sum += values[n] * values[n];
    }
    return metal::precise::rsqrt(block_sum<THREADS>(sum, partial, lane, group) / M + eps);
}
"""

# A threadgroup takes one row, a thread N neighbouring values of it.
ROW = """
    constexpr int N = (M + THREADS - 1) / THREADS;
    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    int first = thread_position_in_threadgroup.x * N;
    size_t row = size_t(threadgroup_position_in_grid.x) * M;
    float value[N];
"""

_SOURCE = ROW + """
    threadgroup float partial[3][32];
    for (int n = 0; n < N; n++) {
        int m = first + n;
        value[n] = m < M ? static_cast<float>(dense[row + m]) : 0.0f;
    }
    float scale = inverse_rms<M, N, THREADS>(value, eps, partial[0], lane, group);
    for (int n = 0; n < N; n++) {
        int m = first + n;
        if (m < M) {
            float normed = static_cast<T>(static_cast<float>(dense_weight[m]) * (value[n] * scale));
            value[n] = static_cast<T>(normed + static_cast<float>(routed[row + m]));
        }
    }
    scale = inverse_rms<M, N, THREADS>(value, eps, partial[1], lane, group);
    for (int n = 0; n < N; n++) {
        int m = first + n;
        if (m < M) {
            float normed = static_cast<T>(static_cast<float>(weight[m]) * (value[n] * scale));
            float sum = static_cast<T>(static_cast<float>(x[row + m]) + normed);
            T scaled = static_cast<T>(sum * static_cast<float>(layer_scalar[0]));
            stream[row + m] = scaled;
            value[n] = scaled;
        }
    }
    scale = inverse_rms<M, N, THREADS>(value, eps, partial[2], lane, group);
    for (int n = 0; n < N; n++) {
        int m = first + n;
        if (m < M) {
            next[row + m] = static_cast<T>(static_cast<float>(next_weight[m]) * (value[n] * scale));
        }
    }
"""

_kernel: Any = mx.fast.metal_kernel(
    name="norm_residual",
    input_names=["x", "dense", "routed", "dense_weight", "weight", "next_weight", "layer_scalar", "eps"],
    output_names=["stream", "next"],
    source=_SOURCE,
    header=INVERSE_RMS,
)


def norm_residual_kernel(
    x: mx.array, dense: mx.array, routed: mx.array, dense_weight: mx.array, weight: mx.array,
    next_weight: mx.array, layer_scalar: mx.array, eps: float,
) -> tuple[mx.array, mx.array]:
    """x, dense and routed (..., M), weights (M,), layer_scalar (1,) -> x and its norm, both (..., M)."""
    M = x.shape[-1]
    threads = row_threads(M)
    stream, normed = _kernel(
        inputs=[x, dense, routed, dense_weight, weight, next_weight, layer_scalar, scalar(eps)],
        template=[("T", x.dtype), ("M", M), ("THREADS", threads)],
        grid=(x.size // M * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape] * 2,
        output_dtypes=[x.dtype] * 2,
    )
    return stream, normed


def norm_residual_reference(
    x: mx.array, dense: mx.array, routed: mx.array, dense_weight: mx.array, weight: mx.array,
    next_weight: mx.array, layer_scalar: mx.array, eps: float,
) -> tuple[mx.array, mx.array]:
    """The same in plain operations: six launches."""
    both = mx.fast.rms_norm(dense, dense_weight, eps) + routed
    x = (x + mx.fast.rms_norm(both, weight, eps)) * layer_scalar
    return x, mx.fast.rms_norm(x, next_weight, eps)


def _example(dtype: mx.Dtype) -> tuple[Any, ...]:
    """A canvas of 256 in the published model's width."""
    C, M = 256, 2816
    rows = [mx.random.normal((1, C, M), dtype, key=mx.random.key(i)) for i in range(3)]
    weights = [mx.random.normal((M,), dtype, key=mx.random.key(3 + i)) for i in range(3)]
    return *rows, *weights, mx.array([0.5], dtype), 1e-6


norm_residual = DispatchedOperation(
    "norm_residual", norm_residual_kernel, norm_residual_reference, examples=[_example], source=INVERSE_RMS + _SOURCE
)
"""((x + norm(norm(dense) + routed)) * layer_scalar, and that normed with ``next_weight``), in x's dtype.

x (..., M) is the residual stream after attention, dense (..., M) the dense branch, normed here with
``dense_weight`` (post_feedforward_layernorm_1), routed (..., M) the experts' branch, normed already; their sum is
normed with ``weight`` (post_feedforward_layernorm). ``next_weight`` is the next layer's input norm, or the final norm.
Weights (M,), layer_scalar (1,). Reference: transformers ``DiffusionGemmaDecoderTextLayer``.
"""
