"""Logits of a batch of canvases, projected onto a constraint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dgemma_mlx.constrain.candidates import top_ids
from dgemma_mlx.constrain.projection import project
from dgemma_mlx.constrain.vocabulary import TokenAutomaton
from dgemma_mlx.diffusion.stopping import gap
from dgemma_mlx.kernels import CanvasSample

CANDIDATES = 64
"""probable tokens of each position, beside those that the constraint needs"""


class Place(NamedTuple):
    """Where a row's canvas begins."""

    state: int
    room: int
    """in tokens, the end-of-text token among them"""


def projection(
    tokens: TokenAutomaton, places: Sequence[Place], free: CanvasSample, raw: mx.array, uniforms: mx.array,
    softcap: float | None, temperature: float,
) -> CanvasSample:
    """Logits (B, C, V) before the softcap, uniforms (B, C), and the sample that ``canvas_sampler`` makes of them -> one
    of canvases that match, no surer of any position than the free one is.

    Its lists hold two probabilities that are the gap apart, without their tokens. Evaluates.
    """
    ids = top_ids(raw, CANDIDATES)
    skeleton = mx.array(tokens.skeleton)
    logits = mx.concatenate([raw[..., skeleton], mx.take_along_axis(raw, ids, axis=-1)], axis=-1).astype(mx.float32)
    if softcap is not None:
        logits = softcap * mx.tanh(logits / softcap)
    mx.eval(ids, logits)
    scores, S = np.array(logits, np.float64) / temperature, skeleton.size
    candidates, draws = np.array(ids), np.array(uniforms, np.float64)
    rows = [
        project(tokens, state, room, scores[row, :, :S], candidates[row], scores[row, :, S:], draws[row])
        for row, (state, room) in enumerate(places)
    ]
    argmax, sample, entropy, ahead = (np.stack(parts) for parts in zip(*rows, strict=True))
    lead = mx.minimum(mx.array(ahead.astype(np.float32)), gap(free))
    weights = mx.stack([lead, mx.zeros_like(lead)], axis=-1)
    return CanvasSample(
        mx.maximum(mx.array(entropy.astype(np.float32)), free.entropy), mx.array(argmax.astype(np.int32)),
        mx.array(sample.astype(np.int32)), mx.full(entropy.shape, 2, mx.int32), mx.zeros(weights.shape, mx.int32),
        weights, lead,
    )
