"""Attention of one layer: causal over the prefix when encoding, over [prefix | canvas] when decoding.

Reference: transformers ``DiffusionGemmaEncoderTextAttention`` and ``DiffusionGemmaDecoderTextAttention``.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import FULL, TextConfig
from dgemma_mlx.kernels import qk_norm_rope
from dgemma_mlx.model.cache import Mask
from dgemma_mlx.model.packed import Linear
from dgemma_mlx.model.rope import rope_periods

AppendKV = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]
"""Takes this call's keys and values (B, Hk, L, D), returns those to attend over (B, Hk, S, D)."""

SCORE_BYTES = 32 << 20
"""Scores (B, H, L, S) are materialised: about so many bytes of them, as float32, at once."""

_ROWS = 8  # queries in a block are a multiple: a GPU's tile
_LEAST_ROWS = 64
_MOST_ROWS = 256


def attend(q: mx.array, k: mx.array, v: mx.array, mask: Mask, score_bytes: int = SCORE_BYTES) -> mx.array:
    """softmax(q k^T) v with scale 1: q (B, H, L, D), k and v (B, Hk, S, D) -> (B, H, L, D).

    Where all scores together would pass ``score_bytes``, they are computed in blocks, so that memory grows linearly
    with S: of queries, each seeing all its keys, while ``_LEAST_ROWS`` of them may be taken at a time; then of keys.

    Why not always of queries, counted for the published model's full layers at S = 262,144 (16 heads on 2 of 512):
    each block of queries reads all keys and values, 1.07 GB. 32 MB are 2 queries; even by 8 a canvas of 256 would be
    32 blocks, 34 GB a layer, in products of 8 rows where a GPU's tiles have 32 or 64. In blocks of 2,048 keys they are
    read once, in products of 2,048 rows. The price, 128 times about eight launches, is small beside 2.2 TFLOP.
    """
    B, H, L, _ = q.shape
    S = k.shape[2]
    fitting = score_bytes // (4 * B * H * S)
    by_keys = fitting < min(L, _LEAST_ROWS)
    rows = _MOST_ROWS if by_keys else fitting // _ROWS * _ROWS or fitting
    blocks: list[mx.array] = []
    for start in range(0, L, rows):
        end = min(start + rows, L)
        seen = S - L + end if isinstance(mask, str) else S  # causal: no key after the block's last query
        part = mask[..., start:end, :] if isinstance(mask, mx.array) and mask.shape[-2] > 1 else mask
        queries, keys, values = q[:, :, start:end], k[:, :, :seen], v[:, :, :seen]
        if blocks:  # else MLX might work out the scores of all blocks first
            [queries] = mx.depends([queries], blocks[-1:])
        if by_keys:
            step = max(_LEAST_ROWS, score_bytes // (4 * B * H * (end - start)))
            blocks.append(_running_softmax(queries, keys, values, part, step))
        else:
            blocks.append(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=part))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _running_softmax(q: mx.array, k: mx.array, v: mx.array, mask: Mask, step: int) -> mx.array:
    """``attend`` over ``step`` keys after the other, sums in float32 (Milakov and Gimelshein, arXiv 1805.02867)."""
    B, H, L, D = q.shape
    Hk, S = k.shape[1:3]
    queries = q.reshape(B, Hk, -1, D)  # all that share a key head in one product, or each head would read the keys
    largest = mx.full((*queries.shape[:3], 1), -1e30)  # finite, as a block of keys may be masked whole
    total, weighted = mx.zeros(largest.shape), mx.zeros(queries.shape)
    for start in range(0, S, step):
        block = slice(start, min(start + step, S))
        scores = queries @ k[:, :, block].swapaxes(-1, -2)  # (B, Hk, H / Hk * L, keys)
        seen = _seen(mask, block, L, S)
        if seen is not None:
            masked = mx.where(seen, scores.reshape(B, H, L, -1), mx.array(-mx.inf, q.dtype))
            scores = masked.reshape(scores.shape)
        before, largest = largest, mx.maximum(largest, scores.max(axis=-1, keepdims=True))
        weights, shrunk = _exp_of_difference(scores, largest), mx.exp(before - largest)
        total = total * shrunk + weights.sum(axis=-1, keepdims=True)
        weighted = weighted * shrunk + weights.astype(v.dtype) @ v[:, :, block]
        [queries] = mx.depends([queries], [total, weighted])
    return (weighted / total).astype(q.dtype).reshape(B, H, L, D)


def _exp_of_difference(scores: mx.array, largest: mx.array) -> mx.array:
    """In float32."""
    return mx.exp(scores.astype(mx.float32) - largest)


if mx.metal.is_available():  # one pass over the scores
    _exp_of_difference = mx.compile(_exp_of_difference, shapeless=True)


def _seen(mask: Mask, keys: slice, L: int, S: int) -> mx.array | None:
    """``mask`` for some of the S keys: boolean, broadcast to (B, H, L, keys), or None where all are seen."""
    if isinstance(mask, mx.array):
        return mask[..., keys] if mask.shape[-1] > 1 else mask
    if mask is None or keys.stop <= S - L + 1:
        return None
    return mx.arange(keys.start, keys.stop) <= mx.arange(S - L, S)[:, None]


class Attention(nn.Module):
    """Grouped-query attention with normed q, k, v and score scale 1; K = V in full-attention layers."""

    def __init__(self, config: TextConfig, kind: str) -> None:
        super().__init__()
        D, H, Hk = config.layer_head_dim(kind), config.num_attention_heads, config.kv_heads(kind)
        M = config.hidden_size
        self._eps = config.rms_norm_eps
        self.score_bytes = SCORE_BYTES
        self.q_proj = Linear(M, H * D)
        self.k_proj = Linear(M, Hk * D)
        if kind != FULL:
            self.v_proj = Linear(M, Hk * D)
        self.o_proj = Linear(H * D, M)
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
        return self.o_proj(attend(q, k, v, mask, self.score_bytes).swapaxes(1, 2).reshape(B, L, -1))
