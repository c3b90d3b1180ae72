"""packaging/dgemma-mlx.1 is up to date with the help, has every command and option, and is a page that man prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_help import NAMES, PAGES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "packaging" / "dgemma-mlx.1"


def test_the_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "man_page.py", "--check"], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_page_has_every_command_and_option_of_the_help() -> None:
    text = PAGE.read_text(encoding="utf-8").replace(r"\-", "-")
    _, *sections = re.split(r"^\.SS (.*)$", text, flags=re.MULTILINE)
    found = dict(zip(sections[::2], sections[1::2], strict=True))
    assert list(found) == sorted(NAMES[1:], key=list(found).index) and len(found) == len(NAMES) - 1
    for name, page in zip(NAMES, PAGES, strict=True):
        place = found.get(name, text)
        for row in (row for rows in page.options.values() for row in rows):
            assert f".B {row.term.strip()}\n" in place, (name, row.term)


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
def test_the_page_is_printed_without_a_complaint() -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-P-c", "-Kutf8", str(PAGE)], capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    assert done.stderr == ""
    text = re.sub(".\b", "", done.stdout)
    assert "NAME\n       dgemma-mlx - Run the language model DiffusionGemma on Apple silicon.\n" in text
    assert 'dgemma-mlx generate "Sort 7 3 5"' in text.replace("“", '"').replace("”", '"')


def test_the_wheel_installs_the_page() -> None:
    assert f'"{PAGE.relative_to(ROOT)}" = "share/man/man1/dgemma-mlx.1"' in (ROOT / "pyproject.toml").read_text()
