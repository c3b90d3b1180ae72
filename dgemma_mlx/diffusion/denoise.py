"""The denoising loop of one canvas: a generator of steps; the caller decides when to go on.

Reference: transformers ``DiffusionGemmaGenerationMixin._denoising_step``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from dgemma_mlx.config import GenerationConfig
from dgemma_mlx.diffusion.sampler import Noise, accept, token_entropy
from dgemma_mlx.diffusion.schedule import temperature
from dgemma_mlx.diffusion.stopping import StableAndConfident
from dgemma_mlx.events import Draft
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.text import DiffusionGemma


@dataclass
class _Step:
    """Arrays of one step over the batch, before they become events."""

    current_canvas: mx.array  # (B, C): the next step's input
    argmax_canvas: mx.array  # (B, C)
    accepted_mask: mx.array  # (B, C) bool
    entropy: mx.array  # (B, C) float32
    conditioning: mx.array  # (B, C, V): processed logits in the weights' dtype

    def keep(self, last: _Step, finished: mx.array) -> _Step:
        """This step, with the rows that had finished as they were."""
        row = finished[:, None]
        return _Step(
            mx.where(row, last.current_canvas, self.current_canvas),
            mx.where(row, last.argmax_canvas, self.argmax_canvas),
            mx.where(row, last.accepted_mask, self.accepted_mask),
            mx.where(row, last.entropy, self.entropy),
            mx.where(row[..., None], last.conditioning, self.conditioning),
        )


def denoise(
    model: DiffusionGemma,
    cache: PrefixCache,
    config: GenerationConfig,
    noise: Noise,
    *,
    batch: int = 1,
    canvas_length: int,
    canvas_index: int = 0,
    greedy: bool = False,
) -> Iterator[tuple[Draft, ...]]:
    """Denoises a canvas after the cached prefix; yields one ``Draft`` for each row a step, last ones ``finished``.

    ``greedy`` takes the argmax as denoiser canvas instead of a sample. Each step is evaluated once, before
    it is yielded; a caller may stop between any two.
    """
    canvas = noise.canvas(batch, canvas_length, model.config.vocab_size)
    settled = StableAndConfident(config.stability_threshold, config.confidence_threshold)
    finished = mx.zeros(batch, mx.bool_)
    last: _Step | None = None
    for number in range(1, config.max_denoising_steps + 1):
        degree = temperature(config.max_denoising_steps + 1 - number, config)
        logits = model.decode(canvas, cache, None if last is None else last.conditioning) / degree
        step = _sample(logits, canvas, config, noise, greedy, model)
        if batch > 1 and last is not None:
            step = step.keep(last, finished)
        finished = finished | settled(step.argmax_canvas, step.entropy)
        mx.eval(step.current_canvas, step.argmax_canvas, step.accepted_mask, step.entropy, step.conditioning, finished)
        drafts = _drafts(step, finished, canvas_index, number, config.max_denoising_steps)
        yield drafts
        if all(draft.finished for draft in drafts):
            return
        last, canvas = step, step.current_canvas


def _sample(
    logits: mx.array, canvas: mx.array, config: GenerationConfig, noise: Noise, greedy: bool, model: DiffusionGemma
) -> _Step:
    """Processed logits (B, C, V) -> acceptance and the next canvas."""
    entropy = token_entropy(logits)
    argmax_canvas = mx.argmax(logits, axis=-1).astype(mx.int32)
    sampled = argmax_canvas if greedy else mx.argmax(logits + noise.gumbel(logits.shape), axis=-1).astype(mx.int32)
    accepted_mask = accept(entropy, config.entropy_bound)
    fresh = noise.canvas(canvas.shape[0], canvas.shape[1], model.config.vocab_size)
    renoised = mx.where(accepted_mask, sampled, fresh)
    return _Step(renoised, argmax_canvas, accepted_mask, entropy, logits.astype(model.dtype))


def _drafts(
    step: _Step, finished: mx.array, canvas_index: int, number: int, max_steps: int
) -> tuple[Draft, ...]:
    """The rows of an evaluated step as events."""
    arrays = (step.argmax_canvas, step.accepted_mask, step.entropy, finished)
    rows: Any = zip(*(array.tolist() for array in arrays), strict=True)
    return tuple(
        Draft(canvas_index, number, max_steps, tuple(ids), tuple(mask), tuple(entropy), stopped or number == max_steps)
        for ids, mask, entropy, stopped in rows
    )
