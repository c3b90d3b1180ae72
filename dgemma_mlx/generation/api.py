"""The outer loop: prefill the prompt, denoise canvas after canvas, commit, until the text ends."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig, ModelConfig
from dgemma_mlx.checkpoint.hub import resolve
from dgemma_mlx.checks import check_count, check_seed
from dgemma_mlx.diffusion.speed import SPEEDS
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done, Event
from dgemma_mlx.generation.memory import fit_to_memory, should_dequantize
from dgemma_mlx.generation.model import Message, Model
from dgemma_mlx.generation.options import Options
from dgemma_mlx.generation.prompt_cache import PromptCache
from dgemma_mlx.generation.runner import Answer, Loop, Run
from dgemma_mlx.model.adapter_file import load_adapter
from dgemma_mlx.model.dequantize import dequantize, dequantized_bytes
from dgemma_mlx.model.load import load_model
from dgemma_mlx.text.parts import PartsParser
from dgemma_mlx.text.tokenizer import load_tokenizer

DEFAULT_MAX_TOKENS = 1024


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
    if should_dequantize(dequantized_bytes(network), cpu_dequantize):
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
        model.check_prompt(ids)
    budget = fit_to_memory(model, len(prompts) * max(map(len, prompts)), options.memory_limit)
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
