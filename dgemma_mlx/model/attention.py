"""The attention of one layer: causal over the prefix in ``encode``, over [prefix | canvas] in ``decode``.

Reference: transformers ``DiffusionGemmaEncoderTextAttention`` and ``DiffusionGemmaDecoderTextAttention``.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import FULL, TextConfig
from dgemma_mlx.kernels import can_fuse, fused_attention, qk_norm_rope
from dgemma_mlx.model.cache import SCORE_BYTES, Mask
from dgemma_mlx.model.joined import SharedInput
from dgemma_mlx.model.packed import Linear
from dgemma_mlx.model.rope import rope_periods

# Takes the keys and values (B, Hk, L, D) of a call; returns the keys and values (B, Hk, S, D) to attend over.
AppendKV = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]

_ROWS = 8  # a block has a multiple of this number of queries, the height of a GPU's matrix tile
_LEAST_ROWS = 64  # with fewer queries per block than this, the keys are split as well
_MOST_ROWS = 256  # queries per block where the keys are split


def attend(q: mx.array, k: mx.array, v: mx.array, mask: Mask, score_bytes: int = SCORE_BYTES) -> mx.array:
    """Return softmax(q k^T) v with score scale 1: (B, H, L, D), in q's dtype.

    ``q`` is (B, H, L, D), ``k`` and ``v`` are (B, Hk, S, D), and ``mask`` says which keys each query sees. The queries
    are the last L of the S positions.

    When the scores (H, L, S) of a row of the batch would take more than ``score_bytes`` as float32, they are computed
    in blocks, so that memory grows linearly with S. The bound is per row, so that a row is computed in the same blocks
    in any batch. A block holds some queries with all their keys as long as at least ``_LEAST_ROWS`` queries fit. Below
    that, a block holds ``_MOST_ROWS`` queries with some of their keys.

    Blocks of queries alone would be slow for a long prefix, because each block reads all keys and values. In the
    published model's full-attention layers (16 query heads, 2 key/value heads of 512 values) at S = 262,144 these are
    1.07 GB, and 32 MB of scores are 2 queries. Even with 8 queries per block, a canvas of 256 positions would need 32
    blocks, which read 34 GB per layer in products of 8 rows, where a GPU's tiles have 32 or 64 rows. With blocks of
    2,048 keys, the keys and values are read once, in products of 2,048 rows. The additional launches (128 blocks of
    about eight) are cheap compared with the 2.2 TFLOP of the products.
    """
    H, L = q.shape[1:3]
    S = k.shape[2]
    fitting = score_bytes // (4 * H * S)
    by_keys = fitting < min(L, _LEAST_ROWS)
    rows = _MOST_ROWS if by_keys else fitting // _ROWS * _ROWS or fitting
    blocks: list[mx.array] = []
    for start in range(0, L, rows):
        end = min(start + rows, L)
        seen = S - L + end if isinstance(mask, str) else S  # causal: omit the keys after the block's last query
        part = mask[..., start:end, :] if isinstance(mask, mx.array) and mask.shape[-2] > 1 else mask
        queries, keys, values = q[:, :, start:end], k[:, :, :seen], v[:, :, :seen]
        if blocks:  # otherwise MLX might compute the scores of all blocks first
            [queries] = mx.depends([queries], blocks[-1:])
        if by_keys:
            step = max(_LEAST_ROWS, score_bytes // (4 * H * (end - start)))
            blocks.append(_running_softmax(queries, keys, values, part, step))
        elif part is None and can_fuse(queries):
            blocks.append(fused_attention(queries, keys, values))
        else:
            blocks.append(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=part))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _running_softmax(q: mx.array, k: mx.array, v: mx.array, mask: Mask, step: int) -> mx.array:
    """Compute ``attend`` in blocks of ``step`` keys, with running float32 sums.

    The running maximum rescales the sums of earlier blocks (Milakov and Gimelshein, arXiv 1805.02867).
    """
    B, H, L, D = q.shape
    Hk, S = k.shape[1:3]
    queries = q.reshape(B, Hk, -1, D)  # one product per key head, so that its keys are read once for all query heads
    largest = mx.full((*queries.shape[:3], 1), -1e30)  # finite, because a block of keys may be masked completely
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
    """Return exp(scores - largest), elementwise, in float32."""
    return mx.exp(scores.astype(mx.float32) - largest)


if mx.metal.is_available():  # compiled, it takes one pass over the scores
    _exp_of_difference = mx.compile(_exp_of_difference, shapeless=True)


def _seen(mask: Mask, keys: slice, L: int, S: int) -> mx.array | None:
    """Return the part of ``mask`` for a slice of the S keys: boolean, broadcastable to (B, H, L, keys).

    Returns None when every query sees all keys of the slice.
    """
    if isinstance(mask, mx.array):
        return mask[..., keys] if mask.shape[-1] > 1 else mask
    if mask is None or keys.stop <= S - L + 1:
        return None
    return mx.arange(keys.start, keys.stop) <= mx.arange(S - L, S)[:, None]


class Attention(SharedInput):
    """Grouped-query attention with norms on q, k and v and score scale 1.

    Full-attention layers have no ``v_proj``: their values are the unrotated key projection after a norm of its own.

    Attributes:
        q_proj: Query projection, from M values to H * D.
        k_proj: Key projection, from M values to Hk * D.
        v_proj: Value projection, from M values to Hk * D; absent in full-attention layers.
        o_proj: Output projection, from H * D values to M.
        q_norm: RMSNorm of each query head, with a weight of shape (D,).
        k_norm: RMSNorm of each key head, with a weight of shape (D,).
    """

    shared_input = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: TextConfig, kind: str) -> None:
        super().__init__()
        D, H, Hk = config.layer_head_dim(kind), config.num_attention_heads, config.kv_heads(kind)
        M = config.hidden_size
        self._eps = config.rms_norm_eps
        self.q_proj = Linear(M, H * D)
        self.k_proj = Linear(M, Hk * D)
        if kind != FULL:
            self.v_proj = Linear(M, Hk * D)
        self.o_proj = Linear(H * D, M)
        self.q_norm = nn.RMSNorm(D, config.rms_norm_eps)
        self.q_norm.weight = self.q_norm.weight * D**-0.5  # untrained, with scale 1: gives q . k about unit variance
        self.k_norm = nn.RMSNorm(D, config.rms_norm_eps)
        self._periods = rope_periods(config.rope_parameters[kind], D)

    def __call__(
        self, x: mx.array, positions: mx.array, mask: Mask, append: AppendKV, score_bytes: int = SCORE_BYTES
    ) -> mx.array:
        """Return the attention's output (B, L, M), in x's dtype.

        ``x`` (B, L, M) is the residual stream after the layer's input norm, ``positions`` (B, L) int32 the positions
        for the rotary embedding. ``append`` takes the new keys and values and returns those to attend over, for which
        ``mask`` says what each query sees. ``score_bytes`` bounds the scores in memory at once (see ``attend``).
        """
        B, L, _ = x.shape
        q, k, v = self.project(x, positions)
        k, v = append(k, v)
        return self.o_proj(attend(q, k, v, mask, score_bytes).swapaxes(1, 2).reshape(B, L, -1))

    def project(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return the queries (B, H, L, D), keys and values (B, Hk, L, D) of ``x``, normed and rotated, in x's dtype.

        ``x`` and ``positions`` are those of ``__call__``.
        """
        q, k, *own = self.products(x)
        v = own[0] if own else None
        return qk_norm_rope(q, k, v, self.q_norm.weight, self.k_norm.weight, self._periods, positions, self._eps)
