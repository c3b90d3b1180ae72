"""Attention of one layer: causal over the prefix when encoding, over [prefix | canvas] when decoding.

Reference: transformers ``DiffusionGemmaEncoderTextAttention`` and ``DiffusionGemmaDecoderTextAttention``.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.config import FULL, TextConfig
from dgemma_mlx.kernels import qk_norm_rope
from dgemma_mlx.model.cache import Mask
from dgemma_mlx.model.rope import rope_periods

AppendKV = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]
"""Takes this call's keys and values (B, Hk, L, D), returns those to attend over (B, Hk, S, D)."""

SCORE_BYTES = 64 << 20  # the unfused kernel materialises float32 scores (B, H, L, S): about so many at once
_ROWS = 8  # queries in a block are a multiple: a GPU's tile


def attend(q: mx.array, k: mx.array, v: mx.array, mask: Mask) -> mx.array:
    """softmax(q k^T) v with scale 1: q (B, H, L, D), k and v (B, Hk, S, D) -> (B, H, L, D).

    Long calls are computed in blocks of queries, each seeing its own keys whole, so that memory grows
    linearly with S and the result does not depend on the blocks.
    """
    B, H, L, _ = q.shape
    S = k.shape[2]
    rows = max(1, SCORE_BYTES // (4 * B * H * S * _ROWS)) * _ROWS
    blocks = []
    for start in range(0, L, rows):
        end = min(start + rows, L)
        seen = S - L + end if isinstance(mask, str) else S  # causal: no key after the block's last query
        part = mask[..., start:end, :] if isinstance(mask, mx.array) and mask.shape[-2] > 1 else mask
        blocks.append(
            mx.fast.scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, :seen], v[:, :, :seen], scale=1.0, mask=part
            )
        )
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


class Attention(nn.Module):
    """Grouped-query attention with normed q, k, v and score scale 1; K = V in full-attention layers."""

    def __init__(self, config: TextConfig, kind: str) -> None:
        super().__init__()
        D, H, Hk = config.layer_head_dim(kind), config.num_attention_heads, config.kv_heads(kind)
        M = config.hidden_size
        self._eps = config.rms_norm_eps
        self.q_proj = nn.Linear(M, H * D, bias=False)
        self.k_proj = nn.Linear(M, Hk * D, bias=False)
        if kind != FULL:
            self.v_proj = nn.Linear(M, Hk * D, bias=False)
        self.o_proj = nn.Linear(H * D, M, bias=False)
        self.q_norm = nn.RMSNorm(D, config.rms_norm_eps)
        self.q_norm.weight = self.q_norm.weight * D**-0.5  # untrained: q . k near unit variance, as the scale is 1
        self.k_norm = nn.RMSNorm(D, config.rms_norm_eps)
        self._periods = rope_periods(config.rope_parameters[kind], D)

    def __call__(self, x: mx.array, positions: mx.array, mask: Mask, append: AppendKV) -> mx.array:
        """x (B, L, M), positions (B, L) int32 -> (B, L, M)."""
        B, L, _ = x.shape
        v = self.v_proj(x) if "v_proj" in self else None
        q, k, v = qk_norm_rope(
            self.q_proj(x), self.k_proj(x), v, self.q_norm.weight, self.k_norm.weight, self._periods, positions,
            self._eps,
        )  # fmt: skip
        k, v = append(k, v)
        return self.o_proj(attend(q, k, v, mask).swapaxes(1, 2).reshape(B, L, -1))
