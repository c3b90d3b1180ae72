"""The denoising loop of one canvas: a generator of steps; the caller decides when to go on.

Reference: transformers ``DiffusionGemmaGenerationMixin._denoising_step``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from dgemma_mlx.config import GenerationConfig
from dgemma_mlx.diffusion.sampler import Noise, accept
from dgemma_mlx.diffusion.schedule import temperature
from dgemma_mlx.diffusion.stopping import StableAndConfident
from dgemma_mlx.events import Draft
from dgemma_mlx.kernels import canvas_sampler
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.prediction import Prediction
from dgemma_mlx.model.text import DiffusionGemma


@dataclass
class _Step:
    """Arrays of one step over the batch, before they become events; (B, C) each."""

    current_canvas: mx.array  # the next step's input
    argmax_canvas: mx.array
    accepted_mask: mx.array  # bool
    entropy: mx.array  # float32

    def keep(self, last: _Step, finished: mx.array) -> _Step:
        """This step, with the rows that had finished as they were."""
        row = finished[:, None]
        return _Step(
            mx.where(row, last.current_canvas, self.current_canvas),
            mx.where(row, last.argmax_canvas, self.argmax_canvas),
            mx.where(row, last.accepted_mask, self.accepted_mask),
            mx.where(row, last.entropy, self.entropy),
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
    vocab_size = model.config.vocab_size
    canvas = noise.canvas(batch, canvas_length, vocab_size)
    settled = StableAndConfident(config.stability_threshold, config.confidence_threshold)
    finished = mx.zeros(batch, mx.bool_)
    last: _Step | None = None
    prediction: Prediction | None = None
    for number in range(1, config.max_denoising_steps + 1):
        raw = model.project(model.decode_hidden(canvas, cache, prediction))
        uniforms = mx.zeros(canvas.shape) if greedy else noise.uniform(batch, canvas_length)
        degree = temperature(config.max_denoising_steps + 1 - number, config)
        sample = canvas_sampler(raw, uniforms, model.config.final_logit_softcapping, degree)
        accepted_mask = accept(sample.entropy, config.entropy_bound)
        denoised = sample.argmax if greedy else sample.sample
        current = mx.where(accepted_mask, denoised, noise.canvas(batch, canvas_length, vocab_size))
        step = _Step(current, sample.argmax, accepted_mask, sample.entropy)
        if last is not None:
            step = step.keep(last, finished)
        finished = finished | settled(step.argmax_canvas, step.entropy)
        mx.eval(step.current_canvas, step.argmax_canvas, step.accepted_mask, step.entropy, finished, *sample)
        drafts = _drafts(step, finished, canvas_index, number, config.max_denoising_steps)
        yield drafts
        if all(draft.finished for draft in drafts):
            return
        last, canvas, prediction = step, step.current_canvas, model.predict(raw, sample, degree)


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
