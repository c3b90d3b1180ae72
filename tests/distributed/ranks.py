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
    """Return the first of ``count`` consecutive ports that are free, after one that is free as well."""
    for first in range(41000 + os.getpid() % 500 * 40, 65000, count + 1):
        try:
            for port in range(first - 1, first + count):
                with socket.socket() as attempt:
                    attempt.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no port is free")


def environments(folder: Path, size: int, port: int | None = None) -> list[dict[str, str]]:
    """Return the environment of each rank, with the ports from ``port`` on. ``folder`` takes the file of hosts."""
    first = port or free_port(size)
    hosts = folder / "ring.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{first + rank}"] for rank in range(size)]))
    own = {"MLX_HOSTFILE": str(hosts), "DGEMMA_LOG": "off"}
    return [{**os.environ, **own, "MLX_RANK": str(rank)} for rank in range(size)]


def printed(folder: Path, size: int, arguments: Sequence[str], seconds: float = 100) -> list[str]:
    """Run Python with these arguments as each rank, and return what each has printed, once all have ended well."""
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        for environment in environments(folder, size)
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return outputs


class Ranks:
    """Processes with ranks from 0, each with its arguments, on free ports.

    Attributes:
        processes: The processes, by rank.
        port: The port of rank 0.
    """

    def __init__(
        self, folder: Path, arguments: Sequence[str], size: int, *, without: int | None = None,
        environment: Mapping[str, str] | None = None, folders: Sequence[Path] | None = None, port: int | None = None,
    ) -> None:
        """Start ``size`` processes with the same arguments, all but the rank ``without``.

        ``folder`` takes the file of hosts, ``folders`` are the working folders by rank, and ``port`` is that of rank 0.
        """
        self.port = port or free_port()
        own = environments(folder, size, self.port)
        self.processes = {
            rank: subprocess.Popen(
                [sys.executable, "-m", "dgemma_mlx", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, cwd=folders[rank] if folders else None,
                env={**own[rank], **(environment or {})},
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
