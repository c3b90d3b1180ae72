"""Tasks that several machines share: real processes on loopback, without a model."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dgemma_mlx.distributed.channel import Channel, MachineLostError, open_channel
from dgemma_mlx.distributed.launch import launched
from dgemma_mlx.distributed.tasks import Pool, Work
from dgemma_mlx.errors import DgemmaError
from tests.distributed.test_whole_batch import free_port

OTHER = """
import os, signal, time
from dgemma_mlx.distributed.channel import MachineLostError, open_channel
from dgemma_mlx.distributed.launch import launched
from dgemma_mlx.distributed.tasks import do_tasks
from dgemma_mlx.errors import DgemmaError

launch = launched()
channel = open_channel(launch)

def do(task):
    {do}
    return {{"square": task["number"] ** 2, "rank": launch.rank}}

try:
    do_tasks(channel, do)
except MachineLostError:
    pass
"""


@contextmanager
def others(folder: Path, *does: str) -> Iterator[Channel]:
    """Start a process for each text of what it does before it answers, and yield the channel to them."""
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(1 + len(does))]))
    environ = {"MLX_HOSTFILE": str(hostfile)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OTHER.format(do=textwrap.indent(do, "    ").strip() or "pass")],
            env={**environ, "MLX_RANK": str(rank), "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        )
        for rank, do in enumerate(does, 1)
    ]
    launch = launched({**environ, "MLX_RANK": "0"})
    assert launch is not None
    channel = open_channel(launch)
    try:
        yield channel
    finally:
        channel.close()
        for process in processes:
            process.kill()
            process.wait()


def squares(own: list[int], goes_on: threading.Event) -> Work[int, int]:
    """Return work whose own part notes what it does, and waits before."""

    def do(number: int) -> int:
        assert goes_on.wait(30)
        own.append(number)
        return number**2

    def unpack(number: int, message: dict[str, int]) -> int:
        return message["square"]

    return Work(do, lambda number: {"number": number}, unpack)


def test_the_work_of_machines_that_are_killed_or_stopped_is_done_here(tmp_path: Path) -> None:
    lost: list[MachineLostError] = []
    goes_on, own = threading.Event(), list[int]()

    def note(error: MachineLostError) -> None:
        lost.append(error)
        if len(lost) == 2:
            goes_on.set()

    end = "if task['number'] > 5: os.kill(os.getpid(), signal.{})"
    with others(tmp_path, end.format("SIGKILL"), end.format("SIGSTOP")) as channel:
        pool = Pool(channel, note)
        assert list(pool.results(range(40), squares(own, goes_on))) == [number**2 for number in range(40)]
        assert pool.size == 1
        assert list(pool.results([7], squares(own, goes_on))) == [49]
    assert {error.rank for error in lost} == {1, 2}
    assert own[-1] == 7 and len(own) > 30  # the others have done the first few


def test_a_machine_with_a_fault_is_lost(tmp_path: Path) -> None:
    lost: list[MachineLostError] = []
    goes_on = threading.Event()
    with others(tmp_path, "channel.fail('out of paper')") as channel:

        def note(error: MachineLostError) -> None:
            lost.append(error)
            goes_on.set()

        assert list(Pool(channel, note).results(range(3), squares([], goes_on))) == [0, 1, 4]
    assert [error.message for error in lost] == ["out of paper"]


def test_the_error_of_another_machine_is_raised_here(tmp_path: Path) -> None:
    heard = threading.Event()

    def do(number: int) -> int:
        assert heard.wait(30)
        return number**2

    work = Work(do, lambda number: {"number": number}, lambda number, message: message["square"],
                lambda number, note: heard.set())  # fmt: skip
    fails = "channel.send({'note': task}); raise DgemmaError('no ink', 'Buy some.', 2)"
    with others(tmp_path, fails) as channel, pytest.raises(DgemmaError, match="no ink") as caught:
        list(Pool(channel).results([0, 1], work))  # one of the tasks is done there, and fails
    assert (caught.value.hint, caught.value.exit_code) == ("Buy some.", 2)


def test_what_cannot_be_packed_is_done_here(tmp_path: Path) -> None:
    def pack(number: int) -> dict[str, int]:
        raise DgemmaError("it cannot be sent", "Leave it here.")

    with others(tmp_path, "") as channel:
        work = Work(lambda number: number**2, pack, lambda number, message: message["square"])
        assert list(Pool(channel).results(range(20), work)) == [number**2 for number in range(20)]
