"""Batches for the demo model's vision tower: drawn pictures of one size, and questions about them.

Inference encodes one picture at a time. Here many of one grid run through the tower together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from dgemma_mlx.checkpoint.vision_config import VisionConfig
from dgemma_mlx.model.soft_tokens import SoftTokens
from dgemma_mlx.text.chat import ChatTemplate, encode_checked
from dgemma_mlx.text.images import place_pictures
from dgemma_mlx.text.tokenizer import Tokenizer
from dgemma_mlx.train.batches import canvas_batch
from dgemma_mlx.train.objective import Batch
from dgemma_mlx.train.tasks.base import Split
from dgemma_mlx.train.tasks.look import COLOURS, GRIDS, THINGS, Pixels, Scene, ask, draw, draw_scene
from dgemma_mlx.vision.pixels import Picture
from dgemma_mlx.vision.tower import Attention, VisionTower, rotary_angles, rotated


@dataclass(frozen=True)
class Drawn:
    """Drawn pictures of one size.

    Attributes:
        scenes: What each picture shows.
        patches: Their patches, (B, N, 3 * patch_size ** 2) float32.
        grid: Numbers of rows and of columns of patches.
    """

    scenes: list[Scene]
    patches: mx.array
    grid: tuple[int, int]

    def labels(self) -> tuple[mx.array, mx.array]:
        """Return the numbers of the colours and of the things that are shown, (B,) int32 each."""
        colours = list(COLOURS)
        return (
            mx.array([colours.index(scene.colour) for scene in self.scenes]),
            mx.array([THINGS.index((scene.kind, scene.value)) for scene in self.scenes]),
        )


def drawn(rng: random.Random, split: Split, count: int, patch_size: int) -> Drawn:
    """Draw ``count`` pictures of a split. All have one size, which is drawn as well."""
    grid = rng.choice(GRIDS)
    scenes = [draw_scene(rng, split) for _ in range(count)]
    pixels = [draw(rng, scene, grid[0] * patch_size, grid[1] * patch_size) for scene in scenes]
    return Drawn(scenes, mx.array(np.stack([as_picture(each, patch_size).patches() for each in pixels])), grid)


def as_picture(pixels: Pixels, patch_size: int) -> Picture:
    """Return pixels (height, width, 3) as the picture that ``read_picture`` returns for a file of this size."""
    height, width, _ = pixels.shape
    grid = height // patch_size, width // patch_size
    return Picture("drawn", pixels, grid, grid[0] * grid[1], 70, -1, (width, height))


def encode_pictures(tower: VisionTower, config: VisionConfig, drawn: Drawn) -> mx.array:
    """Return the features of pictures, (B, N, H), before the tower's projection. The pooling's side is 1.

    They are those that ``VisionTower`` computes for each picture alone.
    """
    count, columns = drawn.grid[0] * drawn.grid[1], drawn.grid[1]
    x, y = mx.arange(count) % columns, mx.arange(count) // columns
    hidden = tower.patch_embedder(drawn.patches, x, y)
    angles = rotary_angles(x, y, config.head_dim, config.rope_theta)
    cos, sin = (mx.tile(array, (len(hidden), 1, 1)) for array in (mx.cos(angles), mx.sin(angles)))
    for layer in tower.encoder.layers:
        attended = _attend(layer.self_attn, layer.input_layernorm(hidden), cos, sin, config)
        hidden = hidden + layer.post_attention_layernorm(attended)
        hidden = hidden + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden)))
    return mx.fast.rms_norm(hidden * config.hidden_size**0.5, None, config.rms_norm_eps)


def _attend(attention: Attention, x: mx.array, cos: mx.array, sin: mx.array, config: VisionConfig) -> mx.array:
    """Return what ``Attention`` returns for each picture of a batch (B, N, H). ``cos`` and ``sin`` (B * N, 2, D / 4)."""
    B, N, _ = x.shape
    heads, D = config.num_attention_heads, config.head_dim
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (proj(x).reshape(B * N, heads, D) for proj in projections)
    q, k = rotated(attention.q_norm(q), cos, sin), rotated(attention.k_norm(k), cos, sin)
    v = mx.fast.rms_norm(v, None, config.rms_norm_eps)
    q, k, v = (array.reshape(B, N, heads, D).swapaxes(1, 2) for array in (q, k, v))
    weights = mx.softmax(q @ k.swapaxes(-1, -2), axis=-1)
    return attention.o_proj((weights @ v).swapaxes(1, 2).reshape(B, N, heads * D))


def questions(
    rng: random.Random, scenes: Sequence[Scene], count: int, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[Batch, mx.array]:
    """Return a batch with a question about each picture, and the rows of their features in it, (B, L) int32.

    Each picture has ``count`` soft tokens. A third of the questions is about the colour. Where a text token stands, the
    row is -1.
    """
    special = tokenizer.special_ids
    block = [special["<|image>"], *[special["<|image|>"]] * count, special["<image|>"]]
    conversations = []
    for scene in scenes:
        question, answer = ask(rng, scene, "colour" if rng.random() < 1 / 3 else scene.kind)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        ids = encode_checked(
            tokenizer, template, [{"role": "user", "content": content}], [], add_generation_prompt=True
        )
        prompt = place_pictures(ids, [block], special["<|image|>"])
        conversations.append((prompt, [*tokenizer.encode(answer), special["<turn|>"]]))
    batch = canvas_batch(conversations, 32, special["<pad>"], rng, causal=False)
    numbers: Any = mx.arange(len(scenes) * count, dtype=mx.int32).reshape(-1, count)
    first = int(conversations[0][0].index(special["<|image|>"]))  # the same in all prompts
    rows = mx.full(batch.ids.shape, -1, mx.int32)
    rows[:, first : first + count] = numbers
    return batch, rows


def soft_tokens(features: mx.array, rows: mx.array) -> SoftTokens:
    """Return the features (B, n, M) of pictures as soft tokens, of which each stands in one row of ``rows`` (B, L)."""
    return SoftTokens(features.reshape(-1, features.shape[-1]), rows, mx.where(rows >= 0, 0, -1))
