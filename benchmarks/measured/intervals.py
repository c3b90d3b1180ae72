"""95 % intervals: of a share, of the difference of two shares on the same questions, and of a ratio of sums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # the standard normal distribution is within -Z and Z with 95 %
RESAMPLES = 4000


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's score interval of the share ``right / count`` (Wilson 1927)."""
    share, square = right / count, Z * Z / count
    middle = share + square / 2
    spread = Z * np.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, float(middle - spread) / (1 + square)), min(1.0, float(middle + spread) / (1 + square))


def paired_difference(first: Sequence[bool], other: Sequence[bool]) -> tuple[float, float]:
    """Return an interval of the share in ``other`` minus the share in ``first``, of answers to the same questions.

    The method is Newcombe's square-and-add of Wilson's intervals with a corrected correlation (his method 10,
    Statistics in Medicine 17, 1998, 2635-2650). Unlike a bootstrap, it does not shrink to a point when no answer
    differs.
    """
    a, b = np.asarray(other, bool), np.asarray(first, bool)
    count = len(a)
    both, only_a, only_b = int((a & b).sum()), int((a & ~b).sum()), int((b & ~a).sum())
    neither = count - both - only_a - only_b
    p_a, p_b = (both + only_a) / count, (both + only_b) / count
    (low_a, high_a), (low_b, high_b) = wilson(both + only_a, count), wilson(both + only_b, count)
    margins = float(both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    determinant = float(both * neither - only_a * only_b)
    if determinant > 0:
        determinant = max(determinant - count / 2, 0.0)
    phi = determinant / np.sqrt(margins) if margins else 0.0

    def spread(x: float, y: float) -> float:
        return float(np.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0)))

    difference = p_a - p_b
    return (
        max(-1.0, difference - spread(p_a - low_a, high_b - p_b)),
        min(1.0, difference + spread(high_a - p_a, p_b - low_b)),
    )


def ratio_of_sums(above: Sequence[float], below: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return a bootstrap interval of ``sum(above) / sum(below)``, of values that belong to the same questions.

    The questions are drawn again ``RESAMPLES`` times, with replacement and a fixed seed; the interval leaves out 2.5 %
    of the ratios on each side.
    """
    pairs = np.array([above, below], np.float64)
    rng, count = np.random.default_rng(seed), pairs.shape[1]
    # How often each question is drawn; the sums are then a product of matrices.
    times = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
    sums = times @ pairs.T
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(low), float(high)
