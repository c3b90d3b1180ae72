"""Compare this project with mlx-vlm and transformers: time per denoising step, prefill, start and peak memory.

    python benchmarks/side_by_side.py --peer PYTHON [--cases small-32k,small-262k,small-262k-settled,demo]
           [--prompts 512,2048] [--steps 3] [--runs 5] [--unchunked] [--without NAME] [--output FILE] [--plots FOLDER]

All programs read the same random checkpoints, which the script creates, and answer the same prompts. Every measurement
runs in a separate process. For each case and prompt length, the programs take ``--runs`` turns. ``--peer`` names a
Python interpreter that has mlx-vlm, transformers or both. Without it, this project is measured alone.

* step: time of a denoising step with self-conditioning and sampling, in the reference's mode, after a prompt of that
  length; and the CPU time of a step, which is more reliable on a busy machine
* prefill: time to encode the prompt, in a process that has already answered another one
* start: time from the start of the process to the end of its first denoising step
* MLX peak: MLX's peak memory while it generates a canvas, weights included
* resident: peak resident memory of the process

mlx-vlm encodes chunks of 2,048 tokens, the default of its command line. ``--unchunked`` also measures it with the
default of its library, the whole prompt at once. transformers computes with the weights as they were before packing.
The script prints a table of medians, and below it the ratios of the other programs' medians to ours. ``--output``
writes all results as JSON. The cases "large" (for Macs) and "tiny" (to try this script) run only on request.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

MEASURED = Path(__file__).parent / "measured"
CASES = "small-32k,small-262k,small-262k-settled,demo"
OURS = "dgemma-mlx"
DEQUANTIZED = "dgemma-mlx, dequantized"
PEERS = ("mlx-vlm", "transformers")
QUANTITIES = {  # name in the results -> (heading, factor that converts to the unit, unit)
    "step_seconds": ("step", 1.0, "s"),
    "step_cpu_seconds": ("step CPU", 1.0, "s"),
    "prefill_seconds": ("prefill", 1.0, "s"),
    "start_seconds": ("start", 1.0, "s"),
    "mlx_peak": ("MLX peak", 1e-6, "MB"),
    "resident_peak": ("resident", 1e-6, "MB"),
}


@dataclass(frozen=True)
class Program:
    """A measured program.

    Attributes:
        python: Python interpreter that runs the script.
        script: Name of the script in ``measured/``.
        weights: Name of the checkpoint folder that the script reads: "packed" or "plain".
        options: Options for the program.
    """

    python: str
    script: str
    weights: str = "packed"
    options: dict[str, Any] = field(default_factory=dict)


def programs(peer: str | None, unchunked: bool, without: Sequence[str] = ()) -> dict[str, Program]:
    """Return the programs to measure by name, this project first.

    Each way to run a program is a separate entry, so that their times are never averaged. ``peer`` is a Python
    interpreter or None. ``without`` lists names of the peer's programs to leave out.
    """
    found = {OURS: Program(sys.executable, "ours.py", options={"cpu_dequantize": "off"})}
    if sys.platform == "linux":  # with Metal, packed weights are never dequantized
        found[DEQUANTIZED] = Program(sys.executable, "ours.py", options={"cpu_dequantize": "on"})
    if peer is not None and _has(peer, "mlx_vlm"):
        found["mlx-vlm"] = Program(peer, "vlm.py", options={"prefill_step_size": 2048})
        if unchunked:
            found["mlx-vlm, unchunked"] = Program(peer, "vlm.py")
    if peer is not None and _has(peer, "transformers"):
        found["transformers"] = Program(peer, "reference.py", weights="plain")
    if peer is not None and all(program.script == "ours.py" for program in found.values()):
        sys.exit(f"{peer} has neither mlx-vlm nor transformers")
    return {name: program for name, program in found.items() if name not in without}


def _has(python: str, module: str) -> bool:
    """Return whether a Python interpreter can import a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def run(program: Program, folder: Path, tokens: int, steps: int) -> dict[str, Any]:
    """Run one measurement and return its report.

    For a program that fails, the report has only ``error``: the last line that the program wrote, or its exit status.
    On Linux a child process inherits the peak memory of its parent, so this process must stay small.
    """
    job = {"folder": str(folder / program.weights), "tokens": tokens, "steps": steps, "options": program.options}
    command = [program.python, str(MEASURED / program.script), json.dumps(job)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        began = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, log):
            file.seek(0)
        if process.returncode < 0:  # MLX crashes when an allocation fails
            return {"error": f"ended by signal {-process.returncode}"}
        if process.returncode > 0:
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            return {"error": lines[-1] if lines else f"ended with exit code {process.returncode}"}
        found: dict[str, Any] = json.loads(out.read().splitlines()[-1])
    found["start_seconds"] = found.pop("first_step_at") - began
    found["load_seconds"] = found.pop("loaded_at") - began
    found["resident_peak"] = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found


def measure(case: str, contestants: dict[str, Program], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one case and return its rows, one per prompt length and program."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tokens in _make(case, folder, arguments.prompts, arguments.dtype):
            turns: dict[str, list[dict[str, Any]]] = {program: [] for program in contestants}
            for turn in range(arguments.runs):
                for program, contestant in contestants.items():
                    _say(f"{case}, {tokens:,} tokens, turn {turn + 1} of {arguments.runs}: {program}")
                    turns[program].append(run(contestant, folder, tokens, arguments.steps))
            rows += [summary(case, tokens, program, found) for program, found in turns.items()]
    return rows


def _make(case: str, folder: Path, lengths: str, dtype: str) -> list[int]:
    """Write the checkpoints of a case in a separate process and return the lengths of its prompts."""
    _say(f"{case}: writing the checkpoint")
    command = [sys.executable, str(MEASURED / "checkpoints.py"), case, str(folder), lengths, dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        sys.exit(f"the checkpoint of {case} could not be written")
    fitting: list[int] = json.loads(done.stdout)
    return fitting


def summary(case: str, tokens: int, program: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row: median, least and most of each quantity, over all runs that did not fail."""
    row: dict[str, Any] = {"case": case, "prompt_tokens": tokens, "program": program, "runs": len(runs)}
    good = [run for run in runs if "error" not in run]
    if len(good) < len(runs):
        row["errors"] = [run["error"] for run in runs if "error" in run]
    if not good:
        return row
    row |= {name: good[0][name] for name in ("versions", "blas")}
    for quantity in (*QUANTITIES, "load_seconds"):
        values = [value for run in good for value in _listed(run[quantity])]
        if values:
            row[quantity] = {"median": median(values), "least": min(values), "most": max(values)}
    return row


def _listed(value: float | list[float] | None) -> list[float]:
    """Return a value as a list; None becomes an empty list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ratio of each median of another program to ours. Above 1, ours is smaller and so better."""
    ours_by_prompt = {(row["case"], row["prompt_tokens"]): row for row in rows if row["program"] == OURS}
    found = []
    for row in rows:
        ours = ours_by_prompt[row["case"], row["prompt_tokens"]]
        if row is not ours:
            shared = [quantity for quantity in QUANTITIES if quantity in row and quantity in ours]
            times = {quantity: row[quantity]["median"] / (ours[quantity]["median"] or math.inf) for quantity in shared}
            found.append({**{name: row[name] for name in ("case", "prompt_tokens", "program")}, **times})
    return found


def as_table(rows: list[dict[str, Any]], compared: list[dict[str, Any]]) -> str:
    """Format rows of medians, and below them the ratios, as a table."""

    def line(row: dict[str, Any], cells: list[str]) -> str:
        head = f"{row['case']:18} {row['prompt_tokens']:>7,}  {row['program']:19}"
        return head + "".join(f"{cell:>13}" for cell in cells)

    headings = [f"{heading}, {unit}" for heading, _, unit in QUANTITIES.values()]
    lines = [f"{'case':18} {'prompt':>7}  {'medians':19}" + "".join(f"{heading:>13}" for heading in headings)]
    for row in rows:
        cells = [
            f"{row[name]['median'] * factor:,.3f}" if name in row else "failed" if "errors" in row else "-"
            for name, (_, factor, _) in QUANTITIES.items()
        ]
        lines.append(line(row, cells))
    if compared:
        lines += ["", f"{'':28}times {OURS}"]
        lines += [line(row, [f"{row[name]:.2f} x" if name in row else "-" for name in QUANTITIES]) for row in compared]
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    """Describe this machine, for the results."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "preloaded": os.environ.get("LD_PRELOAD"),
        "load_average_before": os.getloadavg()[0],
    }


def _processor() -> str:
    """Return the name of the processor, or ""."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _draw(results: Path, folder: Path) -> None:
    subprocess.run([sys.executable, str(MEASURED / "draw.py"), str(results), str(folder)], check=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PYTHON", help="Python interpreter that has mlx-vlm, transformers, or both")
    parser.add_argument("--cases", help=f"cases to measure (default: {CASES} with a peer, else demo)")
    parser.add_argument("--prompts", default="512,2048", help="prompt lengths in tokens")
    parser.add_argument("--steps", type=int, default=3, help="denoising steps to time in each run")
    parser.add_argument("--runs", type=int, default=5, help="runs of each program")
    parser.add_argument("--unchunked", action="store_true", help="also measure mlx-vlm with the whole prompt at once")
    parser.add_argument(
        "--without", metavar="NAME", action="append", default=[], choices=PEERS,
        help=f"leave out one of {', '.join(PEERS)}; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16" if sys.platform == "darwin" else "float32",
        help="dtype of tensors that are not packed; on the CPU, MLX needs float32 for unpacked experts",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="write all results to this file, as JSON")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the results into this folder")
    arguments = parser.parse_args()
    if min(arguments.steps, arguments.runs) < 1:
        parser.error("--steps and --runs must be at least 1")
    if arguments.peer is not None and shutil.which(arguments.peer) is None:
        parser.error(f"{arguments.peer} is not a program")
    arguments.cases = arguments.cases or (CASES if arguments.peer else "demo")
    return arguments


if __name__ == "__main__":
    arguments = _arguments()
    contestants = programs(arguments.peer, arguments.unchunked, arguments.without)
    settings = {name: getattr(arguments, name) for name in ("steps", "runs", "dtype")}
    results: dict[str, Any] = {"machine": _machine(), **settings, "rows": [], "ratios": []}
    with tempfile.TemporaryDirectory() as folder:
        output = arguments.output or Path(folder) / "results.json"
        for case in arguments.cases.split(","):
            results["rows"] += measure(case, contestants, arguments)
            results["ratios"] = ratios(results["rows"])
            # Write after each case, because the next one may take an hour.
            output.write_text(json.dumps(results, indent=1) + "\n")
        print(as_table(results["rows"], results["ratios"]))
        if arguments.plots is not None:
            _draw(output, arguments.plots)
