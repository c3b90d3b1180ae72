"""The engine without HTTP: what it keeps of an answer, and how it fails."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import mlx.core as mx
import pytest

from dgemma_mlx import Committed, Draft, load
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.cancellation import Cancelled
from dgemma_mlx.generation.worker import End
from dgemma_mlx.server.engine import Engine, Inbox
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.metrics import Metrics
from dgemma_mlx.server.question import Question, Written
from dgemma_mlx.server.settings import ServerSettings
from tests.server.live import serving
from tests.waiting import wait_until

LONG = Question("Count from 13 to 60.", seed=1, max_tokens=2000, speed="reference")


@asynccontextmanager
async def engine(**settings: Any) -> AsyncIterator[Engine]:
    made = Engine(lambda: load("demo"), ServerSettings("demo", **settings), Metrics())
    made.start()
    try:
        await made.ready()
        yield made
    finally:
        await made.close()


async def until(is_so: Callable[[], bool]) -> None:
    await asyncio.wait_for(_until(is_so), 60)


async def _until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


def test_a_reader_that_is_slow_gets_everything_written_and_the_latest_draft_only() -> None:
    async def test() -> None:
        inbox = Inbox(Question("", drafts=True))
        for canvas in range(50):
            for step in range(1, 17):
                inbox.receive(Draft(canvas, step, 16, (1,), (True,), (0.0,), finished=step == 16))
            inbox.receive(Committed(canvas, (1,), f"{canvas} ", "", (), 16))
        await asyncio.sleep(0)
        updates = await inbox.take()
        assert [each.text for each in updates if isinstance(each, Written)] == [f"{canvas} " for canvas in range(50)]
        assert [each for each in updates if isinstance(each, Draft)] == updates[-2:-1]
        inbox.receive(End())
        assert await inbox.take() == [End()]

    asyncio.run(test())


def test_an_answer_that_nobody_refers_to_any_more_is_cancelled() -> None:
    """A client may go away between the question and the beginning of its response."""

    async def test() -> None:
        async with engine() as made:
            answering = await made.ask(LONG)
            assert made.admission.running == 1
            del answering
            await until(lambda: made.admission.running == 0)

    asyncio.run(test())


def test_an_answer_that_is_written_when_the_server_ends_is_an_error() -> None:
    def wait_for_cancel(model: Any, cancelled: Callable[[], bool]) -> None:
        wait_until(cancelled)
        raise Cancelled

    async def test() -> None:
        async with engine() as made:
            running, queued = await made.ask(LONG), await made.ask(LONG)
            async for update in running:
                assert isinstance(update, Written)
                break
            work = asyncio.ensure_future(made.run(wait_for_cancel))
            await asyncio.sleep(0)
            await made.close()
            for answering in (running, queued):
                with pytest.raises(ApiError, match="shutting down") as caught:
                    await answering.whole()
                assert (caught.value.status, caught.value.code) == (503, "shutting_down")
            with pytest.raises(ApiError, match="shutting down"):
                await work
            with pytest.raises(ApiError, match="shutting down"):
                await (await made.ask(LONG)).whole()

    asyncio.run(test())


def test_a_fault_of_the_program_is_logged_and_the_next_request_runs() -> None:
    async def test() -> None:
        lines: list[str] = []
        async with engine(log=lines.append) as made:

            def faulty(model: Any, cancelled: Any) -> None:
                raise ValueError("planted")

            with pytest.raises(ApiError, match="unexpected ValueError") as caught:
                await made.run(faulty)
            assert caught.value.status == 500
            assert len(lines) == 1 and "in faulty" in lines[0] and "ValueError: planted" in lines[0]

            def refused(model: Any, cancelled: Any) -> None:
                raise DgemmaError("no room", "Make some.")

            with pytest.raises(ApiError, match=r"no room\. Make some\."):
                await made.run(refused)
            assert len(lines) == 1
            written, ended = await (await made.ask(Question("Sort 7 3 5", seed=1))).whole()
            assert (written.text, ended.finish_reason) == ("3 5 7", "stop")

    asyncio.run(test())


def test_a_server_frees_a_model_that_is_not_used_and_loads_it_again() -> None:
    lines: list[str] = []
    gc.collect()
    before = mx.get_active_memory()
    with serving(keep_alive=0.2, log=lines.append) as address:
        for _ in range(2):
            body = {"messages": [{"role": "user", "content": "Sort 7 3 5"}], "seed": 1}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["message"]["content"] == "3 5 7"
            wait_until(lambda: not httpx.get(f"{address}/health").json()["loaded"])
            wait_until(lambda: mx.get_active_memory() - before < 100_000)
        assert httpx.get(f"{address}/health").json()["status"] == "ok"
    assert sum("loaded again" in line for line in lines) >= 1
