"""Logits of a batch of canvases, projected onto a constraint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dgemma_mlx.constrain.candidates import top_ids
from dgemma_mlx.constrain.projection import project
from dgemma_mlx.constrain.vocabulary import TokenAutomaton
from dgemma_mlx.kernels import CanvasSample

CANDIDATES = 64
"""probable tokens of each position, beside those that the constraint needs"""


class Place(NamedTuple):
    """Where a row's canvas begins."""

    state: int
    room: int
    """in tokens, the end-of-text token among them"""


def projection(
    tokens: TokenAutomaton, places: Sequence[Place], raw: mx.array, uniforms: mx.array, softcap: float | None,
    temperature: float,
) -> CanvasSample:
    """Logits (B, C, V) before the softcap and uniforms (B, C) -> a sample as ``canvas_sampler`` has it, of canvases
    that match. Its lists hold two probabilities that are the gap apart, without their tokens. Evaluates."""
    ids = top_ids(raw, CANDIDATES)
    skeleton = mx.array(tokens.skeleton)
    logits = mx.concatenate([raw[..., skeleton], mx.take_along_axis(raw, ids, axis=-1)], axis=-1).astype(mx.float32)
    if softcap is not None:
        logits = softcap * mx.tanh(logits / softcap)
    mx.eval(ids, logits)
    scores, candidates, draws = np.array(logits, np.float64) / temperature, np.array(ids), np.array(uniforms, np.float64)
    own, S = [], skeleton.size
    for row, (state, room) in enumerate(places):
        own.append(project(
            tokens, state, room, scores[row, :, :S], candidates[row], scores[row, :, S:], draws[row],
        ))
    argmax, sample, entropy, gap = (np.stack(parts) for parts in zip(*own, strict=True))
    weights = mx.array(np.stack([gap, np.zeros_like(gap)], axis=-1).astype(np.float32))
    return CanvasSample(
        mx.array(entropy.astype(np.float32)), mx.array(argmax.astype(np.int32)), mx.array(sample.astype(np.int32)),
        mx.full(entropy.shape, 2, mx.int32), mx.zeros(weights.shape, mx.int32), weights, weights.sum(axis=-1),
    )
