"""Samplers, which write the next step's canvas from a step's prediction, and the random numbers of a generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.kernels import CanvasSample


class Proposal(NamedTuple):
    """What a sampler sees of one step. Pins, barred ids and the projection of a constraint are applied already.

    Attributes:
        denoiser_canvas: The ids that the step proposes, (B, C) int32: drawn from the prediction, or most probable.
        sample: The statistics of the prediction, (B, C).
        free: The positions that are not pinned, (B, C) bool; None when all are free.
        vocab_size: Number of ids of the vocabulary, V.
    """

    denoiser_canvas: mx.array
    sample: CanvasSample
    free: mx.array | None
    vocab_size: int


class Sampler(Protocol):
    """Decides which proposed ids a step accepts, and what stands at the other positions."""

    def __call__(self, proposal: Proposal, noise: Noise, config: GenerationConfig) -> tuple[mx.array, mx.array]:
        """Return the canvas (B, C) int32 that the next step reads, and the accepted positions (B, C) bool.

        Pinned positions are never accepted. The caller writes the pinned ids into the canvas. ``noise`` gives the
        random numbers, which are drawn in the same order in every step.
        """


@dataclass(frozen=True)
class EntropyBound:
    """The reference's sampler: accept the most certain positions, and fill all others with uniform noise.

    The bound is the checkpoint's ``entropy_bound``.

    Reference: transformers ``EntropyBoundSampler``; Ben-Hamu et al., arXiv 2505.24857.
    """

    def __call__(self, proposal: Proposal, noise: Noise, config: GenerationConfig) -> tuple[mx.array, mx.array]:
        """Accept the proposed ids within the bound, as if there were no pinned positions."""
        entropy, free = proposal.sample.entropy, proposal.free
        if free is not None:
            entropy = mx.where(free, entropy, mx.inf)
        accepted_mask = accept(entropy, config.entropy_bound)
        if free is not None:
            accepted_mask = accepted_mask & free
        fresh = noise.canvas(entropy.shape[1], proposal.vocab_size)
        return mx.where(accepted_mask, proposal.denoiser_canvas, fresh), accepted_mask


def accept(entropy: mx.array, entropy_bound: float) -> mx.array:
    """Return which positions (B, C) bool are accepted, given their entropies (B, C) in nats.

    Positions are taken in ascending order of entropy while the sum of the entropies before them stays within the
    bound. The most certain position is therefore always accepted.
    """
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    before = mx.cumsum(ascending, axis=-1) - ascending
    return mx.take_along_axis(before <= entropy_bound, mx.argsort(order, axis=-1), axis=-1)


class Noise:
    """The random numbers of one or more canvases, for a batch of rows that have a seed each.

    Row b draws the numbers that it would draw alone, so a seed gives the same text in any batch on one machine. Tests
    inject the reference's numbers with an object that has the same methods.
    """

    def __init__(self, *seeds: int) -> None:
        """Start one stream of random numbers for each seed."""
        self._keys = [mx.random.key(seed) for seed in seeds]

    def fork(self, rows: Sequence[int] | None = None) -> Noise:
        """Return the random numbers of the next canvas of these rows of the batch, or of all rows.

        They do not depend on how many the last canvas has drawn, nor on the canvases of other rows.
        """
        forked = Noise()
        forked._keys = self._next(rows)
        return forked

    def keep(self, rows: list[int]) -> None:
        """Continue with these rows of the batch only."""
        self._keys = [self._keys[row] for row in rows]

    def canvas(self, length: int, vocab_size: int) -> mx.array:
        """Draw uniform random ids (B, C) over the whole vocabulary."""
        return self._rows(lambda key: mx.random.randint(0, vocab_size, (length,), key=key))

    def uniform(self, length: int) -> mx.array:
        """Draw numbers (B, C) in [0, 1), one for each sample that is drawn by inverse CDF."""
        return self._rows(lambda key: mx.random.uniform(shape=(length,), key=key))

    def _rows(self, draw: Callable[[mx.array], mx.array]) -> mx.array:
        return mx.stack([draw(key) for key in self._next()])

    def _next(self, rows: Sequence[int] | None = None) -> list[mx.array]:
        drawn = []
        for row in range(len(self._keys)) if rows is None else rows:
            self._keys[row], key = mx.random.split(self._keys[row])
            drawn.append(key)
        return drawn
