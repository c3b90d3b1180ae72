"""``cluster check``: processes on loopback, machines that are missing, ports that are taken, and bad hostfiles."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.distributed.launch import launched
from tests.distributed.ranks import Ranks, free_port

CHECK = ("cluster", "check", "-m", "demo")
PROGRAM = (sys.executable, "-m", "dgemma_mlx", *CHECK)
LOCAL = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}


def check(
    folder: Path, hosts: list[Any], *arguments: str, port: int | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the check of a hostfile."""
    (folder / "hosts.json").write_text(json.dumps(hosts))
    own = {"DGEMMA_CLUSTER_PORT": str(port or free_port(len(hosts))), **environment}
    return subprocess.run(
        [*PROGRAM, "--hostfile", str(folder / "hosts.json"), *arguments], env={**os.environ, **own}, timeout=90,
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
    with Ranks(tmp_path, [*CHECK, "--json"], 2) as ranks:
        results = ranks.results(90)
    assert [results[rank][0] for rank in (0, 1)] == [0, 0] and not results[1][1]
    facts = json.loads(results[0][1])
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
    with Ranks(tmp_path, CHECK, 2, without=1) as ranks:
        code, output, errors = ranks.results(90)[0]
    assert (code, errors) == (1, "")
    missing, last = output.splitlines()[1:]
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


def join(folder: Path, name: str, **versions: str) -> tuple[Connection, dict[str, Any]]:
    """Connect to rank 0 as rank 1, once it listens, and return the connection and what rank 0 says of itself."""
    launch = launched({"MLX_RANK": "1", "MLX_HOSTFILE": str(folder / "hosts.json")})
    assert launch is not None
    while True:
        with suppress(ConnectionRefusedError):
            connection = Client(launch.channel_address, authkey=launch.key)
            break
        time.sleep(0.05)
    connection.send_bytes(json.dumps({"rank": 1, "name": name, **versions}).encode())
    return connection, json.loads(connection.recv_bytes())


def test_a_machine_with_another_version(tmp_path: Path) -> None:
    with Ranks(tmp_path, CHECK, 2, without=1) as ranks:
        other, mine = join(tmp_path, "old-mac", version="0.0.1", mlx="0.30.0")
        other.send_bytes(b'{"end": "the versions differ"}')
        code, output, _ = ranks.results(90)[0]
        other.close()
    line = f"old-mac (rank 1) has dgemma-mlx 0.0.1, and {mine['name']} has {mine['version']}"
    assert output.splitlines()[1:] == [f"rank 1  old-mac: {line}", "1 of 2 machines cannot be used"]
    assert code == 1


def test_a_machine_that_ends_before_the_links_are_measured(tmp_path: Path) -> None:
    facts = {
        "name": "brief-mac", "dgemma_mlx": "1", "mlx": "1", "python": "3", "os": "macOS", "chip": "M1", "memory": 1e9,
        "memory_for_model": 1e9, "speed": {"bandwidth": 1e9, "flops": 1e9}, "checkpoint": None, "problem": None,
    }  # fmt: skip
    with Ranks(tmp_path, CHECK, 2, without=1) as ranks:
        other, mine = join(tmp_path, "brief-mac")
        other.send_bytes(json.dumps(facts).encode())
        while "sums_of" not in json.loads(other.recv_bytes()):
            pass
        other.close()
        code, output, errors = ranks.results(90)[0]
    assert code == 1 and output.count("\n") == 2
    lost = "brief-mac (rank 1) has ended"  # what the channel says, if MLX has not begun to connect
    alone = f"{mine['name']} (rank 0) and its neighbours did not connect within 8 s"
    assert errors in (f"dgemma-mlx: {lost}\n", f"dgemma-mlx: {alone}\n")


def test_several_machines_are_needed() -> None:
    done = subprocess.run(PROGRAM, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "a check needs several machines" in done.stderr
