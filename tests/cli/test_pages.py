"""A hint names a page where the reader has it, in a checkout and after an installation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dgemma_mlx.cli import pages
from dgemma_mlx.cli.pages import located, pages_folder

ROOT = Path(__file__).parents[2]


def test_a_hint_has_the_path_of_a_page_that_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", "generate", "--grammar", "start: !", "x"], capture_output=True,
        text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    found = re.search(r"^hint: (/.*\.md) describes the syntax\.$", done.stderr, re.MULTILINE)
    assert done.returncode == 2 and found is not None and Path(found[1]).exists(), done.stderr


def test_an_installation_has_the_pages_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "__file__", str(tmp_path / "lib" / "dgemma_mlx" / "cli" / "pages.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    folder = tmp_path / "share" / "doc" / "dgemma-mlx"
    folder.mkdir(parents=True)
    (folder / "cli.md").touch()
    assert pages_folder() == folder
    assert located("See docs/speed.md, not mydocs/x.md.") == f"See {folder}/speed.md, not mydocs/x.md."


def test_every_page_that_the_program_names_exists_and_is_in_the_wheel() -> None:
    sources = [*(ROOT / "dgemma_mlx").rglob("*.py"), *(ROOT / "convert").rglob("*.py")]
    named = {name for file in sources for name in re.findall(r"\bdocs/([a-z_]+\.md)", file.read_text(encoding="utf-8"))}
    assert named and all((ROOT / "docs" / name).exists() for name in named)
    assert '"docs" = "share/doc/dgemma-mlx"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
