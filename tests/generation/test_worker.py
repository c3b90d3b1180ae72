"""One thread owns MLX: what a model and a prompt cache hold can be used by any thread, and a worker serves several."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import dgemma_mlx
from dgemma_mlx import Committed, DgemmaError, Done, Event, Model, PromptCache, generate, stream
from dgemma_mlx.generation.worker import Request, Submission, Worker
from dgemma_mlx.infill.fill import fill

COUNT = "Count from 13 to 40."  # takes more than one canvas
PROMPTS = ["Sort 7 3 5", "What is 27 + 45?", "Sort 9 2 4 1", "What is 8 + 61?"]  # settled after a few steps
# Events at which an answer is cancelled.
POINTS = [(0, 1, 11, 34, 59), pytest.param(tuple(range(60)), marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def model() -> Model:
    return dgemma_mlx.load("demo")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(lambda: dgemma_mlx.load("demo")) as made:
        yield made


def in_thread(run: Callable[[], Any]) -> Any:
    """Run a function in a new thread, and return what it returns or raise what it raises."""
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append(run())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def answering(prompt: str, **options: Any) -> Request[Event]:
    return lambda model, cancelled: stream(model, prompt, cancelled=cancelled, **options)


def unsettled(model: Model) -> tuple[Model, dict[str, Any]]:
    """A model with small canvases, and options with which none of them settles before its last step."""
    small = replace(model, config=replace(model.config, canvas_length=16))
    endless = model.generation.override(max_denoising_steps=9, confidence_threshold=0.0, eos_token_ids=())
    return small, {
        "seed": 1, "prefill_step_size": 16, "speed": "reference", "generation": endless, "max_tokens": 96,
    }  # fmt: skip


def last(events: Submission[Event]) -> Done:
    *_, done = events
    assert isinstance(done, Done)
    return done


def in_three_threads(answer: Callable[[int], str], count: int) -> dict[int, str]:
    """Answer the requests 0 to ``count`` in three threads at once, and return the texts."""
    texts: dict[int, str] = {}
    errors: list[BaseException] = []

    def serve(first: int) -> None:
        try:
            for number in range(first, count, 3):
                texts[number] = answer(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return texts


def test_a_model_loaded_in_one_thread_answers_in_three_others(model: Model, worker: Worker) -> None:
    """60 answers by threads that take turns, and 30 by a worker to which the threads send requests."""
    elsewhere = in_thread(lambda: dgemma_mlx.load("demo"))
    turn = threading.Lock()

    def prompt(number: int) -> tuple[str, int]:
        return PROMPTS[number % len(PROMPTS)], number // 20

    def taking_turns(number: int) -> str:
        text, seed = prompt(number)
        with turn:
            return generate(elsewhere, text, seed=seed, max_tokens=16).text

    def by_the_worker(number: int) -> str:
        text, seed = prompt(number)
        return last(worker.submit(answering(text, seed=seed, max_tokens=16))).text

    expected: dict[tuple[str, int], str] = {}
    for number in range(60):
        text, seed = prompt(number)
        if (text, seed) not in expected:
            expected[text, seed] = generate(model, text, seed=seed, max_tokens=16).text
    for answer, count in ((taking_turns, 60), (by_the_worker, 30)):
        texts = in_three_threads(answer, count)
        assert texts == {number: expected[prompt(number)] for number in range(count)}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("cached", [False, True])
def test_a_stream_that_another_thread_continues_or_closes(model: Model, cached: bool, count: int) -> None:
    cache = dgemma_mlx.PromptCache() if cached else None
    options: dict[str, Any] = {"seed": 1, "prompt_cache": cache, "max_tokens": 64}
    expected = dgemma_mlx.generate(model, "Count from 5 to 30.", seed=1, max_tokens=64).text
    for end in ("continue", "close"):
        events = dgemma_mlx.stream(model, "Count from 5 to 30.", **options)
        for _ in range(count):
            next(events)
        if end == "continue":
            with pytest.raises(dgemma_mlx.DgemmaError, match="another thread") as caught:
                in_thread(lambda events=events: list(events))
            assert "Worker" in caught.value.hint
        else:
            in_thread(events.close)
        assert dgemma_mlx.generate(model, "Count from 5 to 30.", **options).text == expected


@pytest.mark.parametrize("points", POINTS, ids=["some", "all"])
def test_a_prompt_cache_survives_a_cancel_at_any_event_and_serves_other_threads(
    model: Model, points: tuple[int, ...]
) -> None:
    """The first thread gives up at its n-th event, and another one goes on with what is kept."""
    model, options = unsettled(model)
    whole = list(stream(model, COUNT, **options))
    longer = [
        {"role": "user", "content": COUNT},
        {"role": "assistant", "content": generate(model, COUNT, **options).text},
        {"role": "user", "content": "What is 2 + 2?"},
    ]
    expected = generate(model, longer, seed=1, max_tokens=8).text
    assert len(whole) > points[-1]
    for point in points:
        cache = PromptCache()

        def give_up(cache: PromptCache = cache, point: int = point) -> None:
            events = stream(model, COUNT, prompt_cache=cache, **options)
            for _ in range(point + 1):
                next(events)

        in_thread(give_up)
        kept = in_thread(lambda cache=cache: generate(model, longer, seed=1, max_tokens=8, prompt_cache=cache))
        assert kept.text == expected, point


@pytest.mark.parametrize("points", POINTS, ids=["some", "all"])
def test_a_request_is_cancelled_from_another_thread_at_any_event(worker: Worker, points: tuple[int, ...]) -> None:
    small, options = unsettled(worker.model)

    def answering(prompt: str, **more: Any) -> Request[Event]:
        return lambda model, cancelled: stream(small, prompt, cancelled=cancelled, **options, **more)

    whole = list(worker.submit(answering(COUNT)))
    cache = PromptCache()
    for point in points:
        events = worker.submit(answering(COUNT, prompt_cache=cache))
        seen = [next(events) for _ in range(point)]
        events.cancel()
        seen += events
        done = seen[-1]
        assert isinstance(done, Done)
        assert seen[:-1] == whole[: len(seen) - 1]
        assert done.finish_reason == "cancelled" or seen[:-1] == whole[:-1]
        assert done.text == "".join(event.text for event in seen if isinstance(event, Committed))
    again = last(worker.submit(answering(COUNT, prompt_cache=cache)))
    assert again.text == last(worker.submit(answering(COUNT))).text


def test_a_second_stream_on_a_prompt_cache_is_refused_until_the_first_has_ended(model: Model) -> None:
    cache = PromptCache()
    first = stream(model, COUNT, prompt_cache=cache, seed=1)
    seen = [next(first), next(first)]
    with pytest.raises(DgemmaError, match="the prompt cache is in use by another answer"):
        next(stream(model, "Sort 7 3 5", prompt_cache=cache, seed=1))
    with pytest.raises(DgemmaError, match="in use"):
        in_thread(lambda: generate(model, "Sort 7 3 5", prompt_cache=cache, seed=1))
    seen += first
    assert seen[-1].text == generate(model, COUNT, seed=1).text  # type: ignore[union-attr]
    second = stream(model, "Sort 7 3 5", prompt_cache=cache, seed=1)
    next(second)
    del second  # as good as closed
    sorted_text = generate(model, "Sort 7 3 5", prompt_cache=cache, seed=1).text
    assert sorted_text == generate(model, "Sort 7 3 5", seed=1).text


def test_a_prompt_cache_in_use_is_not_saved(model: Model, tmp_path: Any) -> None:
    cache = PromptCache()
    events = stream(model, COUNT, prompt_cache=cache, seed=1)
    next(events)
    with pytest.raises(DgemmaError, match="in use"):
        cache.save(tmp_path / "cache", model)
    assert not list(tmp_path.iterdir())
    for event in events:
        if isinstance(event, Done):
            cache.save(tmp_path / "cache", model)  # the answer's last event frees the cache
    assert PromptCache.load(tmp_path / "cache", model)


def test_a_worker_survives_a_request_that_raises(worker: Worker) -> None:
    def faulty(model: Model, cancelled: Callable[[], bool]) -> Iterator[str]:
        yield "first"
        raise ValueError("planted")

    events = worker.submit(faulty)
    assert next(events) == "first"
    with pytest.raises(ValueError, match="planted"):
        next(events)
    assert list(events) == []
    with pytest.raises(DgemmaError, match="max_tokens"):
        list(worker.submit(answering(COUNT, max_tokens=0)))
    with pytest.raises(ZeroDivisionError):
        next(worker.submit(lambda model, cancelled: [1 // 0]))
    filled = list(worker.submit(lambda model, cancelled: [fill(model, "Sort 7 3 5: 3 ___:1___ 7", seed=1)]))
    assert len(filled) == 1
    assert last(worker.submit(answering("Sort 7 3 5", seed=1))).text == "3 5 7"


def test_a_stream_that_a_failed_request_left_open_is_closed_on_the_workers_thread(worker: Worker) -> None:
    """The exception, which the caller may keep, refers to the frame that holds the stream."""
    cache, threads = PromptCache(), []

    def read(model: Model) -> Iterator[Event]:
        try:
            yield from stream(model, COUNT, seed=1, prompt_cache=cache)
        finally:
            threads.append(threading.current_thread().name)

    def faulty(model: Model, cancelled: Callable[[], bool]) -> Iterator[Event]:
        events = read(model)
        try:
            for _ in events:
                raise KeyError("planted")
        except KeyError as error:
            raise ValueError("the request failed") from error
        yield from events

    with pytest.raises(ValueError, match="the request failed") as kept:
        next(worker.submit(faulty))
    assert threads == ["dgemma-mlx"]
    answer = last(worker.submit(answering(COUNT, seed=1, prompt_cache=cache)))
    assert answer.text == generate(worker.model, COUNT, seed=1).text
    assert isinstance(kept.value.__cause__, KeyError)


def test_a_request_that_raises_stop_iteration_does_not_end_silently(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(worker.submit(lambda model, cancelled: [next(iter(()))]))


def test_everything_runs_on_one_thread(worker: Worker) -> None:
    names = in_three_threads(
        lambda number: next(worker.submit(lambda model, cancelled: [threading.current_thread().name])), 9
    )
    assert set(names.values()) == {"dgemma-mlx"}
    assert worker.model.name == "demo"


def test_a_model_that_cannot_be_loaded_is_told_to_everybody() -> None:
    with Worker(lambda: dgemma_mlx.load("/nonexistent")) as worker:
        for _ in range(2):
            with pytest.raises(DgemmaError, match="nonexistent"):
                next(worker.submit(answering(COUNT)))
        with pytest.raises(DgemmaError, match="nonexistent"):
            worker.model  # noqa: B018


def test_closing_a_worker_cancels_its_requests_and_ends_its_thread() -> None:
    worker = Worker(lambda: dgemma_mlx.load("demo"))
    running = worker.submit(answering(COUNT, seed=1, max_tokens=100_000, speed="reference"))
    waiting = worker.submit(answering(COUNT, seed=1))
    next(running)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "dgemma-mlx" and thread.is_alive()][-1:]
    worker.close()
    assert not thread.is_alive()
    assert last(running).finish_reason == "cancelled"
    assert last(waiting).finish_reason == "cancelled"
    with pytest.raises(DgemmaError, match="the worker is closed"):
        worker.submit(answering(COUNT))
    worker.close()


def test_a_submission_that_nobody_reads_any_more_is_cancelled(worker: Worker) -> None:
    asked: list[bool] = []

    def endless(model: Model, cancelled: Callable[[], bool]) -> Iterator[int]:
        while not cancelled():
            time.sleep(0.001)
            yield 0
        asked.append(True)

    events = worker.submit(endless)
    next(events)
    del events
    assert last(worker.submit(answering("Sort 7 3 5", seed=1))).text == "3 5 7"
    assert asked == [True]


@pytest.mark.parametrize("end", ["", "del worker", "raise SystemExit(3)"])
def test_a_program_that_forgets_to_close_its_worker_ends(end: str) -> None:
    program = f"""
import dgemma_mlx
from dgemma_mlx.generation.worker import Worker
worker = Worker(lambda: dgemma_mlx.load("demo"))
events = worker.submit(lambda model, cancelled: dgemma_mlx.stream(model, {COUNT!r}, cancelled=cancelled, seed=1))
print(type(next(events)).__name__, flush=True)
{end}
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("Draft\n", "", 3 if "3" in end else 0)
