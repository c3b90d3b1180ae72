"""A program that each of several processes runs: whole answers of the cut demo model beside those of the whole one.

    python -m tests.distributed.cut_answers PICTURE KIND...

Rank 0 prints a JSON object: for each kind of answer, the results of the whole and of the cut model.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dgemma_mlx.constrain.constraint import Constraint
from dgemma_mlx.distributed.lead import LeadingCache, LeadingNetwork
from dgemma_mlx.generation.api import generate, generate_batch
from dgemma_mlx.generation.load import LoadOptions, load
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.prompt_cache import PromptCache
from dgemma_mlx.infill.choose import choose
from dgemma_mlx.infill.edit import edit
from dgemma_mlx.infill.fill import fill
from tests.distributed.machines import on_all_ranks

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def conversation(model: Model) -> list[Any]:
    """Two turns of a conversation that share a prompt cache."""
    cache, messages, results = PromptCache(), [], []
    for question in ("My name is Ada.", "What is my name?", "Sort 7 3 5"):
        messages.append({"role": "user", "content": question})
        done = generate(model, messages, seed=4, prompt_cache=cache)
        messages.append({"role": "assistant", "content": done.text})
        results.append([done.text, done.statistics.cached_tokens])
    return results


def after_an_interrupt(model: Model) -> str:
    """An answer after a Ctrl-C in a call of all machines, which raises once they all have made it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    is_raised = not isinstance(model.network, LeadingNetwork)
    if isinstance(model.network, LeadingNetwork):
        cache = model.network.new_cache()
        assert isinstance(cache, LeadingCache)
        try:
            with model.network._leader.call("reserve", cache=cache.key, positions=8):
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            is_raised = True
    assert is_raised
    return generate(model, "Sort 7 3 5", seed=1).text


def answers(model: Model, picture: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Answers of these kinds. Those with a seed are the same, because rank 0 draws all random numbers."""
    batch = ["Sort 7 3 5", "Count from 1 to 30", "Reverse: 1 2 3 4"]
    all_kinds: dict[str, Callable[[], Any]] = {
        "greedy": lambda: [generate(model, prompt, temp=0, seed=1).text for prompt in batch],
        "reference": lambda: [generate(model, prompt, seed=2, speed="reference").text for prompt in batch],
        "batch": lambda: [done.text for done in generate_batch(model, batch, seeds=[1, 2, 3])],
        "choice": lambda: generate(
            model, "What is 27 + 45?", seed=1, constraint=Constraint.choice(["yes", "no", "72"])
        ).text,
        "schema": lambda: generate(model, "Ada lives in Rome. As JSON.", seed=1, max_tokens=64, response_format={
            "type": "json_schema", "json_schema": {"schema": SCHEMA}
        }).text,
        "verify": lambda: generate(model, "Sort 9 3 5 2 8", seed=1, verify="repair").text,
        "picture": lambda: generate(model, "How many dots are there?", seed=1, images=[picture]).text,
        "conversation": lambda: conversation(model),
        "choose": lambda: [choice.text for choice in choose(model, "What is 27 + 45?", ["71", "72", "82"], seed=1)],
        "fill": lambda: fill(model, "The first ___ is red.", seed=1).text,
        "interrupt": lambda: after_an_interrupt(model),
        "edit": lambda: edit(model, "Sort 9 3 5", "Sort the numbers", seed=1).text,
    }  # fmt: skip
    return {kind: all_kinds[kind]() for kind in kinds}


def main() -> None:
    def work(model: Model) -> dict[str, Any]:
        picture, *kinds = sys.argv[1:]
        cut, whole = answers(model, picture, kinds), answers(load("demo"), picture, kinds)
        return {name: [whole[name], cut[name]] for name in whole}

    on_all_ranks(LoadOptions("demo"), work)


if __name__ == "__main__":
    main()
