"""Measure how long the device waits for Python in a denoising step: from the end of an evaluation to the next work.

    python benchmarks/gaps.py [--drawing 5] [--steps 40]

The network has the published model's 30 layers, so that Python builds as large a graph, and the demo model's widths.
``--drawing`` is the time in milliseconds for which the caller looks at each step's drafts. Times are wall times; the
median is that of the steps, the first ones left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import mlx.core as mx

import dgemma_mlx
from dgemma_mlx.checkpoint.config import FULL, SLIDING
from dgemma_mlx.diffusion.denoiser import Denoiser
from dgemma_mlx.diffusion.sampler import Noise
from dgemma_mlx.model.text import DiffusionGemma

LAYERS = ([SLIDING] * 5 + [FULL]) * 5
CANVAS = 64
WARM_UP = 5


class Clock:
    """Adds up the time from the end of each ``mx.eval`` to the start of the next evaluation."""

    def __init__(self) -> None:
        self.waited, self._ended = 0.0, None
        mx.eval, mx.async_eval = self._timed(mx.eval, waits=True), self._timed(mx.async_eval, waits=False)

    def _timed(self, evaluate: Callable[..., Any], waits: bool) -> Callable[..., Any]:
        def timed(*arrays: Any) -> Any:
            if self._ended is not None:
                self.waited += time.perf_counter() - self._ended
            self._ended = None  # after async_eval the device has work
            result = evaluate(*arrays)
            if waits:
                self._ended = time.perf_counter()
            return result

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawing", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    demo = dgemma_mlx.load("demo")
    network = DiffusionGemma(replace(demo.config.text, num_hidden_layers=len(LAYERS), layer_types=LAYERS))
    network.eval()
    cache = network.new_cache()
    network.encode(mx.array([[1, 2, 3, 4]]), cache)
    mx.eval(network.parameters(), cache.state())
    never = demo.generation.override(max_denoising_steps=options.steps + WARM_UP, confidence_threshold=0.0)
    clock, waits = Clock(), []
    for _ in Denoiser(network, never).denoise(cache, Noise(1), CANVAS):
        until = time.perf_counter() + options.drawing / 1000
        while time.perf_counter() < until:
            pass
        waits.append(clock.waited)
        clock.waited = 0.0
    waits = waits[WARM_UP:-1]  # nothing follows the last step
    print(
        f"drawing {options.drawing:.0f} ms: the device waits for {1000 * median(waits):.2f} ms a step "
        f"(median of {len(waits)})"
    )


if __name__ == "__main__":
    main()
