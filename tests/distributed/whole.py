"""Several processes of the program on this machine, each with the whole model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dgemma_mlx.distributed.channel import Channel, open_channel
from dgemma_mlx.distributed.launch import launched
from tests.distributed.ranks import free_port

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "DGEMMA_LOG": "off"}


@contextmanager
def machines(count: int, folder: Path, arguments: Sequence[str | Path], homes: Sequence[Path] = ()) -> Iterator[
    list[subprocess.Popen[str]]
]:  # fmt: skip
    """Start processes as mlx.launch does, each with its home folder.

    The first one has the arguments, and takes its pipes.
    """
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(count)]))
    with ExitStack() as stack:
        processes = []
        for rank in range(count):
            process = stack.enter_context(subprocess.Popen(
                [sys.executable, "-m", "dgemma_mlx", *(arguments if rank == 0 else ())],
                env={**ENVIRONMENT, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile),
                     **({"HOME": str(homes[rank])} if homes else {})},
                text=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, stderr=subprocess.PIPE,
            ))  # fmt: skip
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def alone(*arguments: str | Path) -> str:
    """Return what one process prints."""
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=120, check=True, env=ENVIRONMENT,
    ).stdout  # fmt: skip


def together(folder: Path, *arguments: str | Path) -> str:
    """Return what two processes print."""
    with machines(2, folder, arguments) as (first, second):
        stdout, stderr = first.communicate(timeout=120)
        assert (first.returncode, second.wait(10)) == (0, 0), stderr
    return stdout


def untimed(line: str) -> dict[str, Any]:
    """Return the object of a line without the times and the memory."""
    record: dict[str, Any] = json.loads(line)
    counts = record.get("statistics", record)
    for name in ("prefill_seconds", "seconds", "tokens_per_second", "peak_memory"):
        counts.pop(name, None)
    return record


@contextmanager
def joined(folder: Path, *commands: Sequence[str]) -> Iterator[Channel]:
    """Start a process of Python for each of the commands, as other machines of this one, and yield the channel."""
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(1 + len(commands))]))
    launch = launched({"MLX_HOSTFILE": str(hostfile), "MLX_RANK": "0"})
    assert launch is not None
    with ExitStack() as stack:
        for rank, command in enumerate(commands, 1):
            process = stack.enter_context(subprocess.Popen(
                [sys.executable, *command], env={**ENVIRONMENT, "MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(rank)},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            ))  # fmt: skip
            stack.callback(process.kill)
        channel = open_channel(launch)
        stack.callback(channel.close)
        yield channel
