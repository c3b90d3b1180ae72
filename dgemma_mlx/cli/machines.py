"""Several machines: the options, and what a process does that is not the first one."""

from __future__ import annotations

import atexit
import os
import select
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dgemma_mlx.cli.parameters import section
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.distributed.channel import Channel, MachineLostError
    from dgemma_mlx.distributed.launch import Launch
    from dgemma_mlx.distributed.links import Expectation
    from dgemma_mlx.distributed.start import Started
    from dgemma_mlx.generation.load import LoadOptions
    from dgemma_mlx.generation.model import Model
    from dgemma_mlx.generation.team import Kind, Team

machine_option = section("Several machines")

Hostfile = Annotated[
    Path | None,
    machine_option(
        "--hostfile", metavar="FILE", help="Use the machines in this hostfile, through ssh (docs/several-macs.md)."
    ),
]
Anyway = Annotated[
    bool, machine_option("--anyway", help="Cut the model over the machines even if one of them would be faster.")
]


Split = Annotated[
    bool, machine_option("--split", help="Cut the model over the machines, instead of sharing the work among them.")
]


@dataclass(frozen=True)
class MachineOptions:
    """The options of every command that can use several machines."""

    hostfile: Hostfile = None
    anyway: Anyway = False

    def check(self) -> None:
        """Raise `DgemmaError` (exit code 2) for an option that has no effect, given that the model is cut."""
        if self.anyway and not self.are_several:
            raise DgemmaError("--anyway needs several machines", _NAME_THEM, exit_code=2)

    def check_prompt_cache(self, path: Path | None) -> None:
        """Raise `DgemmaError` (exit code 2) for a file of the prompt cache of a model that will be cut."""
        if path is not None and self.are_several:
            from dgemma_mlx.generation.prompt_cache import NOT_IN_A_FILE

            raise DgemmaError(*NOT_IN_A_FILE, exit_code=2)

    @property
    def are_several(self) -> bool:
        """Whether there are other machines."""
        return self.hostfile is not None or "MLX_RANK" in os.environ


@dataclass(frozen=True)
class TeamOptions(MachineOptions):
    """The options of a command whose work can be spread over several machines."""

    split: Split = False

    def check_team(self, is_spread: bool) -> bool:
        """Return whether each machine is to have the whole model. ``is_spread`` says whether there is work to spread.

        Raises `DgemmaError` (exit code 2) for an option that has no effect.
        """
        if self.split and not self.are_several:
            raise DgemmaError("--split needs several machines", _NAME_THEM, exit_code=2)
        if self.split and not is_spread:
            raise DgemmaError(
                "--split is for work that several machines can share", "Here the model is cut without it.", exit_code=2
            )
        self.check()
        is_whole = is_spread and not self.split
        if self.anyway and is_whole:
            raise DgemmaError("--anyway is for a model that is cut", "Add --split, or leave it out.", exit_code=2)
        return is_whole


_NAME_THEM = "Name them with --hostfile."


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
    launch, started = launch_of(hostfile)
    if launch is None:
        return None
    from dgemma_mlx.distributed.channel import open_channel
    from dgemma_mlx.distributed.start import end_started

    channel = open_channel(launch, has_ended=lambda rank: rank in started and started[rank].has_ended)
    channel.last_acts.append(end_started)
    atexit.register(channel.close)
    return launch, channel


def cut_model(machines: MachineOptions, options: LoadOptions, quiet: bool) -> Model | None:
    """Cut a model over the machines and return it, or return None when there is only one machine."""
    from dgemma_mlx.generation.load import FLOAT16

    if machines.are_several and options.is_float16:  # refused here before any machine is started
        raise DgemmaError(*FLOAT16, exit_code=2)
    joined = connected(machines.hostfile)
    if joined is None:
        return None
    from dgemma_mlx.generation.machines import lead

    launch, channel = joined

    def say(expected: Expectation) -> None:
        if not quiet:
            print(
                f"dgemma-mlx: {channel.size} machines; a step is expected to take {expected.cut:.3f} s "
                f"({expected.link:.3f} s of it on the links), and {expected.alone:.3f} s on one machine",
                file=sys.stderr,
            )

    try:
        return lead(channel, launch, options, say, machines.anyway)
    except DgemmaError as error:
        channel.close(error.message)
        raise


def invite(
    machines: MachineOptions, options: LoadOptions, quiet: bool, work: str = "whole", **more: Any
) -> Channel | None:
    """Let the other machines, if there are any, load the whole model, and say on stderr how many there are.

    ``work`` is what they are to do with it, and ``more`` is what they must know for that. Returns their channel.
    """
    joined = connected(machines.hostfile)
    if joined is None:
        return None
    from dgemma_mlx.generation.team import invite

    _, channel = joined
    try:
        invite(channel, options, work, **more)
    except DgemmaError as error:
        channel.close(error.message)
        raise
    if not quiet:
        print(f"dgemma-mlx: {channel.size} machines, each with the whole model", file=sys.stderr)
    return channel


def team_of(machines: TeamOptions, model: Model, is_whole: bool, says_lost: bool = True) -> Team:
    """Return the machines that have the whole model, those that `invite` has asked: or else this one alone.

    A machine that is lost is said on stderr unless ``says_lost`` is false, where its work cannot be done by another.
    """
    from dgemma_mlx.generation.team import Team

    joined = connected(machines.hostfile) if is_whole else None
    if joined is None:
        return Team(model)
    _, channel = joined
    return Team(model, channel, lambda error: say_lost(error, channel) if says_lost else None)


def say_lost(error: MachineLostError, channel: Channel) -> None:
    """Say on stderr that a machine is lost, and who does its work. A line of progress is overwritten."""
    others = 1 + len({*channel.alive} - {error.rank})
    doers = "this machine does" if others == 1 else f"the other {others} machines do"
    start = "\r" if sys.stderr.isatty() else ""
    print(f"{start}dgemma-mlx: {error.message}; {doers} its work", file=sys.stderr, flush=True)


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


def _watch_first() -> None:
    """In a process that `--hostfile` has started, end with the first one, and leave it to that one to say why.

    Its standard input ends when the first process, or the ssh between them, ends.
    """
    from threading import Thread

    from dgemma_mlx.distributed.start import STARTED_VARIABLE

    started = os.environ.get(STARTED_VARIABLE)
    if started is None:
        return
    if started == "quiet":
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        os.close(nothing)

    def watch() -> None:
        os.read(0, 1)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def run_follower(commands: Mapping[str, Kind]) -> int:
    """Do what rank 0 asks for, and return the exit code. ``commands`` do the tasks of commands."""
    from dgemma_mlx.distributed.channel import WORD, MachineLostError, open_channel
    from dgemma_mlx.distributed.launch import launched

    _watch_first()
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
        from dgemma_mlx.generation.team import answer_task, attend
        from dgemma_mlx.infill.spread import GapWriter
        from dgemma_mlx.server.follower import follow_server

        kinds: dict[str, Kind] = {"answer": answer_task, "gaps": GapWriter(), **commands}
        while True:
            if message["work"] == "cut":
                message = follow(channel, launch, message)
            elif message["work"] == "serve":
                message = follow_server(channel, message)
            else:
                message = attend(channel, message, kinds)
    except MachineLostError:  # rank 0 has ended
        return 0
    except DgemmaError as error:
        reason = error.message
    except Exception as error:
        time.sleep(WORD)
        if channel.is_over:  # MLX's operations fail when rank 0 has ended
            return 0
        reason = f"unexpected {type(error).__name__}: {error}"
    return channel.fail(f"{socket.gethostname()} (rank {launch.rank}): {reason}")
