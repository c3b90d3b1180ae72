"""Code that the measured programs share. A measured program is a script: a job as JSON -> a report as JSON.

The command line's argument is the job. Its ``folder`` contains a checkpoint and ``prompts.json``, ``tokens`` is the
length of the prompt, ``steps`` is the number of denoising steps to time, and ``options`` are the program's own. Times
are read from the monotonic clock, which all processes share.
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

WARM_UP = 3  # untimed steps: the first has no self-conditioning, and mlx-vlm defers parts of the next two
# A job on Linux may use this share of the machine's memory. It fails when it asks for more, so that the system does not
# kill another process instead.
SHARE_OF_MEMORY = 0.85


@dataclass
class Prompt:
    """A prompt.

    Attributes:
        text: The prompt as text.
        ids: The same prompt as token ids, including the beginning-of-text id.
    """

    text: str
    ids: list[int]


# Seconds of the monotonic clock, and CPU seconds of this process. On a busy machine CPU time is more reliable.
Moment = tuple[float, float]


def now() -> Moment:
    """Return the current moment."""
    return time.monotonic(), time.process_time()


@dataclass
class Found:
    """Measurements of one generation.

    Attributes:
        prefill_seconds: Time to encode the prompt.
        steps: One moment per denoising step, always at the same point of the step.
        mlx_peak: Peak memory of MLX in bytes, or None for a program without MLX.
    """

    prefill_seconds: float
    steps: list[Moment]
    mlx_peak: int | None = None


# Generates one canvas after a prompt, with the given number of denoising steps.
Generate = Callable[[Prompt, int], Found]


def main(start: Callable[[Path, dict[str, Any]], Generate], packages: tuple[str, ...]) -> None:
    """Do the job of the command line and print the report.

    ``start`` loads a model from a folder, given the program's options. ``packages`` are the packages whose versions the
    report lists.
    """
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
    """Return the names of the linear algebra libraries that this process has loaded."""
    if sys.platform == "darwin":
        return "Accelerate"
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return ", ".join(sorted({name for file in files if re.match(r"lib\w*(blas|mkl)", name := Path(file).name)}))


def _version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
