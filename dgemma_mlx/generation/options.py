"""Validated generation options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.checks import check_count, check_temperature, shown
from dgemma_mlx.constrain.constraint import Constraint
from dgemma_mlx.constrain.tokens import TokenMachine
from dgemma_mlx.diffusion.denoiser import Denoiser
from dgemma_mlx.diffusion.speed import DEFAULT_SPEED, SPEEDS
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model

Verify = Literal["off", "flag", "repair"]
VERIFY: tuple[Verify, ...] = get_args(Verify)


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are written: the options that ``stream``, ``generate`` and ``generate_batch`` share.

    Raises ``DgemmaError`` (exit code 2) for a value out of range, and for options that exclude each other.

    Attributes:
        speed: "reference", "balanced" or "fast"; see ``dgemma_mlx.diffusion.speed``.
        verify: "flag" reports the tokens that the encoder would have written differently, as ``Committed.doubted``;
            "repair" denoises the canvas again from the first of them, with the encoder's own token there.
        temp: A constant temperature. 0 takes the most probable tokens as the denoiser canvas. None keeps the
            checkpoint's schedule.
        generation: Parameters of the denoising loop, in place of the checkpoint's.
        trim_canvas: Whether the last canvas is only as long as ``max_tokens`` needs, as a multiple of 64. This saves
            work and changes the text.
        prefill_step_size: Number of prompt positions encoded at once. None takes 2,048 (512 without Metal), or fewer
            to stay within the memory limit.
        memory_limit: Bytes that the work may take. None is the device's own limit.
        cancelled: A function that is called between any two steps; once it returns True, the answer ends. None never
            cancels.
        constraint: What the answer must match.
        response_format: A constraint in the form of OpenAI's clients; see ``Constraint.response_format``.
    """

    speed: str = DEFAULT_SPEED
    verify: Verify = "off"
    temp: float | None = None
    generation: GenerationConfig | None = None
    trim_canvas: bool = False
    prefill_step_size: int | None = None
    memory_limit: int | None = None
    cancelled: Callable[[], bool] | None = None
    constraint: Constraint | None = None
    response_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.constraint is not None and self.response_format is not None:
            raise DgemmaError("constraint and response_format exclude each other", "Give one of them.", exit_code=2)
        if self.constraint is not None and not isinstance(self.constraint, Constraint):
            raise DgemmaError(
                f"not a constraint: {shown(self.constraint)}", "Write Constraint.regex(...), for example.", exit_code=2
            )
        if self.verify == "repair" and self.is_constrained:
            raise DgemmaError(
                "verify=repair cannot be combined with a constraint",
                "The encoder's own tokens may not match the constraint; use flag.", exit_code=2,
            )
        for name in ("prefill_step_size", "memory_limit"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name, value, choices in (("speed", self.speed, tuple(SPEEDS)), ("verify", self.verify, VERIFY)):
            if value not in choices:
                raise DgemmaError(
                    f"{name} must be one of {', '.join(choices)}, not {shown(value)}",
                    "Leave it out for the default.", exit_code=2,
                )
        check_temperature(self.temp)

    @property
    def is_constrained(self) -> bool:
        """Whether the answer must match something. A ``response_format`` of the type text imposes nothing."""
        form = self.response_format
        is_text = isinstance(form, Mapping) and form.get("type") == "text"
        return self.constraint is not None or (form is not None and not is_text)

    def check_thinking(self, thinking: bool) -> None:
        """Raise ``DgemmaError`` when thinking is combined with a constraint."""
        if thinking and self.is_constrained:
            raise DgemmaError(
                "thinking cannot be combined with a constraint",
                "The thoughts would have to match the constraint as well. Use thinking=False, or --no-thinking.", 2,
            )

    def token_machine(self, model: Model) -> TokenMachine | None:
        """Return what every answer must match, over the model's tokens; None without a constraint."""
        constraint = self.constraint
        if self.response_format is not None:
            constraint = Constraint.response_format(self.response_format)
        if constraint is None:
            return None
        return constraint.over(model.tokenizer, self.config(model), model.config.text.vocab_size)

    def config(self, model: Model) -> GenerationConfig:
        """Return the loop's parameters in force."""
        config = self.generation or model.generation
        is_constant = self.temp is not None and self.temp != 0
        return config.override(t_min=self.temp, t_max=self.temp) if is_constant else config

    def denoiser(self, model: Model) -> Denoiser:
        """Return a denoiser with these options."""
        return Denoiser(model.network, self.config(model), SPEEDS[self.speed], greedy=self.temp == 0)
