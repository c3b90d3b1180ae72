"""One layer of the text network."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.kernels import Route, attention_residual, norm_residual
from dgemma_mlx.model.attention import AppendKV, Attention
from dgemma_mlx.model.cache import SCORE_BYTES, Mask
from dgemma_mlx.model.experts import Experts, Router, RouterLog
from dgemma_mlx.model.mlp import MLP


class Layer(nn.Module):
    """One layer: attention, then a dense and a mixture-of-experts branch in parallel, with norms around each.

    A layer takes the residual stream together with its input norm, and returns the new residual stream together with
    the norm that the next layer needs, so that one kernel can compute both.

    Reference: transformers ``DiffusionGemmaEncoderTextLayer`` and ``DiffusionGemmaDecoderTextLayer``.

    Attributes:
        self_attn: The attention.
        mlp: The dense feed-forward branch.
        router: The router of the mixture-of-experts branch.
        experts: The experts of the mixture-of-experts branch.
        input_layernorm: Norm before the attention. The caller applies it.
        post_attention_layernorm: Norm of the attention's output.
        pre_feedforward_layernorm: Norm before the dense branch.
        pre_feedforward_layernorm_2: Norm before the experts.
        post_feedforward_layernorm: Norm of the sum of both branches.
        post_feedforward_layernorm_1: Norm of the dense branch's output.
        post_feedforward_layernorm_2: Norm of the experts' output.
        layer_scalar: Factor (1,) on the layer's output in ``decode``.
        encoder_layer_scalar: Factor (1,) on the layer's output in ``encode``. The two factors are the only weights of
            a layer that encoder and decoder do not share.
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
        score_bytes: int = SCORE_BYTES,
    ) -> tuple[mx.array, mx.array]:
        """Return the residual stream after this layer and its norm by ``next_norm``, both (B, L, M).

        Args:
            x: Residual stream, (B, L, M).
            normed: The residual stream after this layer's ``input_layernorm``, (B, L, M).
            positions: Position of each token for the rotary embedding, (B, L) int32.
            mask: Keys that each query sees.
            append: Stores this layer's new keys and values and returns those to attend over.
            scalar: Factor on the layer's output, (1,): ``layer_scalar`` or ``encoder_layer_scalar``.
            next_norm: Norm to apply to the output: the next layer's input norm, or the network's final norm.
            router_log: List to which the router's probabilities and choices are appended.
            score_bytes: Bound on the attention scores of a row that exist at once, in bytes (see ``attend``).
        """
        attended = self._attended(normed, positions, mask, append, score_bytes)
        after = attention_residual(
            x, attended, self.post_attention_layernorm.weight, self.pre_feedforward_layernorm.weight,
            self.pre_feedforward_layernorm_2.weight, self.router.scale, self._eps,
        )  # fmt: skip
        rows = (-1, x.shape[-1])  # (N, M)
        route = self.router(after.router.reshape(rows), router_log)
        dense, routed = self._branches(after.dense, after.experts.reshape(rows), route)
        return norm_residual(
            after.x, dense, routed, self.post_feedforward_layernorm_1.weight, self.post_feedforward_layernorm.weight,
            next_norm.weight, scalar, self._eps,
        )  # fmt: skip

    def _attended(
        self, normed: mx.array, positions: mx.array, mask: Mask, append: AppendKV, score_bytes: int
    ) -> mx.array:
        """Return the attention's output (B, L, M)."""
        return self.self_attn(normed, positions, mask, append, score_bytes)

    def _branches(self, dense: mx.array, rows: mx.array, route: Route) -> tuple[mx.array, mx.array]:
        """Return the outputs of the dense branch and of the experts, the latter after their norm, both (B, L, M).

        ``dense`` (B, L, M) and ``rows`` (N, M) are the inputs of the two branches.
        """
        routed = self.experts(rows, route, self.post_feedforward_layernorm_2)
        return self.mlp(dense), routed.reshape(dense.shape)
