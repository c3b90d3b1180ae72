"""One stack of weights, run in two ways: ``encode`` a prefix causally, ``decode`` a canvas both ways.

Reference: transformers ``DiffusionGemmaEncoderTextModel``, ``DiffusionGemmaDecoderModel`` and
``DiffusionGemmaForBlockDiffusion``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.kernels import CanvasSample, attention_residual, norm_residual, references, sparse_soft_embedding
from dgemma_mlx.model.attention import AppendKV, Attention
from dgemma_mlx.model.cache import Mask, PrefixCache, row_positions
from dgemma_mlx.model.experts import Experts, Router, RouterLog
from dgemma_mlx.model.mlp import MLP, SelfConditioning
from dgemma_mlx.model.packed import times_table, weighted_rows
from dgemma_mlx.model.prediction import Prediction, incomplete

LayerWrapper = Callable[["Layer", int, Callable[..., Any]], Callable[..., tuple[mx.array, mx.array]]]

DENSE_BYTES = 128 << 20
"""What is worked on at a time where expected embeddings take all logits of a position."""


def dense_value_bytes(dtype: mx.Dtype) -> int:
    """Of a value of ``DENSE_BYTES``: float32 stays in one array, half precision is rounded to and from (measured)."""
    return 4 if dtype == mx.float32 else 14


class Layer(nn.Module):
    """Attention, then a dense and a mixture-of-experts branch side by side; norms before and after each.

    The residual stream travels with the norm of it that comes next: at its end a layer norms for the one after it.
    ``layer_scalar`` scales the output when decoding, ``encoder_layer_scalar`` when encoding: the only
    two weights of a layer that the two ways do not share.
    """

    def __init__(self, config: TextConfig, kind: str) -> None:
        super().__init__()
        self._eps = config.rms_norm_eps

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

        self.self_attn = Attention(config, kind)
        self.mlp = MLP(config)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.pre_feedforward_layernorm_2 = norm()
        self.post_feedforward_layernorm = norm()
        self.post_feedforward_layernorm_1 = norm()
        self.post_feedforward_layernorm_2 = norm()
        self.layer_scalar = mx.ones(1)
        self.encoder_layer_scalar = mx.ones(1)

    def __call__(
        self,
        x: mx.array,
        normed: mx.array,
        positions: mx.array,
        mask: Mask,
        append: AppendKV,
        scalar: mx.array,
        next_norm: nn.RMSNorm,
        router_log: RouterLog | None = None,
    ) -> tuple[mx.array, mx.array]:
        """x and its input norm, both (B, L, M) -> x after this layer and ``next_norm`` of it."""
        attended = self.self_attn(normed, positions, mask, append)
        after = attention_residual(
            x, attended, self.post_attention_layernorm.weight, self.pre_feedforward_layernorm.weight,
            self.pre_feedforward_layernorm_2.weight, self.router.scale, self._eps,
        )  # fmt: skip
        rows = (-1, x.shape[-1])  # (N, M)
        route = self.router(after.router.reshape(rows), router_log)
        routed = self.experts(after.experts.reshape(rows), route, self.post_feedforward_layernorm_2)
        return norm_residual(
            after.x, self.mlp(after.dense), routed.reshape(x.shape), self.post_feedforward_layernorm_1.weight,
            self.post_feedforward_layernorm.weight, next_norm.weight, scalar, self._eps,
        )  # fmt: skip


class DiffusionGemma(nn.Module):
    """The text network. Logits are float32; everything else is in the weights' dtype."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.self_conditioning = SelfConditioning(config)
        self.layers = [Layer(config, kind) for kind in config.layer_types]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._wrapper: LayerWrapper | None = None

    def wrap_layers(self, wrapper: LayerWrapper | None) -> None:
        """In training, what ``wrapper`` makes of a layer, its number and ``append`` is called in its place."""
        self._wrapper = wrapper

    @property
    def dtype(self) -> mx.Dtype:
        """Of activations; packed weights have another."""
        return self.norm.weight.dtype

    def new_cache(self, left_padding: mx.array | None = None) -> PrefixCache:
        """An empty cache; ``left_padding`` (B,) int32 says how many of each row's first positions are padding."""
        return PrefixCache(self.config, left_padding)

    def embed(self, ids: mx.array) -> mx.array:
        """ids (B, L) int -> (B, L, M), scaled by sqrt(M)."""
        embeddings: mx.array = self.embed_tokens(ids).astype(self.dtype)  # mxfp4 and its like unpack to bfloat16
        return embeddings * math.sqrt(self.config.hidden_size)

    def encode(self, ids: mx.array, cache: PrefixCache, router_log: RouterLog | None = None) -> mx.array:
        """Appends ids (B, P) to the cache, causally; returns the hidden states (B, P, M) after the final norm.

        Everything is lazy: a caller that evaluates only the cache pays nothing for the last layer's output.
        """
        masks, scalars = cache.encode_masks(ids.shape[1]), [layer.encoder_layer_scalar for layer in self.layers]
        hidden = self._layers(self.embed(ids), cache.rope_offset, masks, cache.update, scalars, router_log)
        cache.advance(ids.shape[1])
        return hidden

    def decode(
        self, canvas: mx.array, cache: PrefixCache, self_conditioning: mx.array | None = None,
        router_log: RouterLog | None = None,
    ) -> mx.array:
        """Canvas ids (B, C) after the cached prefix -> logits (B, C, V) float32. Takes what ``decode_hidden`` takes."""
        return self.logits(self.decode_hidden(canvas, cache, self_conditioning, router_log))

    def decode_hidden(
        self, canvas: mx.array, cache: PrefixCache, self_conditioning: mx.array | Prediction | None = None,
        router_log: RouterLog | None = None,
    ) -> mx.array:
        """Canvas ids (B, C) after the cached prefix -> hidden states (B, C, M) after the final norm.

        ``self_conditioning`` is the last step's processed logits (B, C, V), or what ``predict`` made of them;
        None in the first step.
        The cache is read, never written.
        """
        x = self.embed(canvas)
        x = self.self_conditioning.condition(x, self._soft_embeddings(self_conditioning, x))
        masks, scalars = cache.canvas_masks(canvas.shape[1]), [layer.layer_scalar for layer in self.layers]
        return self._layers(x, cache.rope_offset, masks, cache.with_canvas, scalars, router_log)

    def _layers(
        self, x: mx.array, rope_offset: int | mx.array, masks: dict[str, Mask],
        append: Callable[[int, mx.array, mx.array], tuple[mx.array, mx.array]], scalars: list[mx.array],
        router_log: RouterLog | None,
    ) -> mx.array:
        """x (B, L, M) through all layers and the final norm; ``append`` takes a layer's number, keys and values."""
        norms = [*(layer.input_layernorm for layer in self.layers), self.norm]
        wrapper = self._wrapper if self.training else None
        with references(only=self.training):
            positions = row_positions(rope_offset, *x.shape[:2])
            normed = norms[0](x)
            for i, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
                run = layer if wrapper is None else wrapper(layer, i, append)
                x, normed = run(
                    x, normed, positions, masks[kind], partial(append, i), scalars[i], norms[i + 1], router_log
                )
        return normed

    def project(self, hidden: mx.array) -> mx.array:
        """hidden (..., M) -> logits (..., V) before the softcap, in the weights' dtype."""
        table = self.embed_tokens
        return times_table(hidden, table) if isinstance(table, nn.QuantizedEmbedding) else table.as_linear(hidden)

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden (..., M) -> softcapped logits (..., V) float32."""
        return self.capped(self.project(hidden))

    def predict(self, raw: mx.array, sample: CanvasSample, temperature: float) -> Prediction:
        """What conditions the next step: from ``project``'s logits (B, C, V) and the evaluated sample of them."""
        dense = incomplete(sample, self.dtype)
        if dense is None:
            return Prediction(sample)
        return Prediction(sample, dense, self._expected_embeddings(raw.reshape(-1, raw.shape[-1]), dense, temperature))

    def _expected_embeddings(self, raw: mx.array, positions: mx.array, temperature: float) -> mx.array:
        """Those of some rows (n,) of raw logits (N, V) -> (n, M), evaluated: in blocks, one after the other.

        Left lazy, the blocks would be part of the next step's evaluation, but MLX starts on several before the first
        has ended. Measured for 256 rows of 262,144 in float32: 134 MB beside the logits instead of 269, in the same
        time (2 Linux cores).
        """
        step = max(1, DENSE_BYTES // (dense_value_bytes(self.dtype) * raw.shape[-1]))
        blocks = []
        for start in range(0, positions.size, step):
            rows = positions[start : start + step]
            blocks.append(self._expected_embedding(self.capped(raw[rows]) / temperature))
            mx.eval(blocks[-1])
        return mx.concatenate(blocks)

    def capped(self, raw: mx.array) -> mx.array:
        """``project``'s logits -> softcapped ones, float32."""
        cap = self.config.final_logit_softcapping
        return cap * mx.tanh(raw.astype(mx.float32) / cap)

    def _soft_embeddings(self, conditioning: mx.array | Prediction | None, like: mx.array) -> mx.array:
        """The expected embedding (B, C, M) of what was predicted; zeros where nothing was."""
        if conditioning is None:
            return mx.zeros_like(like)
        if isinstance(conditioning, mx.array):
            return self._expected_embedding(conditioning)
        sample = conditioning.sample
        soft = sparse_soft_embedding(self.embed_tokens, sample.kept_ids, sample.kept_weights, sample.kept_count)
        soft = soft.astype(self.dtype).reshape(-1, like.shape[-1]) * math.sqrt(self.config.hidden_size)
        if conditioning.dense is not None and conditioning.expected is not None:
            soft[conditioning.dense] = conditioning.expected
        return soft.reshape(like.shape)

    def _expected_embedding(self, logits: mx.array) -> mx.array:
        """The mean embedding under softmax(logits), logits rounded to the weights' dtype: (..., V) -> (..., M)."""
        probabilities = mx.softmax(logits.astype(self.dtype).astype(mx.float32), axis=-1).astype(self.dtype)
        table = self.embed_tokens
        if isinstance(table, nn.QuantizedEmbedding):
            soft = weighted_rows(probabilities, table)
        else:
            soft = probabilities @ table.weight
        return soft * math.sqrt(self.config.hidden_size)
