"""Test that the example in docs/metalsim.md prints the output that the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.metalsim.toolchain import available

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not available(), reason="needs Clang: pip install ziglang")]

PAGE = Path(__file__).parents[2] / "docs" / "metalsim.md"


def test_the_example_prints_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    (example, shown), *_ = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    exec(compile(example, str(PAGE), "exec"), {})
    assert capsys.readouterr().out == shown
