"""The one internal request: what every protocol asks the engine for, and what it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma_mlx.events import Done, Draft, FinishReason
from dgemma_mlx.text.messages import Message
from dgemma_mlx.text.parts import ToolCall
from dgemma_mlx.text.tools import Tool, ToolChoice


@dataclass(frozen=True)
class Question:
    """A request for an answer, in no protocol's words. The attributes are those of ``stream``, except as said here.

    Attributes:
        prompt: The messages of a conversation, or with ``raw`` a text.
        raw: Whether the prompt is plain text, without the chat template.
        thinking: Whether the model thinks before it answers.
        tools: What the model may call.
        tool_choice: Whether it calls.
        single_call: Whether the answer ends after its first call.
        response_format: What the answer must match, in OpenAI's form.
        max_tokens: Largest number of tokens to write; None is the rest of the context.
        seed: Seed of the random numbers; None draws one.
        temp: 0 takes the most probable tokens; None keeps the checkpoint's schedule.
        stop: Texts before which the answer ends.
        speed: What it takes to commit a canvas; None is the server's choice.
        drafts: Whether each denoising step is reported.
    """

    prompt: str | Sequence[Message]
    raw: bool = False
    thinking: bool = False
    tools: Sequence[Tool] | None = None
    tool_choice: ToolChoice | None = None
    single_call: bool = False
    response_format: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    seed: int | None = None
    temp: float | None = None
    stop: tuple[str, ...] = ()
    speed: str | None = None
    drafts: bool = False


@dataclass(frozen=True)
class Written:
    """New parts of an answer. They are final.

    Attributes:
        text: Answer text, cut before a stop text.
        thinking: Thinking.
        tool_calls: Complete calls.
    """

    text: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The end of an answer, after all that was written.

    Attributes:
        finish_reason: Why it ended: "stop" also at a stop text.
        stop_text: The stop text that ended it, or None.
        done: The whole answer with its counts. Its text is not cut at a stop text.
    """

    finish_reason: FinishReason
    stop_text: str | None
    done: Done


Update = Draft | Written | Ended
