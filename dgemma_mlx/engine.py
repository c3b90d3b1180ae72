"""The outer loop: prefill the prompt, denoise canvas after canvas, commit, until the text ends."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.config import GenerationConfig, ModelConfig
from dgemma_mlx.diffusion.speed import DEFAULT_SPEED, SPEEDS
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done, Event
from dgemma_mlx.hub import resolve
from dgemma_mlx.model.adapter_file import load_adapter
from dgemma_mlx.model.dequantize import dequantize, should_dequantize
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.memory import Budget, fitting_budget
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.prompt_cache import PromptCache
from dgemma_mlx.run import VERIFY, Answer, Loop, Run, Verify
from dgemma_mlx.text.chat import ChatTemplate, encode_chat
from dgemma_mlx.text.parts import PartsParser
from dgemma_mlx.text.tokenizer import Tokenizer, load_tokenizer

Message = Mapping[str, Any]
DEFAULT_MAX_TOKENS = 1024


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
    adapter: Path | None = None
    """the folder of the adapter that the network has"""

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
    model: str | Path | None = None, *, dtype: mx.Dtype | None = None, cpu_dequantize: str = "auto",
    adapter: str | Path | None = None,
) -> Model:
    """Opens a checkpoint: a folder, a Hub id ``owner/name[@revision]``, ``demo``, or None for the default.

    Weights are read when they are first used. ``dtype`` is that of ``load_model``. ``cpu_dequantize`` says whether
    packed weights are unpacked where there is no Metal, "on" or "off"; "auto" unpacks them where that takes no more
    than half of the free memory. ``adapter`` is a folder that ``dgemma-mlx train`` (or PEFT, or mlx_lm) has written.
    """
    checkpoint = resolve(None if model is None else str(model))
    config = ModelConfig.load(checkpoint.folder)
    network, weights = load_model(checkpoint.folder, config, dtype)
    if should_dequantize(network, cpu_dequantize):
        dequantize(network)
    folder = None if adapter is None else Path(adapter).expanduser()
    if folder is not None:
        canvas_length = load_adapter(network, folder).canvas_length
        config = config if canvas_length is None else replace(config, canvas_length=canvas_length)
    return Model(
        name=checkpoint.name,
        folder=checkpoint.folder,
        config=config,
        generation=GenerationConfig.load(checkpoint.folder, config),
        network=network,
        tokenizer=load_tokenizer(checkpoint.folder),
        vision=weights.vision,
        adapter=folder,
    )


def generate(model: Model, prompt: str | Sequence[Message], **options: Any) -> Done:
    """The whole answer in one piece. Takes what ``stream`` takes."""
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
    system: str | None = None,
    thinking: bool = False,
    raw: bool = False,
    prompt_cache: PromptCache | None = None,
    **options: Any,
) -> Iterator[Event]:
    """Generates an answer; yields a ``Draft`` a denoising step, a ``Committed`` a canvas, at last a ``Done``.

    One ``seed`` gives one text on one machine; None draws one, which ``Done`` tells. A ``prompt_cache`` that is handed
    on from call to call saves encoding what the prompts have in common. ``options`` are those of ``Options``. To
    cancel, stop iterating: the work is done step by step; or let ``cancelled`` return True, then the ``Done`` of the
    committed canvases comes next.
    """
    ids = model.encode_prompt(prompt, system=system, thinking=thinking, raw=raw)
    run = _run(model, [ids], [seed], [max_tokens], Options(**options), prompt_cache or PromptCache())
    return (event for _, event in run.events())


def generate_batch(
    model: Model,
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_tokens: int | Sequence[int] = DEFAULT_MAX_TOKENS,
    seeds: Sequence[int | None] | None = None,
    system: str | Sequence[str | None] | None = None,
    thinking: bool = False,
    raw: bool = False,
    **options: Any,
) -> list[Done]:
    """Answers several prompts at once, each as it would be alone with its seed, but for rounding.

    ``max_tokens`` and ``system`` may be one for all or one for each. Takes ``Options`` without ``trim_canvas``, which
    would give the answers other texts than alone.
    """
    if not prompts:
        return []
    if options.get("trim_canvas") and len(prompts) > 1:
        raise DgemmaError("trim_canvas goes with one prompt at a time", "Leave it out.", exit_code=2)
    count = len(prompts)
    most = [max_tokens] * count if isinstance(max_tokens, int) else max_tokens
    systems = [system] * count if system is None or isinstance(system, str) else system
    seeds = [None] * count if seeds is None else seeds
    for name, values in (("max_tokens", most), ("seeds", seeds), ("system", systems)):
        if len(values) != count:
            raise DgemmaError(f"{name} must be one for each of {count} prompts, not {len(values)}", exit_code=2)
    ids = [
        model.encode_prompt(prompt, system=own, thinking=thinking, raw=raw)
        for prompt, own in zip(prompts, systems, strict=True)
    ]
    run = _run(model, ids, seeds, most, Options(**options))
    done = {number: event for number, event in run.events() if isinstance(event, Done)}
    return [done[number] for number in range(count)]


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

    def __post_init__(self) -> None:
        if self.prefill_step_size is not None and self.prefill_step_size < 1:
            raise DgemmaError(f"prefill_step_size must be at least 1, not {self.prefill_step_size}", exit_code=2)
        for name, value, choices in (("speed", self.speed, tuple(SPEEDS)), ("verify", self.verify, VERIFY)):
            if value not in choices:
                raise DgemmaError(f"{name} must be one of {', '.join(choices)}, not {value!r}", exit_code=2)

    def config(self, model: Model) -> GenerationConfig:
        """The parameters in force."""
        config = self.generation or model.generation
        constant = self.temp is not None and self.temp != 0
        return config.override(t_min=self.temp, t_max=self.temp) if constant else config


def _run(
    model: Model, prompts: Sequence[list[int]], seeds: Sequence[int | None], max_tokens: Sequence[int],
    options: Options, memory: PromptCache | None = None,
) -> Run:
    """A checked run over encoded prompts, nothing of it done yet."""
    for most in max_tokens:
        if most < 1:
            raise DgemmaError(f"max_tokens must be at least 1, not {most}", exit_code=2)
    config = options.config(model)
    for ids in prompts:
        _check_length(model, ids)
    budget = _budget(model, len(prompts) * max(map(len, prompts)), options.memory_limit)
    loop = Loop(
        config, SPEEDS[options.speed], model.config.canvas_length, model.config.text.max_position_embeddings,
        options.prefill_step_size or budget.prefill_step_size, greedy=options.temp == 0, trim=options.trim_canvas,
        verify=options.verify, cancelled=options.cancelled,
    )  # fmt: skip
    answers = [
        Answer(ids, secrets.randbits(32) if seed is None else seed, most, PartsParser(model.tokenizer))
        for ids, seed, most in zip(prompts, seeds, max_tokens, strict=True)
    ]
    return Run(model.network, model.tokenizer, loop, answers, memory)


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
