"""The outer loop: prefill the prompt, denoise canvas after canvas, commit, until the text ends."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.config import GenerationConfig, ModelConfig
from dgemma_mlx.diffusion.speed import SPEEDS
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done, Event
from dgemma_mlx.hub import resolve
from dgemma_mlx.model.adapter_file import load_adapter
from dgemma_mlx.model.dequantize import dequantize, should_dequantize
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.memory import Budget, fitting_budget
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.options import Options, check_count, check_seed
from dgemma_mlx.prompt_cache import PromptCache
from dgemma_mlx.run import Answer, Loop, Run
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
        after a beginning-of-text id when ``raw``; a list holds the messages of a conversation. ``DgemmaError`` for
        anything else."""
        if raw:
            if not isinstance(prompt, str) or system is not None:
                raise DgemmaError("a raw prompt is one text", "It goes without messages and a system prompt.", 2)
            ids = self.tokenizer.encode(prompt)
            return ids if self.tokenizer.bos_id is None else [self.tokenizer.bos_id, *ids]
        if not isinstance(prompt, (str, Sequence)):
            raise DgemmaError(f"no prompt: {prompt!r}", "It is a text, or a list of messages.", exit_code=2)
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
    ``DgemmaError`` where there is no such model or adapter, or its files are not whole.
    """
    if dtype is not None and not mx.issubdtype(dtype, mx.floating):
        raise DgemmaError(f"dtype must be a floating one, not {dtype}", "mlx.core.bfloat16, say.", exit_code=2)
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
    chosen = Options(**options)
    chosen.check_thinking(thinking)
    ids = model.encode_prompt(prompt, system=system, thinking=thinking, raw=raw)
    run = _run(model, [ids], [seed], [max_tokens], chosen, prompt_cache or PromptCache())
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

    ``max_tokens`` and ``system`` may be one for all or one for each, else that is a ``DgemmaError``. Takes ``Options``
    without ``trim_canvas``, which would give the answers other texts than alone.
    """
    if isinstance(prompts, str):
        raise DgemmaError("prompts must be several", "One prompt goes to generate().", exit_code=2)
    if not prompts:
        return []
    if options.get("trim_canvas") and len(prompts) > 1:
        raise DgemmaError("trim_canvas goes with one prompt at a time", "Leave it out.", exit_code=2)
    count = len(prompts)
    most = max_tokens if isinstance(max_tokens, Sequence) else [max_tokens] * count
    systems = [system] * count if system is None or isinstance(system, str) else system
    seeds = [None] * count if seeds is None else seeds
    for name, values in (("max_tokens", most), ("seeds", seeds), ("system", systems)):
        if len(values) != count:
            raise DgemmaError(
                f"{name} must be one for each of {count} prompts, not {len(values)}", "None leaves them out.", 2
            )
    chosen = Options(**options)
    chosen.check_thinking(thinking)
    ids = [
        model.encode_prompt(prompt, system=own, thinking=thinking, raw=raw)
        for prompt, own in zip(prompts, systems, strict=True)
    ]
    run = _run(model, ids, seeds, most, chosen)
    done = {number: event for number, event in run.events() if isinstance(event, Done)}
    return [done[number] for number in range(count)]


def _run(
    model: Model, prompts: Sequence[list[int]], seeds: Sequence[int | None], max_tokens: Sequence[int],
    options: Options, memory: PromptCache | None = None,
) -> Run:
    """A checked run over encoded prompts, nothing of it done yet."""
    for most, seed in zip(max_tokens, seeds, strict=True):
        check_count("max_tokens", most)
        check_seed(seed)
    config = options.config(model)
    for ids in prompts:
        check_prompt(model, ids)
    budget = budget_for(model, len(prompts) * max(map(len, prompts)), options.memory_limit)
    loop = Loop(
        config, SPEEDS[options.speed], model.config.canvas_length, model.config.text.max_position_embeddings,
        options.prefill_step_size or budget.prefill_step_size, greedy=options.temp == 0, trim=options.trim_canvas,
        verify=options.verify, cancelled=options.cancelled, tokens=options.tokens(model, config),
    )  # fmt: skip
    answers = [
        Answer(ids, secrets.randbits(32) if seed is None else seed, most, PartsParser(model.tokenizer))
        for ids, seed, most in zip(prompts, seeds, max_tokens, strict=True)
    ]
    for answer in answers:
        answer.check_room(loop)
    return Run(model.network, model.tokenizer, loop, answers, memory)


def budget_for(model: Model, positions: int, limit: int | None) -> Budget:
    """What may be worked on at a time, also noted in the network: ``DgemmaError`` where ``limit`` is too low."""
    parameters: Any = tree_flatten(model.network.parameters())  # type: ignore[no-untyped-call]
    weights = sum(array.nbytes for _, array in parameters)
    budget = fitting_budget(model.config, weights, positions, limit)
    budget.apply(model.network)
    return budget


def check_prompt(model: Model, ids: Sequence[int]) -> None:
    """``DgemmaError`` where there is no prompt, or no room for a canvas behind it."""
    if not ids:
        raise DgemmaError("the prompt is empty", "Say what you want to know.", exit_code=2)
    limit = model.config.text.max_position_embeddings
    if len(ids) + model.config.canvas_length > limit:
        raise DgemmaError(
            f"the prompt has {len(ids):,} tokens; with a canvas of {model.config.canvas_length} "
            f"the model's limit of {limit:,} positions is passed",
            "Shorten the prompt.",
        )
