"""docs/cli.md is up to date with the help of the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "cli_reference.py"


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_the_page_is_up_to_date() -> None:
    done = run("--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_page_does_not_depend_on_the_user_or_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("max_tokens = 7\n")
    done = run(
        "--check", COLUMNS="40", HOME=str(tmp_path), DGEMMA_CONFIG=str(tmp_path / "config.toml"), DGEMMA_MODEL="demo",
        NO_COLOR="1", TERM="dumb", LANG="de_DE.UTF-8", LANGUAGE="de",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stale_page_is_an_error_that_says_how_to_write_it(tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    assert run("--check", page).returncode == 1  # there is no page yet
    assert run(page).returncode == 0
    assert run("--check", page).returncode == 0
    page.write_text(page.read_text().replace("--max-tokens", "--longest-answer"))
    done = run("--check", page)
    assert done.returncode == 1
    assert done.stderr == f"{page} is out of date; run: python scripts/cli_reference.py\n"
