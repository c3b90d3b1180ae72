"""Canvases with pinned text, several at a time: denoised, then scored."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from dgemma_mlx.checks import check_seed
from dgemma_mlx.diffusion.denoiser import Barred, Pins, Start, denoise
from dgemma_mlx.diffusion.sampler import Noise
from dgemma_mlx.diffusion.speed import SPEEDS
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Draft
from dgemma_mlx.generation.memory import fit_to_memory
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.options import Options
from dgemma_mlx.generation.runner import prefill

Progress = Callable[[int, int], None]
_PATIENCE = 4  # steps; what is right settles soon, what has the wrong length often never does


@dataclass(frozen=True)
class InfillStatistics:
    """Counts and times of a text that was filled in or edited."""

    prompt_tokens: int
    """of the prefix, what comes before the first gap among them"""
    canvases: int
    """that were tried"""
    denoising_steps: int
    """passes of the decoder over some canvases at a time"""
    seconds: float
    peak_memory: int
    """bytes held by MLX at most"""


class Writer:
    """Denoises canvases behind one prefix, with the random numbers of one seed and the parameters of ``Options``."""

    def __init__(
        self, model: Model, prefix: Sequence[int], rows: int, seed: int | None, options: dict[str, Any]
    ) -> None:
        """Encodes the prefix (P). ``rows`` is how many canvases there will be at a time at the most. Of the options
        ``progress`` hears after each step how many canvases and steps there have been; the rest is ``Options``'."""
        self._progress: Progress = options.get("progress", lambda canvases, steps: None)
        self.options = Options(**{name: value for name, value in options.items() if name != "progress"})
        o = self.options
        if o.verify != "off" or o.trim_canvas or o.constraint is not None or o.response_format is not None:
            raise DgemmaError(
                "verify, trim_canvas and constraints are for answers that are generated", "Leave them out.", exit_code=2
            )
        check_seed(seed)
        self.seed = secrets.randbits(32) if seed is None else seed
        self._began, self._model = time.perf_counter(), model
        self._prompt_tokens, self._canvases, self._steps = len(prefix), 0, 0
        model.check_prompt(prefix)
        mx.reset_peak_memory()
        budget = fit_to_memory(model, rows * len(prefix), self.options.memory_limit)
        self._config = self.options.config(model)
        self._cache = model.network.new_cache()
        step_size = self.options.prefill_step_size or budget.prefill_step_size
        ids = mx.array([prefix], mx.int32)
        _, hidden = prefill(model.network, ids, self._cache, step_size, self.options.cancelled)
        self._stop_if_cancelled()
        assert hidden is not None
        mx.eval(hidden)
        self._hidden = hidden
        """(1, 1, M) of the prefix' last position"""

    def noise(self, rows: int) -> Noise:
        """Random numbers: those of the seed in the first row, of the seeds that follow in the others."""
        return Noise(*((self.seed + row) % 2**64 for row in range(rows)))

    @property
    def vocab_size(self) -> int:
        return self._model.config.text.vocab_size

    @property
    def steps(self) -> int:
        """That a canvas may take at most."""
        return self._config.max_denoising_steps

    def write(
        self, length: int, rows: int, pins: Pins | None, barred: Barred, start: Start | None = None
    ) -> list[Draft]:
        """Denoises canvases (rows, length); returns the last draft of each, ``settled_by`` None where there was no
        hope for it: some other row was settled in less than half of the steps. ``KeyboardInterrupt`` where cancelled.
        """
        drafts: tuple[Draft, ...] = ()
        settled_at = 0
        self._canvases += rows
        for drafts in denoise(
            self._model.network, self._cache.repeated(rows), self._config, self.noise(rows), canvas_length=length,
            speed=SPEEDS[self.options.speed], greedy=self.options.temp == 0, pins=pins, barred=barred, start=start,
        ):  # fmt: skip
            self._steps += 1
            self._progress(self._canvases, self._steps)
            self._stop_if_cancelled()
            if not settled_at and any(draft.settled_by for draft in drafts):
                settled_at = drafts[0].step
            if settled_at and drafts[0].step > 2 * settled_at + _PATIENCE:
                break
        return list(drafts)

    def first_step(self, length: int) -> mx.array:
        """(C, V) float32: log-probabilities of a canvas' first step, from noise, at the temperature 1."""
        network = self._model.network
        canvas = self.noise(1).canvas(length, self.vocab_size)
        self._canvases, self._steps = self._canvases + 1, self._steps + 1
        logits = network.decode(canvas, self._cache)[0]
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    def scores(self, canvases: Sequence[Sequence[int]], ends: Sequence[int]) -> list[float]:
        """How probable the causal encoder finds each canvas (C) up to its end: nats a token, on average.

        Not the decoder: it confirms whatever stands in a canvas, as it sees each token that it is asked for.
        """
        network, ids = self._model.network, mx.array(list(canvases), mx.int32)
        rows = len(canvases)
        hidden = network.encode(ids, self._cache.repeated(rows))
        behind = mx.concatenate([mx.repeat(self._hidden, rows, axis=0), hidden[:, :-1]], axis=1)
        scores: list[Any] = []
        for row, end in enumerate(ends):  # the logits of one canvas at a time
            logits = network.logits(behind[row, :end])
            chosen = mx.take_along_axis(logits, ids[row, :end, None], axis=-1)
            scores.append((chosen[:, 0] - mx.logsumexp(logits, axis=-1)).mean().item())
        return scores

    def statistics(self) -> InfillStatistics:
        return InfillStatistics(
            self._prompt_tokens, self._canvases, self._steps, time.perf_counter() - self._began, mx.get_peak_memory()
        )

    def _stop_if_cancelled(self) -> None:
        if self.options.cancelled():
            raise KeyboardInterrupt
