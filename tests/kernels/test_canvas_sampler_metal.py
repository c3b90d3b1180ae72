"""Tests of the sampler's kernels against float64, and of their samples against the reference's."""

from __future__ import annotations

from importlib import import_module

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.kernels.canvas_sampler import (
    MAX_KEPT,
    canvas_sampler,
    canvas_sampler_kernel,
    canvas_sampler_reference,
)
from tests.kernels.conftest import UseMetal
from tests.kernels.test_canvas_sampler import (
    CAPS,
    DTYPES,
    HUNDRED_TOKENS_1_IN_1000,
    ODD_ROWS,
    REAL_SIZES,
    SIZES,
    TEMPERATURE,
    assert_sampled,
    chi_square,
    hundred_tokens,
    is_drawn,
    logits_of,
    probabilities,
    some_bias,
    some_uniforms,
)

pytestmark = pytest.mark.kernels
module = import_module("dgemma_mlx.kernels.canvas_sampler")


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
def test_kernel(metal: UseMetal, rows: int, vocabulary: int, softcap: float | None) -> None:
    metal(module)
    logits, uniforms = logits_of("normal", rows, vocabulary, mx.float32), some_uniforms(rows)
    assert_sampled(canvas_sampler_kernel(logits, uniforms, softcap, TEMPERATURE), logits, uniforms, softcap)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
def test_kernel_with_a_bias(metal: UseMetal, rows: int, vocabulary: int, softcap: float | None) -> None:
    metal(module)
    logits, uniforms = logits_of("normal", rows, vocabulary, mx.float32), some_uniforms(rows)
    bias = some_bias(rows, vocabulary)
    found = canvas_sampler_kernel(logits, uniforms, softcap, TEMPERATURE, bias)
    assert_sampled(found, logits, uniforms, softcap, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [*REAL_SIZES, (256, 4096), (2, 300_000)])
def test_kernel_at_real_sizes(metal: UseMetal, rows: int, vocabulary: int, dtype: mx.Dtype) -> None:
    metal(module, check=False)
    logits, uniforms = logits_of("normal", rows, vocabulary, dtype), some_uniforms(rows)
    found = canvas_sampler_kernel(logits, uniforms, 30.0, TEMPERATURE)
    assert_sampled(found, logits, uniforms, 30.0)


@pytest.mark.parametrize("softcap", CAPS)
@pytest.mark.parametrize("vocabulary", [7, 4100])
@pytest.mark.parametrize("kind", ODD_ROWS)
def test_kernel_with_special_logits(metal: UseMetal, kind: str, vocabulary: int, softcap: float | None) -> None:
    metal(module)
    logits, uniforms = logits_of(kind, 3, vocabulary, mx.float32), some_uniforms(3)
    assert_sampled(canvas_sampler_kernel(logits, uniforms, softcap, TEMPERATURE), logits, uniforms, softcap)


@pytest.mark.parametrize("excess", [-1, 0, 1, 1000])
def test_kernel_with_a_list_that_is_just_full(metal: UseMetal, excess: int) -> None:
    """The listed tokens come from 20 chunks, more than the kernel reads at a time."""
    metal(module)
    logits = np.full((1, 20_000), -50, np.float32)
    logits[0, np.random.default_rng(0).permutation(20_000)[: MAX_KEPT + excess]] = 4
    uniforms = mx.array([0.5])
    found = canvas_sampler_kernel(mx.array(logits), uniforms, None, TEMPERATURE)
    assert_sampled(found, mx.array(logits), uniforms, None)
    assert found.kept_count.item() == MAX_KEPT + min(excess, 1)


def test_kernel_keeps_leading_dimensions(metal: UseMetal) -> None:
    metal(module)
    logits, uniforms = logits_of("normal", 6, 1100, mx.float32).reshape(2, 3, 1100), some_uniforms(6).reshape(2, 3)
    assert_sampled(canvas_sampler_kernel(logits, uniforms, None, TEMPERATURE), logits, uniforms, None)


@pytest.mark.parametrize("vocabulary", [7, 3000, 32_768])
def test_kernel_and_reference_draw_the_same(metal: UseMetal, vocabulary: int) -> None:
    """Samples are equal unless the uniform number is within 1e-5 of a boundary."""
    metal(module, check=False)
    logits, uniforms = logits_of("normal", 100, vocabulary, mx.float32), some_uniforms(100)
    found = canvas_sampler_kernel(logits, uniforms, None, TEMPERATURE)
    expected = canvas_sampler_reference(logits, uniforms, None, TEMPERATURE)
    different = np.flatnonzero(np.array(found.sample != expected.sample))
    assert len(different) < 10
    p = probabilities(logits, None)
    for i in different:
        for token in (found.sample[i], expected.sample[i]):
            assert is_drawn(token.item(), p[i], uniforms[i].item())


def test_kernel_agrees_with_the_reference_on_the_example(metal: UseMetal) -> None:
    """The example has the published model's vocabulary."""
    metal(module, check=False)
    for example in canvas_sampler.examples:
        arguments = example(mx.bfloat16)
        assert arguments[0].shape[-1] == 262_144
        assert canvas_sampler.agree(canvas_sampler.kernel(*arguments), canvas_sampler.reference(*arguments))


def test_kernel_samples_follow_the_softmax(metal: UseMetal) -> None:
    metal(module, check=False, timeout=300)
    logits, p = hundred_tokens()
    uniforms = mx.random.uniform(shape=(100_000,), key=mx.random.key(5))
    found = canvas_sampler_kernel(mx.broadcast_to(logits, (100_000, 100)), uniforms, None, TEMPERATURE)
    assert chi_square(np.array(found.sample), p) < HUNDRED_TOKENS_1_IN_1000


def test_kernel_samples_follow_the_softmax_over_chunks(metal: UseMetal) -> None:
    """100 of 3,000 tokens are possible, in three chunks."""
    metal(module, check=False, timeout=300)
    logits, p = hundred_tokens()
    wide = mx.concatenate([logits[..., None], mx.full((1, 100, 29), -mx.inf)], axis=-1).reshape(1, 3000)
    uniforms = mx.random.uniform(shape=(20_000,), key=mx.random.key(6))
    found = canvas_sampler_kernel(mx.broadcast_to(wide, (20_000, 3000)), uniforms, None, TEMPERATURE)
    samples = np.array(found.sample)
    assert not (samples % 30).any()
    assert chi_square(samples // 30, p) < HUNDRED_TOKENS_1_IN_1000
