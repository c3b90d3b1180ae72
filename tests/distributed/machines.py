"""What the programs that run in several processes share: a cut model on rank 0, and the others that follow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgemma_mlx.distributed.channel import MachineLostError, open_channel
from dgemma_mlx.distributed.launch import launched
from dgemma_mlx.generation.load import LoadOptions
from dgemma_mlx.generation.machines import follow, lead
from dgemma_mlx.generation.model import Model
from tests.distributed.ranks import free_port


def on_all_ranks(options: LoadOptions, work: Callable[[Model], Any]) -> None:
    """Cut a model, print what ``work`` returns for it as JSON on rank 0, and follow on the others."""
    launch = launched()
    assert launch is not None
    channel = open_channel(launch)
    if launch.rank == 0:
        print(json.dumps(work(lead(channel, launch, options, lambda _: None, anyway=True))))
        channel.close()
        return
    try:
        follow(channel, launch, channel.receive())
    except MachineLostError:
        assert channel.is_over


def run_on_ranks(folder: Path, size: int, *program: str, **environment: str) -> Any:
    """Run a program in ``size`` processes, and return what rank 0 prints as JSON."""
    port, hosts = free_port(), folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(size)]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *program], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), **environment},
        )
        for rank in range(size)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # closes its pipe
    return json.loads(outputs[0])
