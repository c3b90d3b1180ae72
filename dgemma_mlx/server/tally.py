"""What a request has used: counted wherever it is served, for its line of the log."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dgemma_mlx.events import Done


@dataclass
class Tally:
    """What one request has used, which may hold several answers.

    Attributes:
        prompts: What was asked.
        prompt_tokens: Number of tokens of the prompts.
        cached_tokens: Number of these that were not encoded again.
        tokens: Number of tokens written.
        steps: Number of denoising steps.
        answers: Number of answers that have ended.
    """

    prompts: list[Any] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    answers: int = 0

    def add(self, done: Done) -> None:
        """Add an answer that has ended."""
        counts = done.statistics
        self.prompt_tokens += counts.prompt_tokens
        self.cached_tokens += counts.cached_tokens
        self.tokens += counts.generated_tokens
        self.steps += counts.denoising_steps
        self.answers += 1


_current: ContextVar[Tally] = ContextVar("tally")


def begin_tally() -> Tally:
    """Return a new tally, which is the current one of this task and of those that it starts."""
    tally = Tally()
    _current.set(tally)
    return tally


def current_tally() -> Tally:
    """Return the tally of the request that is being served, or a new one outside of a request."""
    return _current.get(Tally())
