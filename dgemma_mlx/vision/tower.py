"""The vision tower: from the patches of a picture to soft tokens in the width of the text network.

Reference: transformers ``Gemma4VisionModel`` and ``Gemma4MultimodalEmbedder``. Unlike there, pictures are not padded
to a common number of patches, so no mask is needed.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.vision_config import VisionConfig
from dgemma_mlx.model.attention import attend
from dgemma_mlx.model.cache import SCORE_BYTES

# On a GPU attention is fused and holds no scores. Elsewhere its scores are computed in blocks of queries.
_SCORE_BYTES = 1 << 62 if mx.metal.is_available() else SCORE_BYTES


class VisionTower(nn.Module):
    """The vision tower and the projection of its features, with random weights until ``load_weights`` is called.

    Attributes:
        patch_embedder: Turns patches into embeddings.
        encoder: The layers.
        std_bias: Bias of the standardisation, (H,); absent without ``standardize``.
        std_scale: Scale of the standardisation, (H,); absent without ``standardize``.
        embedding_projection: Projection from H values to the text network's M.
    """

    def __init__(self, config: VisionConfig, text_width: int) -> None:
        super().__init__()
        self._config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = Encoder(config)
        if config.standardize:
            self.std_bias, self.std_scale = mx.zeros(config.hidden_size), mx.ones(config.hidden_size)
        self.embedding_projection = nn.Linear(config.hidden_size, text_width, bias=False)

    def __call__(self, patches: mx.array, grid: tuple[int, int]) -> mx.array:
        """Return the soft tokens (n, M) of a picture, row by row, in the dtype of the tower's activations.

        ``patches`` (N, 3 * patch_size ** 2) float32 hold the pixels from 0 to 1, row by row, and ``grid`` says how many
        rows and columns of patches there are. Both are multiples of the pooling's side.
        """
        rows, columns = grid
        position = mx.arange(rows * columns)
        x, y = position % columns, position // columns
        hidden = self.encoder(self.patch_embedder(patches, x, y), x, y)
        pooled = _standardized(self._pooled(hidden, rows, columns), self)
        normed = mx.fast.rms_norm(pooled.astype(hidden.dtype), None, self._config.rms_norm_eps)
        projected: mx.array = self.embedding_projection(normed)
        return projected

    def _pooled(self, hidden: mx.array, rows: int, columns: int) -> mx.array:
        """Return the mean of each square of patches, times sqrt(H): (N, H) to (n, H) float32.

        The factor leaves the range of float16, and the standardisation cancels, so both are float32.
        """
        side, H = self._config.pooling_kernel_size, hidden.shape[-1]
        squares = hidden.astype(mx.float32).reshape(rows // side, side, columns // side, side, H)
        return squares.mean(axis=(1, 3)).reshape(-1, H) * math.sqrt(H)


def _standardized(pooled: mx.array, tower: VisionTower) -> mx.array:
    """Return (x - bias) * scale in float32 for pooled features x (n, H), or x where the tower has no such weights."""
    if "std_bias" not in tower:
        return pooled
    return (pooled - tower.std_bias.astype(mx.float32)) * tower.std_scale.astype(mx.float32)


class PatchEmbedder(nn.Module):
    """Embeddings of patches: a projection of the pixels, and a learned embedding of each coordinate.

    Attributes:
        input_proj: Projection from the pixels of a patch to H values.
        position_embedding_table: Embeddings of the columns and of the rows, (2, P, H).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = 0.02 * mx.random.normal(
            (2, config.position_embedding_size, config.hidden_size)
        )

    def __call__(self, patches: mx.array, x: mx.array, y: mx.array) -> mx.array:
        """Return the embeddings (N, H) of patches (N, 3 * patch_size ** 2), in columns ``x`` and rows ``y`` (N,)."""
        table = self.position_embedding_table
        pixels = (2 * (patches - 0.5)).astype(table.dtype)
        embedded: mx.array = self.input_proj(pixels) + table[0][x] + table[1][y]
        return embedded


class Encoder(nn.Module):
    """The layers of the tower.

    Attributes:
        layers: The layers, first to last.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._config = config
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, hidden: mx.array, x: mx.array, y: mx.array) -> mx.array:
        """Return the output (N, H) of the layers for embeddings (N, H) of patches in columns ``x``, rows ``y`` (N,)."""
        angles = rotary_angles(x, y, self._config.head_dim, self._config.rope_theta)
        cos, sin = mx.cos(angles).astype(hidden.dtype), mx.sin(angles).astype(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return hidden


class Layer(nn.Module):
    """One layer: attention over all patches, then a gated feed-forward block, with norms before and after each.

    Attributes:
        self_attn: The attention.
        mlp: The feed-forward block.
        input_layernorm: Norm before the attention.
        post_attention_layernorm: Norm of the attention's output.
        pre_feedforward_layernorm: Norm before the feed-forward block.
        post_feedforward_layernorm: Norm of the feed-forward block's output.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Return the residual stream (N, H) after this layer. ``cos`` and ``sin`` (N, 2, D / 4) turn the heads."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin))
        after: mx.array = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return after


class Attention(nn.Module):
    """Attention of every patch to every patch, with norms on q, k and v and score scale 1.

    Attributes:
        q_proj: Query projection, from H values to heads * D.
        k_proj: Key projection, from H values to heads * D.
        v_proj: Value projection, from H values to heads * D.
        o_proj: Output projection, from heads * D values to H.
        q_norm: Norm of each query head.
        k_norm: Norm of each key head.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        H, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self._heads, self._eps = config.num_attention_heads, config.rms_norm_eps
        self.q_proj = Linear(H, inner, config)
        self.k_proj = Linear(H, inner, config)
        self.v_proj = Linear(H, inner, config)
        self.o_proj = Linear(inner, H, config)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Return the attention's output (N, H) for the normed residual stream (N, H)."""
        q, k, v = (proj(x).reshape(len(x), self._heads, -1) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotated(self.q_norm(q), cos, sin), rotated(self.k_norm(k), cos, sin)
        v = mx.fast.rms_norm(v, None, self._eps)
        q, k, v = (array.swapaxes(0, 1)[None] for array in (q, k, v))  # (1, heads, N, D)
        # MLX has fused kernels for the published head width of 72: nothing is padded, and there is no mask.
        attended = attend(q, k, v, None, _SCORE_BYTES)
        out: mx.array = self.o_proj(attended[0].swapaxes(0, 1).reshape(len(x), -1))
        return out


class MLP(nn.Module):
    """The gated feed-forward block.

    Attributes:
        gate_proj: Projection of the gate, from H values to F.
        up_proj: Projection from H values to F.
        down_proj: Projection from F values to H.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, config)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the block's output (N, H) for the normed residual stream (N, H)."""
        out: mx.array = self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))
        return out


class Linear(nn.Module):
    """A linear map that clamps its input and its output if the configuration says so.

    Attributes:
        linear: The map itself, which may be packed.
        input_min: Least input; like the three others a scalar array, and absent without ``use_clipped_linears``.
        input_max: Greatest input.
        output_min: Least output.
        output_max: Greatest output.
    """

    def __init__(self, inputs: int, outputs: int, config: VisionConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        if config.use_clipped_linears:
            self.input_min, self.output_min = mx.array(-math.inf), mx.array(-math.inf)
            self.input_max, self.output_max = mx.array(math.inf), mx.array(math.inf)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the map's output for an input whose last axis it takes."""
        if "input_min" not in self:
            out: mx.array = self.linear(x)
            return out
        clipped = self.linear(mx.clip(x, self.input_min, self.input_max))
        return mx.clip(clipped, self.output_min, self.output_max)


def rotary_angles(x: mx.array, y: mx.array, head_dim: int, theta: float) -> mx.array:
    """Return the angles (N, 2, D / 4) float32 by which the two halves of each head are turned: by x, and by y."""
    half = head_dim // 2
    frequencies = mx.array([theta ** (-2 * i / half) for i in range(half // 2)], mx.float32)
    return mx.stack([x, y], axis=1)[..., None].astype(mx.float32) * frequencies


def rotated(heads: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Return heads (N, heads, D) of which each half is rotated in pairs (i, i + D / 4) by its angles (N, 2, D / 4)."""
    parts: Any = heads.reshape(*heads.shape[:2], 2, 2, -1)  # the halves, and the two of each pair
    first, second = parts[:, :, :, 0], parts[:, :, :, 1]
    c, s = cos[:, None], sin[:, None]
    return mx.stack([first * c - second * s, second * c + first * s], axis=3).reshape(heads.shape)
