"""Tests of the sampler's reference against float64: sizes, special values, and the distribution of samples."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.kernels.canvas_sampler import (
    KEPT_NATS,
    MAX_KEPT,
    CanvasSample,
    LogitBias,
    canvas_sampler,
    canvas_sampler_reference,
)

Array = np.ndarray[Any, Any]

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
SIZES = [(1, 7), (256, 7), (3, 64), (3, 65), (3, 1000), (3, 1024), (3, 4100)]  # rows, vocabulary
REAL_SIZES = [(1, 32_768), (3, 262_144)]
ODD_ROWS = ["ties", "equal", "huge", "-inf", "one", "inf", "nan", "one nan", "nothing"]
CAPS = [None, 30.0]
TEMPERATURE = 0.6


def logits_of(kind: str, rows: int, vocabulary: int, dtype: mx.Dtype) -> mx.array:
    """Return random logits. The rows range from flat to one with a peak; ``kind`` adds special values."""
    rng = np.random.default_rng(rows * 1_000_000 + vocabulary)
    x = rng.normal(size=(rows, vocabulary)) * np.linspace(1, 6, rows)[:, None]
    one = rng.integers(vocabulary, size=rows)
    x[-1, one[-1]] += 12
    if kind == "ties":
        x = x.round()
    elif kind == "equal":
        x[:] = -0.7
    elif kind == "-inf":
        x[rng.random(x.shape) < 0.8] = -math.inf
        x[np.arange(rows), one] = 1
    elif kind in ("one", "nan", "nothing"):
        x[:] = math.nan if kind == "nan" else -math.inf
        if kind == "one":
            x[np.arange(rows), one] = 3
    elif kind != "normal":
        x[np.arange(rows), one] = {"inf": math.inf, "huge": 6e4, "one nan": math.nan}[kind]
    return mx.array(x, mx.float32).astype(dtype)


def some_uniforms(rows: int) -> mx.array:
    """Return uniform random numbers that include both ends of the range."""
    u = np.random.default_rng(rows).random(rows, np.float32)
    u[:2] = [0, 1 - 2**-24][: len(u)]
    return mx.array(u)


def some_bias(rows: int, vocabulary: int) -> LogitBias:
    """Return a bias that leaves some rows, bars half of the ids in others, and only moves ids in the rest."""
    rng = np.random.default_rng(vocabulary)
    table = np.zeros((3, vocabulary), np.float32)
    table[1, rng.permutation(vocabulary)[: vocabulary // 2]] = -math.inf
    table[2] = rng.normal(size=vocabulary)
    return LogitBias(mx.array(table), mx.array(rng.integers(3, size=rows), mx.int32))


def probabilities(logits: mx.array, softcap: float | None, bias: LogitBias | None = None) -> Array:
    """Return the probabilities in float64, and NaN for a row without a softmax."""
    x = np.array(logits.astype(mx.float32), np.float64).reshape(-1, logits.shape[-1])
    with np.errstate(invalid="ignore"):
        y = x if softcap is None else softcap * np.tanh(x / softcap)
        z = (y if bias is None else y + np.array(bias.table)[np.array(bias.rows).flatten()]) / TEMPERATURE
        e = np.exp(z - z.max(axis=-1, keepdims=True))
        return np.asarray(e / e.sum(axis=-1, keepdims=True))


def assert_sampled(
    found: CanvasSample, logits: mx.array, uniforms: mx.array, softcap: float | None, bias: LogitBias | None = None
) -> None:
    """Assert that every field of every row equals the float64 result up to rounding errors."""
    rows = logits.shape[:-1]
    assert [part.shape for part in found] == [rows] * 4 + [(*rows, MAX_KEPT)] * 2 + [rows]
    assert [part.dtype for part in found] == [mx.float32, *[mx.int32] * 4, *[mx.float32] * 2]
    columns = [np.array(part).reshape(uniforms.size, -1) for part in found]
    x = np.array(logits.astype(mx.float32)).reshape(-1, logits.shape[-1])
    for i, p in enumerate(probabilities(logits, softcap, bias)):
        row = [column[i] for column in columns]
        if np.isnan(p).any():
            assert_without_softmax(row, p.size)
        else:
            assert row[1] == (x[i] if bias is None else p).argmax()
            assert_row(row, p, float(uniforms.reshape(-1)[i]))


def assert_without_softmax(row: list[Array], vocabulary: int) -> None:
    entropy, argmax, sample, count, ids, weights, mass = row
    assert np.isnan(entropy) and sample == 0 and 0 <= argmax < vocabulary
    assert count == 0 and mass == 0 and not ids.any() and not weights.any()


def assert_row(row: list[Array], p: Array, uniform: float) -> None:
    entropy, _, sample, count, ids, weights, mass = row
    positive = p[p > 0]
    np.testing.assert_allclose(entropy, -(positive * np.log(positive)).sum(), rtol=1e-5, atol=1e-5)
    assert p[sample] > 0
    assert is_drawn(int(sample[0]), p, uniform)

    with np.errstate(divide="ignore"):
        nats = np.log(p.max()) - np.log(p)
    n = min(int(count[0]), MAX_KEPT)
    kept, last = ids[:n], ids[n - 1] if count > MAX_KEPT else p.size - 1
    assert 0 < count <= MAX_KEPT + 1
    assert (np.diff(kept) > 0).all() and (nats[kept] < KEPT_NATS + 1e-4).all()
    assert np.isin(np.flatnonzero(nats[: last + 1] < KEPT_NATS - 1e-4), kept).all()
    np.testing.assert_allclose(weights[:n], p[kept], rtol=1e-4)
    np.testing.assert_allclose(mass, p[kept].sum(), rtol=1e-5)
    assert not ids[n:].any() and not weights[n:].any()


def is_drawn(token: int, p: Array, uniform: float) -> bool:
    """Return whether a token is the first whose cumulative probability exceeds ``uniform``, within 1e-5."""
    after = p[: token + 1].sum()
    return bool(after - p[token] - 1e-5 <= uniform < after + 1e-5)


def chi_square(samples: Array, p: Array) -> float:
    """Return the chi-square statistic of the samples' counts for probabilities p."""
    possible = p > 0
    counts = np.bincount(samples, minlength=p.size)
    assert not counts[~possible].any()
    expected = p[possible] * samples.size
    return float(((counts[possible] - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize(("rows", "vocabulary"), SIZES + REAL_SIZES)
def test_reference(rows: int, vocabulary: int, softcap: float | None) -> None:
    logits, uniforms = logits_of("normal", rows, vocabulary, mx.float32), some_uniforms(rows)
    assert_sampled(canvas_sampler_reference(logits, uniforms, softcap, TEMPERATURE), logits, uniforms, softcap)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_reference_with_half_precision_logits(dtype: mx.Dtype) -> None:
    logits, uniforms = logits_of("normal", 3, 5000, dtype), some_uniforms(3)
    assert_sampled(canvas_sampler_reference(logits, uniforms, 30.0, TEMPERATURE), logits, uniforms, 30.0)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("vocabulary", [7, 1000, 4100])
@pytest.mark.parametrize("kind", ODD_ROWS)
def test_reference_with_special_logits(kind: str, vocabulary: int, softcap: float | None) -> None:
    logits, uniforms = logits_of(kind, 3, vocabulary, mx.float32), some_uniforms(3)
    assert_sampled(canvas_sampler_reference(logits, uniforms, softcap, TEMPERATURE), logits, uniforms, softcap)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize(("rows", "vocabulary"), [*SIZES, (68, 32_768)])
def test_reference_with_a_bias(rows: int, vocabulary: int, softcap: float | None) -> None:
    logits, uniforms = logits_of("normal", rows, vocabulary, mx.float32), some_uniforms(rows)
    bias = some_bias(rows, vocabulary)
    found = canvas_sampler_reference(logits, uniforms, softcap, TEMPERATURE, bias)
    assert_sampled(found, logits, uniforms, softcap, bias)


def test_a_bias_takes_little_memory() -> None:
    """The biased logits of a canvas would take 268 MB in float32."""
    logits, uniforms = mx.zeros((256, 262_144), mx.bfloat16), mx.zeros(256)
    bias = LogitBias(mx.zeros((2, 262_144)), mx.zeros(256, mx.int32))
    mx.eval(logits, uniforms, bias)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(canvas_sampler_reference(logits, uniforms, 30.0, TEMPERATURE, bias))
    assert mx.get_peak_memory() - before < 100e6


def test_rows_are_processed_in_blocks() -> None:
    logits, uniforms = logits_of("normal", 68, 32_768, mx.float32), some_uniforms(68)
    shaped = logits.reshape(2, 34, 32_768), uniforms.reshape(2, 34)
    assert_sampled(canvas_sampler_reference(*shaped, None, TEMPERATURE), *shaped, None)


@pytest.mark.parametrize("excess", [-1, 0, 1, 100])
def test_a_list_that_is_just_full(excess: int) -> None:
    """The list has as many equal logits as places, or one more: then the count says so and the first are listed."""
    logits = np.full((1, 2000), -50, np.float32)
    alike = np.sort(np.random.default_rng(0).permutation(2000)[: MAX_KEPT + excess])
    logits[0, alike] = 4
    found = canvas_sampler_reference(mx.array(logits), mx.array([0.5]), None, TEMPERATURE)
    assert found.kept_count.item() == MAX_KEPT + min(excess, 1)
    assert found.kept_ids[0, :511].tolist() == alike[:511].tolist()


@pytest.mark.parametrize("field", CanvasSample._fields)
def test_a_wrong_result_is_noticed(field: str) -> None:
    """The result has a small error in one field of every row."""
    logits, uniforms = logits_of("normal", 8, 1000, mx.float32), some_uniforms(8)
    right = canvas_sampler_reference(logits, uniforms, None, TEMPERATURE)
    value = getattr(right, field)
    wrong = value + (1 if value.dtype == mx.int32 else 0.01)
    assert canvas_sampler.agree(right, right)
    assert not canvas_sampler.agree(right._replace(**{field: wrong}), right)


@pytest.mark.parametrize("vocabulary", [700, 40_000, 50_001])
def test_listed_tokens_at_both_ends_of_a_vocabulary(vocabulary: int) -> None:
    logits = np.full((2, vocabulary), -50, np.float32)
    ends = [0, 1, 33, vocabulary - 40, vocabulary - 3, vocabulary - 2, vocabulary - 1]
    logits[0, ends], logits[1, ends[-2:]] = 4, 4
    found = canvas_sampler_reference(mx.array(logits), mx.array([0.5, 0.5]), None, TEMPERATURE)
    assert found.kept_count.tolist() == [7, 2]
    assert found.kept_ids[:, :8].tolist() == [[*ends, 0], [*ends[-2:], *[0] * 6]]


def test_samples_follow_the_softmax() -> None:
    logits, p = hundred_tokens()
    uniforms = mx.random.uniform(shape=(100_000,), key=mx.random.key(5))
    found = canvas_sampler_reference(mx.broadcast_to(logits, (100_000, 100)), uniforms, None, TEMPERATURE)
    assert chi_square(np.array(found.sample), p) < HUNDRED_TOKENS_1_IN_1000


HUNDRED_TOKENS_1_IN_1000 = 123.6  # chi-square of 100,000 draws: 80 tokens are possible, 79 degrees of freedom


def hundred_tokens() -> tuple[mx.array, Array]:
    """Return logits (1, 100), a fifth of which are -inf, and their probabilities, which are at least 3e-4."""
    x = np.random.default_rng(3).uniform(-1.5, 1.5, (1, 100)).astype(np.float32)
    x[0, ::5] = -math.inf
    return mx.array(x), probabilities(mx.array(x), None)[0]
