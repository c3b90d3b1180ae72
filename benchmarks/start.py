"""Measure the start of ``dgemma-mlx generate`` with Gemma's real vocabulary: to the end of the first denoising step.

    python benchmarks/start.py [--other FOLDER] [--runs 10] [--case tiny-262k]

The network has random weights and a vocabulary of 262,144 (the cases of ``side_by_side.py``). Every run is a process of
its own, and the answer has one step. ``--other`` names another working tree of this project, which takes turns with
this one. The first run of each is reported by itself: it may fill the cache folder, which begins empty. The other rows
are smallest and median of the remaining runs:

* first step: from the start of the process to the first line that the program prints, which is the first step's draft
* its CPU: CPU time of the whole process, user and system
* resident: peak resident memory of the process

Three more runs of each, with timers around the parts, tell where the time goes: the least of each part.

The vocabulary is read from the folder that the environment variable ``DGEMMA_TEST_VOCABULARY`` names, or else from
``runs/gemma4``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = Path(os.environ.get("DGEMMA_TEST_VOCABULARY", ROOT / "runs" / "gemma4"))
ARGUMENTS = ["generate", "Sort 7 3 5", "--seed", "1", "--max-tokens", "8", "--max-denoising-steps", "1", "--speed",
             "reference", "--jsonl", "-q", "-m"]  # fmt: skip
UNITS = {"first step": "s", "its CPU": "s", "resident": "MB"}
# The program with a timer around each part. What is left of the time is imports and the command line.
TIMED = """
import json, sys, time
began = time.perf_counter()
from dgemma_mlx.cli.app import run
from dgemma_mlx.generation import api, model
spent = {"imports": time.perf_counter() - began}
def timed(owner, name, label):
    inner = getattr(owner, name)
    def outer(*arguments, **options):
        since = time.perf_counter()
        try:
            return inner(*arguments, **options)
        finally:
            spent[label] = spent.get(label, 0.0) + time.perf_counter() - since
    setattr(owner, name, outer)
timed(api, "load_model", "open the weights")
timed(api, "_evaluate", "read the weights")
timed(api, "load_tokenizer", "tokenizer")
timed(model.Model, "encode_prompt", "template and prompt")
timed(api.Runner, "__init__", "prepare the answer")
run()
spent["everything"] = time.perf_counter() - began
print(json.dumps(spent))
"""


def start(tree: Path, model: Path, cache: Path) -> dict[str, float]:
    """Run the program of a working tree once and return the quantities of ``UNITS``."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dgemma_mlx", *ARGUMENTS, str(model)], env=_environment(tree, cache), cwd=tree,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.monotonic() - began
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        if not line:
            sys.exit(f"the program of {tree} has failed: {log.read().decode(errors='replace')}")
    resident = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return {"first step": seconds, "its CPU": usage.ru_utime + usage.ru_stime, "resident": resident}


def parts(tree: Path, model: Path, cache: Path) -> dict[str, float]:
    """Return the seconds that each part of a start takes in a working tree: the least of three runs."""
    command = [sys.executable, "-c", TIMED, *ARGUMENTS, str(model)]
    runs: list[dict[str, float]] = []
    for _ in range(3):
        done = subprocess.run(
            command, env=_environment(tree, cache), cwd=tree, stdin=subprocess.DEVNULL, capture_output=True, check=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {part: min(run[part] for run in runs) for part in runs[0]}


def _environment(tree: Path, cache: Path) -> dict[str, str]:
    path = os.pathsep.join([str(tree), str(tree / "convert")])
    return {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(cache)}


def _checkpoint(case: str, folder: Path) -> Path:
    """Write a random checkpoint with the real vocabulary and return its folder."""
    script = Path(__file__).parent / "measured" / "checkpoints.py"
    dtype = "bfloat16" if sys.platform == "darwin" else "float32"
    subprocess.run([sys.executable, str(script), case, str(folder), "16", dtype], stdout=subprocess.DEVNULL, check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(VOCABULARY / name, folder / "packed" / name)
    return folder / "packed"


def _print(title: str, rows: dict[Path, dict[str, str]]) -> None:
    names = list(next(iter(rows.values())))
    print(f"{title:32}" + "".join(f"{name:>22}" for name in names))
    for tree, row in rows.items():
        print(f"{'this tree' if tree == ROOT else str(tree):32}" + "".join(f"{row.get(n, '-'):>22}" for n in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, metavar="FOLDER", help="another working tree, to compare with")
    parser.add_argument("--runs", type=int, default=10, help="runs of each after the first")
    parser.add_argument("--case", default="tiny-262k", help="case of measured/checkpoints.py with 262,144 tokens")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    if not (VOCABULARY / "tokenizer.json").exists():
        sys.exit("Gemma's vocabulary is not there: `make vocabulary` fetches it")
    trees = [ROOT] if options.other is None else [options.other.resolve(), ROOT]
    with tempfile.TemporaryDirectory() as name:
        model = _checkpoint(options.case, Path(name) / "model")
        caches = {tree: Path(name) / str(number) for number, tree in enumerate(trees)}
        print(f"load average before: {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
        first = {tree: start(tree, model, caches[tree]) for tree in trees}
        found: dict[Path, list[dict[str, float]]] = {tree: [] for tree in trees}
        for turn in range(options.runs):
            for tree in trees if turn % 2 else trees[::-1]:
                found[tree].append(start(tree, model, caches[tree]))
        _print("the first run", {t: {k: f"{first[t][k]:.2f} {unit}" for k, unit in UNITS.items()} for t in trees})
        rows = {t: {k: [run[k] for run in runs] for k in UNITS} for t, runs in found.items()}
        _print("smallest, median", {
            t: {k: f"{min(v):.2f}, {median(v):.2f} {UNITS[k]}" for k, v in row.items()} for t, row in rows.items()
        })  # fmt: skip
        _print("parts, s", {
            tree: {k: f"{v:.3f}" for k, v in parts(tree, model, caches[tree]).items()} for tree in trees
        })  # fmt: skip


if __name__ == "__main__":
    main()
