"""Batches for the demo model's vision tower: drawn pictures of one size, and questions about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from dgemma_mlx.model.soft_tokens import SoftTokens
from dgemma_mlx.text.chat import ChatTemplate, encode_checked
from dgemma_mlx.text.images import place_pictures
from dgemma_mlx.text.tokenizer import Tokenizer
from dgemma_mlx.train.batches import canvas_batch
from dgemma_mlx.train.objective import Batch
from dgemma_mlx.train.tasks.base import Split
from dgemma_mlx.train.tasks.look import COLOURS, GRIDS, PATCH, THINGS, Pixels, Scene, ask, draw, draw_scene
from dgemma_mlx.vision.pixels import Picture
from dgemma_mlx.vision.tower import VisionTower


@dataclass(frozen=True)
class Drawn:
    """Drawn pictures of one size.

    Attributes:
        scenes: What each picture shows.
        patches: Their patches, (B, N, 3 * PATCH ** 2) float32.
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


def drawn(rng: random.Random, split: Split, count: int) -> Drawn:
    """Draw ``count`` pictures of a split. All have one size, which is drawn as well."""
    grid = rng.choice(GRIDS)
    scenes = [draw_scene(rng, split) for _ in range(count)]
    pixels = [draw(rng, scene, grid[0] * PATCH, grid[1] * PATCH) for scene in scenes]
    return Drawn(scenes, mx.array(np.stack([as_picture(each).patches() for each in pixels])), grid)


def as_picture(pixels: Pixels) -> Picture:
    """Return pixels (height, width, 3) as the picture that ``read_picture`` returns for a file of this size."""
    height, width, _ = pixels.shape
    grid = height // PATCH, width // PATCH
    return Picture("drawn", pixels, grid, grid[0] * grid[1], 70, -1, (width, height))


def encode_pictures(tower: VisionTower, drawn: Drawn) -> mx.array:
    """Return the soft tokens of pictures, (B, n, M)."""
    encoded: mx.array = mx.vmap(lambda patches: tower(patches, drawn.grid))(drawn.patches)
    return encoded


def questions(
    rng: random.Random, scenes: Sequence[Scene], count: int, tokenizer: Tokenizer, template: ChatTemplate
) -> tuple[Batch, mx.array]:
    """Return a batch with a question about each picture, and the rows of their features in it, (B, L) int32.

    Each picture has ``count`` soft tokens. Two fifths of the questions are about the colour. The row of a text token is
    -1.
    """
    special = tokenizer.special_ids
    block = [special["<|image>"], *[special["<|image|>"]] * count, special["<image|>"]]
    conversations = []
    for scene in scenes:
        question, answer = ask(rng, scene, "colour" if rng.random() < 0.4 else scene.kind)
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
