"""What happens when a machine dies, stops, differs, or never comes: one line everywhere within 15 seconds."""

from __future__ import annotations

import re
import signal
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.distributed.ranks import DEMO, ENDLESS, Ranks, free_port
from tests.model.checkpoint import flat_config, random_tensors, write_checkpoint

LIMIT = 15.0  # seconds
START = 30.0  # seconds that starting the processes may take on a busy machine
ENDLESS_DEMO = (*DEMO, "--jsonl", "Sort 7 3 5")


def check_all_end(
    ranks: Ranks, began: float, named: str, except_for: int | None = None, limit: float = LIMIT
) -> None:
    """Check that every process ends in time with exit code 1 and one line that has the words ``named``."""
    for rank, (code, _, stderr) in ranks.results(limit + 5).items():
        if rank == except_for:
            continue
        lines = re.findall(r"dgemma-mlx: [^\n]*", stderr)  # MLX's ring prints lines of its own, from another thread
        assert code == 1, (rank, stderr)
        assert len(lines) == 1 and named in lines[0], (rank, stderr)
    assert time.monotonic() - began < limit


@pytest.mark.parametrize("lost", [0, 2])
def test_a_machine_that_dies(tmp_path: Path, lost: int) -> None:
    with Ranks(tmp_path, ENDLESS_DEMO, 3, environment=ENDLESS) as ranks:
        ranks.wait_for_steps()
        began = time.monotonic()
        ranks.processes[lost].kill()
        check_all_end(ranks, began, f"(rank {lost}) has ended", except_for=lost)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_stops(tmp_path: Path, lost: int) -> None:
    with Ranks(tmp_path, ENDLESS_DEMO, 2, environment=ENDLESS) as ranks:
        ranks.wait_for_steps()
        began = time.monotonic()
        ranks.processes[lost].send_signal(signal.SIGSTOP)
        other = ranks.processes[1 - lost]
        _, stderr = other.communicate(timeout=LIMIT)
        assert other.returncode == 1 and f"(rank {lost}) has not answered for 10 s" in stderr
        assert time.monotonic() - began < LIMIT
        ranks.processes[lost].send_signal(signal.SIGCONT)  # it ends as soon as it goes on
        assert ranks.processes[lost].wait(5) == 1


@pytest.mark.parametrize("missing", [0, 1])
def test_a_machine_that_never_comes(tmp_path: Path, missing: int) -> None:
    began = time.monotonic()
    with Ranks(tmp_path, (*DEMO, "Sort 7 3 5"), 2, without=missing) as ranks:
        check_all_end(ranks, began, f"(rank {missing}) did not", limit=LIMIT + START)


def test_another_checkpoint(tmp_path: Path) -> None:
    homes = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(homes):
        write_checkpoint(folder / "model", flat_config(num_experts=4 + 4 * seed), random_tensors(
            flat_config(num_experts=4 + 4 * seed)
        ))  # fmt: skip
    began = time.monotonic()
    with Ranks(tmp_path, ("generate", "-m", "~/model", "--anyway", "Sort"), 2, homes=homes) as ranks:
        check_all_end(ranks, began, "(rank 1) has another checkpoint", limit=LIMIT + START)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_a_port_that_is_taken(tmp_path: Path, offset: int) -> None:
    """The port of the channel, and those of both ranks for collective operations."""
    port, began = free_port(), time.monotonic()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + offset))
        taken.listen()
        with Ranks(tmp_path, (*DEMO, "Sort 7 3 5"), 2, port=port) as ranks:
            check_all_end(ranks, began, f"127.0.0.1:{port + offset}", limit=LIMIT + START)


def test_strangers_at_the_port(tmp_path: Path) -> None:
    """They say nothing, or anything, and keep their connections; the machines meet nevertheless."""
    with Ranks(tmp_path, (*DEMO, "Sort 7 3 5"), 2) as ranks, ExitStack() as stack:
        strangers: list[socket.socket] = []
        while len(strangers) < 3:
            with suppress(ConnectionRefusedError):
                stranger = socket.create_connection(("127.0.0.1", ranks.port - 1))
                strangers.append(stack.enter_context(stranger))
        strangers[0].sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert ranks.results()[0] == (0, "3 5 7\n", "")
