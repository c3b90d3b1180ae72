"""Which tokens of a step are accepted, and the random numbers of a generation.

Reference: transformers ``EntropyBoundSampler``; Ben-Hamu et al., arXiv 2505.24857.
"""

from __future__ import annotations

import mlx.core as mx


def accept(entropy: mx.array, entropy_bound: float) -> mx.array:
    """(B, C) entropies -> (B, C) bool: positions taken in ascending order of entropy while the sum of the
    entropies before them stays within the bound. The most certain position is always accepted."""
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    before = mx.cumsum(ascending, axis=-1) - ascending
    return mx.take_along_axis(before <= entropy_bound, mx.argsort(order, axis=-1), axis=-1)


class Noise:
    """The random numbers of a generation, all from one key: one seed, one text, on one machine.

    Tests replace it by an object with the same two methods to inject the reference's numbers.
    """

    def __init__(self, seed: int) -> None:
        self._key = mx.random.key(seed)

    def _next(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return key

    def canvas(self, batch: int, length: int, vocab_size: int) -> mx.array:
        """Uniform random ids (B, C) over the whole vocabulary."""
        return mx.random.randint(0, vocab_size, (batch, length), key=self._next())

    def uniform(self, batch: int, length: int) -> mx.array:
        """Numbers (B, C) in [0, 1): one for each sample that is drawn by inverse CDF."""
        return mx.random.uniform(shape=(batch, length), key=self._next())
