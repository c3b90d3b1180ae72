"""Canvases with pinned text after one prefix, several at a time: denoised, then scored."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import inf
from typing import Any

import mlx.core as mx

from dgemma_mlx.checks import check_seed
from dgemma_mlx.diffusion.edits import Edits
from dgemma_mlx.diffusion.sampler import Noise
from dgemma_mlx.events import Draft
from dgemma_mlx.generation.cancellation import Cancellation
from dgemma_mlx.generation.memory import Work, fit_to_memory
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.pictures import PromptIds, most_patches
from dgemma_mlx.generation.prefill import prefill
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.half_precision import refuse_nan

# Called after each step with the number of canvases and of steps so far.
Progress = Callable[[int, int], None]

# Called after each step with the drafts of all canvases that are written together.
Watch = Callable[[Sequence[Draft]], None]

# When a canvas has settled in n steps, the others are given up after more than 2 n + _PATIENCE steps: the right length
# settles soon, and a wrong one may never settle.
_PATIENCE = 4


@dataclass(frozen=True)
class InfillStatistics:
    """Counts and times of a text that was filled in or edited.

    Attributes:
        prompt_tokens: Number of tokens of the prefix, including the text before the first gap.
        canvases: Number of canvases that were tried.
        denoising_steps: Number of decoder passes, each over several canvases at a time.
        seconds: Seconds in all.
        peak_memory: Largest number of bytes that MLX held.
    """

    prompt_tokens: int
    canvases: int
    denoising_steps: int
    seconds: float
    peak_memory: int


class Patience:
    """How long canvases that do not settle are waited for, after the first one of those written together has settled.

    Attributes:
        settled_at: The step in which the first one has settled; None before.
    """

    def __init__(self) -> None:
        self.settled_at: int | None = None

    def note(self, step: int) -> None:
        """Note that a canvas has settled in this step."""
        self.settled_at = step if self.settled_at is None else min(step, self.settled_at)

    @property
    def last_step(self) -> float:
        """The step after which the others are given up; infinite while none has settled."""
        return inf if self.settled_at is None else 2 * self.settled_at + _PATIENCE + 1


class Writer:
    """Denoises and scores canvases after one encoded prefix, with the random numbers of one seed.

    Attributes:
        seed: The seed in use.
        canvases: Number of canvases that are written.
        steps: Number of decoder passes so far.
    """

    def __init__(
        self, model: Model, prefix: PromptIds, rows: int, seed: int | None,
        options: GenerationOptions | None = None, progress: Progress | None = None,
    ) -> None:
        """Encode the prefix (P).

        ``rows`` is the largest number of canvases at a time. Raises ``DgemmaError`` when the prefix or the memory limit
        leaves no room, and ``Cancelled``, which is a ``KeyboardInterrupt``, when ``options.cancelled`` returns True.
        """
        options = options or GenerationOptions()
        check_seed(seed)
        self.seed = secrets.randbits(32) if seed is None else seed
        self._began, self._model, self._progress = time.perf_counter(), model, progress
        self._prompt_tokens, self._batches, self.canvases, self.steps = len(prefix), 0, 0, 0
        model.check_prompt(prefix)
        mx.reset_peak_memory()
        work = Work(rows, shares_prefix=True, patches=most_patches([prefix]))
        budget = fit_to_memory(model, len(prefix), work, options.memory_limit, options.prefill_step_size)
        self._denoiser = options.denoiser(model)
        self._cancellation = Cancellation(options.cancelled)
        self._cache = model.network.new_cache()
        chunks = prefill(
            model.network, [prefix], self._cache, budget, self._cancellation, model.features_of([prefix]),
            wants_hidden=True,
        )  # fmt: skip
        self._hidden = _last_hidden(chunks)
        self._cancellation.check()
        mx.eval(self._hidden)
        self._copies: tuple[int, PrefixCache] | None = None  # of the prefix, and how many

    def noise(self, rows: int, first: int = 0) -> Noise:
        """Return the random numbers of ``rows`` rows from row ``first`` on; row i uses seed + i."""
        return Noise(*((self.seed + row) % 2**64 for row in range(first, first + rows)))

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the model's vocabulary."""
        return self._model.config.text.vocab_size

    @property
    def max_steps(self) -> int:
        """Largest number of denoising steps that a canvas may take."""
        return self._denoiser.config.max_denoising_steps

    def write(
        self, length: int, rows: int, edits: Edits, watch: Watch | None = None, *, first: int = 0,
        patience: Patience | None = None,
    ) -> list[Draft]:
        """Denoise canvases (rows, length), and return the last draft of each. ``Draft.canvas`` counts such batches.

        Canvases that have not settled long after another one did (``Patience``) are given up; their last draft is not
        ``finished``. Raises ``Cancelled`` between two steps. Where these canvases are only some of those that belong
        together, ``first`` is the number of the first of them, and ``patience`` is that of all.
        """
        drafts: tuple[Draft, ...] = ()
        patience = patience or Patience()
        denoising = self._denoiser.denoise(
            self._repeated(rows), self.noise(rows, first), length, edits, canvas_index=self._batches
        )
        self._batches += 1
        self.canvases += rows
        with closing(denoising) as steps:
            for drafts in steps:
                self.steps += 1
                if watch is not None:
                    watch(drafts)
                if self._progress is not None:
                    self._progress(self.canvases, self.steps)
                self._cancellation.check()
                if any(draft.settled_by for draft in drafts):
                    patience.note(drafts[0].step)
                if drafts[0].step >= patience.last_step:
                    break
        return list(drafts)

    def first_step(self, length: int) -> mx.array:
        """Return the log-probabilities (C, V) float32 of the first step, from noise, at temperature 1."""
        network = self._model.network
        canvas = self.noise(1).canvas(length, self.vocab_size)
        self.canvases, self.steps = self.canvases + 1, self.steps + 1
        logits = network.decode(canvas, self._cache)[0]
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        total: Any = log_probabilities.sum().item()
        refuse_nan(network, total, "the first step")
        return log_probabilities

    def scores(self, canvases: Sequence[Sequence[int]], ends: Sequence[int]) -> list[float]:
        """Return how probable the causal encoder finds each canvas (C) up to its end, in nats per token on average.

        The decoder cannot judge: it sees each token that it is asked for, and confirms whatever a canvas holds.
        """
        network, ids = self._model.network, mx.array(list(canvases), mx.int32)
        rows = len(canvases)
        cache = self._repeated(rows)
        before = cache.snapshot()
        hidden = network.encode(ids, cache)
        shifted = mx.concatenate([mx.repeat(self._hidden, rows, axis=0), hidden[:, :-1]], axis=1)
        scores: list[Any] = []
        for row, end in enumerate(ends):  # the logits of one canvas at a time
            logits = network.logits(shifted[row, :end])
            chosen = mx.take_along_axis(logits, ids[row, :end, None], axis=-1)
            scores.append((chosen[:, 0] - mx.logsumexp(logits, axis=-1)).mean().item())
            refuse_nan(network, scores[-1], "the scores of the candidates")
        cache.restore(before)
        return scores

    def _repeated(self, rows: int) -> PrefixCache:
        """Return a cache with ``rows`` copies of the prefix, the same one while their number stays the same."""
        if self._copies is None or self._copies[0] != rows:
            self._copies = None  # frees the other copies first
            self._copies = rows, self._cache.rows([0] * rows)
        return self._copies[1]

    def statistics(self) -> InfillStatistics:
        """Return the counts and times so far."""
        return InfillStatistics(
            self._prompt_tokens, self.canvases, self.steps, time.perf_counter() - self._began, mx.get_peak_memory()
        )


def _last_hidden(chunks: Generator[int, None, mx.array | None]) -> mx.array:
    """Run a prefill to its end, and return the hidden state (1, 1, M) of the last position."""
    while True:
        try:
            next(chunks)
        except StopIteration as end:
            hidden: mx.array = end.value
            return hidden
