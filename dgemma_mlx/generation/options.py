"""Validated generation options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.checks import check_count, check_temperature, shown
from dgemma_mlx.constrain.constraint import Constraint
from dgemma_mlx.constrain.tokens import TokenMachine
from dgemma_mlx.constrain.turns import THOUGHT, Turn, calls_of, of_turn
from dgemma_mlx.diffusion.denoiser import Denoiser
from dgemma_mlx.diffusion.speed import DEFAULT_SPEED, SPEEDS
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model, ModelText
from dgemma_mlx.text.tools import OPEN_CALL, Tool, ToolChoice, chosen, declarations, signatures

Verify = Literal["off", "flag", "repair"]
VERIFY: tuple[Verify, ...] = get_args(Verify)


class Held(NamedTuple):
    """What one answer is held to.

    Attributes:
        machine: The texts that it may be, over the model's tokens.
        is_free: Whether it is free apart from its calls, so that it may be blank, and be cut off by ``max_tokens``.
    """

    machine: TokenMachine
    is_free: bool


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are written: the options that ``stream``, ``generate`` and ``generate_batch`` share.

    Raises ``DgemmaError`` (exit code 2) for a value out of range, and for options that exclude each other.

    Attributes:
        speed: "reference", "balanced" or "fast"; see ``dgemma_mlx.diffusion.speed``.
        verify: "flag" reports the tokens that the encoder would have written differently, as ``Committed.doubted``;
            "repair" denoises the canvas again from the first of them, with the encoder's own token there; under a
            constraint, from the first of them at which that token may stand.
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
                f"not a constraint: {shown(self.constraint)}", "Write Constraint.json_schema(...), for example.", 2
            )
        if self.response_format is not None:
            Constraint.response_format(self.response_format)  # raises when it is malformed
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

    def held(
        self, model: ModelText, tools: Sequence[Tool] | None, tool_choice: ToolChoice | None, thinking: bool
    ) -> Held | None:
        """Return what an answer is held to, over the model's tokens; None when it is free.

        Calls are held to the tools unless all of these have ``strict`` false and the answer is free to call none.
        Raises ``DgemmaError`` (exit code 2) for a choice that the tools do not offer, when the model's tokenizer has no
        calls and one must be made, for a constraint where one must be made, and for a constraint or parameters that are
        not supported.
        """
        chosen_tools, special = chosen(declarations(tools), tool_choice), model.tokenizer.special_ids
        constraint = self.constraint
        if self.response_format is not None:
            constraint = Constraint.response_format(self.response_format)
        if chosen_tools.must_call and OPEN_CALL not in special:
            raise DgemmaError(
                f"the model's tokenizer has no {OPEN_CALL}, so a call cannot be required", 'Use "auto" or "none".', 2
            )
        if chosen_tools.must_call and constraint is not None:
            raise DgemmaError(
                "a call that is required excludes a constraint on the answer", 'Use the tool choice "auto".', 2
            )
        names = chosen_tools.names if OPEN_CALL in special else ()
        is_free = constraint is None and not chosen_tools.must_call
        if is_free and not any(each.is_strict for each in signatures(tools) if each.name in names):
            return None
        thinks = (thinking or is_free) and set(THOUGHT) <= special.keys()
        if constraint is None or names or thinks:
            answer = None if constraint is None else constraint.machine
            turn = Turn(answer, calls_of(tools, names), thinks, chosen_tools.must_call)
            constraint = Constraint(of_turn(turn), "the answer")
        return Held(constraint.over(model.tokenizer, self.config(model), model.config.text.vocab_size), is_free)

    @property
    def asks_encoder(self) -> bool:
        """Whether the encoder judges canvases: to verify them, or because the speed mode has it check open ones."""
        return self.verify != "off" or SPEEDS[self.speed].check is not None

    def config(self, model: ModelText) -> GenerationConfig:
        """Return the loop's parameters in force."""
        config = self.generation or model.generation
        is_constant = self.temp is not None and self.temp != 0
        return config.override(t_min=self.temp, t_max=self.temp) if is_constant else config

    def denoiser(self, model: Model) -> Denoiser:
        """Return a denoiser with these options."""
        return Denoiser(model.network, self.config(model), SPEEDS[self.speed], greedy=self.temp == 0)
