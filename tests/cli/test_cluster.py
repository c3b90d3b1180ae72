"""``cluster check``: processes on loopback, machines that are missing, ports that are taken, and bad hostfiles."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.distributed.launch import launched
from dgemma_mlx.distributed.start import read_hostfile
from dgemma_mlx.errors import DgemmaError
from tests.distributed.ranks import environments, free_port

CHECK = [sys.executable, "-m", "dgemma_mlx", "cluster", "check", "-m", "demo"]
LOCAL = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}


def check(
    folder: Path, hosts: list[Any], *arguments: str, port: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the check of a hostfile."""
    (folder / "hosts.json").write_text(json.dumps(hosts))
    own = {"DGEMMA_CLUSTER_PORT": str(port or free_port(len(hosts))), **environment}
    return subprocess.run(
        [*CHECK, "--hostfile", str(folder / "hosts.json"), *arguments], env={**os.environ, **own}, timeout=90,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_all_well_through_ssh(tmp_path: Path) -> None:
    """Here ssh is a program that runs its last argument on this machine."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\nexec sh -c "$1"\n')
    ssh.chmod(0o755)
    done = check(
        tmp_path, [LOCAL, {**LOCAL, "ssh": "other-mac"}], PATH=f"{tmp_path}:{os.environ['PATH']}",
        DGEMMA_REMOTE_COMMAND=f"{sys.executable} -m dgemma_mlx",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["rank", "0"], ["rank", "1"]]
    assert all("Python 3." in line and line.endswith("has the model") for line in lines[:2])
    assert lines[2].startswith("links (ring): a small sum takes ")
    assert lines[3].startswith("demo: 3.9 MB of weights")
    assert [line.split(":")[0].split()[0] for line in lines[4:]] == ["whole", "cut,", "cut,", "prediction"]


def test_all_well_as_json_in_the_environment_of_mlx_launch(tmp_path: Path) -> None:
    running = [
        subprocess.Popen([*CHECK, "--json"], env=each, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        for each in environments(tmp_path, 2)
    ]
    outputs = [process.communicate(timeout=90)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0] and not outputs[1]
    facts = json.loads(outputs[0])
    assert (facts["model"], facts["backend"], facts["problem"]) == ("demo", "ring", None)
    first, second = facts["machines"]
    assert {**first, "rank": 1}.keys() == second.keys() and second["rank"] == 1
    assert first["checkpoint"] == second["checkpoint"] and first["speed"]["bandwidth"] > 0
    assert facts["links"].keys() == {"step", "small_sum", "bandwidth"} and min(facts["links"].values()) > 0
    found = facts["fits"]
    assert found["traffic"]["messages"] == 2 * 6 + 4 and found["whole"]["fits"] == [True, True]
    assert sum(part["bytes"] for part in found["cut"]) > found["whole"]["bytes"]  # norms and routers are on both
    assert found["expected"]["link"] == facts["links"]["step"]


def test_every_machine_is_tried_and_each_has_a_line(tmp_path: Path) -> None:
    nowhere = {"ssh": "no-such-host.invalid", "ips": ["127.0.0.1"]}
    done = check(tmp_path, [LOCAL, nowhere, LOCAL], "--json")
    assert (done.returncode, done.stderr) == (1, "")
    facts = json.loads(done.stdout)
    assert [each["rank"] for each in facts["machines"]] == [0, 1, 2]
    problems = [each["problem"] for each in facts["machines"]]
    assert problems[0] is None is problems[2] and "no-such-host.invalid" in problems[1]
    assert facts["machines"][1]["name"] == "no-such-host.invalid"
    assert (facts["problem"], facts["links"], facts["fits"]) == ("1 of 3 machines cannot be used", None, None)


def test_a_machine_that_never_starts(tmp_path: Path) -> None:
    environment = environments(tmp_path, 2)[0]
    done = subprocess.run(
        CHECK, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
    missing, last = done.stdout.splitlines()[1:]
    assert missing == "rank 1  127.0.0.1 (rank 1): did not come" and last == "1 of 2 machines cannot be used"


@pytest.mark.parametrize("taken", [-1, 0, 1], ids=["the channel's", "rank 0's", "rank 1's"])
def test_a_taken_port(tmp_path: Path, taken: int) -> None:
    port = free_port(2)
    with socket.create_server(("127.0.0.1", port + taken)):
        done = check(tmp_path, [LOCAL, LOCAL], port=port)
    line = f"cannot listen on 127.0.0.1:{port + taken}: Address already in use"
    assert done.returncode == 1
    if taken == -1:
        error, hint = done.stderr.splitlines()
        assert error == f"dgemma-mlx: {line}" and hint.startswith("hint: ") and not done.stdout
    else:
        lines = done.stdout.splitlines()
        assert [each.endswith(line) for each in lines] == [taken == 0, taken == 1, False]
        assert lines[2] == "1 of 2 machines cannot be used" and not done.stderr


def test_a_machine_with_another_version(tmp_path: Path) -> None:
    own = environments(tmp_path, 2)
    launch = launched(own[1])
    assert launch is not None
    running = subprocess.Popen(CHECK, env=own[0], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    while True:  # until rank 0 listens
        with suppress(ConnectionRefusedError):
            other = Client(launch.channel_address, authkey=launch.key)
            break
    other.send_bytes(json.dumps({"rank": 1, "name": "old-mac", "version": "0.0.1", "mlx": "0.30.0"}).encode())
    mine = json.loads(other.recv_bytes())
    other.send_bytes(b'{"end": "the versions differ"}')
    output, _ = running.communicate(timeout=90)
    other.close()
    line = f"old-mac (rank 1) has dgemma-mlx 0.0.1, and {mine['name']} has {mine['version']}"
    assert output.splitlines()[1:] == [f"rank 1  old-mac: {line}", "1 of 2 machines cannot be used"]
    assert running.returncode == 1


def test_several_machines_are_needed() -> None:
    done = subprocess.run(CHECK, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "a check needs several machines" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("3", "is not a hostfile"),
        ("[1, 2]", "is not a hostfile"),
        ('{"hosts": {"ssh": "a"}}', "is not a hostfile"),
        ('[{"ips": ["10.0.0.1"]}, {"ips": ["10.0.0.2"]}]', "is not a hostfile"),
        ('[{"ssh": "a", "ips": "10.0.0.1"}, {"ssh": "b", "ips": "10.0.0.2"}]', "is not a hostfile"),
        ('[{"ssh": "a", "ips": [1]}, {"ssh": "b", "ips": [2]}]', "is not a hostfile"),
        ('[{"ssh": "-oProxyCommand=x", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"]}]', "is not a hostfile"),
        ('[{"ssh": "a", "ips": ["10.0.0.1"]}]', "fewer than two hosts"),
        ('[{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b"}]', "no address (ips) of 'b'"),
        ('{"backend": "mpi", "hosts": [{"ssh": "a"}, {"ssh": "b"}]}', "must be ring or jaccl, not 'mpi'"),
        ('{"backend": "jaccl", "hosts": [{"ssh": "a", "ips": ["1"]}, {"ssh": "b"}]}', "one rdma device for each host"),
        ('{"envs": ["X;ls=1"], "hosts": []}', "envs must be NAME=VALUE, not 'X;ls=1'"),
        ('{"envs": "X=1", "hosts": []}', "is not a hostfile"),
    ],
)
def test_a_malformed_hostfile(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(content)
    with pytest.raises(DgemmaError) as caught:
        read_hostfile(path)
    assert message in caught.value.message and str(path) in caught.value.message
    assert caught.value.exit_code == 2 and caught.value.hint


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DgemmaError, match="cannot read"):
        read_hostfile(tmp_path / "nowhere.json")


def test_a_hostfile_as_mlx_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    host = {"ssh": "a", "ips": ["10.0.0.1"], "rdma": []}
    path.write_text(json.dumps({"backend": "", "envs": [], "hosts": [host, {**host, "ssh": "b"}]}))
    backend, hosts, variables = read_hostfile(path)
    assert (backend, [each.ssh for each in hosts], variables) == ("ring", ["a", "b"], [])
