"""How long a short question waits for a long answer, and whether answers that share a batch are faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from dgemma_mlx import Draft, Model, Worker, generate, generate_batch, load, stream
from dgemma_mlx.generation.worker import End

STEPS, LONG, SHORT = 16, 8, 1  # steps of a canvas; canvases of the answers
Ended = tuple[int, float]  # the steps, of all answers, and the seconds from a question to the end of its answer


def fairness(repeats: int) -> dict[str, dict[str, Ended]]:
    """Return how long each answer takes, by steps and by the least seconds, first come first served and in turns."""
    with Worker(lambda: load("demo")) as worker:
        found = {}
        for way in ("first come first served", "in turns"):
            rounds = [_both(worker, way == "in turns") for _ in range(repeats)]
            found[way] = {name: min(each[name] for each in rounds) for name in rounds[0]}
    return found


def batches(repeats: int) -> dict[str, float]:
    """Return the least seconds of 1, 2 and 4 answers of 2 canvases, one after the other and in a batch."""
    model, found = load("demo"), {}
    options = _options(model, canvases=2)
    for count in (1, 2, 4):
        prompts, seeds = [f"Count from {13 + number} to 60." for number in range(count)], list(range(count))
        ways: dict[str, Callable[[], object]] = {
            "alternating": lambda prompts=prompts: [generate(model, prompt, seed=1, **options) for prompt in prompts],
            "batch": lambda prompts=prompts, seeds=seeds: generate_batch(model, prompts, seeds=seeds, **options),
        }
        for name, way in ways.items():
            found[f"{count} {name}"] = round(min(_seconds(way) for _ in range(repeats)), 3)
    return found


def _both(worker: Worker, in_turns: bool) -> dict[str, Ended]:
    """Ask for a long answer, and a short question at its first step. Return when each has ended."""
    asked: dict[str, Ended] = {}
    ends: SimpleQueue[tuple[str, Ended]] = SimpleQueue()
    steps = 0

    def ask(name: str, canvases: int) -> None:
        def receive(item: Any) -> None:
            nonlocal steps
            if isinstance(item, End):
                before, began = asked[name]
                ends.put((name, (steps - before, round(time.perf_counter() - began, 3))))
            elif isinstance(item if in_turns else item[0], Draft):
                steps += 1
                if "short" not in asked:
                    ask("short", SHORT)

        asked[name] = steps, time.perf_counter()
        worker.submit_to(receive, _answer(canvases, in_turns))

    ask("long", LONG)
    return dict(ends.get() for _ in range(2))


def _answer(canvases: int, in_turns: bool) -> Callable[[Model, Callable[[], bool]], Iterator[Any]]:
    """Return a request. To be one turn, its events are wrapped: the worker then takes them for others."""

    def request(model: Model, cancelled: Callable[[], bool]) -> Iterator[Any]:
        for event in stream(model, "Sort 7 3 5", seed=1, cancelled=cancelled, **_options(model, canvases)):
            yield event if in_turns else (event,)

    return request


def _options(model: Model, canvases: int) -> dict[str, Any]:
    """Return options with which an answer takes so many canvases, and each of them all its steps."""
    endless = model.generation.override(max_denoising_steps=STEPS, confidence_threshold=0.0, eos_token_ids=())
    length = canvases * model.config.canvas_length
    return {"generation": endless, "speed": "reference", "max_tokens": length}


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
