"""The step after attention in a layer: the output's norm, the residual addition, and the next three norms.

The dense branch, the experts and the router each need the residual stream after a norm with a weight of its own. The
root mean square is the same for all three, so the kernel reads each row once and computes it once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from dgemma_mlx.kernels._common import row_threads, scalar
from dgemma_mlx.kernels.dispatch import DispatchedOperation
from dgemma_mlx.kernels.norm_residual import INVERSE_RMS, ROW


class AttentionResidual(NamedTuple):
    """The residual stream after attention, and its norms for the three blocks that read it.

    All arrays are (..., M), in the dtype of the residual stream.

    Attributes:
        x: The residual stream after attention.
        dense: The norm of x that the dense branch takes.
        experts: The norm of x that the experts take.
        router: The norm of x that the router takes.
    """

    x: mx.array
    dense: mx.array
    experts: mx.array
    router: mx.array


_SOURCE = ROW + """
    threadgroup float partial[2][32];
    for (int n = 0; n < N; n++) {
        int m = first + n;
        value[n] = m < M ? static_cast<float>(attended[row + m]) : 0.0f;
    }
    float scale = inverse_rms<M, N, THREADS>(value, eps, partial[0], lane, group);
    for (int n = 0; n < N; n++) {
        int m = first + n;
        if (m < M) {
            float normed = static_cast<T>(static_cast<float>(weight[m]) * (value[n] * scale));
            T sum = static_cast<T>(static_cast<float>(x[row + m]) + normed);
            stream[row + m] = sum;
            value[n] = sum;
        }
    }
    scale = inverse_rms<M, N, THREADS>(value, eps, partial[1], lane, group);
    for (int n = 0; n < N; n++) {
        int m = first + n;
        if (m < M) {
            float normed = value[n] * scale;
            float router_weight = static_cast<T>(static_cast<float>(router_scale[m]) * static_cast<float>(root));
            dense[row + m] = static_cast<T>(static_cast<float>(dense_weight[m]) * normed);
            experts[row + m] = static_cast<T>(static_cast<float>(experts_weight[m]) * normed);
            router[row + m] = static_cast<T>(router_weight * normed);
        }
    }
"""

_kernel: Any = mx.fast.metal_kernel(
    name="attention_residual",
    input_names=["x", "attended", "weight", "dense_weight", "experts_weight", "router_scale", "root", "eps"],
    output_names=["stream", "dense", "experts", "router"],
    source=_SOURCE,
    header=INVERSE_RMS,
)


def attention_residual_kernel(
    x: mx.array, attended: mx.array, weight: mx.array, dense_weight: mx.array, experts_weight: mx.array,
    router_scale: mx.array, eps: float,
) -> AttentionResidual:
    """Compute ``attention_residual_reference`` in one launch, with one threadgroup per row.

    Shapes and dtypes are those of the reference, and results are rounded to x's dtype where the reference rounds them.
    """
    M = x.shape[-1]
    threads = row_threads(M)
    root = scalar(M**-0.5, x.dtype)
    return AttentionResidual(
        *_kernel(
            inputs=[x, attended, weight, dense_weight, experts_weight, router_scale, root, scalar(eps)],
            template=[("T", x.dtype), ("M", M), ("THREADS", threads)],
            grid=(x.size // M * threads, 1, 1),
            threadgroup=(threads, 1, 1),
            output_shapes=[x.shape] * 4,
            output_dtypes=[x.dtype] * 4,
        )
    )


def attention_residual_reference(
    x: mx.array, attended: mx.array, weight: mx.array, dense_weight: mx.array, experts_weight: mx.array,
    router_scale: mx.array, eps: float,
) -> AttentionResidual:
    """Add the normed output of attention to the residual stream, and norm the sum for its three readers.

    The sum is x' = x + rms_norm(attended) * weight. The three norms are rms_norm(x') times ``dense_weight``,
    ``experts_weight`` and ``router_scale * M**-0.5``. This takes five launches over the rows.

    Reference: transformers ``DiffusionGemmaDecoderTextLayer`` and ``DiffusionGemmaTextRouter``.

    Args:
        x: Residual stream before attention, (..., M).
        attended: Output of attention, (..., M).
        weight: Weight of the layer's ``post_attention_layernorm``, (M,).
        dense_weight: Weight of the layer's ``pre_feedforward_layernorm``, (M,).
        experts_weight: Weight of the layer's ``pre_feedforward_layernorm_2``, (M,).
        router_scale: The router's ``scale``, (M,).
        eps: Constant added to the mean square.
    """
    x = x + mx.fast.rms_norm(attended, weight, eps)
    weights = dense_weight, experts_weight, router_scale * x.shape[-1] ** -0.5
    dense, experts, router = (mx.fast.rms_norm(x, w, eps) for w in weights)
    return AttentionResidual(x, dense, experts, router)


def _example(dtype: mx.Dtype) -> tuple[Any, ...]:
    """Return arguments for a canvas of 256 positions with the published model's hidden size."""
    C, M = 256, 2816
    rows = [mx.random.normal((1, C, M), dtype, key=mx.random.key(i)) for i in range(2)]
    weights = [mx.random.normal((M,), dtype, key=mx.random.key(2 + i)) for i in range(4)]
    return *rows, *weights, 1e-6


attention_residual = DispatchedOperation(
    "attention_residual", attention_residual_kernel, attention_residual_reference,
    examples=[_example], source=INVERSE_RMS + _SOURCE,
)
