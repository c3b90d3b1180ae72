"""The stopping rule against the same rule in plain Python."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.diffusion.stopping import StableAndConfident


def decide(
    canvases: list[list[int]], entropies: list[list[float]], stability: int, confidence: float
) -> bool:
    """For the last step of one row, given all its argmax canvases and entropies."""
    last = entropies[-1]
    earlier = canvases[-1 - stability : -1]
    stable = len(earlier) == stability and all(canvas == canvases[-1] for canvas in earlier)
    return stable and sum(last) / len(last) < confidence


@pytest.mark.parametrize("stability", [0, 1, 2, 3])
def test_stops_when_stable_and_confident(stability: int) -> None:
    """Short canvases over two tokens, so that they often stay and often come back."""
    rng = np.random.default_rng(stability)
    rule = StableAndConfident(stability, 0.5)
    canvases, entropies = rng.integers(0, 2, (100, 3, 2)), rng.integers(0, 5, (100, 3, 2)) / 4
    canvases[30:60] = canvases[30]
    decisions = []
    for step in range(100):
        found = np.array(rule(mx.array(canvases[step]), mx.array(entropies[step], mx.float32)))
        assert found.tolist() == [
            decide(canvases[: step + 1, row].tolist(), entropies[: step + 1, row].tolist(), stability, 0.5)
            for row in range(3)
        ]
        decisions.append(found)
    assert 0 < np.mean(decisions) < 1


def test_mean_entropy_at_the_threshold_is_not_confident() -> None:
    canvas = mx.zeros((1, 2), mx.int32)
    assert StableAndConfident(0, 0.5)(canvas, mx.array([[0.25, 0.75]])).tolist() == [False]
    assert StableAndConfident(0, 0.5)(canvas, mx.array([[0.25, 0.7]])).tolist() == [True]
