"""The counts of docs/constrained.md, made again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks/constrain.py"


@pytest.mark.slow
@pytest.mark.parametrize("options", [["json"], ["random", "--outputs", "200"]])
def test_everything_matches_and_no_answer_is_lost(options: list[str]) -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
