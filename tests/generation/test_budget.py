"""Estimates of memory, and budgets that keep within a limit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import ModelConfig, TextConfig
from dgemma_mlx.constrain.constraint import Constraint
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.api import generate_batch
from dgemma_mlx.generation.load import load
from dgemma_mlx.generation.memory import Budget, Work, cache_memory, device_limit, fitting_budget, run_memory
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.options import Verify
from dgemma_mlx.generation.prefill import prefill
from dgemma_mlx.infill.fill import fill
from dgemma_mlx.infill.template import Gap
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
    work = run_memory(PUBLISHED, WEIGHTS, positions, Budget(2048)) - WEIGHTS - cache_memory(PUBLISHED, positions)
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
    mx.eval(dict(tree_flatten(model)))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in prefill(model, [[1] * positions], model.new_cache(), budget):
        pass
    return mx.get_peak_memory() - before


SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "wide heads": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "global_head_dim": 128},
    "many experts": {"hidden_size": 64, "num_experts": 64, "top_k_experts": 8},
    "many layers": {"num_hidden_layers": 24, "num_key_value_heads": 2},
}


@pytest.mark.parametrize(
    ("shape", "positions", "step_size"),
    [
        # Every shape, and every size of the steps; the whole matrix in make soak.
        pytest.param(shape, *sizes, marks=[] if shape == "small" or sizes == (1024, 512) else pytest.mark.slow)
        for shape in SHAPES
        for sizes in ((1024, 512), (2048, 512), (1024, 2048))
    ],
)
def test_what_prefill_takes_is_what_was_estimated(shape: str, positions: int, step_size: int) -> None:
    config, budget = ModelConfig(TextConfig.from_dict({**SMALL, **SHAPES[shape]}), canvas_length=32), Budget(step_size)
    peak = prefill_peak(config, positions, budget)
    assert run_memory(config, 0, positions, budget) == pytest.approx(peak, rel=0.15)


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
    for _ in prefill(model, [[1] * 16], cache, Budget()):
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


def test_a_long_prefill_never_copies_what_is_encoded() -> None:
    """A hidden state that outlives its chunk would refer to the last layer's buffers, and MLX would copy them."""
    wide = {"num_hidden_layers": 2, "num_global_key_value_heads": 4, "global_head_dim": 128}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    config = ModelConfig(TextConfig.from_dict({**SMALL, **wide, **layers}))
    peak, held = prefill_peak(config, 2048, Budget(64, 1 << 18)), cache_memory(config, 2048)
    assert held > 10e6
    assert peak < 1.4 * held


def test_requests_with_different_budgets_do_not_change_each_other() -> None:
    """The blocks in which scores are computed decide how they are rounded."""
    model = DiffusionGemma(TextConfig.from_dict(SMALL)).eval()
    ids, canvas = [list(range(200))], mx.arange(32)[None]
    budgets = [Budget(64), Budget(64, 1 << 12)]

    def encoded(budget: Budget) -> tuple[Any, Any]:
        cache = model.new_cache()
        return cache, prefill(model, ids, cache, budget)

    alone = []
    for budget in budgets:
        cache, chunks = encoded(budget)
        list(chunks)
        alone.append(model.decode(canvas, cache))
    (one, first), (two, second) = map(encoded, budgets)
    list(zip(first, second, strict=True))  # a chunk of each in turn
    together = [model.decode(canvas, one), model.decode(canvas, two)]
    assert not mx.array_equal(*alone)
    assert all(map(mx.array_equal, alone, together))


@pytest.fixture(scope="module")
def large_vocabulary() -> Model:
    """A model with random weights and a vocabulary of the published size, whose canvases are short."""
    demo = load("demo")
    config = ModelConfig(TextConfig.from_dict({**SMALL, "vocab_size": 262_144}), canvas_length=8)
    mx.random.seed(0)
    network = DiffusionGemma(config.text).eval()
    mx.eval(network.parameters())
    return replace(demo, config=config, network=network, generation=demo.generation.override(max_denoising_steps=2))


def request_peak(run: Callable[[], object]) -> int:
    """Return the peak bytes of a request, without what was there before."""
    gc.collect()  # networks of other tests, which refer to themselves, would be freed meanwhile
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize(
    ("rows", "words", "verify", "constraint"),
    [
        (1, 3, "off", None),
        (2, 3, "off", None),
        (4, 400, "flag", None),
        (8, 3, "flag", None),
        pytest.param(8, 400, "off", None, marks=pytest.mark.slow),
        (4, 3, "off", Constraint.regex("[a-z]{2,6}")),
    ],
)
def test_a_batch_takes_what_was_estimated(
    large_vocabulary: Model, rows: int, words: int, verify: Verify, constraint: Constraint | None
) -> None:
    model, prompts = large_vocabulary, ["a cat " * words for _ in range(rows)]
    prompts[0] += "sat"  # the others are padded
    longest = max(len(model.encode_prompt(prompt, raw=True)) for prompt in prompts)
    peak = request_peak(lambda: generate_batch(
        model, prompts, seeds=range(rows), max_tokens=8, raw=True, verify=verify, speed="reference",
        constraint=constraint,
    ))  # fmt: skip
    estimate = run_memory(model.config, 0, longest, work=Work(rows, verifies=verify != "off"))
    # How far MLX runs ahead depends on the load: the first case took 26.6 MB alone, and 24.1 beside other tests.
    assert 0.85 * peak <= estimate <= 1.3 * peak


def test_a_batch_that_does_not_fit_is_refused_and_its_prompts_fit_alone(large_vocabulary: Model) -> None:
    model, prompts = large_vocabulary, ["a cat"] * 4
    limit = run_memory(model.config, model.weight_bytes(), 32) + 1_000_000
    with pytest.raises(DgemmaError, match=r"^4 canvases after \d+ tokens of context take .* limit of") as caught:
        generate_batch(model, prompts, memory_limit=limit, raw=True)
    assert "fewer prompts or candidates at a time" in (caught.value.hint or "")
    [done] = generate_batch(model, prompts[:1], memory_limit=limit, raw=True, max_tokens=8)
    assert done.tokens


@pytest.mark.parametrize(("candidates", "words"), [(1, 3), (8, 3), (8, 600)])
def test_filling_takes_what_was_estimated(large_vocabulary: Model, candidates: int, words: int) -> None:
    """All candidates follow one prefix, which is encoded once and copied."""
    model, text = large_vocabulary, "a cat " * words
    positions = len(model.encode_prompt(text, raw=True))
    parts = [text, Gap(size=7)]  # fills the canvas; all candidates of a known length are written at a time
    peak = request_peak(lambda: fill(model, parts, raw=True, candidates=candidates, seed=1, speed="reference"))
    estimate = run_memory(model.config, 0, positions, work=Work(candidates, shares_prefix=True))
    assert estimate == pytest.approx(peak, rel=0.15)


def test_a_step_size_of_the_callers_is_counted() -> None:
    least = run_memory(PUBLISHED, WEIGHTS, 100_000, Budget(64, 4 << 20))
    assert fitting_budget(PUBLISHED, WEIGHTS, 100_000, least).prefill_step_size <= 512
    with pytest.raises(DgemmaError, match="100,000 tokens of context take about"):
        fitting_budget(PUBLISHED, WEIGHTS, 100_000, least, prefill_step_size=8192)
