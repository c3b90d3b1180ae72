"""Fused operations of the network, each with a Metal kernel and a reference in plain MLX operations.

For an operation ``foo``, ``foo_reference`` computes and documents it in plain MLX operations, ``foo_kernel`` launches
the Metal kernel that computes the same, and ``foo`` calls one of the two (see ``dispatch``). The ``model`` package
defines the shape letters.
"""

from __future__ import annotations

from typing import Any

from dgemma_mlx.kernels.attention_residual import AttentionResidual, attention_residual
from dgemma_mlx.kernels.canvas_sampler import MAX_KEPT, CanvasSample, LogitBias, canvas_sampler
from dgemma_mlx.kernels.dispatch import DispatchedOperation, references
from dgemma_mlx.kernels.fused_attention import can_fuse, fused_attention
from dgemma_mlx.kernels.moe_combine import moe_combine
from dgemma_mlx.kernels.moe_route import Route, moe_route
from dgemma_mlx.kernels.norm_residual import norm_residual
from dgemma_mlx.kernels.qk_norm_rope import qk_norm_rope
from dgemma_mlx.kernels.sparse_soft_embedding import (
    dense_soft_embedding,
    packed_soft_embedding,
    sparse_soft_embedding,
)

# Every operation that has a kernel, for the self-check of all of them by `dgemma-mlx doctor`.
OPERATIONS: tuple[DispatchedOperation[..., Any], ...] = (
    canvas_sampler, dense_soft_embedding, *packed_soft_embedding.values(), qk_norm_rope, fused_attention,
    attention_residual, moe_route, moe_combine, norm_residual,
)  # fmt: skip

__all__ = [
    "MAX_KEPT",
    "OPERATIONS",
    "AttentionResidual",
    "CanvasSample",
    "DispatchedOperation",
    "LogitBias",
    "Route",
    "attention_residual",
    "can_fuse",
    "canvas_sampler",
    "fused_attention",
    "moe_combine",
    "moe_route",
    "norm_residual",
    "qk_norm_rope",
    "references",
    "sparse_soft_embedding",
]
