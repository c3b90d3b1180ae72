"""Measure peak memory and time of encoding a long prompt, on a small random model.

    python benchmarks/long_prompt.py [--tokens 100000] [--step-size 512]

The model has the layout of the real one (sliding and full layers, two head sizes, K = V) and random float32 weights.
The script prints one JSON object with sizes in MB and times in seconds. An excess is the peak minus weights and cache.
The estimate is the number that ``dgemma-mlx info`` prints.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import ModelConfig, TextConfig
from dgemma_mlx.generation.memory import Budget, run_memory
from dgemma_mlx.generation.prefill import prefill
from dgemma_mlx.model.text import DiffusionGemma

MODEL: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 7, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_global_key_value_heads": 1, "head_dim": 32, "global_head_dim": 64,
    "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, "sliding_window": 1024,
    "max_position_embeddings": 262_144,
}


def _resident_peak() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(tokens: int, budget: Budget) -> dict[str, float]:
    """Encode a random prompt, decode one canvas after it, and return sizes in MB and times in seconds."""
    mx.random.seed(0)
    config = ModelConfig(TextConfig.from_dict(MODEL))
    model = DiffusionGemma(config.text).eval()
    mx.eval(model.parameters())
    ids: Any = mx.random.randint(0, 1024, (1, tokens)).tolist()
    cache = model.new_cache()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = _resident_peak()
    began = time.perf_counter()
    for _ in prefill(model, ids, cache, budget):
        pass
    prefilled = time.perf_counter()
    mx.eval(model.decode(mx.zeros((1, config.canvas_length), mx.int32), cache))
    decoded = time.perf_counter()
    weights = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    mb = 1e6
    return {
        "tokens": tokens,
        "weights_mb": weights / mb,
        "cache_mb": cache.nbytes / mb,
        "mlx_peak_mb": mx.get_peak_memory() / mb,
        "mlx_estimate_mb": run_memory(config, weights, tokens, budget) / mb,
        "mlx_excess_mb": (mx.get_peak_memory() - weights - cache.nbytes) / mb,
        "resident_growth_mb": (_resident_peak() - before) / mb,
        "resident_excess_mb": (_resident_peak() - before - cache.nbytes) / mb,
        "prefill_seconds": prefilled - began,
        "canvas_step_seconds": decoded - prefilled,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="length of the prompt (default: %(default)s)")
    parser.add_argument(
        "--step-size", type=int, default=Budget().prefill_step_size, help="positions at a time (default: %(default)s)"
    )
    arguments = parser.parse_args()
    figures = measure(arguments.tokens, Budget(arguments.step_size))
    print(json.dumps({name: round(value, 2) for name, value in figures.items()}))
