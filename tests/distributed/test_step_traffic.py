"""The messages and bytes of a step: those that are predicted, and those of real steps."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.distributed.links import StepTraffic, step_traffic
from tests.distributed.machines import run_on_ranks

ROOT = Path(__file__).parents[2]


def test_real_steps_have_the_predicted_messages_and_bytes(tmp_path: Path) -> None:
    drafts = run_on_ranks(tmp_path, 2, "tests.distributed.step_counts")
    steps = [
        StepTraffic(after[1] - before[1], after[2] - before[2])
        for before, after in pairwise(drafts)
        if before[0] == after[0]  # of one attempt at a canvas: nothing is encoded between them
    ]
    config = ModelConfig.load(DEMO_FOLDER)
    assert len(steps) >= 3
    assert set(steps) == {step_traffic(config.text, config.canvas_length, 4)}  # float32 without Metal


def test_the_prediction_at_the_published_sizes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "links.py"], capture_output=True, text=True, check=True
    )
    assert "A step makes 64 sums of 132.7 MB in all. The plan was 63 of 133 MB;" in done.stdout
    tables = [block.splitlines() for block in done.stdout.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables] == [2 + 2 + 3 + 4, 2 + 3, 2 + 6, 2 + 6]
    assert all(len({row.count("|") for row in table}) == 1 for table in tables)
    assert "| 2 | 0 | 8 and 4 | 8 and 1 | 1,088 | 384 | 131,072 |" in done.stdout
    assert "| 4 | 3 | 4 and 2 | 4 and 1 | 512 | 128 | 65,536 |" in done.stdout
    page = (ROOT / "docs" / "several-macs.md").read_text(encoding="utf-8")
    assert all("\n".join(table) in page for table in tables)
