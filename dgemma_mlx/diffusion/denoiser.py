"""The denoising loop of one canvas: a generator of steps; the caller decides when to go on.

Reference: transformers ``DiffusionGemmaGenerationMixin._denoising_step``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.sampler import Noise, accept
from dgemma_mlx.diffusion.schedule import temperature
from dgemma_mlx.diffusion.speed import REFERENCE, Speed
from dgemma_mlx.diffusion.stopping import TESTS, Stopping
from dgemma_mlx.events import Draft
from dgemma_mlx.kernels import CanvasSample, canvas_sampler
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.prediction import Prediction
from dgemma_mlx.model.text import DiffusionGemma

Project = Callable[[CanvasSample, mx.array, mx.array, float | None, float], CanvasSample]
"""Takes a sample (B, C) and what ``canvas_sampler`` has made it from; gives one of the canvases that are allowed."""


@dataclass(frozen=True)
class Barred:
    """Ids that must not be written, as what is added to logits: (V,) float32, -inf for such an id and else 0."""

    everywhere: mx.array
    there: mx.array | None = None
    """at ``places`` only, besides"""
    places: mx.array | None = None
    """(n,) int32: positions, counted through the batch"""

    def __call__(self, logits: mx.array) -> mx.array:
        """Capped logits (B, C, V) float32 -> the same without these ids."""
        logits = logits + self.everywhere
        if self.there is None or self.places is None:
            return logits
        rows = logits.reshape(-1, logits.shape[-1])
        rows[self.places] = rows[self.places] + self.there
        return rows.reshape(logits.shape)


@dataclass(frozen=True)
class Pins:
    """Positions of a canvas that hold given ids: never renoised, counted neither for acceptance nor for stopping."""

    ids: mx.array
    """(B, C) int32; what stands at a free position does not matter"""
    free: mx.array
    """(B, C) bool: the other positions"""

    def canvas(self, canvas: mx.array) -> mx.array:
        """Ids (B, C) with the given ones in their places."""
        return mx.where(self.free, canvas, self.ids)

    def sample(self, sample: CanvasSample) -> CanvasSample:
        """A step's sample (B, C), certain of the given ids."""
        first = mx.arange(sample.kept_ids.shape[-1]) == 0
        free = self.free[..., None]
        return sample._replace(
            entropy=mx.where(self.free, sample.entropy, 0), argmax=self.canvas(sample.argmax),
            sample=self.canvas(sample.sample), kept_count=mx.where(self.free, sample.kept_count, 1),
            kept_ids=mx.where(free, sample.kept_ids, mx.where(first, self.ids[..., None], 0)),
            kept_weights=mx.where(free, sample.kept_weights, first.astype(mx.float32)),
            kept_mass=mx.where(self.free, sample.kept_mass, 1),
        )


@dataclass(frozen=True)
class Start:
    """A canvas to begin with instead of noise, as in image editing (SDEdit, Meng et al., arXiv 2108.01073)."""

    canvas: mx.array
    """(B, C) int32"""
    step: int
    """the first one, from 1: those before it are taken as done"""


@dataclass
class _Step:
    """Arrays of one step over the batch, before they become events."""

    current_canvas: mx.array  # (B, C), the next step's input
    argmax_canvas: mx.array  # (B, C)
    accepted_mask: mx.array  # (B, C) bool
    entropy: mx.array  # (B, C) float32
    test: mx.array  # (B,) int32, as ``Stopping`` has it
    uncertain: mx.array  # (B,) bool

    def arrays(self) -> tuple[mx.array, ...]:
        return (
            self.current_canvas, self.argmax_canvas, self.accepted_mask, self.entropy, self.test, self.uncertain,
        )  # fmt: skip

    def keep(self, last: _Step) -> _Step:
        """This step, with the rows that had finished as they were."""
        finished = last.test < len(TESTS)
        pairs = zip(last.arrays(), self.arrays(), strict=True)
        return _Step(*(mx.where(finished if new.ndim == 1 else finished[:, None], old, new) for old, new in pairs))


def denoise(
    model: DiffusionGemma,
    cache: PrefixCache,
    config: GenerationConfig,
    noise: Noise,
    *,
    canvas_length: int,
    canvas_index: int = 0,
    attempt: int = 0,
    speed: Speed = REFERENCE,
    greedy: bool = False,
    pins: Pins | None = None,
    barred: Barred | None = None,
    start: Start | None = None,
    project: Project | None = None,
) -> Iterator[tuple[Draft, ...]]:
    """Denoises a canvas after the cached prefix; yields one ``Draft`` for each row a step, last ones ``finished``.

    ``canvas_length`` C may be another than the checkpoint's; ``config`` and ``speed`` say when to accept and to stop.
    ``greedy`` takes the argmax as denoiser canvas instead of a sample. With ``project``, acceptance and stopping go by
    what it says of a step; the next one is conditioned on the model's own prediction even so. Each step is evaluated
    once, before it is yielded; a caller may stop between any two.
    """
    vocab_size, steps = model.config.vocab_size, config.max_denoising_steps
    stopping = Stopping(config, speed, None if pins is None else pins.free)
    canvas = noise.canvas(canvas_length, vocab_size) if start is None else start.canvas
    if pins is not None:
        canvas = pins.canvas(canvas)
    last: _Step | None = None
    prediction: Prediction | None = None
    for number in range(1 if start is None else start.step, steps + 1):
        raw = model.project(model.decode_hidden(canvas, cache, prediction))
        uniforms = mx.zeros(canvas.shape) if greedy else noise.uniform(canvas_length)
        degree = temperature(steps + 1 - number, config)
        own = sample = _sampled(model, raw, uniforms, degree, pins, barred)
        if project is not None:
            sample = project(own, raw, uniforms, model.config.final_logit_softcapping, degree)
        accepted_mask = _accept(sample.entropy, config.entropy_bound * speed.entropy_bound_factor, pins)
        denoised = sample.argmax if greedy else sample.sample
        current = mx.where(accepted_mask, denoised, noise.canvas(canvas_length, vocab_size))
        test, uncertain = stopping(sample)
        if pins is not None:
            current = pins.canvas(current)
        step = _Step(current, sample.argmax, accepted_mask, sample.entropy, test, uncertain)
        if last is not None:
            step = step.keep(last)
        mx.eval(*step.arrays(), *own)
        drafts = _drafts(step, canvas_index, attempt, number, steps)
        yield drafts
        if all(draft.finished for draft in drafts):
            return
        last, canvas, prediction = step, step.current_canvas, model.predict(raw, own, degree)
        del raw  # the next step's logits may be evaluated at once, beside it


def _sampled(
    model: DiffusionGemma, raw: mx.array, uniforms: mx.array, degree: float, pins: Pins | None, barred: Barred | None
) -> CanvasSample:
    """What the model's logits (B, C, V) say of a step, where ids are given or must not be written."""
    if barred is None:
        sample = canvas_sampler(raw, uniforms, model.config.final_logit_softcapping, degree)
    else:
        sample = canvas_sampler(barred(model.capped(raw)), uniforms, None, degree)
    return sample if pins is None else pins.sample(sample)


def _accept(entropy: mx.array, bound: float, pins: Pins | None) -> mx.array:
    if pins is None:
        return accept(entropy, bound)
    return accept(mx.where(pins.free, entropy, mx.inf), bound) & pins.free


def _drafts(
    step: _Step, canvas_index: int, attempt: int, number: int, max_steps: int
) -> tuple[Draft, ...]:
    """The rows of an evaluated step as events."""
    rows: Any = zip(*(array.tolist() for array in step.arrays()[1:]), strict=True)
    drafts = []
    for ids, mask, entropy, test, uncertain in rows:
        settled_by = TESTS[test] if test < len(TESTS) else "steps" if number == max_steps and not uncertain else None
        drafts.append(Draft(
            canvas_index, number, max_steps, tuple(ids), tuple(mask), tuple(entropy),
            finished=settled_by is not None or number == max_steps, settled_by=settled_by, attempt=attempt,
        ))
    return tuple(drafts)
