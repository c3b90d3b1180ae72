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
from dgemma_mlx.generation.prompt_cache import PromptCache
from dgemma_mlx.generation.runner import Runner
from dgemma_mlx.text.messages import Message
from dgemma_mlx.text.parts import PartsParser
from dgemma_mlx.text.tools import Tool, ToolChoice


class Asked(NamedTuple):
    """An encoded prompt, and what its answer is held to.

    Attributes:
        ids: Ids of the prompt.
        held: What the answer is held to; None when it is free.
        reads_calls: Whether the answer may hold calls.
    """

    ids: list[int]
    held: Held | None
    reads_calls: bool


def ask(
    model: ModelText, prompt: str | Sequence[Message], options: GenerationOptions, system: str | None, thinking: bool,
    raw: bool, tools: Sequence[Tool] | None, tool_choice: ToolChoice | None,
) -> Asked:
    """Encode a prompt. Raises ``DgemmaError`` for arguments that exclude each other."""
    ids = model.encode_prompt(
        prompt, system=system, thinking=thinking, raw=raw, tools=tools, tool_choice=tool_choice
    )
    return Asked(ids, options.held(model, tools, tool_choice, thinking), tool_choice != "none")


def begin(
    model: Model, prompts: Sequence[Asked], seeds: Sequence[int | None], max_tokens: Sequence[int],
    options: GenerationOptions, prompt_cache: PromptCache | None = None,
) -> Runner:
    """Return a runner over encoded prompts whose arguments are checked, with nothing of the work done yet."""
    for limit, seed in zip(max_tokens, seeds, strict=True):
        check_count("max_tokens", limit)
        check_seed(seed)
    config = options.config(model)
    for asked in prompts:
        model.check_prompt(asked.ids)
    work = Work(len(prompts), verifies=options.verify != "off")
    longest = max(len(asked.ids) for asked in prompts)
    budget = fit_to_memory(model, longest, work, options.memory_limit, options.prefill_step_size)
    marks = frozenset((*model.tokenizer.special_ids.values(), config.pad_token_id, *config.eos_token_ids))
    drawn = [secrets.randbits(32) if seed is None else seed for seed in seeds]
    answers = [
        Answer(
            asked.ids, seed, limit, model.config.text.max_position_embeddings, config,
            PartsParser(model.tokenizer, call_prefix(asked.ids, seed), reads_calls=asked.reads_calls), marks,
            None if asked.held is None else ConstraintState.first(asked.held.machine),
            is_free=asked.held is not None and asked.held.is_free,
        )
        for asked, seed, limit in zip(prompts, drawn, max_tokens, strict=True)
    ]  # fmt: skip
    for answer in answers:
        answer.check_room(model.config.canvas_length)
    return Runner(model, options, answers, budget, prompt_cache)
