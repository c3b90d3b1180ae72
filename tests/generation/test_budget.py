"""Estimates of memory, and budgets that keep within a limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import ModelConfig, TextConfig
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.memory import Budget, cache_memory, device_limit, fitting_budget, run_memory
from dgemma_mlx.generation.prefill import prefill
from dgemma_mlx.kernels import canvas_sampler
from dgemma_mlx.model.text import DiffusionGemma

PUBLISHED = ModelConfig(TextConfig.from_dict({
    "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "hidden_size": 2816,
    "intermediate_size": 2112, "num_hidden_layers": 30, "num_attention_heads": 16, "num_key_value_heads": 8,
    "num_global_key_value_heads": 2, "global_head_dim": 512, "sliding_window": 1024,
    "max_position_embeddings": 262_144,
}))  # fmt: skip
WEIGHTS = 15_000_000_000

SMALL: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 1, "num_global_key_value_heads": 1, "head_dim": 32, "global_head_dim": 64,
    "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16, "sliding_window": 256,
}


def test_memory_grows_linearly_and_less_than_a_gigabyte_is_work() -> None:
    def work(positions: int) -> int:
        return run_memory(PUBLISHED, WEIGHTS, positions) - WEIGHTS - cache_memory(PUBLISHED, positions)

    assert work(262_144) == work(16_384)
    # In float32 the windows that a prompt cache may go back to alone are 0.84 GB.
    assert work(262_144) < (1e9 if mx.metal.is_available() else 1.7e9)
    per_position = cache_memory(PUBLISHED, 200_000) - cache_memory(PUBLISHED, 199_999)
    element = 2 if mx.metal.is_available() else 4
    assert per_position == 5 * 2 * 2 * 512 * element  # full layers, keys and values, heads, head dim


@pytest.mark.parametrize("positions", [2_000, 32_768, 262_144])
def test_in_half_precision_too(monkeypatch: pytest.MonkeyPatch, positions: int) -> None:
    """Counted as on a GPU: weights, cache and less than 1 GB."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    work = run_memory(PUBLISHED, WEIGHTS, positions) - WEIGHTS - cache_memory(PUBLISHED, positions)
    assert work < 1e9


def test_a_tighter_limit_makes_smaller_steps() -> None:
    config = replace(PUBLISHED, text=replace(PUBLISHED.text, vocab_size=1000))
    most = run_memory(config, WEIGHTS, 100_000)
    assert fitting_budget(config, WEIGHTS, 100_000, most) == Budget()
    sizes = []
    for limit in range(most, 0, -1_000_000):
        try:
            budget = fitting_budget(config, WEIGHTS, 100_000, limit)
        except DgemmaError as error:
            assert "memory limit of" in error.message and error.hint
            break
        assert run_memory(config, WEIGHTS, 100_000, budget) <= limit
        sizes.append((budget.prefill_step_size, budget.score_bytes))
    else:
        pytest.fail("no limit was too small")
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 1


def test_a_limit_too_low_is_shown_as_it_was_given() -> None:
    with pytest.raises(DgemmaError, match=r"about 15\.\d GB, more than the memory limit of 1\.0 kB"):
        fitting_budget(PUBLISHED, WEIGHTS, 100, 1000)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_is_not_positive(limit: int) -> None:
    with pytest.raises(DgemmaError, match=f"more than 0 bytes, not {limit}") as caught:
        fitting_budget(PUBLISHED, WEIGHTS, 100, limit)
    assert caught.value.exit_code == 2 and caught.value.hint


def test_the_devices_own_limit_is_not_an_error() -> None:
    weights = 2 * device_limit()
    assert fitting_budget(PUBLISHED, weights, 1000).prefill_step_size < Budget().prefill_step_size


def prefill_peak(config: ModelConfig, positions: int, budget: Budget) -> int:
    """Return the peak bytes of a prefill, without the weights."""
    model = DiffusionGemma(config.text)
    model.eval()
    budget.apply(model)
    mx.eval(dict(tree_flatten(model)))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in prefill(model, mx.array([[1] * positions]), model.new_cache(), budget.prefill_step_size):
        pass
    return mx.get_peak_memory() - before


SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "wide heads": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "global_head_dim": 128},
    "many experts": {"hidden_size": 64, "num_experts": 64, "top_k_experts": 8},
    "many layers": {"num_hidden_layers": 24, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("positions", [1024, 2048])
def test_what_prefill_takes_is_what_was_estimated(shape: str, positions: int) -> None:
    config = ModelConfig(TextConfig.from_dict({**SMALL, **SHAPES[shape]}), canvas_length=32)
    peak = prefill_peak(config, positions, Budget())
    assert run_memory(config, 0, positions, Budget()) == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_step_with_flat_predictions_takes_what_was_estimated(bits: int | None) -> None:
    """Over a vocabulary of the published size, where all logits of all positions make the expected embeddings."""
    config = ModelConfig(TextConfig.from_dict({**SMALL, "vocab_size": 262_144}), canvas_length=32)
    model = DiffusionGemma(config.text)
    if bits is not None:
        model.embed_tokens = model.embed_tokens.to_quantized(32, bits)
    model.eval()
    mx.eval(model.parameters())
    mx.clear_cache()
    cache = model.new_cache()
    for _ in prefill(model, mx.array([[1] * 16]), cache, 16):
        pass
    before = mx.get_active_memory() - cache.nbytes
    mx.reset_peak_memory()
    canvas = mx.arange(32)[None]
    raw = model.project(model.decode_hidden(canvas, cache))
    sample = canvas_sampler(raw, mx.zeros(canvas.shape), config.text.final_logit_softcapping, 0.6)
    mx.eval(raw, *sample)
    prediction = model.predict(raw, sample, 0.6)
    assert prediction.dense is not None and prediction.dense.positions.size == 32
    mx.eval(model.decode_hidden(canvas, cache, prediction))
    peak = mx.get_peak_memory() - before
    assert run_memory(config, 0, 16) == pytest.approx(peak, rel=0.15)


def test_a_smaller_budget_takes_less() -> None:
    """The number of small blocks alive at a time varies from run to run, but has a bound."""
    config, budget = ModelConfig(TextConfig.from_dict(SMALL), canvas_length=32), Budget(128, 1 << 18)
    peak = prefill_peak(config, 2048, budget)
    assert peak < 1.15 * run_memory(config, 0, 2048, budget) < 0.6 * run_memory(config, 0, 2048, Budget())
