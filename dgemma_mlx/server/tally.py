"""What a request has used: counted wherever it is served, for its line of the log and for the metrics."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dgemma_mlx.events import Done
from dgemma_mlx.infill.fill import Filled


@dataclass(frozen=True)
class Use:
    """What one answer has used.

    Attributes:
        finish_reason: Why it ended.
        prompt_tokens: Number of tokens of the prompt.
        cached_tokens: Number of these that were not encoded again.
        tokens: Number of tokens written.
        steps: Number of denoising steps.
        canvases: Number of canvases.
        prefill_seconds: Seconds spent on encoding the prompt.
    """

    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    steps: int
    canvases: int
    prefill_seconds: float

    @classmethod
    def of(cls, answer: Done | Filled) -> Use:
        """Return what an answer or a filled text has used."""
        if isinstance(answer, Filled):
            work, written = answer.statistics, sum(answer.candidates[0].lengths)
            return cls("stop", work.prompt_tokens, 0, written, work.denoising_steps, work.canvases, 0.0)
        counts = answer.statistics
        return cls(
            answer.finish_reason, counts.prompt_tokens, counts.cached_tokens, counts.generated_tokens,
            counts.denoising_steps, counts.canvases, counts.prefill_seconds,
        )  # fmt: skip


@dataclass
class Tally:
    """What one request has asked for and used, which may hold several answers.

    Attributes:
        prompts: What was asked.
        uses: What each answer that has ended has used.
    """

    prompts: list[Any] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)


_current: ContextVar[Tally] = ContextVar("tally")


def begin_tally() -> Tally:
    """Return a new tally, which is the current one of this task and of those that it starts."""
    tally = Tally()
    _current.set(tally)
    return tally


def current_tally() -> Tally:
    """Return the tally of the request that is being served, or a new one outside of a request."""
    return _current.get(Tally())
