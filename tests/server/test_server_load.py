"""Minutes of load: see ``benchmarks/serve.py``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "serve.py"


@pytest.mark.slow
def test_under_load_every_answer_is_right_and_memory_stays_flat() -> None:
    command = [sys.executable, str(BENCHMARK), "load", "--seconds", "300", "--requests", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
