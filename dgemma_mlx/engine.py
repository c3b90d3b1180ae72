"""The outer loop: prefill the prompt, denoise canvas after canvas, commit, until the text ends."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.config import GenerationConfig, ModelConfig
from dgemma_mlx.diffusion.denoise import denoise
from dgemma_mlx.diffusion.sampler import Noise
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Committed, Done, Draft, Event, FinishReason, Statistics
from dgemma_mlx.hub import resolve
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.dequantize import dequantize, should_dequantize
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.memory import Budget, fitting_budget
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.prompt_cache import PromptCache
from dgemma_mlx.text.chat import ChatTemplate, encode_chat
from dgemma_mlx.text.parts import Parts, PartsParser
from dgemma_mlx.text.tokenizer import Tokenizer, load_tokenizer

Message = Mapping[str, Any]
DEFAULT_MAX_TOKENS = 1024
_TRIM = 64


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint: everything generation needs. Made by ``load``."""

    name: str
    folder: Path
    config: ModelConfig
    generation: GenerationConfig
    network: DiffusionGemma
    tokenizer: Tokenizer
    vision: Mapping[str, mx.array]
    """the vision tower's tensors under their published names, not used yet"""

    def encode_prompt(
        self, prompt: str | Sequence[Message], *, system: str | None = None, thinking: bool = False, raw: bool = False
    ) -> list[int]:
        """Prompt -> ids (P). A string is one user turn of the checkpoint's chat template, or plain text
        after a beginning-of-text id when ``raw``; a list holds the messages of a conversation."""
        if raw:
            if not isinstance(prompt, str) or system is not None:
                raise DgemmaError("a raw prompt is one text, without a system prompt", exit_code=2)
            ids = self.tokenizer.encode(prompt)
            return ids if self.tokenizer.bos_id is None else [self.tokenizer.bos_id, *ids]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        return encode_chat(self.tokenizer, self.template, messages, enable_thinking=thinking)

    @cached_property
    def template(self) -> ChatTemplate:
        """The checkpoint's chat template, read when it is first needed: a raw prompt needs none."""
        return ChatTemplate.load(self.folder)


def load(
    model: str | Path | None = None, *, dtype: mx.Dtype | None = None, cpu_dequantize: str = "auto"
) -> Model:
    """Opens a checkpoint: a folder, a Hub id ``owner/name[@revision]``, ``demo``, or None for the default.

    Weights are read when they are first used. ``dtype`` is that of ``load_model``. ``cpu_dequantize`` says whether
    packed weights are unpacked where there is no Metal, "on" or "off"; "auto" unpacks them where that takes no more
    than half of the free memory.
    """
    checkpoint = resolve(None if model is None else str(model))
    config = ModelConfig.load(checkpoint.folder)
    network, weights = load_model(checkpoint.folder, config, dtype)
    if should_dequantize(network, cpu_dequantize):
        dequantize(network)
    return Model(
        name=checkpoint.name,
        folder=checkpoint.folder,
        config=config,
        generation=GenerationConfig.load(checkpoint.folder, config),
        network=network,
        tokenizer=load_tokenizer(checkpoint.folder),
        vision=weights.vision,
    )


def generate(model: Model, prompt: str | Sequence[Message], **options: Any) -> Done:
    """The whole answer in one piece. Takes the options of ``stream``."""
    for event in stream(model, prompt, **options):
        if isinstance(event, Done):
            return event
    raise AssertionError("stream() ends with Done")


def stream(
    model: Model,
    prompt: str | Sequence[Message],
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    seed: int | None = None,
    temp: float | None = None,
    system: str | None = None,
    thinking: bool = False,
    raw: bool = False,
    generation: GenerationConfig | None = None,
    trim_canvas: bool = False,
    prefill_step_size: int | None = None,
    memory_limit: int | None = None,
    prompt_cache: PromptCache | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Generates an answer; yields a ``Draft`` a denoising step, a ``Committed`` a canvas, at last a ``Done``.

    One ``seed`` gives one text on one machine; None draws one, which ``Done`` tells. ``temp`` 0 takes the
    most probable tokens as denoiser canvas, another value replaces the temperature schedule by a constant.
    ``generation`` replaces the checkpoint's parameters. ``trim_canvas`` makes the last canvas no longer than
    ``max_tokens`` leaves to write (a multiple of 64): less work, another text. ``memory_limit`` in bytes, by default
    the device's, bounds what is worked on at a time; ``prefill_step_size`` sets outright how many positions of the
    prompt are encoded at once. A ``prompt_cache`` that is handed on from call to call saves encoding what the prompts
    have in common. To cancel, stop iterating: the work is done step by step; or let ``cancelled`` return True, then the
    ``Done`` of the committed canvases comes next.
    """
    if max_tokens < 1:
        raise DgemmaError(f"max_tokens must be at least 1, not {max_tokens}", exit_code=2)
    if prefill_step_size is not None and prefill_step_size < 1:
        raise DgemmaError(f"prefill_step_size must be at least 1, not {prefill_step_size}", exit_code=2)
    config = generation or model.generation
    if temp is not None and temp != 0:
        config = config.override(t_min=temp, t_max=temp)
    ids = model.encode_prompt(prompt, system=system, thinking=thinking, raw=raw)
    _check_length(model, ids)
    budget = _budget(model, len(ids), memory_limit)
    run = _Run(
        model, config, secrets.randbits(32) if seed is None else seed, greedy=temp == 0,
        trim=trim_canvas, memory=prompt_cache or PromptCache(), cancelled=cancelled,
    )  # fmt: skip
    return run.events(ids, max_tokens, prefill_step_size or budget.prefill_step_size)


def prefill(
    network: DiffusionGemma, ids: Sequence[int], cache: PrefixCache, step_size: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> int:
    """Encodes a prompt into the cache chunk by chunk, freeing what each chunk needed on the way.

    Returns how many ids were encoded: all of them, if not ``cancelled``.
    """
    cache.reserve(len(ids))
    for start in range(0, len(ids), step_size):
        if cancelled():
            return start
        network.encode(mx.array([ids[start : start + step_size]], mx.int32), cache)
        mx.eval(cache.state())
        mx.clear_cache()
    return len(ids)


def _model_turn(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """Where the last turn begins, the one that the model is to write: the next prompt may differ from there."""
    start = tokenizer.special_ids.get("<|turn>")
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] == start), len(ids))


def _budget(model: Model, positions: int, limit: int | None) -> Budget:
    """What may be worked on at a time, also noted in the network: ``DgemmaError`` where ``limit`` is too low."""
    parameters: Any = tree_flatten(model.network.parameters())  # type: ignore[no-untyped-call]
    weights = sum(array.nbytes for _, array in parameters)
    budget = fitting_budget(model.config, weights, positions, limit)
    budget.apply(model.network)
    return budget


def _check_length(model: Model, ids: Sequence[int]) -> None:
    if not ids:
        raise DgemmaError("the prompt is empty", "Say what you want to know.", exit_code=2)
    limit = model.config.text.max_position_embeddings
    if len(ids) + model.config.canvas_length > limit:
        raise DgemmaError(
            f"the prompt has {len(ids):,} tokens; with a canvas of {model.config.canvas_length} "
            f"the model's limit of {limit:,} positions is passed",
            "Shorten the prompt.",
        )


@dataclass
class _Run:
    """One generation: what has been written so far, and the counts."""

    model: Model
    config: GenerationConfig
    seed: int
    greedy: bool
    trim: bool
    memory: PromptCache
    cancelled: Callable[[], bool]
    tokens: list[int] = field(default_factory=list)
    parts: Parts = field(default_factory=Parts)
    canvases: int = 0
    steps: int = 0

    def events(self, ids: list[int], max_tokens: int, prefill_step_size: int) -> Iterator[Event]:
        network, noise = self.model.network, Noise(self.seed)
        length = self._canvas_length(max_tokens)
        room = self.model.config.text.max_position_embeddings
        parser = PartsParser(self.model.tokenizer)
        mx.reset_peak_memory()
        began = time.perf_counter()
        cache = self.memory.reuse(network, ids)
        known = cache.offset
        self._prefill(ids, cache, prefill_step_size)
        prefilled = time.perf_counter()
        reason: FinishReason | None = "cancelled" if self.cancelled() else None
        while reason is None:
            draft: Draft | None = None
            for (draft,) in denoise(
                network, cache, self.config, noise, canvas_length=length, canvas_index=self.canvases, greedy=self.greedy
            ):
                self.steps += 1
                yield draft
                if self.cancelled():
                    break
            assert draft is not None
            if not draft.finished:
                reason = "cancelled"
                break
            kept, reason = self._commit(draft, max_tokens, fits=cache.offset + 2 * length <= room)
            if reason is None and self.cancelled():
                reason = "cancelled"
            new = parser.feed(kept)
            if reason is not None:
                new += parser.finish()
            self.parts += new
            yield Committed(draft.canvas, tuple(kept), new.text, new.thinking, new.tool_calls, draft.step)
            if reason is None:
                network.encode(mx.array([draft.tokens], mx.int32), cache)
                self.memory.append(draft.tokens, mark="canvas")
                length = self._canvas_length(max_tokens)
        yield self._done(reason, len(ids), known, prefilled - began, time.perf_counter() - prefilled)

    def _canvas_length(self, max_tokens: int) -> int:
        """Of the next canvas. One that is trimmed has whole blocks of 64: with fewer positions, experts that are
        chosen by few of them leave MLX's fast path."""
        whole = self.model.config.canvas_length
        left = max_tokens - len(self.tokens)
        return min(whole, -(-left // _TRIM) * _TRIM) if self.trim else whole

    def _prefill(self, ids: list[int], cache: PrefixCache, step_size: int) -> None:
        """Encodes what the cache does not hold of the prompt, with a mark where the model's turn begins."""
        known = cache.offset
        turn = max(known, _model_turn(ids, self.model.tokenizer))
        for part, mark in ((ids[known:turn], "turn"), (ids[turn:], None)):
            encoded = prefill(self.model.network, part, cache, step_size, self.cancelled)
            self.memory.append(part[:encoded], mark if encoded else None)
            if encoded < len(part):
                return

    def _commit(self, draft: Draft, max_tokens: int, fits: bool) -> tuple[list[int], FinishReason | None]:
        """Cuts a finished canvas after its first end-of-text id, and at max_tokens."""
        kept = list(draft.tokens)
        reason: FinishReason | None = None if fits else "length"
        ends = [i for i, token in enumerate(kept) if token in self.config.eos_token_ids]
        if ends:
            kept, reason = kept[: ends[0] + 1], "stop"
        room = max_tokens - len(self.tokens)
        if len(kept) > room or (len(kept) == room and reason is None):
            kept, reason = kept[:room], "length"
        self.tokens += kept
        self.canvases += 1
        return kept, reason

    def _done(
        self, reason: FinishReason, prompt_tokens: int, cached_tokens: int, prefill_seconds: float, seconds: float
    ) -> Done:
        count = sum(token != self.config.pad_token_id for token in self.tokens)  # as the reference counts
        statistics = Statistics(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            generated_tokens=count,
            canvases=self.canvases,
            denoising_steps=self.steps,
            tokens_per_forward=count / self.steps if self.steps else 0.0,
            prefill_seconds=prefill_seconds,
            seconds=prefill_seconds + seconds,
            tokens_per_second=count / seconds,
            peak_memory=mx.get_peak_memory(),
        )
        parts = self.parts
        return Done(
            parts.text, parts.thinking, parts.tool_calls, tuple(self.tokens), reason, self.seed, statistics
        )
