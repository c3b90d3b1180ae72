"""The end of a layer: the residual addition of its two feed-forward branches, and the input norm of the next layer.

The kernel reads each row once and keeps it in registers through three norms.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from dgemma_mlx.kernels._common import BLOCK_SUM, row_threads, scalar
from dgemma_mlx.kernels.dispatch import DispatchedOperation

INVERSE_RMS = BLOCK_SUM + """
// Returns 1 / rms of a row of M values. Each of THREADS threads holds N of them, with zeros after the end of the row.
template <int M, int N, int THREADS>
inline float inverse_rms(const thread float* values, float eps, threadgroup float* partial, uint lane, uint group) {
    float sum = 0.0f;
    for (int n = 0; n < N; n++) {
        sum += values[n] * values[n];
    }
    return metal::precise::rsqrt(block_sum<THREADS>(sum, partial, lane, group) / M + eps);
}
"""

# A threadgroup processes one row. Each thread holds N neighbouring values of the row.
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
    """Compute ``norm_residual_reference`` in one launch, with one threadgroup per row.

    Shapes and dtypes are those of the reference, and results are rounded to x's dtype where the reference rounds them.
    """
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
    """Add the two feed-forward branches to the residual stream, scale the sum, and norm it for the next layer.

    Returns x' = (x + rms_norm(rms_norm(dense) * dense_weight + routed) * weight) * layer_scalar, and
    rms_norm(x') * next_weight, both (..., M) in x's dtype. This takes six launches.

    Reference: transformers ``DiffusionGemmaDecoderTextLayer``.

    Args:
        x: Residual stream after attention, (..., M).
        dense: Output of the dense branch before its norm, (..., M).
        routed: Output of the experts after their norm, (..., M).
        dense_weight: Weight of the layer's ``post_feedforward_layernorm_1``, (M,).
        weight: Weight of the layer's ``post_feedforward_layernorm``, (M,).
        next_weight: Weight of the next layer's ``input_layernorm``, or of the network's final norm, (M,).
        layer_scalar: Factor on the layer's output, (1,).
        eps: Constant added to the mean square.
    """
    both = mx.fast.rms_norm(dense, dense_weight, eps) + routed
    x = (x + mx.fast.rms_norm(both, weight, eps)) * layer_scalar
    return x, mx.fast.rms_norm(x, next_weight, eps)


def _example(dtype: mx.Dtype) -> tuple[Any, ...]:
    """Return arguments for a canvas of 256 positions with the published model's hidden size."""
    C, M = 256, 2816
    rows = [mx.random.normal((1, C, M), dtype, key=mx.random.key(i)) for i in range(3)]
    weights = [mx.random.normal((M,), dtype, key=mx.random.key(3 + i)) for i in range(3)]
    return *rows, *weights, mx.array([0.5], dtype), 1e-6


norm_residual = DispatchedOperation(
    "norm_residual", norm_residual_kernel, norm_residual_reference, examples=[_example], source=INVERSE_RMS + _SOURCE
)
