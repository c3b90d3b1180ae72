"""The two halves of a request: what needs no network (``ask``), and the work on the network (``begin``).

``stream`` and ``generate_batch`` run one after the other. A server runs the first half on any thread, so that a request
is refused before anything is encoded, and while another one is answered.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple

from dgemma_mlx.checks import check_count, check_seed
from dgemma_mlx.constrain.canvas import ConstraintState
from dgemma_mlx.generation.answer import Answer, call_prefix
from dgemma_mlx.generation.memory import Work, fit_to_memory
from dgemma_mlx.generation.model import Model, ModelText
from dgemma_mlx.generation.options import GenerationOptions, Held
from dgemma_mlx.generation.pictures import PromptIds, most_patches
from dgemma_mlx.generation.prompt_cache import PromptCache
from dgemma_mlx.generation.runner import Runner
from dgemma_mlx.text.images import Image
from dgemma_mlx.text.messages import Message
from dgemma_mlx.text.parts import PartsParser
from dgemma_mlx.text.tools import Tool, ToolChoice


class Asked(NamedTuple):
    """An encoded prompt, and what its answer is held to.

    Attributes:
        ids: Ids of the prompt, with its pictures.
        held: What the answer is held to; None when it is free.
        reads_calls: Whether the answer may hold calls.
    """

    ids: PromptIds
    held: Held | None
    reads_calls: bool


def ask(
    model: ModelText, prompt: str | Sequence[Message], options: GenerationOptions, system: str | None, thinking: bool,
    raw: bool, tools: Sequence[Tool] | None, tool_choice: ToolChoice | None, images: Sequence[Image] | None = None,
) -> Asked:
    """Encode a prompt. Raises ``DgemmaError`` for arguments that exclude each other."""
    ids = model.encode_prompt(
        prompt, system=system, thinking=thinking, raw=raw, tools=tools, tool_choice=tool_choice, images=images
    )
    return Asked(ids, options.held(model, tools, tool_choice, thinking), tool_choice != "none")


def new_answer(
    model: ModelText, asked: Asked, seed: int | None, max_tokens: int, options: GenerationOptions
) -> Answer:
    """Return an answer of which nothing is written yet. A seed of None draws one.

    Raises ``DgemmaError`` for a seed or a number of tokens out of range, a prompt that leaves no room, and when no text
    that matches the constraint is short enough.
    """
    model.check_prompt(asked.ids)
    check_count("max_tokens", max_tokens)
    check_seed(seed)
    config = options.config(model)
    marks = frozenset((*model.tokenizer.special_ids.values(), config.pad_token_id, *config.eos_token_ids))
    drawn = secrets.randbits(32) if seed is None else seed
    answer = Answer(
        asked.ids, drawn, max_tokens, model.config.text.max_position_embeddings, config,
        PartsParser(model.tokenizer, call_prefix(asked.ids, drawn), reads_calls=asked.reads_calls), marks,
        None if asked.held is None else ConstraintState.first(asked.held.machine),
        is_free=asked.held is not None and asked.held.is_free,
    )  # fmt: skip
    answer.check_room(model.config.canvas_length)
    return answer


def begin(
    model: Model, prompts: Sequence[Asked], seeds: Sequence[int | None], max_tokens: Sequence[int],
    options: GenerationOptions, prompt_cache: PromptCache | None = None,
) -> Runner:
    """Return a runner over encoded prompts whose arguments are checked, with nothing of the work done yet."""
    answers = [
        new_answer(model, asked, seed, limit, options)
        for asked, seed, limit in zip(prompts, seeds, max_tokens, strict=True)
    ]
    patches = most_patches(asked.ids for asked in prompts)
    work = Work(len(prompts), verifies=options.asks_encoder, patches=patches)
    longest = max(len(asked.ids) for asked in prompts)
    budget = fit_to_memory(model, longest, work, options.memory_limit, options.prefill_step_size)
    return Runner(model, options, answers, budget, prompt_cache)
