"""Random numbers that are replayed, so that two programs can be given the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from dgemma_mlx.diffusion.sampler import Noise


class Replay(Noise):
    """Noise that returns given canvases (n, B, C) and uniform numbers (n, B, C), one after the other."""

    def __init__(self, canvases: NDArray[Any], uniforms: NDArray[Any]) -> None:
        self._canvases, self._uniforms = iter(canvases), iter(uniforms)

    def fork(self, rows: Sequence[int] | None = None) -> Replay:
        return self

    def canvas(self, length: int, vocab_size: int) -> mx.array:
        canvas = next(self._canvases)
        assert canvas.shape[1:] == (length,)
        assert canvas.max() < vocab_size
        return mx.array(canvas, mx.int32)

    def uniform(self, length: int) -> mx.array:
        uniform = next(self._uniforms)
        assert uniform.shape[1:] == (length,)
        return mx.array(uniform, mx.float32)


def draw(
    seed: int, draws: int, batch: int, length: int, vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return canvases and uniform numbers for ``draws`` draws of each."""
    rng = np.random.default_rng(seed)
    canvases = rng.integers(0, vocab_size, (draws, batch, length))
    return canvases, rng.random((draws, batch, length), np.float32)
