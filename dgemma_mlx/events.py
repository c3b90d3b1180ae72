"""Events: what generation reports to its callers. All are plain, frozen values that hold no MLX arrays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dgemma_mlx.text.parts import ToolCall

# "stop": an end-of-text id was written. "tool_calls": the same, and the answer holds a tool call.
# "length": max_tokens or the model's positions are used up, or the model went on with nothing but padding.
# "cancelled": the caller asked to stop.
FinishReason = Literal["stop", "tool_calls", "length", "cancelled"]


@dataclass(frozen=True)
class Encoded:
    """A part of the prompt is encoded. A runner reports it, so that other work can go on in between.

    Attributes:
        tokens: Number of prompt positions that are encoded so far.
        total: Number of prompt positions.
    """

    tokens: int
    total: int


@dataclass(frozen=True)
class Draft:
    """One denoising step of one canvas. Every token may still change.

    Attributes:
        canvas: Index of the canvas, from 0.
        step: Number of the step, from 1.
        max_steps: Largest number of steps that the canvas may take.
        tokens: The argmax canvas, C ids.
        accepted_mask: Which of the C positions this step accepted. Acceptance locks nothing.
        entropy: Entropy of the processed logits at each of the C positions, in nats.
        finished: Whether this is the last step, because a stopping test was passed or all steps are used.
        settled_by: The stopping test that the canvas passed, one of ``dgemma_mlx.diffusion.stopping.TESTS``, or
            "steps" when all steps are used and the canvas is not uncertain. None before the last step, and in the last
            step when the canvas is still uncertain.
        attempt: 0 for the first attempt at this canvas, 1 for a second one from other noise, 2 and above for repairs.
    """

    canvas: int
    step: int
    max_steps: int
    tokens: tuple[int, ...]
    accepted_mask: tuple[bool, ...]
    entropy: tuple[float, ...]
    finished: bool
    settled_by: str | None = None
    attempt: int = 0

    @property
    def mean_entropy(self) -> float:
        """Mean of ``entropy`` over the canvas, in nats."""
        return sum(self.entropy) / len(self.entropy)

    @property
    def low_confidence(self) -> bool:
        """Whether the canvas has finished and is still uncertain."""
        return self.finished and self.settled_by is None


@dataclass(frozen=True)
class Committed:
    """A canvas that is final. The texts are what this canvas adds: concatenate them over canvases.

    Attributes:
        canvas: Index of the canvas, from 0.
        tokens: Its ids, cut after the first end-of-text id, which is kept.
        text: Answer text that the canvas adds.
        thinking: Thinking that the canvas adds.
        tool_calls: Tool calls that the canvas completes. Their ids differ within an answer, and between answers to
            other prompts or with other seeds; one prompt with one seed gives the same ids.
        steps: Number of denoising steps, over all attempts.
        settled_by: The stopping test that the committed attempt passed, as in ``Draft``. None when the canvas is still
            uncertain after all steps (of a second attempt, too, where the speed mode makes one).
        doubted: Indices into ``tokens`` at which the encoder would have written another token. Empty unless
            ``verify`` asks the encoder.
        is_last: Whether the answer ends with this canvas.
    """

    canvas: int
    tokens: tuple[int, ...]
    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    steps: int
    settled_by: str | None = "steps"
    doubted: tuple[int, ...] = ()
    is_last: bool = False

    @property
    def low_confidence(self) -> bool:
        """Whether the canvas is still uncertain."""
        return self.settled_by is None


@dataclass(frozen=True)
class Statistics:
    """Counts and times of one answer.

    Attributes:
        prompt_tokens: Number of prompt tokens.
        cached_tokens: Number of prompt tokens that an earlier call had encoded.
        generated_tokens: Number of kept tokens, including the end-of-text id and excluding padding.
        canvases: Number of committed canvases.
        denoising_steps: Number of decoder passes.
        tokens_per_forward: generated_tokens / denoising_steps, as the reference counts it; 0 without a step.
        prefill_seconds: Seconds spent on encoding the prompt.
        seconds: Seconds in all.
        tokens_per_second: generated_tokens divided by the seconds after the prefill.
        peak_memory: Largest number of bytes that MLX held.
        low_confidence: Number of canvases that were committed while still uncertain.
        doubted_tokens: Number of tokens that the encoder would have written differently; 0 unless ``verify`` asks it.
        decoded_positions: Number of canvas positions that the decoder passes computed, over all steps. What a row of a
            batch waits for is not counted, here and in ``encoder_passes``: the counts are those of the answer alone.
        encoder_passes: Number of encoder passes over canvases, to commit or to verify them. The prompt's prefill is
            not one.
        encoded_positions: Number of canvas positions that these encoder passes computed.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    canvases: int
    denoising_steps: int
    tokens_per_forward: float
    prefill_seconds: float
    seconds: float
    tokens_per_second: float
    peak_memory: int
    low_confidence: int = 0
    doubted_tokens: int = 0
    decoded_positions: int = 0
    encoder_passes: int = 0
    encoded_positions: int = 0


@dataclass(frozen=True)
class Done:
    """The end of an answer, with all of it in one piece.

    Attributes:
        text: The answer: the texts of all ``Committed`` events, and of a tool call that was cancelled half-way, what
            was written.
        thinking: What the model thought before answering; empty when it did not think.
        tool_calls: Tool calls, in order.
        tokens: All kept ids of the committed canvases.
        finish_reason: Why the answer ended.
        seed: The seed that gives this answer again.
        statistics: Counts and times.
    """

    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    statistics: Statistics

    @property
    def is_blank(self) -> bool:
        """Whether nothing was written: no text, no thinking and no tool call."""
        return not (self.text or self.thinking or self.tool_calls)

    def message(self) -> dict[str, Any]:
        """Return the answer as a message of a conversation, in plain JSON. The results of its calls go after it."""
        found: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            found["reasoning_content"] = self.thinking
        if self.tool_calls:
            found["tool_calls"] = [asdict(call) for call in self.tool_calls]
        return found


Event = Draft | Committed | Done
