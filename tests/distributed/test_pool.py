"""Tasks that several machines share: real processes on loopback, without a model."""

from __future__ import annotations

import textwrap
import threading
from pathlib import Path

import pytest

from dgemma_mlx.distributed.channel import MachineLostError
from dgemma_mlx.distributed.tasks import Pool, Work
from dgemma_mlx.errors import DgemmaError
from tests.distributed.whole import joined

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


def other(do: str) -> tuple[str, str]:
    """Return the command of a process that does this before it answers."""
    return "-c", OTHER.format(do=textwrap.indent(do, "    ").strip() or "pass")


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
    with joined(tmp_path, other(end.format("SIGKILL")), other(end.format("SIGSTOP"))) as channel:
        pool = Pool(channel, note)
        assert list(pool.results(range(40), squares(own, goes_on))) == [number**2 for number in range(40)]
        assert pool.size == 1
        assert list(pool.results([7], squares(own, goes_on))) == [49]
    assert {error.rank for error in lost} == {1, 2}
    assert own[-1] == 7 and len(own) > 30  # the others have done the first few


def test_a_machine_with_a_fault_is_lost(tmp_path: Path) -> None:
    lost: list[MachineLostError] = []
    goes_on = threading.Event()
    with joined(tmp_path, other("channel.fail('out of paper')")) as channel:

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
    with joined(tmp_path, other(fails)) as channel, pytest.raises(DgemmaError, match="no ink") as caught:
        list(Pool(channel).results([0, 1], work))  # one of the tasks is done there, and fails
    assert (caught.value.hint, caught.value.exit_code) == ("Buy some.", 2)


def test_what_cannot_be_packed_is_done_here(tmp_path: Path) -> None:
    def pack(number: int) -> dict[str, int]:
        raise DgemmaError("it cannot be sent", "Leave it here.")

    with joined(tmp_path, other("")) as channel:
        work = Work(lambda number: number**2, pack, lambda number, message: message["square"])
        assert list(Pool(channel).results(range(20), work)) == [number**2 for number in range(20)]


def test_a_task_for_each_machine_fails_without_one_of_them(tmp_path: Path) -> None:
    goes_on = threading.Event()
    goes_on.set()
    with joined(tmp_path, other(""), other("if task['number'] == 2: os._exit(1)")) as channel:
        pool = Pool(channel)
        assert pool.on_each(5, squares([], goes_on)) == [25, 25, 25]
        assert [name.rpartition(" (")[2] for name in pool.names] == ["rank 0)", "rank 1)", "rank 2)"]
        with pytest.raises(MachineLostError) as caught:
            pool.on_each(2, squares([], goes_on))
        assert caught.value.rank == 2
