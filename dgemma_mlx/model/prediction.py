"""What a denoising step predicted, in the form in which it conditions the next one."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from dgemma_mlx.kernels import MAX_KEPT, CanvasSample


def least_kept(dtype: mx.Dtype) -> float:
    """Of a position's probability. What is left out, times the table's largest value, is the most by which the expected
    embedding moves: what bfloat16 rounds off; in float32, where results are compared with the reference's, what the sum
    of the list is off itself.

    That bound is on the exact expected embedding, of logits that are not rounded. transformers rounds them to the
    weights' dtype first, and so does the way over all logits (``DiffusionGemma._expected_embedding``): in bfloat16 the
    two ways differ by what that rounding is worth, far more than the bound, and the lists are the closer to the exact.
    """
    return 1 - (2**-20 if dtype == mx.float32 else 2**-9)


@dataclass(frozen=True)
class Prediction:
    """The probable tokens of each canvas position, and the mean embedding of those positions where they are too many.

    ``sample`` is the step's, over (B, C); ``dense`` (n,) are the positions, counted through the batch, that its lists
    do not stand for, and ``expected`` (n, M) their expected embeddings, smaller to keep through the next step than
    logits (n, V); both None where there are none.
    """

    sample: CanvasSample
    dense: mx.array | None = None
    expected: mx.array | None = None


def incomplete(sample: CanvasSample, dtype: mx.Dtype) -> mx.array | None:
    """(n,) int32: the positions of an evaluated sample whose list is cut off or keeps less than ``least_kept``; None
    when there are none."""
    complete = (np.array(sample.kept_count) <= MAX_KEPT) & (np.array(sample.kept_mass) >= least_kept(dtype))
    positions = np.flatnonzero(~complete)
    return mx.array(positions, mx.int32) if positions.size else None
