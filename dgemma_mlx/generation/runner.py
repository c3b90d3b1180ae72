"""The outer loop: encode the prompts, denoise and commit canvas after canvas, until every answer has ended."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from contextlib import closing, nullcontext

import mlx.core as mx

from dgemma_mlx.constrain.canvas import CanvasProjection
from dgemma_mlx.diffusion.edits import Edits, Pins
from dgemma_mlx.diffusion.encoder_check import EncoderCheck
from dgemma_mlx.diffusion.sampler import Noise
from dgemma_mlx.diffusion.stopping import text_ids
from dgemma_mlx.events import Draft, Encoded, Event
from dgemma_mlx.generation.answer import Answer
from dgemma_mlx.generation.borders import repeats_words
from dgemma_mlx.generation.cancellation import Cancellation, Cancelled
from dgemma_mlx.generation.memory import Budget
from dgemma_mlx.generation.model import Model, block_length
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.prefill import prefill
from dgemma_mlx.generation.prompt_cache import LEAST_SHARED, PromptCache
from dgemma_mlx.generation.verify import MAX_REPAIRS, Reading, Verifier, repair_pins
from dgemma_mlx.generation.wired import wired_memory
from dgemma_mlx.model.cache import PrefixCache

Numbered = tuple[int, Event | Encoded]  # the number of an answer, and what happened to it
Events = Generator[Numbered, None, None]
Prefill = Generator[Numbered, None, PrefixCache]
Canvases = Generator[Numbered, None, dict[int, Draft]]  # returns the finished draft of each row


class Runner:
    """A batch of prompts, often one, that are answered together, canvas by canvas.

    Answers are numbered in the order of the prompts, and the number never changes. ``_live`` lists the numbers of the
    answers that are still being written, in the order of the rows of the prefix cache.
    """

    def __init__(
        self, model: Model, options: GenerationOptions, answers: Sequence[Answer], budget: Budget,
        prompt_cache: PromptCache | None = None,
    ) -> None:
        """``budget`` bounds the work on all prompts together. ``prompt_cache`` is for a single prompt only."""
        self._model, self._network, self._options = model, model.network, options
        self._answers, self._prompt_cache = answers, prompt_cache
        self._denoiser = options.denoiser(model)
        self._budget = budget
        self._features = model.features_of(answer.prompt_ids for answer in answers)
        self._cancellation = Cancellation(options.cancelled)
        self._live = list(range(len(answers)))
        self._noise = Noise(*(answer.seed for answer in answers))
        self._verifier: Verifier | None = None
        self._is_encoded = False  # whether the prefix cache holds the canvases that were finished last
        self._settled: set[int] = set()  # rows whose canvas the check has encoded, so that alone it would be kept
        if options.verify != "off":
            self._verifier = Verifier(self._network, self._denoiser.config.eos_token_ids)
        self._cached_tokens = 0
        self._began = self._prefilled = 0.0  # seconds on the performance counter

    def events(self) -> Events:
        """Yield an answer's number with each of its events. The last event of an answer is its ``Done``.

        After an ``Encoded`` or a ``Committed``, nothing but the prefix is kept on the device, so that another runner
        may go on in between.
        """
        mx.reset_peak_memory()
        self._began = self._prefilled = time.perf_counter()
        lease = nullcontext() if self._prompt_cache is None else self._prompt_cache.lease()
        with wired_memory(), lease:
            try:
                cache = yield from self._prefill()
                while any(self._answers[number].finish_reason is None for number in self._live):
                    self._cancellation.check()
                    drafts, readings = yield from self._canvas(cache)
                    yield from self._commit(drafts, readings)
                    cache = yield from self._continue(cache, drafts)
            except Cancelled:
                pass
        yield from self._done(self._live)  # after the lease, so that the caller may use the prompt cache at once

    def _prefill(self) -> Prefill:
        """Encode the prompts, and return the cache that holds them."""
        try:
            if self._prompt_cache is None:
                return (yield from self._prefill_batch())
            return (yield from self._prefill_one(self._prompt_cache))
        finally:
            self._prefilled = time.perf_counter()

    def _prefill_batch(self) -> Prefill:
        """Encode prompts side by side; the shorter ones are padded on the left."""
        longest = max(len(answer.prompt_ids) for answer in self._answers)
        padding = [longest - len(answer.prompt_ids) for answer in self._answers]
        rows = [[0] * pad + answer.prompt_ids for pad, answer in zip(padding, self._answers, strict=True)]
        cache = self._network.new_cache(mx.array(padding, mx.int32) if any(padding) else None)
        for _ in self._encode(rows, cache):
            yield from ((number, Encoded(cache.offset, longest)) for number in self._live)
        return cache

    def _prefill_one(self, prompt_cache: PromptCache) -> Prefill:
        """Encode what the prompt cache does not hold yet, and set the marks to which a later prompt may return."""
        ids = self._answers[0].prompt_ids
        # The encoder is asked for the token after the prompt, so the prompt's last position must be encoded here.
        cache = prompt_cache.reuse(self._network, ids, leave_last=self._verifier is not None)
        known = self._cached_tokens = cache.offset
        cache.reserve(len(ids) - known)  # once: a later, larger buffer would copy what is encoded before
        turn = max(known, self._model_turn(ids))
        shared = min(prompt_cache.shared, turn)
        if shared - known < min(LEAST_SHARED, self._budget.prefill_step_size):
            shared = known  # such a mark would save the next prompt little
        for start, end, mark in ((known, shared, "shared"), (shared, turn, "turn"), (turn, len(ids), None)):
            encoded = start
            for count in self._encode([ids[start:end]], cache):
                part, encoded = ids[encoded : encoded + count], encoded + count
                prompt_cache.append(part, mark if encoded == end else None)
                yield 0, Encoded(encoded, len(ids))
        return cache

    def _encode(self, rows: Sequence[Sequence[int]], cache: PrefixCache) -> Generator[int, None, None]:
        """Encode ids (B, P) chunk by chunk. Yield the number of positions of each chunk."""
        hidden = yield from prefill(
            self._network, rows, cache, self._budget, self._cancellation, self._features,
            wants_hidden=self._verifier is not None,
        )  # fmt: skip
        if self._verifier is not None and hidden is not None:
            self._verifier.start_after(hidden)

    def _model_turn(self, ids: Sequence[int]) -> int:
        """Return the index at which the model's turn begins. A later prompt may render this turn differently."""
        start = self._model.tokenizer.special_ids.get("<|turn>")
        return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] == start), len(ids))

    def _canvas(
        self, cache: PrefixCache
    ) -> Generator[Numbered, None, tuple[list[Draft], list[Reading] | None]]:
        """Write the next canvas of every live answer. Return its finished drafts, and what the encoder says of them."""
        attempts, check = self._noise.fork(), self._check(cache)
        before = None if check is None else cache.snapshot()
        if self._prompt_cache is not None:
            self._prompt_cache.mark("canvas")
        drafts = yield from self._attempt(cache, attempts.fork(), list(range(len(self._live))), check=check)
        self._is_encoded = check is not None and check.is_encoded
        answers = {row: self._answers[self._live[row]] for row in drafts}
        rejected = [
            row for row, draft in drafts.items()
            if draft.low_confidence or answers[row].is_blank(draft) or self._repeats(row, draft)
        ]  # fmt: skip
        self._settled = set() if check is None else {row for row in drafts if check.kept[row]} - set(rejected)
        if before is not None and self._is_encoded and (rejected or self._verifier is not None):
            cache.restore(before)
            self._is_encoded = False
        if rejected and self._denoiser.speed.reroll:
            again = yield from self._attempt(cache, attempts.fork(rejected), rejected, attempt=1)
            for row, draft in again.items():
                drafts[row] = min(drafts[row], draft, key=lambda d: (
                    answers[row].is_blank(d), d.low_confidence, self._repeats(row, d), _uncertainty(d)
                ))  # fmt: skip
        readings = None
        if self._verifier is not None:
            readings = yield from self._verify(self._verifier, cache, attempts, drafts)
            self._is_encoded = True
        return list(drafts.values()), readings

    def _repeats(self, row: int, draft: Draft) -> bool:
        """Return whether a canvas begins with the last words of the canvas before it."""
        answer = self._answers[self._live[row]]
        ids = [token for token in text_ids(draft.tokens, answer.config.eos_token_ids) if token not in answer.marks]
        return repeats_words(answer.tokens, ids, self._model.tokenizer.decode)

    def _check(self, cache: PrefixCache) -> EncoderCheck | None:
        """Return the encoder's check of the next canvases; None without one.

        Under a constraint and after pictures there is none: how well the encoder judges such answers has not been
        measured.
        """
        rule = self._denoiser.speed.check
        if rule is None or any(a.constraint is not None or a.prompt_ids.pictures for a in self._answers):
            return None
        return EncoderCheck(self._network, cache, len(self._live), self._denoiser.config.eos_token_ids, rule)

    def _attempt(
        self, cache: PrefixCache, noise: Noise, rows: list[int], attempt: int = 0, pins: Pins | None = None,
        check: EncoderCheck | None = None,
    ) -> Canvases:
        """Denoise a canvas for these rows of the batch, each of which has a row of ``noise``."""
        finished: dict[int, Draft] = {}
        index = self._answers[self._live[0]].canvases
        edits = Edits(pins=pins, projection=self._projection(rows, pins))
        if len(rows) < len(self._live):
            cache = cache.rows(rows)
        steps = self._denoiser.denoise(
            cache, noise, self._canvas_length(), edits, check=check, canvas_index=index, attempt=attempt
        )
        try:
            with closing(steps):
                for drafts in steps:
                    for row, draft in zip(rows, drafts, strict=True):
                        if row not in finished:
                            self._answers[self._live[row]].count_step(len(draft.tokens))
                            yield self._live[row], draft
                            if draft.finished:
                                finished[row] = draft
                    if len(finished) < len(rows):
                        self._cancellation.check()
        finally:  # also when it is cancelled
            if check is not None:
                for row, positions in zip(rows, check.passes, strict=True):
                    if positions:
                        self._answers[self._live[row]].count_encoded(positions)
        return {row: finished[row] for row in rows}

    def _verify(
        self, verifier: Verifier, cache: PrefixCache, attempts: Noise, drafts: dict[int, Draft]
    ) -> Generator[Numbered, None, list[Reading]]:
        """Encode the canvases, and ask what the encoder would have written at each position.

        To repair, the first token that the encoder doubts, and may replace, is replaced by its own, those before it
        stay, and the rest is denoised again, until the encoder agrees or ``MAX_REPAIRS`` are used. ``drafts`` then
        holds the repaired canvases. A repair that is cancelled leaves the cache as it was before the canvas.
        """
        rows = list(drafts)
        for repair in range(MAX_REPAIRS + 1):
            before = cache.snapshot()
            readings, hidden = verifier.read(cache, drafts.values())
            for row in rows:  # a canvas that is read again because another row's was repaired counts once
                self._answers[self._live[row]].count_encoded(len(drafts[row].tokens))
            if self._options.verify == "flag" or repair == MAX_REPAIRS:
                break
            places = {
                row: place for row, reading in zip(drafts, readings, strict=True)
                if (place := self._repair_place(row, drafts[row], reading)) is not None
            }  # fmt: skip
            if not places:
                break
            cache.restore(before)
            rows = list(places)
            pins = repair_pins([drafts[row] for row in rows], [readings[row] for row in rows], list(places.values()))
            drafts |= yield from self._attempt(cache, attempts.fork(rows), rows, 2 + repair, pins)
        verifier.start_after(hidden)
        return readings

    def _commit(self, drafts: Sequence[Draft], readings: Sequence[Reading] | None) -> Events:
        """Commit the finished canvases."""
        # Asked here as well, so that an answer that is cancelled now ends with this event and flushes its parser.
        is_cancelled = self._cancellation.requested()
        for row, (number, draft) in enumerate(zip(self._live, drafts, strict=True)):
            doubted = () if readings is None else readings[row].doubted
            yield number, self._answers[number].commit(draft, doubted, is_cancelled)

    def _done(self, numbers: Sequence[int]) -> Events:
        """Yield the ``Done`` of these answers."""
        seconds = time.perf_counter() - self._prefilled
        for number in numbers:
            yield number, self._answers[number].done(self._cached_tokens, self._prefilled - self._began, seconds)

    def _continue(
        self, cache: PrefixCache, drafts: Sequence[Draft]
    ) -> Generator[Numbered, None, PrefixCache]:
        """Leave out the answers that have ended, unless all have. Encode the canvases of the others into their cache.

        Yield the ``Done`` of the answers that are left out, and return the cache of the others.
        """
        rows = [row for row, number in enumerate(self._live) if self._answers[number].finish_reason is None]
        others = [self._live[row] for row in rows]
        if rows and len(rows) < len(self._live):
            yield from self._done([number for number in self._live if number not in others])
            self._live = others
            cache = cache.rows(rows)
            self._noise.keep(rows)
            if self._verifier is not None:
                self._verifier.keep(rows)
        if rows and not self._is_encoded:
            self._network.extend(mx.array([drafts[row].tokens for row in rows], mx.int32), cache)
            mx.async_eval(cache.state())
        if self._verifier is None:  # whose passes are counted already, as those of the check are
            for number, row in zip(others, rows, strict=True):
                if row not in self._settled:
                    self._answers[number].count_encoded(len(drafts[row].tokens))
        if self._prompt_cache is not None and (rows or self._is_encoded):
            self._prompt_cache.append(drafts[0].tokens)
        return cache

    def _repair_place(self, row: int, draft: Draft, reading: Reading) -> int | None:
        """Return the first doubted position of a canvas at which the encoder's token may stand; None without one."""
        start = self._answers[self._live[row]].row_start(self._canvas_length())
        if start is None:
            return reading.doubted[0] if reading.doubted else None
        return start.first_allowed(draft.tokens, {place: reading.expected[place] for place in reading.doubted})

    def _projection(self, rows: Sequence[int], pins: Pins | None) -> CanvasProjection | None:
        """Return the projection of the next canvas of these rows of the batch; None without a constraint."""
        starts = [self._answers[self._live[row]].row_start(self._canvas_length()) for row in rows]
        constrained = [start for start in starts if start is not None]
        return CanvasProjection(constrained, pins) if constrained else None

    def _canvas_length(self) -> int:
        """Return the length of the next canvas."""
        whole = self._model.config.canvas_length
        if not self._options.trim_canvas:
            return whole
        remaining = max(self._answers[number].remaining for number in self._live)
        return block_length(remaining, whole)


def _uncertainty(draft: Draft) -> float:
    """Return the mean entropy of a draft, in nats; infinity for NaN."""
    entropy = draft.mean_entropy
    return math.inf if math.isnan(entropy) else entropy
