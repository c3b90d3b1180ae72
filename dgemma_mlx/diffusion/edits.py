"""Edits of one canvas: what a caller fixes, bars, starts from or projects, on top of the plain denoising loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from dgemma_mlx.diffusion.sampler import Noise
from dgemma_mlx.kernels import CanvasSample, LogitBias


@dataclass(frozen=True)
class Pins:
    """Canvas positions that hold given ids. They are never renoised, and neither acceptance nor stopping counts them.

    Attributes:
        ids: The given ids, (B, C) int32. The values at free positions do not matter.
        free: The positions that are not pinned, (B, C) bool.
    """

    ids: mx.array
    free: mx.array

    def apply(self, canvas: mx.array) -> mx.array:
        """Return ids (B, C) with the pinned ids in their positions."""
        return mx.where(self.free, canvas, self.ids)

    def certain(self, sample: CanvasSample) -> CanvasSample:
        """Return a step's sample (B, C) in which every pinned position is certain of its id."""
        first = mx.arange(sample.kept_ids.shape[-1]) == 0
        free = self.free[..., None]
        return sample._replace(
            entropy=mx.where(self.free, sample.entropy, 0), argmax=self.apply(sample.argmax),
            sample=self.apply(sample.sample), kept_count=mx.where(self.free, sample.kept_count, 1),
            kept_ids=mx.where(free, sample.kept_ids, mx.where(first, self.ids[..., None], 0)),
            kept_weights=mx.where(free, sample.kept_weights, first.astype(mx.float32)),
            kept_mass=mx.where(self.free, sample.kept_mass, 1),
        )


@dataclass(frozen=True)
class StartCanvas:
    """A canvas to start from instead of noise, as in image editing (SDEdit, Meng et al., arXiv 2108.01073).

    Attributes:
        ids: The canvas, (B, C) int32.
        step: Number of the first denoising step to run, from 1. Earlier steps count as done.
    """

    ids: mx.array
    step: int


class Projection(Protocol):
    """Moves a step's sample onto the canvases that a constraint allows, on the CPU."""

    def gather(self, raw: mx.array, softcap: float | None) -> tuple[mx.array, ...]:
        """Return what the projection reads of raw logits (B, C, V), lazily."""

    def __call__(
        self, sample: CanvasSample, gathered: tuple[mx.array, ...], uniforms: mx.array, temperature: float
    ) -> CanvasSample:
        """Return the sample (B, C) of an allowed canvas.

        ``sample`` is the unconstrained sample, made with ``uniforms`` at ``temperature``. ``gathered`` is the result of
        ``gather`` for its logits. Both are evaluated.
        """


@dataclass(frozen=True)
class Edits:
    """Everything that distinguishes one canvas from freely denoised text. The default changes nothing.

    Attributes:
        pins: Positions that hold given ids.
        barred: A bias on the logits that bars ids, which are then never written.
        start: A canvas to start from instead of noise.
        projection: A projection of every step onto the allowed canvases. Acceptance and stopping use its result;
            self-conditioning uses the model's own prediction.
    """

    pins: Pins | None = None
    barred: LogitBias | None = None
    start: StartCanvas | None = None
    projection: Projection | None = None

    @property
    def free(self) -> mx.array | None:
        """Positions that are not pinned, (B, C) bool; None when all are free."""
        return None if self.pins is None else self.pins.free

    @property
    def first_step(self) -> int:
        """Number of the first denoising step to run, from 1."""
        return 1 if self.start is None else self.start.step

    def first_canvas(self, noise: Noise, length: int, vocab_size: int) -> mx.array:
        """Return the canvas (B, C) that the first step reads."""
        return self.pinned(noise.canvas(length, vocab_size) if self.start is None else self.start.ids)

    def pinned(self, canvas: mx.array) -> mx.array:
        """Return ids (B, C) with the pinned ids in their positions."""
        return canvas if self.pins is None else self.pins.apply(canvas)


NO_EDITS = Edits()
