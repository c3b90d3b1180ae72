"""Attention of a canvas over prefix and canvas in MLX's fused kernel, for heads of 256 values.

MLX's own rule takes this kernel only where it expects it to be faster, and otherwise stores the scores. The self-check
compares the two on this machine. The kernel is MLX's, so there is no Metal source here.
"""

from __future__ import annotations

import mlx.core as mx

from dgemma_mlx.kernels.dispatch import DispatchedOperation

_HEAD_DIM = 256
_LEAST_QUERIES = 9  # for fewer, MLX has another kernel, with other limits


def can_fuse(q: mx.array) -> bool:
    """Return whether ``fused_attention`` takes queries (B, H, L, D) of this shape and dtype."""
    return q.shape[-1] == _HEAD_DIM and q.shape[-2] >= _LEAST_QUERIES and q.dtype in (mx.bfloat16, mx.float16)


def fused_attention_kernel(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Compute ``fused_attention_reference`` without storing the scores. Raises ``ValueError`` without Metal."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, force_fused=True)


def fused_attention_reference(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Return softmax(q k^T) v, (B, H, L, D), for q (B, H, L, D) and k, v (B, Hk, S, D); every query sees all keys."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)


def _example(dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """Return arguments for a canvas after a full window, in a sliding-window layer of the published model."""
    keys = mx.random.split(mx.random.key(0), 3)
    q = mx.random.normal((1, 16, 256, _HEAD_DIM), dtype, scale=_HEAD_DIM**-0.5, key=keys[0])
    k, v = (mx.random.normal((1, 8, 1279, _HEAD_DIM), dtype, key=key) for key in keys[1:])
    return q, k, v


fused_attention = DispatchedOperation(
    "fused_attention", fused_attention_kernel, fused_attention_reference,
    examples=[_example], source="mx.fast.scaled_dot_product_attention, force_fused=True",
)
