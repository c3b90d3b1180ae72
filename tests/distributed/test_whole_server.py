"""The server with other machines: real processes on loopback, and one that ends in the middle of an answer."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dgemma_mlx.distributed.channel import Channel, MachineLostError
from dgemma_mlx.generation.api import generate
from dgemma_mlx.generation.load import LoadOptions, load
from dgemma_mlx.generation.team import invite
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.machines import Machines
from dgemma_mlx.server.metrics import Metrics
from dgemma_mlx.server.question import Question
from dgemma_mlx.server.settings import ServerSettings
from tests.distributed.whole import joined
from tests.server.test_engine import until

LONG = Question("Count from 13 to 60.", seed=1, max_tokens=2000, speed="reference")
SHORT = Question("Sort 7 3 5", seed=2, max_tokens=20)

# A machine that writes a part of an answer, and then ends.
BROKEN = """
import os
from dgemma_mlx.distributed.channel import open_channel
from dgemma_mlx.distributed.launch import launched

channel = open_channel(launched())
channel.send({{"room": 1 << 40}})
number = channel.receive()["ask"]
{part}
os._exit(1)
"""
CANVAS = """
event = {"canvas": 0, "tokens": [1], "text": "3 ", "thinking": "", "tool_calls": [], "steps": 1}
channel.send({"number": number, "kind": "committed", "event": {**event, "doubted": []}})
"""


@asynccontextmanager
async def engine(channel: Channel, lost: list[MachineLostError]) -> AsyncIterator[tuple[Engine, Machines]]:
    """Yield an engine with other machines that are ready."""
    machines = Machines(channel, 64, 4, lost.append)
    made = Engine(lambda: load("demo"), ServerSettings("demo"), Metrics(), machines=machines)
    made.start()
    try:
        await made.ready()
        await until(lambda: all(machine.room for machine in machines.machines))
        yield made, machines
    finally:
        await made.close()


def test_a_question_goes_to_the_machine_with_the_fewest_and_gets_the_same_answer(tmp_path: Path) -> None:
    async def test(channel: Channel) -> None:
        async with engine(channel, []) as (made, machines):
            [machine] = machines.machines
            async with await made.ask(LONG) as first:
                async with await made.ask(SHORT) as second:
                    assert [*machine.prompts]  # the other machine answers the second question
                    assert (made.admission.here, machine.admission.here, made.admission.running) == (1, 1, 2)
                    written, ended = await second.whole()
                _, long = await first.whole()
            assert (made.admission.running, machine.admission.running) == (0, 0)
            async with await made.ask(SHORT) as third:  # where its prompt is encoded
                assert (await third.whole())[1].done.statistics.cached_tokens > 0
        alone = generate(load("demo"), "Sort 7 3 5", seed=2, max_tokens=20)
        assert (written.text, ended.done.tokens, ended.done.seed) == (alone.text, alone.tokens, 2)
        assert long.done.text == generate(load("demo"), LONG.prompt, seed=1, max_tokens=2000, speed="reference").text

    with joined(tmp_path, ("-m", "dgemma_mlx")) as channel:
        invite(channel, LoadOptions("demo"), "serve", prompt_caches=4, keep_alive=None)
        asyncio.run(test(channel))


def test_an_answer_that_is_cancelled_ends_there(tmp_path: Path) -> None:
    async def test(channel: Channel) -> None:
        async with engine(channel, []) as (made, machines):
            [machine] = machines.machines
            async with await made.ask(LONG), await made.ask(LONG):
                assert machine.admission.here == 1
            await until(lambda: not (machine.admission.here or made.admission.running))

    with joined(tmp_path, ("-m", "dgemma_mlx")) as channel:
        invite(channel, LoadOptions("demo"), "serve", prompt_caches=4, keep_alive=None)
        asyncio.run(test(channel))


@pytest.mark.parametrize("has_written", [False, True])
def test_a_machine_that_ends_in_the_middle_of_an_answer(tmp_path: Path, has_written: bool) -> None:
    lost: list[MachineLostError] = []

    async def test(channel: Channel) -> None:
        async with engine(channel, lost) as (made, machines):
            async with await made.ask(LONG) as first, await made.ask(SHORT) as second:
                if has_written:
                    with pytest.raises(ApiError, match=r"\(rank 1\) has ended in the middle of the answer. Ask again."):
                        await second.whole()
                else:
                    written, _ = await second.whole()
                    assert written.text == "3 5 7"
                await first.whole()
            async with await made.ask(SHORT) as third:
                assert (await third.whole())[0].text == "3 5 7"
            assert machines.machines[0].admission.here == 0

    script = BROKEN.format(part=CANVAS if has_written else "")
    with joined(tmp_path, ("-c", textwrap.dedent(script))) as channel:
        asyncio.run(test(channel))
    assert [error.rank for error in lost] == [1]
