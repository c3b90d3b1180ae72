"""What the measured programs share. Each is a script that takes a job as JSON and prints what it found as JSON.

A job names a ``folder`` with a checkpoint and ``prompts.json``, the length of the prompt in ``tokens``, how many
``steps`` to time, and the program's own ``options``. Times are of the clock that all processes share.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

WARM_UP = 3  # steps more than are timed: the first has no self-conditioning, and mlx-vlm puts off parts of the next two
SHARE_OF_MEMORY = 0.85  # that a job may take on Linux: who asks for more fails, and nothing else is killed for it


@dataclass
class Prompt:
    """The same prompt as ``text`` and as ``ids``, with the beginning-of-text id."""

    text: str
    ids: list[int]


Moment = tuple[float, float]
"""Seconds of the clock, and of CPU that this process has used; on a busy machine the second is more to be trusted."""


def now() -> Moment:
    return time.monotonic(), time.process_time()


@dataclass
class Found:
    """Of one generation: the seconds of the prefill, and a moment of each step, at the same place in all."""

    prefill_seconds: float
    steps: list[Moment]
    mlx_peak: int | None = None
    """bytes that MLX held at most"""


Generate = Callable[[Prompt, int], Found]
"""One canvas of so many denoising steps after a prompt."""


def main(start: Callable[[Path, dict[str, Any]], Generate], packages: tuple[str, ...]) -> None:
    """Does the job of the command line with the program that ``start`` loads."""
    job = json.loads(sys.argv[1])
    if sys.platform == "linux":
        limit = int(SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    folder = Path(job["folder"])
    prompts = {name: Prompt(**prompt) for name, prompt in json.loads((folder / "prompts.json").read_text()).items()}
    generate = start(folder, job["options"])
    loaded_at = time.monotonic()
    generate(prompts["cold"], 1)
    first_step_at = time.monotonic()
    prompt = prompts[str(job["tokens"])]
    found = generate(prompt, job["steps"] + WARM_UP)
    steps = [*pairwise(found.steps)][WARM_UP - 1 :]
    report = {
        "loaded_at": loaded_at,
        "first_step_at": first_step_at,
        "prompt_tokens": len(prompt.ids),
        "prefill_seconds": found.prefill_seconds,
        "step_seconds": [ended - began for (began, _), (ended, _) in steps],
        "step_cpu_seconds": [after - before for (_, before), (_, after) in steps],
        "mlx_peak": found.mlx_peak,
        "versions": {name: number for name in packages if (number := _version(name))},
        "blas": blas(),
    }
    print(json.dumps(report))


def blas() -> str:
    """The linear algebra libraries that this process has loaded."""
    if sys.platform == "darwin":
        return "Accelerate"
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return ", ".join(sorted({name for file in files if re.match(r"lib\w*(blas|mkl)", name := Path(file).name)}))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
