"""Which tokens of a step are accepted, and the random numbers of a generation.

Reference: transformers ``EntropyBoundSampler``; Ben-Hamu et al., arXiv 2505.24857.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx


def accept(entropy: mx.array, entropy_bound: float) -> mx.array:
    """(B, C) entropies -> (B, C) bool: positions taken in ascending order of entropy while the sum of the
    entropies before them stays within the bound. The most certain position is always accepted."""
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    before = mx.cumsum(ascending, axis=-1) - ascending
    return mx.take_along_axis(before <= entropy_bound, mx.argsort(order, axis=-1), axis=-1)


class Noise:
    """The random numbers of one canvas or more, for a batch of rows with a seed each: row b draws what it would alone.

    One seed, one text, on one machine. Tests replace it by an object with the same methods to inject the
    reference's numbers.
    """

    def __init__(self, *seeds: int) -> None:
        self._keys = [mx.random.key(seed) for seed in seeds]

    def fork(self) -> Noise:
        """Numbers for the next canvas: what they are does not depend on how many the canvas before has drawn."""
        forked = Noise()
        forked._keys = self._next()
        return forked

    def keep(self, rows: list[int]) -> None:
        """Goes on with these rows of the batch alone."""
        self._keys = [self._keys[row] for row in rows]

    def canvas(self, length: int, vocab_size: int) -> mx.array:
        """Uniform random ids (B, C) over the whole vocabulary."""
        return self._rows(lambda key: mx.random.randint(0, vocab_size, (length,), key=key))

    def uniform(self, length: int) -> mx.array:
        """Numbers (B, C) in [0, 1): one for each sample that is drawn by inverse CDF."""
        return self._rows(lambda key: mx.random.uniform(shape=(length,), key=key))

    def _rows(self, draw: Callable[[mx.array], mx.array]) -> mx.array:
        return mx.stack([draw(key) for key in self._next()])

    def _next(self) -> list[mx.array]:
        pairs = [mx.random.split(key) for key in self._keys]
        self._keys = [pair[0] for pair in pairs]
        return [pair[1] for pair in pairs]
