"""Soft tokens: rows of features that stand in place of token embeddings, and who sees whom among them.

A picture is a block of soft tokens. Three rules are in the field for what the positions of one block see of each
other while they are encoded:

=============  ======================================  =================
rule           sliding-window layers                   full layers
=============  ======================================  =================
google         (causal or same block) and near         causal
transformers   (causal and near) or same block         causal or same block
causal         causal and near                         causal
=============  ======================================  =================

"near" is the sliding window. ``google`` is Google's own code and transformers' Gemma 4; ``transformers`` is its
DiffusionGemma in version 5.24; ``causal`` is for checkpoints without ``use_bidirectional_attention``. With which of
them the published weights were trained could not be settled without them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx

ImageAttention = Literal["google", "transformers", "causal"]
IMAGE_ATTENTION: tuple[ImageAttention, ...] = get_args(ImageAttention)


@dataclass(frozen=True)
class SoftTokens:
    """The soft tokens among the positions of a call of ``encode``, which holds each of their blocks whole.

    Attributes:
        features: Features of all blocks, one after another, (T, M), in the dtype of the activations.
        rows: Row of ``features`` that stands at each position, (B, L) int32; -1 where a token is.
        blocks: Number of the block that each position belongs to, (B, L) int32; -1 where a token is.
    """

    features: mx.array
    rows: mx.array
    blocks: mx.array

    def put_into(self, embeddings: mx.array) -> mx.array:
        """Return token embeddings (B, L, M) with the features in their places, which are not scaled."""
        return mx.where(self.rows[..., None] >= 0, self.features[mx.maximum(self.rows, 0)], embeddings)

    def same_block(self, keys: int) -> mx.array:
        """Return which queries are in one block with which keys, (B, 1, L, S) bool.

        ``keys`` is S; the last L of the keys are the queries' own positions.
        """
        queries = self.blocks[:, :, None]
        same = (queries == self.blocks[:, None, :]) & (queries >= 0)
        return mx.pad(same, [(0, 0), (0, 0), (keys - same.shape[2], 0)])[:, None]
