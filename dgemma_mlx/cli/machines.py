"""Several machines: the options, and what a process does that is not the first one."""

from __future__ import annotations

import atexit
import os
import select
import socket
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dgemma_mlx.cli.parameters import section
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.distributed.channel import Channel
    from dgemma_mlx.distributed.launch import Launch
    from dgemma_mlx.distributed.links import Expectation
    from dgemma_mlx.distributed.start import Started
    from dgemma_mlx.generation.load import LoadOptions
    from dgemma_mlx.generation.model import Model

machine_option = section("Several machines")

Hostfile = Annotated[
    Path | None,
    machine_option("--hostfile", metavar="FILE", help="Start on the machines of this file as well, through ssh."),
]
Anyway = Annotated[
    bool, machine_option("--anyway", help="Cut the model over the machines even if one of them would be faster.")
]


@dataclass(frozen=True)
class MachineOptions:
    """The options of every command that can use several machines."""

    hostfile: Hostfile = None
    anyway: Anyway = False


def launch_of(hostfile: Path | None, keep_errors: bool = False) -> tuple[Launch | None, dict[int, Started]]:
    """Start the machines of a hostfile, or find those that mlx.launch has started; None for one machine.

    Returns also the processes that were started, by rank; `keep_errors` keeps their stderr to themselves. Raises
    `DgemmaError`.
    """
    from dgemma_mlx.distributed.launch import launched

    started: dict[int, Started] = {}
    if hostfile is not None:
        if "MLX_RANK" in os.environ:
            raise DgemmaError("--hostfile excludes mlx.launch", "mlx.launch has a --hostfile of its own.", exit_code=2)
        from dgemma_mlx.distributed.start import start

        started = start(hostfile, keep_errors=keep_errors)
    return launched(), started


@cache
def connected(hostfile: Path | None) -> tuple[Launch, Channel] | None:
    """Connect the machines that mlx.launch has started, or start those of a hostfile; None for one machine.

    Raises `DgemmaError` when a machine is missing or differs.
    """
    launch, _ = launch_of(hostfile)
    if launch is None:
        return None
    from dgemma_mlx.distributed.channel import open_channel
    from dgemma_mlx.distributed.start import end_started

    channel = open_channel(launch)
    channel.last_acts.append(end_started)
    atexit.register(channel.close)
    return launch, channel


def cut_model(machines: MachineOptions, options: LoadOptions, quiet: bool) -> Model | None:
    """Cut a model over the machines and return it, or return None when there is only one machine."""
    joined = connected(machines.hostfile)
    if joined is None:
        if machines.anyway:
            raise DgemmaError("--anyway needs several machines", "Name them with --hostfile.", exit_code=2)
        return None
    from dgemma_mlx.generation.machines import lead

    launch, channel = joined

    def say(expected: Expectation) -> None:
        if not quiet:
            print(
                f"dgemma-mlx: {channel.size} machines; a step is expected to take {expected.cut:.3f} s, "
                f"{expected.link:.3f} s of it on the links, and {expected.alone:.3f} s on one machine",
                file=sys.stderr,
            )

    try:
        return lead(channel, launch, options, say, machines.anyway)
    except DgemmaError as error:
        channel.close(error.message)
        raise


def is_follower() -> bool:
    """Return whether this process is another one than the first of several."""
    return os.environ.get("MLX_RANK", "0") != "0"


def join_launched() -> None:
    """Connect the first of several processes of mlx.launch at once: the others wait for it, and not for long.

    mlx.launch never ends the standard input of a process, so that it would be waited for without end. It is closed.
    """
    if "MLX_RANK" not in os.environ or connected(None) is None:
        return
    if not sys.stdin.isatty() and select.select([sys.stdin], [], [], 0)[0] and os.read(0, 1):
        hint = "Name the text with --file, or start the other machines with --hostfile instead of mlx.launch."
        raise DgemmaError("mlx.launch never ends standard input, so it cannot be read", hint, exit_code=2)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def run_follower() -> int:
    """Do what rank 0 asks for, and return the exit code."""
    from dgemma_mlx.distributed.channel import MachineLostError, open_channel
    from dgemma_mlx.distributed.launch import launched

    launch = launched()
    if launch is None:
        raise DgemmaError("MLX_RANK is set, but there are no other hosts", "Unset it.", exit_code=2)
    channel = open_channel(launch)
    try:
        message = channel.receive()
        if message["work"] == "check":
            from dgemma_mlx.cli.machine_check import answer_check

            message = answer_check(channel, launch, message)
        from dgemma_mlx.generation.machines import follow

        while True:
            message = follow(channel, launch, message)
    except MachineLostError:  # rank 0 has ended
        return 0
    except DgemmaError as error:
        reason = error.message
    except Exception as error:
        reason = f"unexpected {type(error).__name__}: {error}"
    return channel.fail(f"{socket.gethostname()} (rank {launch.rank}): {reason}")
