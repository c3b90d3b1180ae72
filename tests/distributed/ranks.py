"""Several processes of the program on this machine, as mlx.launch starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

DEMO = ("generate", "-m", "demo", "--anyway", "-q", "--seed", "1")
# A canvas that never settles.
ENDLESS = {
    "DGEMMA_MAX_DENOISING_STEPS": "100000", "DGEMMA_STABILITY_THRESHOLD": "99999", "DGEMMA_SPEED": "reference",
}


def free_port(count: int = 4) -> int:
    """Return the first of ``count`` consecutive free ports after another free one.

    The system gives none of them to outgoing connections.
    """
    for first in range(10000 + os.getpid() % 500 * 40, 32000, count + 1):
        try:
            for port in range(first - 1, first + count):
                with socket.socket() as attempt:
                    attempt.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no port is free")


class Ranks:
    """Processes with ranks from 0, each with its arguments, on free ports.

    Attributes:
        processes: The processes, by rank.
        port: The port of rank 0.
    """

    def __init__(
        self, folder: Path, arguments: Sequence[str], size: int, *, without: int | None = None,
        environment: Mapping[str, str] | None = None, homes: Sequence[Path] | None = None, port: int | None = None,
        addresses: Sequence[str] | None = None, prefixes: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Start ``size`` processes with the same arguments, all but the rank ``without``.

        ``folder`` takes the file of hosts, ``homes`` are the home folders by rank, and ``port`` is that of rank 0.
        ``addresses`` are those of the ranks, and ``prefixes`` the commands that run the program, as on another host.
        """
        self.port = port or free_port()
        hosts = folder / "hosts.json"
        where = addresses or ["127.0.0.1"] * size
        hosts.write_text(json.dumps([[f"{address}:{self.port + rank}"] for rank, address in enumerate(where)]))
        self.processes = {
            rank: subprocess.Popen(
                [*(prefixes[rank] if prefixes else ()), sys.executable, "-m", "dgemma_mlx", *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), "DGEMMA_LOG": "off",
                     **(environment or {}), **({"HOME": str(homes[rank])} if homes else {})},
            )
            for rank in range(size) if rank != without
        }  # fmt: skip

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes.values():
            process.kill()
            process.communicate()

    def results(self, seconds: float = 60) -> dict[int, tuple[int, str, str]]:
        """Wait until all processes have ended, and return the exit code, stdout and stderr of each rank."""
        deadline = time.monotonic() + seconds
        results = {}
        for rank, process in self.processes.items():
            stdout, stderr = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            results[rank] = process.returncode, stdout, stderr
        return results

    def wait_for_steps(self, seconds: float = 60) -> None:
        """Wait until rank 0 has printed something: with --jsonl, a step."""
        stdout = self.processes[0].stdout
        assert stdout is not None
        line = stdout.readline()
        assert line.startswith("{"), line
