"""When a canvas is settled.

Reference: transformers ``StableAndConfidentStoppingCriteria``.
"""

from __future__ import annotations

import mlx.core as mx


class StableAndConfident:
    """True for a row whose argmax canvas equals those of the last ``stability_threshold`` steps and whose
    mean entropy is below ``confidence_threshold`` (an upper bound, in nats)."""

    def __init__(self, stability_threshold: int, confidence_threshold: float) -> None:
        self._stability, self._confidence = stability_threshold, confidence_threshold
        self._history: list[mx.array] = []

    def __call__(self, argmax_canvas: mx.array, entropy: mx.array) -> mx.array:
        """Argmax canvas (B, C) and entropies (B, C) of a step -> (B,) bool."""
        confident = entropy.mean(axis=-1) < self._confidence
        if self._stability == 0:
            return confident
        stable = mx.full(confident.shape, len(self._history) == self._stability)
        for earlier in self._history:
            stable = stable & (earlier == argmax_canvas).all(axis=-1)
        self._history = [*self._history, argmax_canvas][-self._stability :]
        return stable & confident
