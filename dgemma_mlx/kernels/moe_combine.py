"""The way back from the experts: each row's K outputs are found, weighted, summed and normed.

Reference: the end of transformers ``DiffusionGemmaTextExperts``, and ``post_feedforward_layernorm_2`` after it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from dgemma_mlx.kernels._common import BLOCK_SUM, row_threads, scalar
from dgemma_mlx.kernels.dispatch import DispatchedOperation

# A threadgroup for each row, which stays in registers between sum and norm.
_SOURCE = """
    constexpr int R = (M + THREADS - 1) / THREADS;  // values of a thread: t, t + THREADS, ...
    threadgroup float partial[32];
    uint t = thread_position_in_threadgroup.x;
    size_t row = threadgroup_position_in_grid.x;

    float sum[R];
    for (int i = 0; i < R; i++) {
        sum[i] = 0.0f;
    }
    for (int k = 0; k < K; k++) {
        float weight = weights[row * K + k];
        size_t base = size_t(slots[row * K + k]) * M;
        for (int i = 0; i < R; i++) {
            uint d = t + i * THREADS;
            if (d < M) {
                sum[i] += weight * static_cast<float>(outputs[base + d]);
            }
        }
    }

    float squares = 0.0f;
    for (int i = 0; i < R; i++) {
        squares += sum[i] * sum[i];
    }
    squares = block_sum<THREADS>(squares, partial, thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
    float rstd = metal::precise::rsqrt(squares / M + eps);
    for (int i = 0; i < R; i++) {
        uint d = t + i * THREADS;
        if (d < M) {
            normed[row * M + d] = static_cast<T>(sum[i] * rstd * static_cast<float>(norm_weight[d]));
        }
    }
"""

_kernel: Any = mx.fast.metal_kernel(
    name="moe_combine",
    input_names=["outputs", "slots", "weights", "norm_weight", "eps"],
    output_names=["normed"],
    source=_SOURCE,
    header=BLOCK_SUM,
)


def moe_combine_kernel(
    outputs: mx.array, slots: mx.array, weights: mx.array, norm_weight: mx.array, eps: float
) -> mx.array:
    """Outputs (N * K, M) by slot, slots and weights (N, K), norm weight (M,) -> (N, M) in the outputs' dtype."""
    N, K = slots.shape
    M = outputs.shape[-1]
    threads = row_threads(M)
    outcome: list[mx.array] = _kernel(
        inputs=[outputs, slots, weights, norm_weight, scalar(eps)],
        template=[("T", outputs.dtype), ("M", M), ("K", K), ("THREADS", threads)],
        grid=(N * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(N, M)],
        output_dtypes=[outputs.dtype],
    )
    return outcome[0]


def moe_combine_reference(
    outputs: mx.array, slots: mx.array, weights: mx.array, norm_weight: mx.array, eps: float
) -> mx.array:
    """rms_norm(sum over k of weights[n, k] * outputs[slots[n, k]]), sum and norm in float32.

    Outputs (N * K, M), slots (N, K), weights (N, K), norm weight (M,) -> (N, M) in the outputs' dtype. The sum is a
    product of matrices: of the plain ways to write it, the one that moves the fewest bytes. Weights and sums are
    rounded to the outputs' dtype on the way; the kernel rounds its result only.
    """
    summed = weights[:, None].astype(outputs.dtype) @ outputs[slots]  # (N, 1, K) @ (N, K, M)
    return mx.fast.rms_norm(summed[:, 0], norm_weight, eps).astype(outputs.dtype)


def _example(dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array, mx.array, float]:
    """A canvas of 256 rows, 8 experts each, of the published model's width."""
    N, K, M = 256, 8, 2816
    keys = mx.random.split(mx.random.key(0), 4)
    return (
        mx.random.normal((N * K, M), dtype, key=keys[0]),
        mx.random.permutation(N * K, key=keys[1]).astype(mx.uint32).reshape(N, K),
        mx.softmax(mx.random.normal((N, K), key=keys[2]), axis=-1),
        1 + 0.1 * mx.random.normal((M,), dtype, key=keys[3]),
        1e-6,
    )


moe_combine = DispatchedOperation(
    "moe_combine", moe_combine_kernel, moe_combine_reference, examples=[_example], source=BLOCK_SUM + _SOURCE
)
"""Outputs (N * K, M), slots (N, K), weights (N, K), norm weight (M,), eps -> (N, M)."""
