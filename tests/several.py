"""Several processes on this machine, in the environment that mlx.launch would give them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def free_ports(count: int) -> int:
    """Return the first of ``count`` free ports in a row."""
    while True:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError, OverflowError):
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            for following in range(port + 1, port + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", following))
            return port


def environments(folder: Path, count: int) -> list[dict[str, str]]:
    """Return the environment of each rank, with ports that are free, also the one of the channel before them."""
    port = free_ports(count + 1) + 1
    hosts = folder / "ring.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(count)]))
    return [{**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(count)]


def run_on_ranks(folder: Path, count: int, arguments: Sequence[str], seconds: float = 60) -> list[str]:
    """Run Python with these arguments as each rank, and return what each has printed."""
    running = [
        subprocess.Popen([sys.executable, *arguments], env=each, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                         text=True)
        for each in environments(folder, count)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0] * count
    return outputs
