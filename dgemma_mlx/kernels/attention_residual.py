"""What follows attention in a layer: its norm, the residual addition, and the norms that three readers of it want.

The dense branch, the experts and the router each take the residual stream normed with a weight of their own; the rms
is the same. A row is read once for all of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from dgemma_mlx.kernels._common import row_threads, scalar
from dgemma_mlx.kernels.dispatch import DispatchedOperation
from dgemma_mlx.kernels.norm_residual import INVERSE_RMS, ROW


class AttentionResidual(NamedTuple):
    """The residual stream after attention, and its norms for its three readers; all (..., M)."""

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
    """x and attended (..., M), weights (M,) -> four times (..., M)."""
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
    """The same in plain operations: five launches over rows."""
    x = x + mx.fast.rms_norm(attended, weight, eps)
    weights = dense_weight, experts_weight, router_scale * x.shape[-1] ** -0.5
    dense, experts, router = (mx.fast.rms_norm(x, w, eps) for w in weights)
    return AttentionResidual(x, dense, experts, router)


def _example(dtype: mx.Dtype) -> tuple[Any, ...]:
    """A canvas of 256 in the published model's width."""
    C, M = 256, 2816
    rows = [mx.random.normal((1, C, M), dtype, key=mx.random.key(i)) for i in range(2)]
    weights = [mx.random.normal((M,), dtype, key=mx.random.key(2 + i)) for i in range(4)]
    return *rows, *weights, 1e-6


attention_residual = DispatchedOperation(
    "attention_residual", attention_residual_kernel, attention_residual_reference,
    examples=[_example], source=INVERSE_RMS + _SOURCE,
)
"""x + norm(attended), and three norms of that sum, in x's dtype.

x (..., M) is the residual stream, attended (..., M) the attention's output, normed with ``weight``
(post_attention_layernorm). The norms are for the dense branch with ``dense_weight`` (pre_feedforward_layernorm), for
the experts with ``experts_weight`` (pre_feedforward_layernorm_2) and for the router with ``router_scale * M**-0.5``.
Weights (M,). Reference: transformers ``DiffusionGemmaDecoderTextLayer`` and ``DiffusionGemmaTextRouter``.
"""
