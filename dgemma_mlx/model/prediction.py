"""The prediction of a denoising step, stored in the form that conditions the next step (self-conditioning).

The next step needs the expected embedding of each canvas position: the mean of the embedding table's rows under the
predicted distribution. Most positions are described by a short list of probable tokens, which is cheap to store and to
average over. The expected embeddings of the other positions are computed from all V logits before these are discarded.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from dgemma_mlx.kernels import MAX_KEPT, CanvasSample

DENSE_BYTES = 128 << 20  # working memory for the logits from which one block of expected embeddings is computed
_TILE = 64  # a block of expected embeddings has a multiple of this number of rows, the height of a GPU's matrix tile


def dense_rows(vocab_size: int, dtype: mx.Dtype) -> int:
    """Return the number of rows of logits from which expected embeddings are computed at a time in ``dtype``.

    The rows take about ``DENSE_BYTES``, but are at least one tile.
    """
    return max(1, DENSE_BYTES // (dense_value_bytes(dtype) * vocab_size * _TILE)) * _TILE


def dense_value_bytes(dtype: mx.Dtype) -> int:
    """Return the working memory, in bytes, that one logit takes while expected embeddings are computed in ``dtype``.

    The values are measured, for plain and, in float32, packed tables. In half precision logits are converted to float32
    for the softcap, and back.
    """
    return 4 if dtype == mx.float32 else 8


def least_kept(dtype: mx.Dtype) -> float:
    """Return the least probability mass that a position's token list must hold to stand for the whole distribution.

    Leaving out a mass m moves the expected embedding by at most m times the largest absolute value of the table. The
    returned threshold limits m to the rounding error of bfloat16 (2^-9) for half precision. For float32, where results
    are compared with the reference implementation, it limits m to the error of the float32 sum itself (2^-20).

    This bound refers to the exact expected embedding of unrounded logits. transformers rounds the logits to the dtype
    of the weights first, and ``DiffusionGemma._expected_embedding`` does the same. In bfloat16 that rounding changes
    the result by far more than the bound, so the token lists are closer to the exact value than the full softmax is.
    """
    return 1 - (2**-20 if dtype == mx.float32 else 2**-9)


@dataclass(frozen=True)
class DenseRows:
    """Expected embeddings of the positions whose token lists are incomplete.

    Storing them through the next step takes n * M values, where their logits would take n * V.

    Attributes:
        positions: Indices of the positions in the flattened batch, b * C + c. (n,) int32.
        embeddings: Expected embedding of each of these positions, scaled by sqrt(M). (n, M), in the activations' dtype.
    """

    positions: mx.array
    embeddings: mx.array


@dataclass(frozen=True)
class Prediction:
    """The predicted distribution of each canvas position, as token lists and, where these are incomplete, embeddings.

    Attributes:
        sample: The step's ``CanvasSample`` of shape (B, C); its lists hold the probable tokens and their probabilities.
        dense: Expected embeddings of the positions whose lists are incomplete; None when every list is complete.
    """

    sample: CanvasSample
    dense: DenseRows | None = None


def incomplete(sample: CanvasSample, dtype: mx.Dtype) -> mx.array | None:
    """Return the flattened indices (n,) int32 of the positions whose token list is incomplete, or None without any.

    A list is incomplete when more than ``MAX_KEPT`` tokens qualified for it, or when it holds less than
    ``least_kept(dtype)`` of the probability mass. The sample must be evaluated, because its values are read here.
    """
    complete = (np.array(sample.kept_count) <= MAX_KEPT) & (np.array(sample.kept_mass) >= least_kept(dtype))
    positions = np.flatnonzero(~complete)
    return mx.array(positions, mx.int32) if positions.size else None
