"""Starting of the other machines of a hostfile, through ssh, as ``mlx.launch`` does it.

The process that the user has started becomes rank 0 and keeps the terminal. The hostfile is the one that MLX documents
and ``mlx.distributed_config`` writes; its first host is this machine.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import IO, Any

from dgemma_mlx.checks import shown
from dgemma_mlx.distributed.launch import DEFAULT_PORT
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json

_GRACE = 1.0  # seconds that they have for it
_VARIABLE = re.compile(r"[A-Za-z_]\w*=", re.ASCII)
_MOST_WORDS = 1 << 16  # bytes of stderr that are read
PORT_VARIABLE = "DGEMMA_CLUSTER_PORT"  # of the first host; the others follow, and the one before is the channel's
_LOCAL = ("127.0.0.1", "localhost", "::1")
STARTED_VARIABLE = "DGEMMA_STARTED"  # in the processes that are started here: "quiet", or "heard" by who started them
_started: list[subprocess.Popen[bytes]] = []
_written: list[Path] = []
_HINT = "`mlx.distributed_config` writes one; docs/several-macs.md shows it."


@dataclass(frozen=True)
class Host:
    """A machine of a hostfile.

    Attributes:
        ssh: The name by which ssh reaches it.
        ips: Its addresses for the ring.
        rdma: For JACCL, its device towards each machine, or None towards itself.
    """

    ssh: str
    ips: tuple[str, ...]
    rdma: tuple[str | None, ...]


def read_hostfile(path: Path) -> tuple[str, list[Host], list[str]]:
    """Return the back end, the hosts and the environment variables (``NAME=VALUE``) of a hostfile.

    Raises ``DgemmaError`` (exit code 2) when it cannot be read, or names fewer than two hosts.
    """
    try:
        content: Any = parse_json(path.read_bytes())
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", _HINT, exit_code=2) from None
    except ValueError as error:
        raise DgemmaError(f"{path} is not JSON: {error}", _HINT, exit_code=2) from None
    data = content if isinstance(content, Mapping) else {"hosts": content}
    try:
        hosts = [_host(host) for host in data["hosts"]]
        backend, variables = str(data.get("backend") or "ring"), _texts(data.get("envs") or [])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise DgemmaError(f"{path} is not a hostfile", _HINT, exit_code=2) from None
    if wrong := [variable for variable in variables if not _VARIABLE.match(variable)]:
        raise DgemmaError(f"{path}: envs must be NAME=VALUE, not {shown(wrong[0])}", _HINT, exit_code=2)
    if backend not in ("ring", "jaccl"):
        raise DgemmaError(f"{path}: the backend must be ring or jaccl, not {shown(backend)}", _HINT, exit_code=2)
    if len(hosts) < 2:
        raise DgemmaError(f"{path} names fewer than two hosts", "One machine needs no hostfile.", exit_code=2)
    if wrong := [ip for host in hosts for ip in host.ips if not _is_address(ip)]:
        raise DgemmaError(f"{path}: {shown(wrong[0])} is not an IPv4 address such as 10.0.0.2", _HINT, exit_code=2)
    if bad := [host.ssh for host in hosts if not host.ips and (backend == "ring" or host is hosts[0])]:
        raise DgemmaError(f"{path} has no address (ips) of {shown(bad[0])}", _HINT, exit_code=2)
    if backend == "jaccl" and any(len(host.rdma) != len(hosts) for host in hosts):
        raise DgemmaError(f"{path}: each host needs one rdma device for each host, null for itself", _HINT, exit_code=2)
    return backend, hosts, variables


def _host(entry: Mapping[str, Any]) -> Host:
    """Return a host of a hostfile. Raises ``ValueError``, ``KeyError`` or ``TypeError`` when it is malformed."""
    (name,) = _texts([entry["ssh"]])
    if name.startswith("-"):
        raise ValueError("ssh would take it as an option")
    rdma = entry.get("rdma") or []
    if not isinstance(rdma, list):
        raise TypeError("rdma is not a list")
    return Host(name, tuple(_texts(entry.get("ips") or [])), tuple(rdma))


def _is_address(text: str) -> bool:
    """Return whether a text is an IPv4 address."""
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True


def _texts(values: Any) -> list[str]:
    """Return a list of texts that are not empty. Raises ``TypeError`` for anything else."""
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise TypeError("not a list of texts")
    return values


@dataclass(frozen=True)
class Started:
    """A process that has been started on another machine, or on this one.

    Attributes:
        host: The name of the machine in the hostfile.
        process: The process, or ssh.
        errors: What it writes to stderr, where that is kept.
    """

    host: str
    process: subprocess.Popen[bytes]
    errors: IO[bytes] | None

    @property
    def has_ended(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    def last_words(self) -> str:
        """Return the last line that it has written to stderr, without a hint; empty where there is none."""
        if self.errors is None:
            return ""
        written = os.pread(self.errors.fileno(), _MOST_WORDS, 0)  # the process writes on at the file's own place
        lines = written.decode(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip() and not line.startswith("hint: ")), "")


def start(path: Path, keep_errors: bool = False) -> dict[int, Started]:
    """Start a process on every other machine of a hostfile, and make this one rank 0, in its environment.

    The others end when this process ends, because their standard input ends. Returns the processes by rank. They are
    quiet, because this process says what happens to them; with ``keep_errors``, what they write to stderr is kept.
    Raises ``DgemmaError`` as ``read_hostfile`` does, and when ssh is missing.
    """
    backend, hosts, variables = read_hostfile(path)
    port = _first_port(len(hosts))
    if backend == "ring":
        addresses = [[f"{host.ips[0]}:{port + rank}"] for rank, host in enumerate(hosts)]
        name, content, common = "MLX_HOSTFILE", json.dumps(addresses), {}
    else:
        name, content = "MLX_IBV_DEVICES", json.dumps([host.rdma for host in hosts])
        common = {"MLX_JACCL_COORDINATOR": f"{hosts[0].ips[0]}:{port}"}
    common |= {variable.partition("=")[0]: variable.partition("=")[2] for variable in variables}
    common_there = common | {STARTED_VARIABLE: "heard" if keep_errors else "quiet"}
    key = secrets.token_hex(16)
    atexit.register(end_started)
    file = _temporary(content)
    os.environ.update(common | {name: file, "MLX_RANK": "0", "DGEMMA_CLUSTER_KEY": key})
    started: dict[int, Started] = {}
    for rank, host in enumerate(hosts[1:], 1):
        own = common_there | {"MLX_RANK": str(rank)}
        errors = tempfile.TemporaryFile() if keep_errors else None  # noqa: SIM115 - it is read later
        process = _start_here(own | {name: file}, key, errors) if host.ssh in _LOCAL else _start_there(
            host.ssh, own, name, content, key, errors
        )  # fmt: skip
        _started.append(process)
        started[rank] = Started(host.ssh, process, errors)
    return started


def _first_port(count: int) -> int:
    """Return the port of the first of ``count`` hosts: that of the variable ``PORT_VARIABLE``, or mlx.launch's own.

    Raises ``DgemmaError`` (exit code 2) for anything but a port, and when there are too few ports after it.
    """
    text = os.environ.get(PORT_VARIABLE) or str(DEFAULT_PORT)
    if not (text.isascii() and text.isdigit() and 1 < int(text[:6]) < 1 << 16):
        raise DgemmaError(f"{PORT_VARIABLE} must be a port, not {shown(text)}", "Choose one above 1024.", exit_code=2)
    port = int(text)
    if port + count > 1 << 16:
        line = f"{PORT_VARIABLE} is {port}, which leaves too few ports for {count} hosts"
        raise DgemmaError(line, f"Choose at most {(1 << 16) - count}.", exit_code=2)
    return port


def _start_here(variables: Mapping[str, str], key: str, errors: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start a process on this machine."""
    environment = {**os.environ, **variables, "DGEMMA_CLUSTER_KEY": key}
    command = [sys.executable, "-m", "dgemma_mlx"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, env=environment,
        start_new_session=True,
    )  # fmt: skip


def _start_there(
    host: str, variables: Mapping[str, str], name: str, content: str, key: str, errors: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    """Start a process on another machine. The key goes through ssh's input, so that no list of processes shows it."""
    exports = " ".join(f"{variable}={shlex.quote(value)}" for variable, value in variables.items())
    program = os.environ.get("DGEMMA_REMOTE_COMMAND", "dgemma-mlx")
    script = (
        f"file=$(mktemp); trap 'rm -f \"$file\"' EXIT; printf %s {shlex.quote(content)} > \"$file\"; "
        f"IFS= read -r DGEMMA_CLUSTER_KEY; export DGEMMA_CLUSTER_KEY {exports} {name}=\"$file\"; {program}"
    )
    try:
        process = subprocess.Popen(
            ["ssh", "-o", "BatchMode=yes", host, script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=errors, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise DgemmaError(f"cannot run ssh: {error.strerror}", "Install ssh, or use mlx.launch.") from None
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(f"{key}\n".encode())
        process.stdin.flush()
    return process


def _temporary(content: str) -> str:
    """Write a file that ``end_started`` removes, and return its path."""
    with tempfile.NamedTemporaryFile("w", prefix="dgemma-mlx-", suffix=".json", delete=False) as file:
        file.write(content)
    _written.append(Path(file.name))
    return file.name


def end_started() -> None:
    """End the processes that ``start`` has started, and remove what it has written.

    The processes have lost rank 0 and end by themselves, unless they are stopped.
    """
    deadline = time.monotonic() + _GRACE
    while _started:
        process = _started.pop()
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with suppress(OSError):
            process.kill()
            process.wait()
    while _written:
        with suppress(OSError):
            _written.pop().unlink()
