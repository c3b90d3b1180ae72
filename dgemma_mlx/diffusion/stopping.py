"""Stopping: when a canvas is settled.

Reference: transformers ``StableAndConfidentStoppingCriteria``. The further tests are those of ``diffusion.speed``.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.speed import SETTLED_END, UNCERTAIN, Speed
from dgemma_mlx.kernels import MAX_KEPT, CanvasSample

# "encoder" is not tested here: see ``diffusion.encoder_check``.
TESTS = ("stable", "confident", "gap", "plateau", "encoder")


def text_ids(canvas: Sequence[int], eos_ids: Sequence[int]) -> Sequence[int]:
    """Return the canvas up to and including its first end-of-text id."""
    end = next((position for position, token in enumerate(canvas) if token in eos_ids), len(canvas))
    return canvas[: end + 1]


class Stopping:
    """The stopping tests of one canvas, for every row of a batch. Call it once per step.

    ``stable`` is the reference's test: the argmax canvas equals those of the last ``stability_threshold`` steps, and
    the mean entropy is below ``confidence_threshold`` (an upper bound, in nats). The other tests are those of
    ``Speed``.
    """

    def __init__(self, config: GenerationConfig, speed: Speed, free: mx.array | None = None) -> None:
        """Only positions that are ``free``, (B, C) bool, count; None means all. ``speed`` may leave out more."""
        self._config, self._speed, self._free = config, speed, free
        self._history: list[mx.array] = []  # the argmax canvases (B, C) of earlier steps, the latest last

    def __call__(self, sample: CanvasSample) -> tuple[mx.array, mx.array]:
        """Test a step's sample (B, C).

        Return (B,) int32, the first passed test as an index into ``TESTS``, or ``len(TESTS)`` when none was passed;
        and (B,) bool, whether the mean entropy is above ``UNCERTAIN``.
        """
        config, speed = self._config, self._speed
        counts = self._counting(sample)
        entropy = self._mean_entropy(sample, counts)
        no = mx.zeros(entropy.shape, mx.bool_)
        passed = dict.fromkeys(TESTS, no)
        confident = entropy < config.confidence_threshold
        passed["stable"] = self._unchanged(sample, counts, config.stability_threshold) & confident
        if speed.confident is not None and len(self._history) + 1 >= speed.confident.first_step:
            passed["confident"] = entropy < max(speed.confident.max_entropy, config.confidence_threshold)
        if speed.gap is not None:
            passed["gap"] = _all(gap(sample) > speed.gap, counts)
        if speed.plateau is not None:
            unchanged = self._unchanged(sample, counts, speed.plateau.steps)
            passed["plateau"] = unchanged & (entropy < speed.plateau.max_entropy)
        self._history.append(sample.argmax)
        first = mx.argmax(mx.stack([*passed.values(), ~no], axis=-1), axis=-1)
        return first.astype(mx.int32), ~(entropy <= UNCERTAIN)  # NaN is uncertain

    def _counting(self, sample: CanvasSample) -> mx.array | None:
        """Return the positions that count, (B, C) bool; None when all do."""
        if not self._speed.ignore_after_end:
            return self._free
        ends = (sample.argmax[..., None] == mx.array(self._config.eos_token_ids)).any(axis=-1)
        first = ends & (mx.cumsum(ends, axis=-1) == 1)
        settled = first & (sample.entropy < SETTLED_END)
        counts = mx.cumsum(settled, axis=-1) - settled == 0
        return counts if self._free is None else counts & self._free

    def _mean_entropy(self, sample: CanvasSample, counts: mx.array | None) -> mx.array:
        """Return the mean entropy, (B,) float32, in nats.

        Positions that do not count because they follow the end enter the mean as certain, so that a short answer does
        not take more steps than a long one.
        """
        if counts is None:
            return sample.entropy.mean(axis=-1)
        total = mx.where(counts, sample.entropy, 0).sum(axis=-1)
        size = sample.entropy.shape[-1] if self._free is None else mx.maximum(self._free.sum(axis=-1), 1)
        return total / size

    def _unchanged(self, sample: CanvasSample, counts: mx.array | None, steps: int) -> mx.array:
        """Return (B,) bool: whether the argmax equals that of each of the last ``steps`` steps, where it counts."""
        same = mx.full(sample.argmax.shape[:1], len(self._history) >= steps)
        for earlier in self._history[-steps:] if steps else ():
            same = same & _all(earlier == sample.argmax, counts)
        return same


def _all(true: mx.array, counts: mx.array | None) -> mx.array:
    """Return (B,) bool: whether ``true`` (B, C) holds at every position that counts."""
    return (true if counts is None else true | ~counts).all(axis=-1)


def gap(sample: CanvasSample) -> mx.array:
    """Return how far the two most probable tokens are apart in probability, (B, C) float32.

    It is 0 where the list of probable tokens is cut off.
    """
    two = mx.topk(sample.kept_weights, 2, axis=-1)
    return mx.where(sample.kept_count <= MAX_KEPT, mx.abs(two[..., 1] - two[..., 0]), 0)
