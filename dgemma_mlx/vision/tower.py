"""The vision tower: from the patches of one picture to its soft tokens.

Reference: transformers ``Gemma4VisionModel`` and ``Gemma4MultimodalEmbedder``. Shape letters: N patches, n soft tokens,
H vision width, D vision head dim, M text width.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from dgemma_mlx.checkpoint.vision_config import VisionConfig
from dgemma_mlx.model.attention import attend
from dgemma_mlx.model.cache import SCORE_BYTES
from dgemma_mlx.model.mlp import geglu
from dgemma_mlx.model.packed import Linear

LIMITS = ("input_min", "input_max", "output_min", "output_max")  # names of a clipped linear map's scalars
_UNBOUNDED = 1 << 62  # bytes of scores: attention in one call, whose fused kernel on a GPU stores no scores


class ClippableLinear(nn.Module):
    """A linear map that clamps its inputs and outputs, if the configuration says so.

    Attributes:
        linear: The linear map, plain or packed.
        input_min: Least input, a scalar; absent unless ``use_clipped_linears``, as are the next three.
        input_max: Greatest input.
        output_min: Least output.
        output_max: Greatest output.
    """

    def __init__(self, config: VisionConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        if config.use_clipped_linears:
            self.input_min, self.input_max = mx.array(-mx.inf), mx.array(mx.inf)
            self.output_min, self.output_max = mx.array(-mx.inf), mx.array(mx.inf)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the map to x (..., I) and return (..., O) in x's dtype."""
        if "input_min" not in self:
            return self.linear(x)
        least, most, least_output, most_output = (self[name].astype(x.dtype) for name in LIMITS)
        return mx.clip(self.linear(mx.clip(x, least, most)), least_output, most_output)


class Attention(nn.Module):
    """Attention of every patch to every patch, with norms on q, k and v and score scale 1."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        H, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self._heads, self._eps = config.num_attention_heads, config.rms_norm_eps
        self.q_proj = ClippableLinear(config, H, inner)
        self.k_proj = ClippableLinear(config, H, inner)
        self.v_proj = ClippableLinear(config, H, inner)
        self.o_proj = ClippableLinear(config, inner, H)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Return the attention's output (N, H) for x (N, H), in x's dtype. ``cos`` and ``sin`` are those of ``turn``.

        Without Metal, blocks of queries bound the memory of the scores.
        """
        N = x.shape[0]
        q, k, v = (layer(x).reshape(N, self._heads, -1) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = turn(self.q_norm(q), cos, sin), turn(self.k_norm(k), cos, sin)
        v = mx.fast.rms_norm(v, None, self._eps)
        q, k, v = (values.swapaxes(0, 1)[None] for values in (q, k, v))  # (1, heads, N, D)
        on_gpu = mx.default_device() != mx.Device(mx.cpu)
        mixed = attend(q, k, v, None, _UNBOUNDED if on_gpu else SCORE_BYTES)
        return self.o_proj(mixed[0].swapaxes(0, 1).reshape(N, -1))


class MLP(nn.Module):
    """The feed-forward block: down(gelu(gate x) * up x)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = ClippableLinear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = ClippableLinear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = ClippableLinear(config, config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the block to x (N, H) and return (N, H)."""
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Layer(nn.Module):
    """A layer of the tower: attention and a feed-forward block, each between two norms."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(H, eps)
        self.post_attention_layernorm = nn.RMSNorm(H, eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(H, eps)
        self.post_feedforward_layernorm = nn.RMSNorm(H, eps)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Apply the layer to x (N, H) and return (N, H). ``cos`` and ``sin`` are those of ``turn``."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class PatchEmbedder(nn.Module):
    """The embedding of patches: a linear map of the pixels, plus a row for each coordinate.

    Attributes:
        input_proj: Linear map from the values of a patch to H.
        position_embedding_table: Rows for the columns of a picture and rows for its rows, (2, positions, H).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = Linear(3 * config.patch_size**2, config.hidden_size)
        self.position_embedding_table = mx.zeros((2, config.position_embedding_size, config.hidden_size))

    def __call__(self, patches: mx.array, grid: tuple[int, int]) -> mx.array:
        """Return the embeddings (N, H) of patches (N, values) float32 from 0 to 1, in the table's dtype."""
        rows, columns = grid
        by_column, by_row = self.position_embedding_table
        positions = by_column[None, :columns] + by_row[:rows, None]
        x = self.input_proj((2 * (patches - 0.5)).astype(positions.dtype))
        return x + positions.reshape(x.shape)


class Encoder(nn.Module):
    """The layers of the tower, first to last."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [Layer(config) for _ in range(config.num_hidden_layers)]


class VisionTower(nn.Module):
    """The network that turns the patches of a picture into embeddings for the text network.

    Attributes:
        patch_embedder: Embedding of the patches.
        encoder: The layers.
        std_bias: Values (H,), float32, subtracted from the pooled features; absent unless ``standardize``.
        std_scale: Values (H,), float32, by which they are multiplied then; absent unless ``standardize``.
        embedding_projection: Linear map from H to M values.
    """

    def __init__(self, config: VisionConfig, text_width: int) -> None:
        super().__init__()
        self._config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = Encoder(config)
        if config.standardize:
            self.std_bias, self.std_scale = mx.zeros((config.hidden_size,)), mx.ones((config.hidden_size,))
        self.embedding_projection = Linear(config.hidden_size, text_width)

    def __call__(self, patches: mx.array | np.ndarray, grid: tuple[int, int]) -> mx.array:
        """Return the soft tokens (n, M) of a picture, row by row, in the tower's dtype, lazily.

        ``patches`` (N, values) float32 from 0 to 1 are the patches of a picture, row by row, and ``grid`` holds the
        numbers of their rows and columns, both multiples of ``pooling_kernel_size``.

        The products of pooled features and sqrt(H) leave the range of float16, and standardizing subtracts large
        numbers from each other, so this part is computed in float32.
        """
        x = self.patch_embedder(mx.array(patches), grid)
        cos, sin = angles(grid, self._config)
        cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
        for layer in self.encoder.layers:
            x = layer(x, cos, sin)
        pooled = self._pool(x.astype(mx.float32), grid) * self._config.hidden_size**0.5
        if self._config.standardize:
            pooled = (pooled - self.std_bias) * self.std_scale
        return self.embedding_projection(mx.fast.rms_norm(pooled.astype(x.dtype), None, self._config.rms_norm_eps))

    def _pool(self, x: mx.array, grid: tuple[int, int]) -> mx.array:
        """Return the mean (n, H) of each square of patches in x (N, H)."""
        (rows, columns), side = grid, self._config.pooling_kernel_size
        squares = x.reshape(rows // side, side, columns // side, side, -1)
        return squares.mean(axis=(1, 3)).reshape(-1, x.shape[-1])


def angles(grid: tuple[int, int], config: VisionConfig) -> tuple[mx.array, mx.array]:
    """Return the cosines and sines of the rotary embedding of a grid's patches, each (N, 1, 2, 1, D/4) float32.

    The first of the two rows is for the column of a patch, the second for its row.
    """
    rows, columns = grid
    pairs = config.head_dim // 4
    frequencies = config.rope_theta ** (-mx.arange(pairs, dtype=mx.float32) / pairs)
    column = mx.broadcast_to(mx.arange(columns), (rows, columns))
    row = mx.broadcast_to(mx.arange(rows)[:, None], (rows, columns))
    positions = mx.stack([column, row], axis=-1).reshape(-1, 1, 2, 1, 1)
    turned = positions * frequencies
    return mx.cos(turned), mx.sin(turned)


def turn(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate heads x (N, heads, D) by the angles of ``angles``, in x's dtype.

    Each half of a head belongs to one coordinate. In it, values i and i + D/4 form a pair.
    """
    halves = x.reshape(*x.shape[:-1], 2, 2, -1)
    a, b = halves[..., :1, :], halves[..., 1:, :]
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-2).reshape(x.shape)
