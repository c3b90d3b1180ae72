"""How answers are written: what callers may wish, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.checks import check_count, check_temperature
from dgemma_mlx.constrain.constraint import Constraint
from dgemma_mlx.constrain.vocabulary import TokenAutomaton
from dgemma_mlx.diffusion.speed import DEFAULT_SPEED, SPEEDS
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.runner import VERIFY, Verify


@dataclass(frozen=True)
class Options:
    """How answers are written; the keyword arguments that ``stream``, ``generate`` and ``generate_batch`` share."""

    speed: str = DEFAULT_SPEED
    """``reference``, ``balanced`` or ``fast``: see ``dgemma_mlx.diffusion.speed``"""
    verify: Verify = "off"
    """``flag``: tokens that the encoder would have written otherwise are told as ``Committed.doubted``; ``repair``: the
    canvas is denoised again from the first of them, with the encoder's own token there"""
    temp: float | None = None
    """0 takes the most probable tokens as denoiser canvas, another value is a constant temperature"""
    generation: GenerationConfig | None = None
    """instead of the checkpoint's parameters"""
    trim_canvas: bool = False
    """the last canvas is no longer than ``max_tokens`` leaves to write (a multiple of 64): less work, another text"""
    prefill_step_size: int | None = None
    """positions of a prompt that are encoded at once; None: as many as ``memory_limit`` allows"""
    memory_limit: int | None = None
    """bytes, which bound what is worked on at a time; None: the device's"""
    cancelled: Callable[[], bool] = lambda: False
    """asked between any two steps"""
    constraint: Constraint | None = None
    """what the answer has to match"""
    response_format: Mapping[str, Any] | None = None
    """a constraint as OpenAI's clients send it: see ``Constraint.response_format``"""

    def __post_init__(self) -> None:
        if self.constraint is not None and self.response_format is not None:
            raise DgemmaError("constraint and response_format exclude each other", "Give one of them.", exit_code=2)
        if self.verify == "repair" and (self.constraint is not None or self.response_format is not None):
            raise DgemmaError(
                "verify=repair goes without a constraint", "The encoder's own tokens need not match; use flag.", 2
            )
        for name in ("prefill_step_size", "memory_limit"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name, value, choices in (("speed", self.speed, tuple(SPEEDS)), ("verify", self.verify, VERIFY)):
            if value not in choices:
                raise DgemmaError(
                    f"{name} must be one of {', '.join(choices)}, not {value!r}", "Leave it out for the default.", 2
                )
        check_temperature(self.temp)

    def check_thinking(self, thinking: bool) -> None:
        if thinking and (self.constraint is not None or self.response_format is not None):
            raise DgemmaError(
                "thinking goes without a constraint",
                "What the model thinks would have to match, too. Use thinking=False, or --no-thinking.", exit_code=2,
            )

    def tokens(self, model: Model, config: GenerationConfig) -> TokenAutomaton | None:
        """What every answer has to match."""
        constraint = self.constraint
        if self.response_format is not None:
            constraint = Constraint.response_format(self.response_format)
        return None if constraint is None else constraint.over(model.tokenizer, config, model.config.text.vocab_size)

    def config(self, model: Model) -> GenerationConfig:
        """The parameters in force."""
        config = self.generation or model.generation
        constant = self.temp is not None and self.temp != 0
        return config.override(t_min=self.temp, t_max=self.temp) if constant else config
