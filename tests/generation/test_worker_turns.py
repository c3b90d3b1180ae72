"""Requests of a worker that take turns: equal answers, no logits in between, cancels, and the model's unloading."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import pytest

from dgemma_mlx import Committed, Done, Draft, Event, Model, generate, load
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Encoded
from dgemma_mlx.generation.cancellation import Cancelled
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.request import ask, begin
from dgemma_mlx.generation.worker import End, Request, Worker
from dgemma_mlx.model.cache import PrefixCache
from tests.waiting import wait_until

COUNT = "Count from 13 to 60."  # takes four canvases
SHORT = "Sort 7 3 5"


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(lambda: load("demo")) as made:
        yield made


def answering(prompt: str, seed: int = 1, max_tokens: int = 80, **options: Any) -> Request[Event | Encoded]:
    """An answer with the events of its prefill, which goes on in small parts."""

    def request(model: Model, cancelled: Callable[[], bool]) -> Iterator[Event | Encoded]:
        chosen = GenerationOptions(speed="reference", cancelled=cancelled, prefill_step_size=8, **options)
        asked = ask(model, prompt, chosen, None, False, False, None, None)
        return (event for _, event in begin(model, [asked], [seed], [max_tokens], chosen).events())

    return request


class Log:
    """What several requests report, in one order. Nothing runs before all of them are submitted.

    ``watch`` is called on the worker's thread with the name and the kind of each event.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.seen: list[tuple[str, Any]] = []
        self.watch: Callable[[str, type], None] = lambda name, kind: None
        self.cancels: dict[str, Callable[[], None]] = {}
        self._released: SimpleQueue[None] = SimpleQueue()
        self._ends: SimpleQueue[str] = SimpleQueue()
        worker.submit_to(lambda item: None, lambda model, cancelled: [self._released.get()])

    def submit(self, name: str, request: Request[Any]) -> None:
        def receive(item: Any) -> None:
            self.seen.append((name, item))
            self.watch(name, type(item))
            if isinstance(item, End):
                self._ends.put(name)

        self.cancels[name] = self.worker.submit_to(receive, request)

    def run(self) -> None:
        """Let the requests go on until all have ended."""
        self._released.put(None)
        ended: set[str] = set()
        while ended != self.cancels.keys():
            ended.add(self._ends.get(timeout=60))

    def of(self, name: str) -> list[Any]:
        return [item for each, item in self.seen if each == name]

    def index(self, name: str, kind: type) -> int:
        return next(i for i, (each, item) in enumerate(self.seen) if each == name and isinstance(item, kind))


def test_a_short_answer_is_written_between_two_canvases_of_a_long_one(worker: Worker) -> None:
    log = Log(worker)

    def ask_later(name: str, kind: type) -> None:
        if kind is Draft and "short" not in log.cancels:
            log.submit("short", answering(SHORT, max_tokens=16))

    log.watch = ask_later
    log.submit("long", answering(COUNT, max_tokens=140))
    log.run()
    for name, prompt, limit in (("long", COUNT, 140), ("short", SHORT, 16)):
        *_, done, end = log.of(name)
        expected = generate(worker.model, prompt, seed=1, max_tokens=limit, speed="reference", prefill_step_size=8)
        assert end.error is None and (done.text, done.tokens) == (expected.text, expected.tokens)
    canvases = [name for name, item in log.seen if isinstance(item, Committed)]
    assert len(canvases) > 4 and "short" in canvases[1:3]
    names = [name for name, item in log.seen if isinstance(item, Draft)]
    assert sum(one != two for one, two in pairwise(names)) == 2  # never within a canvas
    place = log.index("short", Committed)  # the last one: the rest of the answer does not wait for another turn
    assert [(name, type(item)) for name, item in log.seen[place + 1 : place + 3]] == [("short", Done), ("short", End)]


@pytest.mark.parametrize("draw", [0, pytest.param(range(1, 20), marks=pytest.mark.slow)], ids=str)
def test_answers_are_those_of_generate_however_turns_and_cancels_fall(worker: Worker, draw: Any) -> None:
    for seed in [draw] if isinstance(draw, int) else draw:
        choose = random.Random(seed)
        log = Log(worker)
        asked = {}
        for number in range(4):
            prompt, limit = choose.choice([COUNT, SHORT, "What is 27 + 45?"]), choose.choice([16, 48, 80])
            asked[str(number)] = prompt, choose.randrange(99), limit
            log.submit(str(number), answering(*asked[str(number)]))
        cancelled = set(choose.sample(sorted(asked), 2))
        at = {choose.randrange(1, 60): log.cancels[name] for name in cancelled}

        def cancel(*_: object, log: Log = log, at: dict[int, Callable[[], None]] = at) -> None:
            at.get(len(log.seen), lambda: None)()

        log.watch = cancel
        log.run()
        for name, (prompt, number, limit) in asked.items():
            *_, done, end = log.of(name)
            assert end.error is None
            expected = generate(worker.model, prompt, seed=number, max_tokens=limit, speed="reference").tokens
            if done.finish_reason == "cancelled":
                assert name in cancelled and done.tokens == expected[: len(done.tokens)]
            else:
                assert done.tokens == expected


def test_what_is_cancelled_while_another_request_runs_ends_within_a_step(worker: Worker) -> None:
    """One of them has been suspended after a canvas, and one has never run."""
    log = Log(worker)

    def watch(name: str, kind: type) -> None:
        if (name, kind) == ("suspended", Committed) and "running" not in log.cancels:
            log.submit("running", answering(SHORT))
            log.submit("queued", answering(f"{SHORT} 8 9 1 2"))
        elif (name, kind) == ("running", Draft):
            log.cancels["suspended"]()
            log.cancels["queued"]()

    log.watch = watch
    log.submit("suspended", answering(COUNT))
    log.run()
    place = log.index("running", Draft) + 1
    ends = {(name, type(item)) for name, item in log.seen[place : place + 4]}
    assert ends == {(name, kind) for name in ("suspended", "queued") for kind in (Done, End)}
    assert len(log.of("suspended")[-2].tokens) >= 32 and not log.of("queued")[-2].tokens
    assert log.of("running")[-2].text == "3 5 7"


def test_a_request_that_raises_harms_no_other(worker: Worker) -> None:
    log = Log(worker)

    def faulty(model: Model, cancelled: Callable[[], bool]) -> Iterator[Any]:
        for event in answering(COUNT)(model, cancelled):
            yield event
            if isinstance(event, Draft):
                raise ValueError("planted")

    log.submit("long", answering(COUNT, max_tokens=48))
    log.submit("faulty", faulty)
    log.run()
    assert repr(log.of("faulty")[-1].error) == "ValueError('planted')"
    assert log.of("long")[-2].tokens == generate(worker.model, COUNT, seed=1, max_tokens=48, speed="reference").tokens


def test_a_request_that_waits_holds_its_prefix_and_no_logits(worker: Worker) -> None:
    config = worker.model.config
    logits = 4 * config.canvas_length * config.text.vocab_size  # bytes
    held = []

    def measure(model: Model, cancelled: Callable[[], bool]) -> list[int]:
        mx.synchronize()
        gc.collect()
        caches = [each for each in gc.get_objects() if isinstance(each, PrefixCache)]
        return [mx.get_active_memory() - sum(cache.nbytes for cache in caches)]

    def request(model: Model, cancelled: Callable[[], bool]) -> Iterator[Any]:
        for event in answering(COUNT)(model, cancelled):
            if isinstance(event, (Encoded, Committed)):
                worker.submit_to(held.append, measure)
            yield event

    kept = mx.set_cache_limit(0)  # a freed buffer that is used again may be larger than what it holds
    before = next(worker.submit(measure))
    canvases = [event for event in worker.submit(request) if isinstance(event, Committed)]
    mx.set_cache_limit(kept)
    figures = [item for item in held if not isinstance(item, End)]
    assert len(canvases) > 1 and len(figures) > len(canvases)
    assert max(figures) - before < logits / 100


def test_a_model_that_is_not_used_is_freed_and_loaded_again() -> None:
    loads, unloads = [], []

    def load_demo() -> Model:
        loads.append(1)
        if len(loads) == 2:
            raise DgemmaError("the disk is gone", "Bring it back.")
        return load("demo")

    gc.collect()
    before = mx.get_active_memory()
    with Worker(load_demo, keep_alive=0.05, unload=lambda: unloads.append(1)) as worker:
        weights = worker.submit(lambda model, cancelled: [model.weight_bytes()])
        size, _ = next(weights), list(weights)
        wait_until(lambda: not worker.is_loaded)
        wait_until(lambda: mx.get_active_memory() - before < size / 100)
        assert unloads == [1]
        with pytest.raises(DgemmaError, match="the disk is gone"):
            list(worker.submit(answering(SHORT)))
        answer = list(worker.submit(answering(SHORT)))[-1]
        assert isinstance(answer, Done) and answer.text == "3 5 7"
        assert len(loads) == 3


def test_a_request_that_is_cancelled_loads_no_model() -> None:
    loads: list[int] = []
    is_cancelled = threading.Event()

    def load_demo() -> Model:
        loads.append(1)
        if len(loads) == 2:
            is_cancelled.wait(60)
            raise DgemmaError("the disk is gone", "Bring it back.")
        return load("demo")

    with Worker(load_demo, keep_alive=0.05) as worker:
        wait_until(lambda: worker.is_loaded)
        wait_until(lambda: not worker.is_loaded)
        first, second = worker.submit(answering(SHORT)), worker.submit(answering(SHORT))
        second.cancel()
        is_cancelled.set()
        with pytest.raises(DgemmaError, match="the disk is gone"):
            list(first)
        with pytest.raises(Cancelled):
            list(second)
        assert len(loads) == 2
