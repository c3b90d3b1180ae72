"""Memory over long prompts and many generations. Takes minutes: `make soak`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MANY_GENERATIONS = """
import json, os
from dgemma_mlx import generate, load

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

model = load("demo")
prompts = ["Sort 5 2 9", "Count from 13 to 40.", "What is 27 + 45?", "Write a sentence about a cat."]
sizes = []
for number in range(1000):
    generate(model, prompts[number % 4], seed=number, max_tokens=64)
    if (number + 1) % 100 == 0:
        sizes.append(resident())
print(json.dumps(sizes))
"""


def test_a_prompt_of_32768_tokens_needs_little_beyond_cache_and_weights() -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "long_prompt.py"
    done = subprocess.run([sys.executable, str(script), "--tokens", "32768"], capture_output=True, check=True)
    figures = json.loads(done.stdout)
    print(figures)
    assert figures["mlx_excess_mb"] < 300
    assert figures["resident_excess_mb"] < 300


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_thousand_generations_leave_memory_as_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", MANY_GENERATIONS], capture_output=True, check=True)
    sizes = json.loads(done.stdout)
    print(sizes)
    assert max(sizes[2:]) - sizes[1] < 10  # MB; the first ones fill caches and compile
