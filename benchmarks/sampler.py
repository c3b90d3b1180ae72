"""Time and memory of sampling a canvas from its logits on the CPU, compared with mlx-vlm where it is installed.

    python benchmarks/sampler.py [--rows 256] [--vocabulary 262144] [--runs 5]

The measured step takes softcapped float32 logits. It applies the temperature, and computes entropy, acceptance,
argmax, sample, the next canvas and the stopping test, as in the middle of a canvas whose argmax is not stable yet. Both
programs take turns on the same logits. This program also lists the probable tokens, for sparse self-conditioning.

The script prints one JSON object: medians of wall and CPU seconds, and peaks of MLX's memory including the logits. The
exit code is 1 when mlx-vlm is installed and this program is less than 2.5 times as fast.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.sampler import Noise, accept
from dgemma_mlx.diffusion.speed import REFERENCE
from dgemma_mlx.diffusion.stopping import Stopping
from dgemma_mlx.kernels import canvas_sampler
from dgemma_mlx.sizes import rate

TEMPERATURE = 0.6
CONFIG = GenerationConfig()
LEAST = 2.5  # times as fast as mlx-vlm

Step = Callable[[mx.array, mx.array], None]  # of logits (1, C, V) and a canvas (1, C) of another step


def our_step() -> Step:
    noise = Noise(0)

    def step(logits: mx.array, canvas: mx.array) -> None:
        sample = canvas_sampler(logits, noise.uniform(canvas.shape[-1]), None, TEMPERATURE)
        accepted_mask = accept(sample.entropy, CONFIG.entropy_bound)
        fresh = noise.canvas(canvas.shape[-1], logits.shape[-1])
        stopping = Stopping(CONFIG, REFERENCE)
        stopping(sample._replace(argmax=canvas))
        mx.eval(mx.where(accepted_mask, sample.sample, fresh), *stopping(sample), *sample)

    return step


def peer_step() -> Step:
    """What ``stream_diffusion_generate`` of mlx-vlm 0.7.10 calls in a step, in that order."""
    peer: Any = importlib.import_module("mlx_vlm.generate.diffusion")

    def step(logits: mx.array, canvas: mx.array) -> None:
        processed = logits / TEMPERATURE
        argmax_canvas = mx.argmax(processed, axis=-1).astype(mx.int32)
        denoiser_canvas = peer._diffusion_sample_canvas(processed, mx.int32, 1.0)
        entropy = peer._diffusion_token_entropy(processed)
        accepted_mask = peer._diffusion_entropy_transfer_mask(entropy, CONFIG.entropy_bound)
        accepted = mx.where(accepted_mask, denoiser_canvas, canvas)
        fresh = peer._diffusion_initialize_canvas(*canvas.shape, logits.shape[-1], mx.int32)
        current = mx.where(accepted_mask, accepted, fresh)
        peer._diffusion_stable_and_confident(argmax_canvas, processed, [canvas], {})
        mx.eval(current, argmax_canvas, entropy)

    return step


def measure(rows: int, vocabulary: int, runs: int) -> dict[str, float]:
    """Times in seconds, memory in MB."""
    scale = mx.linspace(1, 8, rows)[None, :, None]  # from flat rows to certain ones
    logits = 30 * mx.tanh(scale * mx.random.normal((1, rows, vocabulary), key=mx.random.key(0)) / 30)
    canvas = mx.zeros((1, rows), mx.int32)
    mx.eval(logits, canvas)
    steps = {"": our_step()}
    if importlib.util.find_spec("mlx_vlm") is not None:
        steps["peer_"] = peer_step()
    times: dict[str, list[float]] = {}
    result: dict[str, float] = {"logits_mb": logits.nbytes / 1e6}
    for _ in range(runs + 1):  # the first one warms up
        for name, step in steps.items():
            mx.clear_cache()
            mx.reset_peak_memory()
            began, used = time.perf_counter(), time.process_time()
            step(logits, canvas)
            times.setdefault(f"{name}seconds", []).append(time.perf_counter() - began)
            times.setdefault(f"{name}cpu_seconds", []).append(time.process_time() - used)
            result[f"{name}peak_mb"] = mx.get_peak_memory() / 1e6
    return {**result, **{name: median(values[1:]) for name, values in times.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="positions of the canvas")
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--runs", type=int, default=5, help="of each")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    result = measure(arguments.rows, arguments.vocabulary, arguments.runs)
    if "peer_seconds" in result:
        result["times_as_fast"] = rate(result["peer_seconds"], result["seconds"])
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))
    sys.exit(result.get("times_as_fast", LEAST) < LEAST)
