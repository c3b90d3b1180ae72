"""Two hosts with addresses of their own and a cable between them: network namespaces of Linux."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.ranks import DEMO, ENDLESS, Ranks

ADDRESSES = ("10.77.31.1", "10.77.31.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two hosts that are joined by a cable, ``eth`` at both ends. Skipped where none can be made."""
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip`, which makes network namespaces")
    names = [f"dgemma-{os.getpid()}-{number}" for number in range(2)]
    try:
        join(names)
        yield names
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces cannot be made here")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def join(names: list[str]) -> None:
    """Make the hosts and the cable."""
    for name in names:
        ip("netns", "add", name)
    ip("link", "add", "eth", "netns", names[0], "type", "veth", "peer", "name", "eth", "netns", names[1])
    for name, address in zip(names, ADDRESSES, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth")
        for device in ("eth", "lo"):
            ip("-n", name, "link", "set", device, "up")


def test_two_hosts(tmp_path: Path, hosts: list[str]) -> None:
    """They answer together; when the cable is pulled, both end with one line."""
    prefixes = [("ip", "netns", "exec", host) for host in hosts]
    with Ranks(tmp_path, (*DEMO, "Sort 7 3 5"), 2, addresses=ADDRESSES, prefixes=prefixes) as ranks:
        assert [(code, stdout) for code, stdout, _ in ranks.results().values()] == [(0, "3 5 7\n"), (0, "")]
    endless = (*DEMO, "--jsonl", "Sort 7 3 5")
    with Ranks(tmp_path, endless, 2, addresses=ADDRESSES, prefixes=prefixes, environment=ENDLESS) as ranks:
        ranks.wait_for_steps()
        began = time.monotonic()
        ip("-n", hosts[1], "link", "set", "eth", "down")
        for rank, (code, _, stderr) in ranks.results(20).items():
            assert code == 1 and f"(rank {1 - rank}) has not answered for 10 s" in stderr, stderr
        assert time.monotonic() - began < 15
