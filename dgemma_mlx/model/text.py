"""One stack of weights, run in two ways: ``encode`` a prefix causally, ``decode`` a canvas both ways.

Reference: transformers ``DiffusionGemmaEncoderTextModel``, ``DiffusionGemmaDecoderModel`` and
``DiffusionGemmaForBlockDiffusion``.
"""

from __future__ import annotations

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.config import TextConfig
from dgemma_mlx.model.attention import AppendKV, Attention
from dgemma_mlx.model.cache import Mask, PrefixCache
from dgemma_mlx.model.experts import Experts, Router
from dgemma_mlx.model.mlp import MLP, SelfConditioning


class Layer(nn.Module):
    """Attention, then a dense and a mixture-of-experts branch side by side; norms before and after each.

    ``layer_scalar`` scales the output when decoding, ``encoder_layer_scalar`` when encoding: the only
    two weights of a layer that the two ways do not share.
    """

    def __init__(self, config: TextConfig, kind: str) -> None:
        super().__init__()

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
        rope_offset: int | mx.array,
        mask: Mask,
        append: AppendKV,
        scalar: mx.array,
        router_log: list[tuple[mx.array, mx.array]] | None,
    ) -> mx.array:
        """x (B, L, M) -> (B, L, M)."""
        attended = self.self_attn(self.input_layernorm(x), rope_offset, mask, append)
        x = x + self.post_attention_layernorm(attended)
        dense = self.mlp(self.pre_feedforward_layernorm(x))
        rows = x.reshape(-1, x.shape[-1])  # (N, M)
        probabilities, weights, indices = self.router(rows)
        if router_log is not None:
            router_log.append((probabilities, indices))
        routed = self.experts(self.pre_feedforward_layernorm_2(rows), weights, indices)
        both = self.post_feedforward_layernorm_1(dense)
        both = both + self.post_feedforward_layernorm_2(routed).reshape(x.shape)
        return (x + self.post_feedforward_layernorm(both)) * scalar


class DiffusionGemma(nn.Module):
    """The text network. Logits are float32; everything else is in the weights' dtype."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.self_conditioning = SelfConditioning(config)
        self.layers = [Layer(config, kind) for kind in config.layer_types]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def dtype(self) -> mx.Dtype:
        """Of activations; packed weights have another."""
        return self.norm.weight.dtype

    def new_cache(self, left_padding: mx.array | None = None) -> PrefixCache:
        return PrefixCache(self.config, left_padding)

    def embed(self, ids: mx.array) -> mx.array:
        """ids (B, L) int -> (B, L, M), scaled by sqrt(M)."""
        embeddings: mx.array = self.embed_tokens(ids).astype(self.dtype)  # mxfp4 and its like unpack to bfloat16
        return embeddings * math.sqrt(self.config.hidden_size)

    def encode(
        self, ids: mx.array, cache: PrefixCache, router_log: list[tuple[mx.array, mx.array]] | None = None
    ) -> mx.array:
        """Appends ids (B, P) to the cache, causally; returns the hidden states (B, P, M) after the final norm.

        Everything is lazy: a caller that evaluates only the cache pays nothing for the last layer's output.
        """
        x = self.embed(ids)
        masks = cache.encode_masks(ids.shape[1])
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            x = layer(
                x, cache.rope_offset, masks[kind], partial(cache.update, i), layer.encoder_layer_scalar, router_log
            )
        cache.advance(ids.shape[1])
        hidden: mx.array = self.norm(x)
        return hidden

    def decode(
        self,
        canvas: mx.array,
        cache: PrefixCache,
        self_conditioning: mx.array | None = None,
        router_log: list[tuple[mx.array, mx.array]] | None = None,
    ) -> mx.array:
        """Canvas ids (B, C) after the cached prefix -> logits (B, C, V) float32.

        ``self_conditioning`` is the last step's processed logits (B, C, V), None in the first step.
        The cache is read, never written.
        """
        x = self.embed(canvas)
        x = self.self_conditioning.condition(x, self._soft_embeddings(self_conditioning, x))
        masks = cache.canvas_masks(canvas.shape[1])
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            x = layer(
                x, cache.rope_offset, masks[kind], partial(cache.with_canvas, i), layer.layer_scalar, router_log
            )
        return self.logits(self.norm(x))

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden (..., M) -> softcapped logits (..., V) float32."""
        cap = self.config.final_logit_softcapping
        return cap * mx.tanh(self.embed_tokens.as_linear(hidden).astype(mx.float32) / cap)

    def _soft_embeddings(self, logits: mx.array | None, like: mx.array) -> mx.array:
        """The expected embedding under softmax(logits), (B, C, V) -> (B, C, M); zeros without logits."""
        if logits is None:
            return mx.zeros_like(like)
        probabilities = mx.softmax(logits.astype(mx.float32), axis=-1).astype(like.dtype)
        table = self.embed_tokens
        if isinstance(table, nn.QuantizedEmbedding):
            soft = mx.quantized_matmul(
                probabilities, table.weight, table.scales, table.get("biases"), transpose=False,
                group_size=table.group_size, bits=table.bits, mode=table.mode,
            )
        else:
            soft = probabilities @ table.weight
        return soft * math.sqrt(self.config.hidden_size)
