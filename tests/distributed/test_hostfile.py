"""``--hostfile``: the first process starts the others, and none of them stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgemma_mlx.distributed.start import read_hostfile
from dgemma_mlx.errors import DgemmaError
from tests.distributed.ranks import DEMO, ENDLESS, free_port

HERE = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}


def hostfile(folder: Path, *hosts: object) -> Path:
    path = folder / "hosts.json"
    path.write_text(json.dumps(hosts))
    return path


def command(path: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "dgemma_mlx", *DEMO, "--hostfile", str(path), *options, "Sort 7 3 5"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "DGEMMA_CLUSTER_PORT": str(free_port()), "DGEMMA_LOG": "off", **more}


def running(key: str) -> list[str]:
    """Return the ids of the processes with this variable in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if key.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
        except OSError:
            continue
    return found


def test_a_host_that_ssh_reaches(tmp_path: Path) -> None:
    """The program that is called ssh here runs the command on this machine, as sshd does: with a shell."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nwhile [ "$1" = -o ]; do shift 2; done\n[ "$1" = other ] && exec sh -c "$2"\n')
    ssh.chmod(0o755)
    result = subprocess.run(
        command(hostfile(tmp_path, HERE, {"ssh": "other", "ips": ["127.0.0.1"]})), capture_output=True, text=True,
        timeout=60, check=False, env=environment(
            PATH=f"{tmp_path}:{os.environ['PATH']}", DGEMMA_REMOTE_COMMAND=f"'{sys.executable}' -m dgemma_mlx"
        ),
    )  # fmt: skip
    assert (result.returncode, result.stdout, result.stderr) == (0, "3 5 7\n", "")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL, signal.SIGSTOP])
def test_no_process_stays(tmp_path: Path, end: signal.Signals) -> None:
    """After Ctrl-C, when the first process is killed, and when another one is stopped."""
    mark = f"DGEMMA_TEST_MARK={tmp_path}"
    with subprocess.Popen(
        command(hostfile(tmp_path, HERE, HERE), "--jsonl"), stdout=subprocess.PIPE,
        env=environment(**ENDLESS, DGEMMA_TEST_MARK=str(tmp_path)),
    ) as first:
        assert first.stdout is not None and first.stdout.readline().startswith(b"{")
        pids = running(mark)
        assert len(pids) == 2
        other = next(int(pid) for pid in pids if int(pid) != first.pid)
        os.kill(other if end == signal.SIGSTOP else first.pid, end)
        first.stdout.read()
    assert first.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9, signal.SIGSTOP: 1}[end]
    deadline = time.monotonic() + 5
    while running(mark):
        assert time.monotonic() < deadline, "a process has stayed"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "names fewer than two hosts"),
        (json.dumps([HERE]), "names fewer than two hosts"),
        (json.dumps([HERE, {"ips": ["10.0.0.2"]}]), "is not a hostfile"),
        (json.dumps([HERE, {"ssh": "b"}]), "has no address (ips) of 'b'"),
        (json.dumps({"hosts": [HERE, HERE], "backend": "mpi"}), "the backend must be ring or jaccl"),
        (json.dumps({"hosts": [HERE, HERE], "backend": "jaccl"}), "each host needs one rdma device"),
        (json.dumps("hosts"), "is not a hostfile"),
        (json.dumps([HERE, {"ssh": "b", "ips": ["b.local"]}]), "'b.local' is not an IPv4 address"),
        (json.dumps([1, 2]), "is not a hostfile"),
        (json.dumps([HERE, {"ssh": "b", "ips": "10.0.0.2"}]), "is not a hostfile"),
        (json.dumps([HERE, {"ssh": "b", "ips": [2]}]), "is not a hostfile"),
        (json.dumps([HERE, {"ssh": "-oProxyCommand=x", "ips": ["10.0.0.2"]}]), "is not a hostfile"),
        (json.dumps({"hosts": [HERE, HERE], "envs": "X=1"}), "is not a hostfile"),
        (json.dumps({"hosts": [HERE, HERE], "envs": ["X;ls=1"]}), "envs must be NAME=VALUE, not 'X;ls=1'"),
    ],
)
def test_a_hostfile_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(text)
    with pytest.raises(DgemmaError) as raised:
        read_hostfile(path)
    assert message in raised.value.message and raised.value.exit_code == 2


def test_what_mlx_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps({"backend": "jaccl", "envs": ["MLX_METAL_FAST_SYNCH=1"], "hosts": [
        {"ssh": "a", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2"]},
        {"ssh": "b", "ips": [], "rdma": ["rdma_en2", None]},
    ]}))  # fmt: skip
    backend, hosts, variables = read_hostfile(path)
    assert (backend, [host.ssh for host in hosts], variables) == ("jaccl", ["a", "b"], ["MLX_METAL_FAST_SYNCH=1"])
