"""The outer loop: prefill the prompts, denoise canvas after canvas, commit, until every answer has ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.constrain.canvas import Place, projection
from dgemma_mlx.constrain.vocabulary import TokenAutomaton
from dgemma_mlx.diffusion.denoiser import Pins, Project, denoise
from dgemma_mlx.diffusion.sampler import Noise
from dgemma_mlx.diffusion.speed import Speed
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Committed, Done, Draft, Event, FinishReason, Statistics
from dgemma_mlx.generation.prompt_cache import PromptCache
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.text.parts import Parts, PartsParser
from dgemma_mlx.text.tokenizer import Tokenizer

Verify = Literal["off", "flag", "repair"]
VERIFY: tuple[Verify, ...] = ("off", "flag", "repair")
_TRIM = 64
_REPAIRS = 8  # of a canvas: each fixes one token more than the last


@dataclass(frozen=True)
class Loop:
    """How answers are written: what all of a batch have in common."""

    config: GenerationConfig
    speed: Speed
    canvas_length: int
    positions: int
    """that the model has"""
    prefill_step_size: int
    greedy: bool = False
    trim: bool = False
    verify: Verify = "off"
    cancelled: Callable[[], bool] = lambda: False
    tokens: TokenAutomaton | None = None
    """what every answer has to match"""


@dataclass
class Answer:
    """One prompt's answer: what has been written so far, and the counts."""

    ids: list[int]
    seed: int
    max_tokens: int
    parser: PartsParser
    tokens: list[int] = field(default_factory=list)
    parts: Parts = field(default_factory=Parts)
    reason: FinishReason | None = None
    canvases: int = 0
    steps: int = 0
    canvas_steps: int = 0
    """of the canvas in work"""
    low_confidence: int = 0
    doubted: int = 0
    state: int = 0
    """of ``Loop.tokens``, behind what has been written"""

    def room(self, loop: Loop, canvas_length: int) -> int:
        """How many tokens may still be written, the end-of-text token among them, in canvases of a length."""
        written = len(self.ids) + len(self.tokens)
        canvases = max(1, (loop.positions - written) // canvas_length)
        return min(self.max_tokens - len(self.tokens), canvases * canvas_length)

    def check_room(self, loop: Loop) -> None:
        """``DgemmaError`` where nothing that matches is short enough."""
        if loop.tokens is None:
            return
        room, needed = self.room(loop, loop.canvas_length), loop.tokens.shortest[self.state]
        if needed > room:
            raise DgemmaError(
                f"the shortest answer that matches takes {needed:,} tokens; {room:,} may be written",
                "Allow more (max_tokens, --max-tokens), or a shorter answer.", exit_code=2,
            )

    def commit(self, draft: Draft, loop: Loop, doubted: Sequence[int]) -> Committed:
        """Takes over a finished canvas: cut after its first end-of-text id, and at max_tokens."""
        kept = list(_text(draft.tokens, loop.config.eos_token_ids))
        self.canvases += 1
        if kept[-1] in loop.config.eos_token_ids:
            self.reason = "stop"
        elif len(self.ids) + len(self.tokens) + 2 * len(kept) > loop.positions:
            self.reason = "length"
        room = self.max_tokens - len(self.tokens)
        if len(kept) > room or (len(kept) == room and self.reason is None):
            kept, self.reason = kept[:room], "length"
        self.tokens += kept
        if loop.tokens is not None:
            self.state = loop.tokens.advance(self.state, kept)
        if self.reason is None and loop.cancelled():
            self.reason = "cancelled"
        new = self.parser.feed(kept)
        if self.reason is not None:
            new += self.parser.finish()
        self.parts += new
        places = tuple(place for place in doubted if place < len(kept))
        steps, self.canvas_steps = self.canvas_steps, 0
        self.low_confidence += draft.settled_by is None
        self.doubted += len(places)
        return Committed(
            draft.canvas, tuple(kept), new.text, new.thinking, new.tool_calls, steps, draft.settled_by,
            draft.settled_by is None, places,
        )  # fmt: skip

    def count_step(self) -> None:
        self.steps += 1
        self.canvas_steps += 1

    def done(self, config: GenerationConfig, cached_tokens: int, prefill_seconds: float, seconds: float) -> Done:
        """The answer in one piece; ``seconds`` without those of the prefill."""
        count = sum(token != config.pad_token_id for token in self.tokens)  # as the reference counts
        statistics = Statistics(
            prompt_tokens=len(self.ids),
            cached_tokens=cached_tokens,
            generated_tokens=count,
            canvases=self.canvases,
            denoising_steps=self.steps,
            tokens_per_forward=count / self.steps if self.steps else 0.0,
            prefill_seconds=prefill_seconds,
            seconds=prefill_seconds + seconds,
            tokens_per_second=count / seconds,
            peak_memory=mx.get_peak_memory(),
            low_confidence=self.low_confidence,
            doubted_tokens=self.doubted,
        )
        parts, reason = self.parts, self.reason or "cancelled"
        return Done(parts.text, parts.thinking, parts.tool_calls, tuple(self.tokens), reason, self.seed, statistics)


@dataclass
class Final:
    """The last draft of a canvas, and what the encoder says of it."""

    draft: Draft
    expected: list[int] = field(default_factory=list)
    """the encoder's most probable token in each place (C)"""
    doubted: list[int] = field(default_factory=list)
    """places up to the end of the text where another token stands"""

    def expect(self, tokens: list[int], eos_ids: Sequence[int]) -> None:
        """Compares with what the encoder would have written."""
        self.expected = tokens
        written = enumerate(_text(self.draft.tokens, eos_ids))
        self.doubted = [place for place, token in written if token != tokens[place]]


class Run:
    """A batch of prompts (often one) that are answered together, canvas by canvas.

    The answers' numbers stay; ``_live`` are those that are still written, in the order of the cache's rows.
    """

    def __init__(
        self, network: DiffusionGemma, tokenizer: Tokenizer, loop: Loop, answers: Sequence[Answer],
        memory: PromptCache | None = None,
    ) -> None:
        """``memory`` goes with one prompt alone, and then has to be given."""
        self._network, self._loop, self._answers, self._memory = network, loop, answers, memory
        self._turn = tokenizer.special_ids.get("<|turn>")
        self._live = list(range(len(answers)))
        self._noise = Noise(*(answer.seed for answer in answers))
        self._hidden: mx.array | None = None
        """(B, 1, M) behind the last encoded position, where ``verify`` wants it"""

    def events(self) -> Iterator[tuple[int, Event]]:
        """Number of an answer, and what happens to it; the last is its ``Done``."""
        mx.reset_peak_memory()
        began = time.perf_counter()
        cache, known = self._prefill()
        prefilled = time.perf_counter()
        while self._live:
            finals = None if self._loop.cancelled() else (yield from self._canvas(cache))
            if finals is not None:
                yield from self._commit(finals)
            seconds = time.perf_counter() - prefilled
            for number in self._live:
                if finals is None or self._answers[number].reason is not None:
                    yield number, self._answers[number].done(self._loop.config, known, prefilled - began, seconds)
            if finals is None:
                return
            self._go_on(cache, finals)

    def _prefill(self) -> tuple[PrefixCache, int]:
        """The cache with all prompts in it, and how much of them had been there before."""
        if self._memory is None:
            return self._prefill_batch(), 0
        ids = self._answers[0].ids
        # The encoder is asked for what follows the prompt, so its last position has to be encoded here.
        cache = self._memory.reuse(self._network, ids, leave=self._loop.verify != "off")
        known = cache.offset
        cache.reserve(len(ids) - known)  # all at once: a part that is encoded later would have the first ones copied
        turn = max(known, _model_turn(ids, self._turn))
        shared = min(self._memory.shared, turn)
        if shared - known < self._loop.prefill_step_size:  # it would save the next prompt little
            shared = known
        for part, mark in ((ids[known:shared], "shared"), (ids[shared:turn], "turn"), (ids[turn:], None)):
            encoded = self._encode_prompt(mx.array([part], mx.int32), cache)
            self._memory.append(part[:encoded], mark if encoded else None)
            if encoded < len(part):
                break
        return cache, known

    def _prefill_batch(self) -> PrefixCache:
        """Prompts side by side, the shorter ones padded on the left."""
        longest = max(len(answer.ids) for answer in self._answers)
        padding = [longest - len(answer.ids) for answer in self._answers]
        rows = [[0] * pad + answer.ids for pad, answer in zip(padding, self._answers, strict=True)]
        cache = self._network.new_cache(mx.array(padding, mx.int32) if any(padding) else None)
        self._encode_prompt(mx.array(rows, mx.int32), cache)
        return cache

    def _encode_prompt(self, ids: mx.array, cache: PrefixCache) -> int:
        """Encodes ids (B, P) chunk by chunk; returns how many positions: all of them, if not cancelled."""
        batch, length = ids.shape
        if length == 0:
            return 0
        step = max(1, self._loop.prefill_step_size // batch)
        encoded, hidden = prefill(self._network, ids, cache, step, self._loop.cancelled)
        if self._loop.verify != "off" and hidden is not None:
            mx.eval(hidden)
            self._hidden = hidden
        return encoded

    def _canvas(self, cache: PrefixCache) -> Generator[tuple[int, Event], None, list[Final] | None]:
        """Writes the next canvas of every live answer; None where that was cancelled."""
        attempts = self._noise.fork()
        finals = yield from self._attempt(cache, attempts.fork(), range(len(self._live)))
        if finals is None:
            return None
        uncertain = [row for row, final in finals.items() if final.draft.settled_by is None]
        if uncertain and self._loop.speed.reroll:
            again = yield from self._attempt(cache, attempts.fork(), uncertain, attempt=1)
            if again is None:
                return None
            finals |= {row: min(finals[row], final, key=_doubt) for row, final in again.items()}
        if self._loop.verify != "off" and not (yield from self._verify(cache, attempts, finals)):
            return None
        return [finals[row] for row in range(len(self._live))]

    def _attempt(
        self, cache: PrefixCache, noise: Noise, rows: Sequence[int], attempt: int = 0, pins: Pins | None = None
    ) -> Generator[tuple[int, Event], None, dict[int, Final] | None]:
        """Denoises a canvas for these rows of the batch; None where that was cancelled."""
        finals: dict[int, Final] = {}
        index = self._answers[self._live[0]].canvases
        for drafts in denoise(
            self._network, cache, self._loop.config, noise, canvas_length=self._canvas_length(), canvas_index=index,
            attempt=attempt, speed=self._loop.speed, greedy=self._loop.greedy, pins=pins, project=self._projection(),
        ):  # fmt: skip
            for row in rows:
                if row not in finals:
                    self._answers[self._live[row]].count_step()
                    yield self._live[row], drafts[row]
                    if drafts[row].finished:
                        finals[row] = Final(drafts[row])
            if len(finals) == len(rows):
                break
            if self._loop.cancelled():
                return None
        return {row: finals[row] for row in rows}

    def _projection(self) -> Project | None:
        """Of the next canvas of all live answers onto what they have to match."""
        if self._loop.tokens is None:
            return None
        length, answers = self._canvas_length(), [self._answers[number] for number in self._live]
        places = [Place(answer.state, answer.room(self._loop, length)) for answer in answers]
        return partial(projection, self._loop.tokens, places)

    def _verify(
        self, cache: PrefixCache, attempts: Noise, finals: dict[int, Final]
    ) -> Generator[tuple[int, Event], None, bool]:
        """Encodes the canvases, and asks what the encoder would have written in each place, given all before it.

        To repair, the first token that it doubts gives way to its own, those before stay, and the rest is denoised
        again, until it agrees or ``_REPAIRS`` are used up. False where that was cancelled; then nothing was encoded.
        """
        for repair in range(_REPAIRS + 1):
            before = cache.snapshot()
            canvases = mx.array([final.draft.tokens for final in finals.values()], mx.int32)
            hidden = self._network.encode(canvases, cache)
            assert self._hidden is not None
            behind = mx.concatenate([self._hidden, hidden[:, :-1]], axis=1)
            expected: Any = mx.argmax(self._network.project(behind), axis=-1).tolist()
            for final, tokens in zip(finals.values(), expected, strict=True):
                final.expect(tokens, self._loop.config.eos_token_ids)
            doubtful = [row for row, final in finals.items() if final.doubted]
            if self._loop.verify == "flag" or not doubtful or repair == _REPAIRS:
                break
            cache.restore(before)
            pins = _repairs(list(finals.values()))
            again = yield from self._attempt(cache, attempts.fork(), doubtful, 2 + repair, pins)
            if again is None:
                return False
            finals |= again
        self._hidden = hidden[:, -1:]
        return True

    def _commit(self, finals: list[Final]) -> Iterator[tuple[int, Event]]:
        for number, final in zip(self._live, finals, strict=True):
            yield number, self._answers[number].commit(final.draft, self._loop, final.doubted)

    def _go_on(self, cache: PrefixCache, finals: list[Final]) -> None:
        """Leaves out the answers that have ended, and encodes the canvases of the others."""
        rows = [row for row, number in enumerate(self._live) if self._answers[number].reason is None]
        encoded = self._loop.verify != "off"
        if rows and len(rows) < len(self._live):
            cache.keep(rows)
            self._noise.keep(rows)
            self._hidden = None if self._hidden is None else self._hidden[mx.array(rows)]
        if rows and not encoded:
            self._network.encode(mx.array([finals[row].draft.tokens for row in rows], mx.int32), cache)
        if self._memory is not None and (rows or encoded):
            self._memory.append(finals[0].draft.tokens, mark="canvas")
        self._live = [self._live[row] for row in rows]

    def _canvas_length(self) -> int:
        """Of the next canvas. One that is trimmed has whole blocks of 64: with fewer positions, experts that are
        chosen by few of them leave MLX's fast path."""
        whole = self._loop.canvas_length
        left = max(answer.max_tokens - len(answer.tokens) for answer in (self._answers[n] for n in self._live))
        return min(whole, -(-left // _TRIM) * _TRIM) if self._loop.trim else whole


def prefill(
    network: DiffusionGemma, ids: mx.array, cache: PrefixCache, step_size: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[int, mx.array | None]:
    """Encodes prompts (B, P) into the cache chunk by chunk, freeing what each chunk needed on the way.

    Returns how many positions were encoded, all of them if not ``cancelled``, and the hidden state (B, 1, M) of the
    last, not evaluated; None without any.
    """
    cache.reserve(ids.shape[1])
    hidden = None
    for start in range(0, ids.shape[1], step_size):
        if cancelled():
            return start, hidden
        hidden = network.encode(ids[:, start : start + step_size], cache)[:, -1:]
        mx.eval(cache.state())
        mx.clear_cache()
    return ids.shape[1], hidden


def _text(canvas: Sequence[int], eos_ids: Sequence[int]) -> Sequence[int]:
    """The canvas up to its first end-of-text id, which is kept."""
    end = next((place for place, token in enumerate(canvas) if token in eos_ids), len(canvas))
    return canvas[: end + 1]


def _doubt(final: Final) -> tuple[bool, float]:
    """Less is better."""
    entropy = final.draft.mean_entropy
    return final.draft.settled_by is None, math.inf if math.isnan(entropy) else entropy


def _repairs(finals: list[Final]) -> Pins:
    """What stays of each canvas, with the encoder's token where it has its first doubt; of one without, all."""
    ids, free = [], []
    for final in finals:
        tokens = list(final.draft.tokens)
        first = final.doubted[0] if final.doubted else len(tokens)
        tokens[first : first + 1] = final.expected[first : first + 1]
        ids.append(tokens)
        free.append([place > first for place in range(len(tokens))])
    return Pins(mx.array(ids, mx.int32), mx.array(free))


def _model_turn(ids: Sequence[int], start: int | None) -> int:
    """Where the last turn begins, the one that the model is to write: the next prompt may differ from there."""
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] == start), len(ids))
