"""The denoising loop of one canvas: a generator of steps. The caller decides when to go on.

Reference: transformers ``DiffusionGemmaGenerationMixin._denoising_step``.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.edits import NO_EDITS, Edits
from dgemma_mlx.diffusion.encoder_check import EncoderCheck
from dgemma_mlx.diffusion.sampler import Noise, Proposal
from dgemma_mlx.diffusion.schedule import temperature
from dgemma_mlx.diffusion.speed import REFERENCE, Speed
from dgemma_mlx.diffusion.stopping import TESTS, Stopping
from dgemma_mlx.events import Draft
from dgemma_mlx.kernels import CanvasSample, LogitBias
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.half_precision import refuse_nan
from dgemma_mlx.model.text import DiffusionGemma

# Layers of the next step that the device computes while the caller looks at a step's drafts: long enough for drawing
# them, and few enough that starting them does not block. With more than ten tasks in flight, ``mx.async_eval`` waits
# (MLX 0.32); for a whole step it returned after nine tenths of the step's time, and every draft came a step late.
_STARTED = 2


@dataclass(frozen=True)
class Denoiser:
    """A network and the settings with which it denoises canvases.

    Attributes:
        network: The text network.
        config: The loop's parameters: number of steps, temperatures, acceptance and stopping thresholds.
        speed: The sampler, and when a canvas may be committed before the reference would commit it.
        greedy: Whether the denoiser canvas takes the most probable tokens instead of sampling.
    """

    network: DiffusionGemma
    config: GenerationConfig
    speed: Speed = REFERENCE
    greedy: bool = False

    def denoise(
        self, cache: PrefixCache, noise: Noise, canvas_length: int, edits: Edits = NO_EDITS, *,
        check: EncoderCheck | None = None, canvas_index: int = 0, attempt: int = 0,
    ) -> Generator[tuple[Draft, ...], None, None]:
        """Denoise one canvas of ``canvas_length`` C positions after the cached prefix.

        Yield one ``Draft`` per row of the batch for each step; in the last step every draft is ``finished``. While the
        caller looks at a step's drafts, the device already computes the first layers of the next step, if there is one.
        A caller may stop between any two steps. It then closes the generator, which waits for these layers. C may
        differ from the checkpoint's ``canvas_length``. ``check`` is called after each step that leaves a row open; it
        is not for canvases with pins or a projection. ``canvas_index`` and ``attempt`` only label the drafts.

        Raises ``DgemmaError`` when the network computes NaN.
        """
        max_steps = self.config.max_denoising_steps
        stopping = Stopping(self.config, self.speed, edits.free)
        canvas = edits.first_canvas(noise, canvas_length, self.network.config.vocab_size)
        signal = self.network.conditioning_signal(None, canvas.shape)
        is_lazy = self.network.is_lazy
        decoded: _Decoded | None = None
        last: _Step | None = None
        try:
            for number in range(edits.first_step, max_steps + 1):
                if decoded is None:
                    decoded = self._decode(canvas, signal, cache, noise, edits, number)
                sample = decoded.sample
                if edits.projection is not None:
                    raw = self.network.whole(decoded.raw)
                    gathered = edits.projection.gather(raw, self.network.config.final_logit_softcapping)
                    mx.eval(*decoded.sample, *gathered)
                    signal = self._next_signal(decoded)  # the device computes it while the CPU projects
                    sample = edits.projection(decoded.sample, gathered, decoded.uniforms, decoded.temperature)
                step = self._step(sample, noise, edits, stopping)
                if last is not None:
                    step = step.keep_finished(last)
                read = decoded.sample
                mx.eval(*step.arrays(), *read)
                if check is not None and number < max_steps and (texts := step.worth(check)):
                    signal, decoded = self._next_signal(decoded), None
                    mx.eval(signal)  # so that the logits are freed: the check has logits of its own
                    step = step.checked(check, texts)
                last, has_ended = step, number == max_steps or step.all_finished()
                early = is_lazy and not has_ended and self.network.predicts_at_once(read)
                if not early:  # the drafts would come late, after what predict waits for
                    yield self._drafts(step, canvas_index, attempt, number)
                if has_ended:
                    return
                if decoded is not None and edits.projection is None:
                    signal = self._next_signal(decoded)
                canvas, decoded = step.current_canvas, None  # frees the logits first
                if early:
                    decoded = self._decode(canvas, signal, cache, noise, edits, number + 1)
                    yield self._drafts(step, canvas_index, attempt, number)
        finally:
            mx.synchronize()

    def _decode(
        self, canvas: mx.array, signal: mx.array, cache: PrefixCache, noise: Noise, edits: Edits, number: int
    ) -> _Decoded:
        """Start the decoder's pass over a canvas (B, C) in step ``number``, and return its lazy results."""
        raw = self.network.step(canvas, signal, cache, started=_STARTED)
        uniforms = mx.zeros(canvas.shape) if self.greedy else noise.uniform(canvas.shape[1])
        T = temperature(self.config.max_denoising_steps + 1 - number, self.config)
        return _Decoded(raw, uniforms, T, self._sample(raw, uniforms, T, edits), edits.barred)

    def _next_signal(self, decoded: _Decoded) -> mx.array:
        """Start what conditions the next step on this one, whose sample is evaluated, and return it, (B, C, M)."""
        signal = self.network.next_signal(decoded.raw, decoded.sample, decoded.temperature, decoded.barred)
        mx.async_eval(signal)
        return signal

    def _drafts(self, step: _Step, canvas_index: int, attempt: int, number: int) -> tuple[Draft, ...]:
        """Return the rows of an evaluated step as events. Raises ``DgemmaError`` when the step has computed NaN."""
        drafts = step.drafts(canvas_index, attempt, number, self.config.max_denoising_steps)
        for draft in drafts:
            refuse_nan(self.network, draft.mean_entropy, f"step {number} of canvas {canvas_index + 1}")
        return drafts

    def _step(self, sample: CanvasSample, noise: Noise, edits: Edits, stopping: Stopping) -> _Step:
        """Let the sampler write the next canvas (B, C) from a sample of this one, and test whether to stop."""
        denoiser_canvas = sample.argmax if self.greedy else sample.sample
        proposal = Proposal(denoiser_canvas, sample, edits.free, self.network.config.vocab_size)
        renoised, accepted_mask = self.speed.sampler(proposal, noise, self.config)
        return _Step(edits.pinned(renoised), sample.argmax, accepted_mask, sample.entropy, *stopping(sample))

    def _sample(self, raw: mx.array, uniforms: mx.array, T: float, edits: Edits) -> CanvasSample:
        """Sample every position from the logits (B, C, V), which are not softcapped yet, under pins and barred ids."""
        sample = self.network.sample(raw, uniforms, T, edits.barred)
        return sample if edits.pins is None else edits.pins.certain(sample)


@dataclass
class _Decoded:
    """The decoder's pass of one step over a canvas, lazy until the step is evaluated.

    Attributes:
        raw: Logits before the softcap, (B, C, V).
        uniforms: The random numbers of the sample, (B, C).
        temperature: The step's temperature.
        sample: The sample of the logits under pins and barred ids, (B, C).
        barred: The bias that bars ids, or None.
    """

    raw: mx.array
    uniforms: mx.array
    temperature: float
    sample: CanvasSample
    barred: LogitBias | None


@dataclass
class _Step:
    """Arrays of one step over the batch, before they become events.

    Attributes:
        current_canvas: The next step's input, (B, C) int32.
        argmax_canvas: The most probable token at each position, (B, C) int32.
        accepted_mask: The accepted positions, (B, C) bool.
        entropy: Entropy of the processed logits in nats, (B, C) float32.
        test: The stopping test that each row has passed, (B,) int32: an index into ``TESTS``, or their number for none.
        uncertain: Whether each row's mean entropy is above ``UNCERTAIN``, (B,) bool.
    """

    current_canvas: mx.array
    argmax_canvas: mx.array
    accepted_mask: mx.array
    entropy: mx.array
    test: mx.array
    uncertain: mx.array

    def arrays(self) -> tuple[mx.array, ...]:
        return (
            self.current_canvas, self.argmax_canvas, self.accepted_mask, self.entropy, self.test, self.uncertain,
        )  # fmt: skip

    def finished(self) -> list[bool]:
        """Return which rows have passed a stopping test. The step must be evaluated."""
        tests: Any = self.test.tolist()
        return [test < len(TESTS) for test in tests]

    def all_finished(self) -> bool:
        """Return whether every row has passed a stopping test. The step must be evaluated."""
        return all(self.finished())

    def worth(self, check: EncoderCheck) -> dict[int, Sequence[int]]:
        """Return the texts of the open rows that are worth the encoder's check, by row."""
        return check.worth(self.argmax_canvas, self.entropy, self.finished())

    def checked(self, check: EncoderCheck, texts: dict[int, Sequence[int]]) -> _Step:
        """Return this step after the encoder's check of these texts, evaluated."""
        settled = check(self.argmax_canvas, texts, self.finished())
        test = mx.where(settled, TESTS.index("encoder"), self.test).astype(mx.int32)
        mx.eval(test)
        return replace(self, test=test)

    def keep_finished(self, last: _Step) -> _Step:
        """Return this step, in which the rows that had finished by the ``last`` step keep its values."""
        finished = last.test < len(TESTS)
        pairs = zip(last.arrays(), self.arrays(), strict=True)
        return _Step(*(mx.where(finished if new.ndim == 1 else finished[:, None], old, new) for old, new in pairs))

    def drafts(self, canvas_index: int, attempt: int, number: int, max_steps: int) -> tuple[Draft, ...]:
        """Return the rows of this step, which is evaluated, as events."""
        rows: Any = zip(*(array.tolist() for array in self.arrays()[1:]), strict=True)
        drafts = []
        for ids, mask, entropy, test, uncertain in rows:
            is_last = number == max_steps
            settled_by = TESTS[test] if test < len(TESTS) else "steps" if is_last and not uncertain else None
            drafts.append(Draft(
                canvas_index, number, max_steps, tuple(ids), tuple(mask), tuple(entropy),
                finished=settled_by is not None or is_last, settled_by=settled_by, attempt=attempt,
            ))
        return tuple(drafts)
