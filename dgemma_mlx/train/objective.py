"""The block-diffusion training objective.

A canvas of the answer is corrupted with uniform random ids and the decoder predicts the clean canvas at
every position, seeing the clean prefix through the encoder's keys and values (Arriola et al., arXiv
2503.09573; uniform noise as in Austin et al., arXiv 2107.03006). Beside it the encoder learns to predict
the next token of the same canvas, and the routers to spread their load (Fedus et al., arXiv 2101.03961).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import FULL, SLIDING
from dgemma_mlx.model.cache import Mask
from dgemma_mlx.model.experts import RouterLog
from dgemma_mlx.model.text import DiffusionGemma


@dataclass(frozen=True)
class Batch:
    """Whole clean sequences and the canvas chosen from each.

    ids (B, S) int32, padded on the right; starts (B,) int32, where the canvas begins; canvas (B, C) int32,
    the clean canvas, padded after the end of text.
    """

    ids: mx.array
    starts: mx.array
    canvas: mx.array


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the parts, and how canvases are corrupted."""

    pad_weight: float = 0.2
    """of a padding position in the denoising loss, against 1 of a text position"""
    causal_weight: float = 0.5
    """of the encoder's loss; with 0, a batch needs no ids from its canvases on"""
    balance_weight: float = 0.01
    """of the routers' loss; 0 where they do not learn"""
    full_noise: float = 0.3
    """share of canvases with every id replaced, as in the first denoising step"""
    min_noise: float = 0.0
    """of the others, the share of ids that are replaced is U(min_noise, 1)"""
    min_temperature: float = 0.4
    """self-conditioning logits are divided by U(min_temperature, 1), as the sampler's schedule does"""


class TeacherCache:
    """Holds each layer's keys and values of whole clean sequences; the canvas of row b sees those before starts[b].

    Stands in for ``PrefixCache`` (same calls), keeps the gradient, and encodes prefix and AR targets in one pass.
    """

    def __init__(self, window: int, starts: mx.array) -> None:
        self._window, self._starts = window, starts
        self._layers: list[tuple[mx.array, mx.array]] = []
        self._length = 0
        self.rope_offset: int | mx.array = 0

    def encode_masks(self, length: int) -> dict[str, Mask]:
        positions = mx.arange(length)
        queries, keys = positions[:, None], positions
        return {FULL: "causal", SLIDING: (keys <= queries) & (keys > queries - self._window)}

    def update(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        assert layer == len(self._layers)
        self._layers.append((k, v))
        return k, v

    def advance(self, positions: int) -> None:
        self._length, self.rope_offset = positions, self._starts

    def canvas_masks(self, length: int) -> dict[str, Mask]:
        keys, starts = mx.arange(self._length), self._starts[:, None]
        canvas = mx.ones((starts.shape[0], length), mx.bool_)

        def mask(prefix: mx.array) -> mx.array:  # (B, S) -> (B, 1, 1, S + C)
            return mx.concatenate([prefix, canvas], axis=1)[:, None, None, :]

        before = keys < starts
        return {FULL: mask(before), SLIDING: mask(before & (keys > starts - self._window))}

    def with_canvas(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        keys, values = self._layers[layer]
        return mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2)

    def prefix(self, layer: int) -> tuple[mx.array, ...]:
        """A layer's keys and values; nothing before they are known."""
        return self._layers[layer] if layer < len(self._layers) else ()

    def detached(self) -> TeacherCache:
        """The same cache without gradient."""
        copy = TeacherCache(self._window, self._starts)
        copy._layers = [(mx.stop_gradient(k), mx.stop_gradient(v)) for k, v in self._layers]
        copy._length, copy.rope_offset = self._length, self.rope_offset
        return copy


def corrupt(canvas: mx.array, noise: mx.array, draw: mx.array, t: mx.array) -> mx.array:
    """Replaces each id with the random id in ``noise`` where ``draw`` (B, C) in [0, 1) is below t (B,)."""
    return mx.where(draw < t[:, None], noise, canvas)


def block_diffusion_loss(
    model: DiffusionGemma, batch: Batch, config: ObjectiveConfig, pad_id: int, key: mx.array, self_condition: bool
) -> tuple[mx.array, dict[str, mx.array]]:
    """The training loss of a batch (a scalar, nats per token) and its parts, for logging."""
    B, C = batch.canvas.shape
    keys = mx.random.split(key, 6)
    t = mx.random.uniform(config.min_noise, 1.0, (B,), key=keys[0])
    t = mx.where(mx.random.uniform(shape=(B,), key=keys[1]) < config.full_noise, 1.0, t)
    noise = mx.random.randint(0, model.config.vocab_size, (B, C), key=keys[2])
    draw = mx.random.uniform(shape=(B, C), key=keys[3])

    router_log: RouterLog | None = [] if config.balance_weight else None
    cache = TeacherCache(model.config.sliding_window, batch.starts)
    hidden = model.encode(batch.ids, cache, router_log)  # type: ignore[arg-type]  # same calls as PrefixCache

    conditioning = None
    if self_condition:
        # What an earlier, noisier step would have predicted: t' in [t, 1), same draws.
        earlier = t + (1 - t) * mx.random.uniform(shape=(B,), key=keys[4])
        first = model.decode(corrupt(batch.canvas, noise, draw, earlier), cache.detached())  # type: ignore[arg-type]
        temperature = mx.random.uniform(config.min_temperature, 1.0, (B, 1, 1), key=keys[5])
        conditioning = mx.stop_gradient(first / temperature)
    logits = model.decode(
        corrupt(batch.canvas, noise, draw, t), cache, conditioning, router_log  # type: ignore[arg-type]
    )

    text = batch.canvas != pad_id
    total = _weighted_mean(nn.losses.cross_entropy(logits, batch.canvas), mx.where(text, 1.0, config.pad_weight))
    parts = {"diffusion": total}
    if config.causal_weight:
        parts["causal"] = _causal_loss(model, hidden, batch, text)
        total = total + config.causal_weight * parts["causal"]
    if router_log:
        parts["balance"] = load_balance(router_log)
        total = total + config.balance_weight * parts["balance"]
    return total, parts


def _causal_loss(model: DiffusionGemma, hidden: mx.array, batch: Batch, text: mx.array) -> mx.array:
    """The encoder's: the position before the canvas predicts its first token, and so on."""
    before = batch.starts[:, None] - 1 + mx.arange(batch.canvas.shape[1])
    before = mx.minimum(before, batch.ids.shape[1] - 1)
    rows = mx.take_along_axis(hidden, before[..., None], axis=1)
    return _weighted_mean(nn.losses.cross_entropy(model.logits(rows), batch.canvas), text.astype(mx.float32))


def load_balance(router_log: RouterLog) -> mx.array:
    """E * sum over experts of (share of rows) * (mean probability), averaged over layers; 1 when balanced."""
    parts = []
    for probabilities, indices in router_log:
        E = probabilities.shape[-1]
        share = (indices[..., None] == mx.arange(E)).astype(mx.float32).mean(axis=(0, 1))
        parts.append(E * (mx.stop_gradient(share) * probabilities.mean(axis=0)).sum())
    return mx.stack(parts).mean()


def _weighted_mean(losses: mx.array, weights: mx.array) -> mx.array:
    return (losses * weights).sum() / weights.sum()
