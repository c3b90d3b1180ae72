"""The block-diffusion training objective.

A canvas of the answer is corrupted with uniform random ids. The decoder sees the clean prefix through the encoder's
keys and values, and predicts the clean id at every position of the canvas (Arriola et al., arXiv 2503.09573; uniform
noise as in Austin et al., arXiv 2107.03006). Two smaller losses are added: the encoder learns to predict the next
token of the same canvas, and the routers learn to spread their load over the experts (Fedus et al., arXiv
2101.03961).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import FULL, SLIDING
from dgemma_mlx.model.cache import SCORE_BYTES, Mask, prefix_masks
from dgemma_mlx.model.experts import RouterLog
from dgemma_mlx.model.soft_tokens import ImageAttention, SoftTokens
from dgemma_mlx.model.text import DiffusionGemma


@dataclass(frozen=True)
class Batch:
    """Clean sequences, and one canvas of each of them to train on.

    Attributes:
        ids: Prompt and answer up to the canvas, or through it for the causal loss: (B, S) int32, padded on the right.
        starts: The position in ``ids`` where the canvas of each row begins: (B,) int32.
        canvas: The clean canvas, padded after the end of the text: (B, C) int32.
    """

    ids: mx.array
    starts: mx.array
    canvas: mx.array


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the losses, and how canvases are corrupted.

    Attributes:
        pad_weight: Weight of a padding position in the denoising loss. A text position has weight 1.
        causal_weight: Weight of the encoder's next-token loss. With 0, ``Batch.ids`` may end before the canvas.
        balance_weight: Weight of the routers' load-balance loss; 0 if the routers are not trained.
        full_noise: Share of canvases in which every id is replaced, as in the first denoising step.
        min_noise: In the other canvases, each id is replaced with probability U(min_noise, 1), drawn once per canvas.
        min_temperature: Self-conditioning logits are divided by U(min_temperature, 1), because the sampler divides its
            logits by a temperature as well.
    """

    pad_weight: float = 0.2
    causal_weight: float = 0.5
    balance_weight: float = 0.01
    full_noise: float = 0.3
    min_noise: float = 0.0
    min_temperature: float = 0.4


class TeacherCache:
    """Keys and values of whole clean sequences, for teacher forcing.

    The canvas of row b sees only the positions before ``starts[b]``. The class has the methods of ``PrefixCache``
    that the network calls. Unlike it, it keeps gradients, and one pass encodes the prefix and the targets of the
    causal loss.

    Attributes:
        rope_offset: Position of the next token for rotary embeddings: 0 while encoding, then ``starts`` (B,) int32.
        score_bytes: Bound on the attention scores of a row that exist at once, in bytes (see ``attend``).
    """

    def __init__(self, window: int, starts: mx.array) -> None:
        self._window, self._starts = window, starts
        self._layers: list[tuple[mx.array, mx.array]] = []
        self._length = 0
        self.rope_offset: int | mx.array = 0
        self.score_bytes = SCORE_BYTES

    def encode_masks(
        self, length: int, soft: SoftTokens | None = None, rule: ImageAttention = "google"
    ) -> dict[str, Mask]:
        """Return the masks of each layer kind for sequences of ``length`` positions, as ``PrefixCache`` does."""
        positions = mx.arange(length)
        sliding, full = prefix_masks(positions[:, None], positions, positions, self._window, soft, rule)
        return {FULL: "causal" if full is None else full, SLIDING: sliding}

    def update(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store a layer's keys and values (B, Hk, S, D) and return them. Layers must be stored in order."""
        assert layer == len(self._layers)
        self._layers.append((k, v))
        return k, v

    def advance(self, positions: int) -> None:
        """Finish encoding sequences of ``positions`` positions; from now on, canvases are decoded."""
        self._length, self.rope_offset = positions, self._starts

    def canvas_masks(self, length: int) -> dict[str, Mask]:
        """Return the masks (B, 1, 1, S + C) of each layer kind for canvases of ``length`` positions."""
        keys, starts = mx.arange(self._length), self._starts[:, None]
        canvas = mx.ones((starts.shape[0], length), mx.bool_)

        def mask(prefix: mx.array) -> mx.array:  # (B, S) -> (B, 1, 1, S + C)
            return mx.concatenate([prefix, canvas], axis=1)[:, None, None, :]

        before = keys < starts
        return {FULL: mask(before), SLIDING: mask(before & (keys > starts - self._window))}

    def with_canvas(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Return a layer's keys and values with those of the canvas after them, (B, Hk, S + C, D) each."""
        keys, values = self._layers[layer]
        return mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2)

    def prefix(self, layer: int) -> tuple[mx.array, ...]:
        """Return a layer's keys and values, or an empty tuple if the layer has stored none yet."""
        return self._layers[layer] if layer < len(self._layers) else ()

    def detached(self) -> TeacherCache:
        """Return a copy of this cache that stops gradients."""
        copy = TeacherCache(self._window, self._starts)
        copy._layers = [(mx.stop_gradient(k), mx.stop_gradient(v)) for k, v in self._layers]
        copy._length, copy.rope_offset = self._length, self.rope_offset
        return copy


def corrupt(canvas: mx.array, noise: mx.array, draw: mx.array, t: mx.array) -> mx.array:
    """Replace the ids of a canvas by random ids.

    Args:
        canvas: Clean ids, (B, C) int32.
        noise: Random ids, (B, C) int32.
        draw: Uniform random numbers in [0, 1), (B, C) float32. An id is replaced where its number is below ``t``.
        t: The probability of replacement for each row, (B,) float32.
    """
    return mx.where(draw < t[:, None], noise, canvas)


def block_diffusion_loss(
    model: DiffusionGemma, batch: Batch, config: ObjectiveConfig, pad_id: int, key: mx.array, self_condition: bool
) -> tuple[mx.array, dict[str, mx.array]]:
    """Compute the training loss of a batch.

    Args:
        model: The network.
        batch: Sequences and canvases.
        config: Weights of the losses and amounts of noise.
        pad_id: The id of padding.
        key: Random key; the same key gives the same noise.
        self_condition: Give the decoder its own prediction from a noisier canvas, which is computed first.

    Returns:
        The total loss, a scalar in nats per token, and its unweighted parts by name for the log: "diffusion", and
        "causal" and "balance" if their weights are not 0.
    """
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
        # The prediction of an earlier denoising step, whose canvas is noisier: t' in [t, 1), with the same draws.
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
    """Return the encoder's next-token loss: the position before each token of the canvas predicts that token.

    ``hidden`` (B, S, M) are the encoder's final states, and ``text`` (B, C) is True where the canvas is not padding.
    """
    before = batch.starts[:, None] - 1 + mx.arange(batch.canvas.shape[1])
    before = mx.minimum(before, batch.ids.shape[1] - 1)
    rows = mx.take_along_axis(hidden, before[..., None], axis=1)
    return _weighted_mean(nn.losses.cross_entropy(model.logits(rows), batch.canvas), text.astype(mx.float32))


def load_balance(router_log: RouterLog) -> mx.array:
    """Compute the load-balance loss of the routers (Fedus et al., arXiv 2101.03961).

    For each layer, it is E times the sum over experts of (share of rows sent to the expert) * (mean probability of the
    expert). The result is the mean over layers, a scalar. An even load gives 1.
    """
    parts = []
    for probabilities, indices in router_log:
        E = probabilities.shape[-1]
        share = (indices[..., None] == mx.arange(E)).astype(mx.float32).mean(axis=(0, 1))
        parts.append(E * (mx.stop_gradient(share) * probabilities.mean(axis=0)).sum())
    return mx.stack(parts).mean()


def _weighted_mean(losses: mx.array, weights: mx.array) -> mx.array:
    """Return the mean of losses with the given weights, a scalar."""
    return (losses * weights).sum() / weights.sum()
