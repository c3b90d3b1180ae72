"""The state of one answer: what is written so far, and the counts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.constrain.canvas import ConstraintState, RowStart
from dgemma_mlx.diffusion.stopping import text_ids
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Committed, Done, Draft, FinishReason, Statistics
from dgemma_mlx.generation.pictures import PromptIds
from dgemma_mlx.sizes import rate
from dgemma_mlx.text.parts import Parts, PartsParser

_UNLIMITED = 1 << 30  # tokens: more than any answer has


@dataclass
class Answer:
    """One prompt's answer while it is written.

    Attributes:
        prompt_ids: Ids of the prompt, with its pictures.
        seed: Seed of the random numbers.
        max_tokens: Largest number of tokens to write.
        max_positions: Number of positions the model supports (max_position_embeddings).
        config: Parameters of the denoising loop, with the ids that end a text.
        parser: Turns ids into text, thinking and tool calls.
        marks: Ids that are not text: padding and all control tokens.
        constraint: Where the answer stands in its constraint; None without one.
        is_free: Whether an answer with a constraint may be blank, and be cut off by ``max_tokens``, as one without.
        tokens: Committed ids.
        parts: Committed text, thinking and tool calls.
        finish_reason: Why the answer has ended; None while it is written.
        canvases: Number of committed canvases.
        steps: Number of denoising steps.
        canvas_steps: Number of denoising steps of the current canvas.
        low_confidence: Number of canvases that were committed while still uncertain.
        doubted: Number of committed tokens that the encoder doubts.
        decoded: Number of canvas positions that decoder passes computed.
        encoder_passes: Number of encoder passes over canvases.
        encoded: Number of canvas positions that these passes computed.
    """

    prompt_ids: PromptIds
    seed: int
    max_tokens: int
    max_positions: int
    config: GenerationConfig
    parser: PartsParser
    marks: frozenset[int] = frozenset()
    constraint: ConstraintState | None = None
    is_free: bool = False
    tokens: list[int] = field(default_factory=list)
    parts: Parts = field(default_factory=Parts)
    finish_reason: FinishReason | None = None
    canvases: int = 0
    steps: int = 0
    canvas_steps: int = 0
    low_confidence: int = 0
    doubted: int = 0
    decoded: int = 0
    encoder_passes: int = 0
    encoded: int = 0

    @property
    def remaining(self) -> int:
        """Number of tokens that ``max_tokens`` still allows."""
        return self.max_tokens - len(self.tokens)

    def row_start(self, canvas_length: int) -> RowStart | None:
        """Return where the next canvas begins in the constraint; None without a constraint.

        Its room counts the tokens, including the end-of-text token, that fit into ``max_tokens`` and into canvases of
        this length. A free answer need not end in time: a call that is cut off is no call, and one that is cut short
        might be carried out.
        """
        if self.constraint is None:
            return None
        if self.is_free:
            return RowStart(self.constraint, _UNLIMITED)
        written = len(self.prompt_ids) + len(self.tokens)
        canvases = max(1, (self.max_positions - written) // canvas_length)
        return RowStart(self.constraint, min(self.remaining, canvases * canvas_length))

    def check_room(self, canvas_length: int) -> None:
        """Raise ``DgemmaError`` (exit code 2) when no text that matches the constraint is short enough."""
        start = self.row_start(canvas_length)
        if start is not None and start.constraint.shortest > start.room:
            raise DgemmaError(
                f"the shortest answer that matches takes {start.constraint.shortest:,} tokens; "
                f"{start.room:,} may be written",
                "Allow more tokens (max_tokens, --max-tokens), or a shorter answer.", exit_code=2,
            )

    def is_blank(self, draft: Draft) -> bool:
        """Return whether a canvas adds no text token where the answer needs one.

        An answer that has begun may end with nothing but an end-of-text id, and a constraint may allow an empty text.
        Without end-of-text ids nothing ends a text, so padding does not, either.
        """
        ids = text_ids(draft.tokens, self.config.eos_token_ids)
        may_end = bool(self.tokens) and ids[-1] in self.config.eos_token_ids
        can_be_blank = (self.constraint is None or self.is_free) and bool(self.config.eos_token_ids)
        return can_be_blank and not may_end and self.marks.issuperset(ids)

    def count_step(self, positions: int) -> None:
        """Count one denoising step over a canvas of so many positions."""
        self.steps += 1
        self.canvas_steps += 1
        self.decoded += positions

    def count_encoded(self, positions: int) -> None:
        """Count one encoder pass over so many positions of a canvas."""
        self.encoder_passes += 1
        self.encoded += positions

    def commit(self, draft: Draft, doubted: Sequence[int], is_cancelled: bool) -> Committed:
        """Append a finished canvas to the answer, cut after its first end-of-text id and at ``max_tokens``.

        ``doubted`` are canvas positions that the encoder doubts. An answer ends at a blank canvas, because a model that
        writes padding goes on with padding. One that has not ended otherwise ends here when it is cancelled.
        """
        kept = list(text_ids(draft.tokens, self.config.eos_token_ids))
        self.canvases += 1
        if kept[-1] in self.config.eos_token_ids:
            self.finish_reason = "stop"
        elif self.is_blank(draft) or len(self.prompt_ids) + len(self.tokens) + 2 * len(kept) > self.max_positions:
            self.finish_reason = "length"
        if len(kept) > self.remaining or (len(kept) == self.remaining and self.finish_reason is None):
            kept, self.finish_reason = kept[: self.remaining], "length"
        self.tokens += kept
        if self.constraint is not None:
            self.constraint.advance(kept)
        if self.finish_reason is None and is_cancelled:
            self.finish_reason = "cancelled"
        new = self.parser.feed(kept)
        if self.finish_reason is not None:
            new += self.parser.finish(is_cut=self.finish_reason != "stop")
        self.parts += new
        if self.finish_reason == "stop" and self.parts.tool_calls:
            self.finish_reason = "tool_calls"
        steps, self.canvas_steps = self.canvas_steps, 0
        kept_doubts = tuple(position for position in doubted if position < len(kept))
        self.low_confidence += draft.low_confidence
        self.doubted += len(kept_doubts)
        return Committed(
            draft.canvas, tuple(kept), new.text, new.thinking, new.tool_calls, steps, draft.settled_by, kept_doubts,
            is_last=self.finish_reason is not None,
        )  # fmt: skip

    def done(self, cached_tokens: int, prefill_seconds: float, seconds: float) -> Done:
        """Return the whole answer. ``seconds`` are those after the prefill.

        When it was cancelled between two canvases, it ends with what the parser held back, such as half a tool call.
        """
        if self.finish_reason is None:
            self.parts, self.finish_reason = self.parts + self.parser.finish(is_cut=True), "cancelled"
        count = sum(token != self.config.pad_token_id for token in self.tokens)  # as the reference counts
        statistics = Statistics(
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=cached_tokens,
            generated_tokens=count,
            canvases=self.canvases,
            denoising_steps=self.steps,
            tokens_per_forward=rate(count, self.steps),
            prefill_seconds=prefill_seconds,
            seconds=prefill_seconds + seconds,
            tokens_per_second=rate(count, seconds),
            peak_memory=mx.get_peak_memory(),
            low_confidence=self.low_confidence,
            doubted_tokens=self.doubted,
            decoded_positions=self.decoded,
            encoder_passes=self.encoder_passes,
            encoded_positions=self.encoded,
        )
        parts, tokens = self.parts, tuple(self.tokens)
        return Done(parts.text, parts.thinking, parts.tool_calls, tokens, self.finish_reason, self.seed, statistics)


def call_prefix(prompt_ids: Sequence[int], seed: int) -> str:
    """Return the beginning of the ids of an answer's tool calls: the same for the same prompt and seed."""
    digest = hashlib.sha256(",".join(map(str, [seed, *prompt_ids])).encode()).hexdigest()
    return f"call_{digest[:12]}_"
