"""What the engine tells its callers: plain, frozen values, no arrays of the GPU among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dgemma_mlx.text.parts import ToolCall

FinishReason = Literal["stop", "length", "cancelled"]
"""``stop``: an end-of-text id was written; ``length``: max_tokens or the model's positions were used up;
``cancelled``: the caller asked to stop."""


@dataclass(frozen=True)
class Draft:
    """One denoising step of one canvas; every token may still change."""

    canvas: int
    """index of the canvas, from 0"""
    step: int
    """from 1"""
    max_steps: int
    tokens: tuple[int, ...]
    """the argmax canvas (C)"""
    accepted_mask: tuple[bool, ...]
    """positions accepted in this step (C); nothing is locked"""
    entropy: tuple[float, ...]
    """of the processed logits, in nats (C)"""
    finished: bool
    """True for the last step: a test was passed, or steps used up"""
    settled_by: str | None = None
    """of the last step: the test that the canvas passed, one of ``dgemma_mlx.diffusion.stopping.TESTS``, or "steps":
    all were used, and it is not uncertain; None where it still is"""
    attempt: int = 0
    """counts up each time that a canvas is begun again: from other noise, or to repair it"""

    @property
    def mean_entropy(self) -> float:
        return sum(self.entropy) / len(self.entropy)


@dataclass(frozen=True)
class Committed:
    """A canvas that is final. The texts are what this canvas adds: concatenate them over canvases."""

    canvas: int
    tokens: tuple[int, ...]
    """cut after the first end-of-text id, which is kept"""
    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    steps: int
    """of all attempts"""
    settled_by: str | None = "steps"
    """of the attempt that is committed, as in ``Draft``"""
    low_confidence: bool = False
    """all steps were used, of a second attempt too where the speed mode has one, and the canvas is still uncertain"""
    doubted: tuple[int, ...] = ()
    """places in ``tokens`` at which the encoder would have written another token, where it was asked (``verify``)"""

@dataclass(frozen=True)
class Statistics:
    """Counts and times of one generation."""

    prompt_tokens: int
    cached_tokens: int
    """prompt tokens that an earlier call had encoded"""
    generated_tokens: int
    """kept tokens, the end-of-text id among them, padding not"""
    canvases: int
    denoising_steps: int
    tokens_per_forward: float
    """generated_tokens / denoising_steps, as the reference counts it; 0 without a step"""
    prefill_seconds: float
    seconds: float
    tokens_per_second: float
    """generated_tokens over the time after the prefill"""
    peak_memory: int
    """bytes held by MLX at most"""
    low_confidence: int = 0
    """canvases committed with low confidence"""
    doubted_tokens: int = 0
    """tokens that the encoder would have written otherwise, where it was asked (``verify``)"""


@dataclass(frozen=True)
class Done:
    """The end of a generation, and all of it in one piece."""

    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    statistics: Statistics


Event = Draft | Committed | Done
