"""Signals at any moment: during the imports, during a download, and at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from tests.hub_server import HubServer, Repository

LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
SORT = ("generate", "-q", "-m", "demo", "--seed", "1", "Sort 7 3 5")
WITH_IMPORTS = (sys.executable, "-X", "importtime", "-m", "dgemma_mlx")  # a line on stderr for each import


def _default_signals() -> None:
    """Undo what a background job or nohup has set: a process inherits that it ignores a signal."""
    for number in LINES:
        signal.signal(number, signal.SIG_DFL)


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, preexec_fn=_default_signals,  # noqa: PLW1509
    )  # fmt: skip


@pytest.fixture(scope="module")
def imports() -> list[str]:
    """The imports that a short answer makes after the program's entry, in order, as stderr shows them."""
    done = start(*WITH_IMPORTS, *SORT)
    _, error = done.communicate(timeout=60)
    names = [line.rpartition("|")[2].strip() for line in error.splitlines() if line.startswith("import time:")]
    return names[names.index("dgemma_mlx.cli.entry") + 1 :]


def ends_after(module: str, number: signal.Signals) -> None:
    """Send a signal when a module has been imported, and check how the program ends."""
    with start(*WITH_IMPORTS, *SORT) as process:
        assert process.stderr is not None
        rest = []
        for line in process.stderr:
            if line.startswith("import time:") and line.rpartition("|")[2].strip() == module:
                process.send_signal(number)
                rest = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
                break
        assert process.wait(timeout=60) == 128 + number, (module, rest)
        assert rest == [LINES[number]], module


@pytest.mark.parametrize(("place", "number"), [(0.0, signal.SIGINT), (0.4, signal.SIGTERM), (0.8, signal.SIGHUP)])
def test_a_signal_during_the_imports_is_one_line(imports: list[str], place: float, number: signal.Signals) -> None:
    ends_after(imports[int(place * len(imports))], number)


@pytest.mark.slow
@pytest.mark.parametrize("number", LINES)
def test_a_signal_after_any_of_many_imports_is_one_line(imports: list[str], number: signal.Signals) -> None:
    for module in imports[: -len(imports) // 10 : len(imports) // 30]:
        ends_after(module, number)


def test_an_ignored_signal_stays_ignored() -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv[1:] = ['--version']\n"
        "from dgemma_mlx.cli import entry\n"
        "try:\n    entry.main()\nexcept SystemExit:\n    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def slow_hub() -> Iterator[tuple[HubServer, threading.Event]]:
    """A Hub whose weights never arrive, and an event that says when somebody asks for them."""
    files = {path.name: path.read_bytes() for path in DEMO_FOLDER.iterdir()}
    asked = threading.Event()
    with HubServer({"owner/tiny": Repository({"main": files})}) as hub:
        hub.stalled["model.safetensors"] = asked
        yield hub, asked


@pytest.mark.parametrize(
    ("number", "command"),
    [
        (signal.SIGINT, ("generate", "-m", "owner/tiny", "Sort 7 3 5")),
        (signal.SIGTERM, ("convert", "owner/tiny", "-o", "out", "--recipe", "bf16")),
        (signal.SIGINT, ("fuse", "-m", "owner/tiny", "--adapter", "adapter", "-o", "out")),
    ],
)
def test_one_signal_ends_a_download(
    slow_hub: tuple[HubServer, threading.Event], tmp_path: Path, number: signal.Signals, command: tuple[str, ...]
) -> None:
    hub, asked = slow_hub
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    with start(sys.executable, "-m", "dgemma_mlx", *command, **environment) as process:
        assert asked.wait(60), process.stderr
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert error.splitlines()[-1:] == [LINES[number]] and "Traceback" not in error
