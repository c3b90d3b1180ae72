"""The side-by-side benchmark, on a model so small that its figures mean nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.side_by_side import DEQUANTIZED, OURS, ratios, summary

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "side_by_side.py"
ALONE = [OURS, DEQUANTIZED] if sys.platform == "linux" else [OURS]
TINY = ("--cases", "tiny", "--prompts", "8,20", "--steps", "2", "--runs", "2")


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    output = folder / "results.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY, "--output", str(output), *arguments], stdin=subprocess.DEVNULL,
        capture_output=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    results: dict[str, Any] = json.loads(output.read_text())
    assert done.stdout.decode().count("tiny") == len(results["rows"]) + len(results["ratios"])
    return results


@pytest.mark.slow
def test_alone_it_measures_this_project(tmp_path: Path) -> None:
    results = run(tmp_path)
    rows = [(row["program"], row["prompt_tokens"]) for row in results["rows"]]
    assert rows == [(name, length) for length in (8, 20) for name in ALONE]
    assert [row["program"] for row in results["ratios"]] == 2 * ALONE[1:]
    for row in results["rows"]:
        assert "errors" not in row
        assert 0 < row["load_seconds"]["median"] < row["start_seconds"]["median"]
        assert 0 < row["mlx_peak"]["most"] < row["resident_peak"]["least"]
        assert row["step_seconds"]["least"] <= row["step_seconds"]["median"] <= row["step_seconds"]["most"]


@pytest.mark.oracle
@pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="needs mlx-vlm")
def test_the_peers_answer_the_same_prompts(tmp_path: Path) -> None:
    results = run(tmp_path, "--peer", sys.executable, "--unchunked", "--runs", "1")
    assert not [row["errors"] for row in results["rows"] if "errors" in row]
    names = [*ALONE, "mlx-vlm", "mlx-vlm, unchunked", "transformers"]
    assert [row["program"] for row in results["rows"]] == 2 * names
    assert [row["program"] for row in results["ratios"]] == 2 * names[1:]
    assert all(row["step_seconds"] > 0 and row["prefill_seconds"] > 0 for row in results["ratios"])


def row_of(program: str, *runs: dict[str, Any]) -> dict[str, Any]:
    return summary("case", 512, program, [{"versions": {}, "blas": "", **run} for run in runs])


def measured(seconds: float, peak: int | None = 100, steps: tuple[float, ...] = (1.0,)) -> dict[str, Any]:
    return {
        "step_seconds": list(steps), "step_cpu_seconds": list(steps), "prefill_seconds": seconds, "mlx_peak": peak,
        "start_seconds": seconds, "load_seconds": seconds, "resident_peak": 100,
    }  # fmt: skip


def test_medians_are_of_all_steps_of_all_runs() -> None:
    found = row_of(OURS, measured(1, steps=(1, 2)), measured(5, steps=(9,)), measured(3, steps=(4, 4)))
    assert found["step_seconds"] == {"median": 4, "least": 1, "most": 9}
    assert found["prefill_seconds"] == {"median": 3, "least": 1, "most": 5}


def test_a_ratio_says_how_many_times_ours_another_takes() -> None:
    found = ratios([row_of(OURS, measured(2, peak=50)), row_of("mlx-vlm", measured(3)), row_of("x", measured(1, None))])
    assert [(each["program"], each["prefill_seconds"], each.get("mlx_peak")) for each in found] == [
        ("mlx-vlm", 1.5, 2.0), ("x", 0.5, None),
    ]  # fmt: skip


def test_runs_that_fail_are_told_and_left_out() -> None:
    error = {"error": "RuntimeError: Unable to allocate"}
    some, none = row_of("mlx-vlm", error, measured(4)), row_of("mlx-vlm", error, error)
    assert (some["runs"], some["errors"], some["prefill_seconds"]["median"]) == (2, [error["error"]], 4)
    assert len(none["errors"]) == 2 and "prefill_seconds" not in none
    found = ratios([row_of(OURS, measured(2)), none])
    assert found == [{"case": "case", "prompt_tokens": 512, "program": "mlx-vlm"}]
