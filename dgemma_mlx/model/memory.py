"""How much memory generating takes, estimated from the configuration, and how to stay within a limit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from dgemma_mlx.config import FULL, SLIDING, ModelConfig
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.attention import SCORE_BYTES
from dgemma_mlx.model.cache import SPARE
from dgemma_mlx.model.shards import StoredTensor
from dgemma_mlx.model.text import DiffusionGemma

PREFILL_STEP_SIZE = 512
_LEAST_STEP_SIZE = 64
_LEAST_SCORE_BYTES = 4 << 20
_AHEAD = 8  # blocks of scores alive at a time: MLX sets out on operations before those in front have ended (measured)
_MARKS = 2  # copies of the sliding layers' keys and values in a ``PromptCache``
_SHARE_OF_FREE = 0.9
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Budget:
    """How much is worked on at a time."""

    prefill_step_size: int = PREFILL_STEP_SIZE
    """prompt positions encoded at once"""
    score_bytes: int = SCORE_BYTES
    """of attention scores at once"""

    def apply(self, network: DiffusionGemma) -> None:
        """Bounds the scores of a network's layers. The step size is ``prefill``'s argument."""
        for layer in network.layers:
            layer.self_attn.score_bytes = self.score_bytes


def weight_memory(tensors: Iterable[StoredTensor]) -> int:
    """Bytes of stored weights once loaded: without Metal, ``load_model`` makes half precision float32."""
    return sum(tensor.nbytes * (_element() // 2 if tensor.dtype in ("BF16", "F16") else 1) for tensor in tensors)


def cache_memory(config: ModelConfig, positions: int) -> int:
    """Bytes of keys and values for a prefix of so many positions with a canvas behind it."""
    sliding = _window(config, positions) + config.canvas_length
    return _kept_memory(config, FULL, positions + SPARE) + _kept_memory(config, SLIDING, sliding)


def run_memory(config: ModelConfig, weight_bytes: int, positions: int, budget: Budget | None = None) -> int:
    """Bytes at the peak, for a prompt of so many positions: weights, cache, and the larger of what prefill and a
    denoising step work with."""
    budget = budget or Budget()
    step = min(budget.prefill_step_size, positions)
    kinds, canvas = config.text.layer_types, config.canvas_length
    # Encoding needs the last layer's keys and values, not what it would attend to.
    prefill = step * _position_memory(config, kinds[:-1]) + _score_memory(config, kinds[:-1], step, positions, budget)
    logits = 4 * canvas * config.text.vocab_size  # an array of float32
    # Two are there while the layers run, as raw and as processed logits, up to two and a half more in the softmax.
    layers = canvas * _position_memory(config, kinds) + _score_memory(config, kinds, canvas, positions + canvas, budget)
    marks = _MARKS * _kept_memory(config, SLIDING, _window(config, positions))
    denoising = marks + 2 * logits + max(layers, 5 * logits // 2)
    return weight_bytes + cache_memory(config, positions) + max(prefill, denoising)


def fitting_budget(config: ModelConfig, weight_bytes: int, positions: int, limit: int | None = None) -> Budget:
    """The largest budget with which a prompt of so many positions stays within ``limit`` bytes.

    Where not even the smallest one does, that is a ``DgemmaError``; but the device's own limit (None) is not
    enforced, it may be stretched: then it is the smallest one.
    """
    bound = device_limit() if limit is None else limit
    budget = Budget()
    while run_memory(config, weight_bytes, positions, budget) > bound:
        smaller = replace(
            budget,
            prefill_step_size=max(_LEAST_STEP_SIZE, budget.prefill_step_size // 2),
            score_bytes=max(_LEAST_SCORE_BYTES, budget.score_bytes // 2),
        )
        if smaller != budget:
            budget = smaller
        elif limit is None:
            return budget
        else:
            needed = run_memory(config, weight_bytes, positions, budget)
            raise DgemmaError(
                f"{positions:,} tokens of context take about {needed / 1e9:.1f} GB, "
                f"more than the memory limit of {limit / 1e9:.1f} GB",
                "Shorten the prompt, raise --memory-limit, or take a checkpoint with fewer bits per weight.",
            )
    return budget


def device_limit() -> int:
    """Bytes that may be used: the GPU's recommended working set, without Metal nine tenths of what is free."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    return mx.get_active_memory() + int(_SHARE_OF_FREE * free_memory())


def parse_size(text: str) -> int:
    """``8GB``, ``7.5 GiB``, ``500M`` or plain bytes -> bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
    if size == 0:
        raise DgemmaError(f"no size of memory: {text!r}", "Say it as 8GB or 7.5GiB.", exit_code=2)
    return size


def free_memory() -> int:
    """Bytes that programs may still take; all of them where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _element() -> int:
    """Bytes of an activation, and of a key's or value's element."""
    return 2 if mx.metal.is_available() else 4


def _window(config: ModelConfig, positions: int) -> int:
    return min(positions, config.text.sliding_window - 1)


def _kept_memory(config: ModelConfig, kind: str, positions: int) -> int:
    """Bytes of so many positions' keys and values in all layers of a kind."""
    text = config.text
    layers, width = text.layer_types.count(kind), text.kv_heads(kind) * text.layer_head_dim(kind)
    return 2 * layers * positions * width * _element()


def _position_memory(config: ModelConfig, kinds: Sequence[str]) -> int:
    """Bytes of a position's intermediate results in a layer of these kinds, as many as were measured at a time."""
    text = config.text
    heads = text.num_attention_heads * max((text.layer_head_dim(kind) for kind in kinds), default=0)
    expert = text.hidden_size + 5 * text.moe_intermediate_size  # a row, gate and up, what their product needs
    return _element() * (
        6 * text.hidden_size + text.top_k_experts * expert + 3 * text.intermediate_size + 7 * heads
    )


def _score_memory(config: ModelConfig, kinds: Sequence[str], queries: int, keys: int, budget: Budget) -> int:
    """Bytes of the scores that are there at a time, in layers of these kinds."""
    seen = {FULL: keys, SLIDING: min(keys, config.text.sliding_window - 1 + queries)}
    whole = 4 * config.text.num_attention_heads * queries * max((seen[kind] for kind in kinds), default=0)
    return min(whole, _AHEAD * budget.score_bytes)
