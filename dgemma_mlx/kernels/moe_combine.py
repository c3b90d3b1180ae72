"""The combination of the experts' outputs: a weighted sum of K outputs for each row, followed by a norm.

``moe_route`` has sorted the work by expert, so the outputs of a row are in different places ("slots").
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from dgemma_mlx.kernels._common import BLOCK_SUM, row_threads, scalar
from dgemma_mlx.kernels.dispatch import DispatchedOperation

# A threadgroup processes one row, which stays in registers between the sum and the norm.
_SOURCE = """
    constexpr int R = (M + THREADS - 1) / THREADS;  // a thread holds the values t, t + THREADS, ...
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
    """Compute ``moe_combine_reference`` in one launch, with one threadgroup per row.

    Shapes and dtypes are those of the reference. The sums are float32, and only the result is rounded to the outputs'
    dtype.
    """
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
    """Return rms_norm(y) * norm_weight, (N, M), where y[n] is the sum over k of weights[n, k] * outputs[slots[n, k]].

    The result has the dtype of ``outputs``. The sum is written as a matrix product, which moves fewer bytes than other
    plain forms. The weights and the sum are rounded to the outputs' dtype, where the kernel keeps float32.

    Reference: the end of transformers ``DiffusionGemmaTextExperts``, and ``post_feedforward_layernorm_2`` after it.

    Args:
        outputs: Output of an expert in each slot, (N * K, M).
        slots: The slots of each row's K experts, (N, K) uint32.
        weights: The weights of each row's K experts, (N, K) float32.
        norm_weight: Weight of the layer's ``post_feedforward_layernorm_2``, (M,).
        eps: Constant added to the mean square.
    """
    summed = weights[:, None].astype(outputs.dtype) @ outputs[slots]  # (N, 1, K) @ (N, K, M)
    return mx.fast.rms_norm(summed[:, 0], norm_weight, eps).astype(outputs.dtype)


def _example(dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array, mx.array, float]:
    """Return arguments for a canvas of 256 rows with 8 experts each and the published model's hidden size."""
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
