"""``dgemma-mlx serve`` as a process: what it prints, and how its options reach the server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from dgemma_mlx.cli.serve import _model_name, _seconds
from dgemma_mlx.errors import DgemmaError

PROGRAM = [sys.executable, "-m", "dgemma_mlx", "serve"]


@contextmanager
def served(*options: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the program on a free port, and yield its address and the process."""
    process = subprocess.Popen(
        [*PROGRAM, "--port", "0", *options], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"(\w+) is served at (http://\S+);", line):
                break
        assert found, "".join(lines)
        yield found[2], process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def refused(*options: str, **environment: str) -> str:
    """Return the error of a server that does not start."""
    done = subprocess.run(
        [*PROGRAM, "-m", "demo", "--port", "0", *options], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 2, done.stderr
    return done.stderr


def test_the_command_serves_the_model_that_it_names() -> None:
    with served("-m", "demo", "--max-tokens", "3") as (address, process):
        body = {"messages": [{"role": "user", "content": "Count from 13 to 40."}], "seed": 1}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["model"] == "demo" and answer["choices"][0]["finish_reason"] == "length"
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


def test_the_page_is_opened_in_the_browser(tmp_path: Path) -> None:
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}.part && mv {opened}.part {opened} && sleep 3\n')
    browser.chmod(0o755)
    with served("-m", "demo", "--open", "--host", "0.0.0.0", BROWSER=str(browser), DGEMMA_API_KEY="k") as (address, _):
        local = address.replace("0.0.0.0", "127.0.0.1")
        for _ in range(600):
            if opened.exists():
                break
            time.sleep(0.05)
        assert opened.read_text().strip() == local
        assert httpx.get(f"{local}/health").status_code == 200
        assert httpx.get(f"{local}/v1/models").status_code == 401


def test_without_its_libraries_it_says_how_to_install_them() -> None:
    code = (
        "import sys, importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'uvicorn' else real(name, *rest)\n"
        "from dgemma_mlx.cli.app import run\n"
        "sys.argv = ['dgemma-mlx', 'serve']\n"
        "sys.exit(run())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "dgemma-mlx: serve needs uvicorn\nhint: Run pip install uvicorn, or pipx inject dgemma-mlx uvicorn.\n"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--keep-alive", "soon"], "--keep-alive must be a time, not 'soon'"),
        (["--max-body", "much"], "not a size: 'much'"),
        (["--speed", "warp"], "--speed must be one of"),
        (["--port", "70000"], "--port must be a whole number from 0 to 65535"),
        (["--host", "0.0.0.0", "-m", "owner/never-fetched"], "so the server needs an API key"),
        (["--api-key", ""], "the API key is empty"),
        (["--allow-origin", "*"], "not an origin that can be allowed: '*'"),
    ],
)
def test_a_wrong_option_is_one_line_and_a_hint(options: list[str], words: str) -> None:
    assert words in refused(*options)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("30s", 30.0), ("1.5m", 90.0), ("2H", 7200.0), ("0", 0.0), ("-1", None)]
)
def test_times_have_units(text: str, seconds: float | None) -> None:
    assert _seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "1e3", "nan", "10 minutes", "9999999999"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(DgemmaError, match="must be a time"):
        _seconds(text)


def test_clients_see_no_path(tmp_path: Path) -> None:
    assert _model_name(str(tmp_path)) == os.path.basename(str(tmp_path))
    assert _model_name("owner/name") == "owner/name"
    assert _model_name(None) == "demo"
