"""Tests of which attention calls may run MLX's fused kernel, and that its stand-in computes attention."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.kernels import can_fuse, fused_attention
from dgemma_mlx.kernels.selfcheck import examine
from dgemma_mlx.model import attention


def test_reference() -> None:
    q, k, v = fused_attention.examples[0](mx.float32)
    keys, values = (np.repeat(np.array(part, np.float64), 2, axis=1) for part in (k, v))
    weights = np.exp(np.array(q, np.float64) @ keys.swapaxes(2, 3))
    expected = weights @ values / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.array(fused_attention.reference(q, k, v)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "can"),
    [
        ((1, 2, 64, 256), mx.bfloat16, True), ((2, 2, 9, 256), mx.float16, True), ((1, 2, 8, 256), mx.bfloat16, False),
        ((1, 2, 64, 512), mx.bfloat16, False), ((1, 2, 64, 256), mx.float32, False),
    ],
)  # fmt: skip
def test_only_calls_without_a_mask_that_fit_are_fused(
    shape: tuple[int, ...], dtype: mx.Dtype, can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def spy(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        calls.append(q.shape)
        return fused_attention.reference(q, k, v)

    monkeypatch.setattr(attention, "fused_attention", spy)
    q, k = mx.ones(shape, dtype), mx.ones((shape[0], 1, 100, shape[-1]), dtype)
    assert can_fuse(q) is can
    mx.eval(attention.attend(q, k, k, None))
    assert bool(calls) is can
    calls.clear()
    mx.eval(attention.attend(q, k, k, "causal"), attention.attend(q, k, k, mx.ones((shape[2], 100), mx.bool_)))
    assert not calls


@pytest.mark.skipif(mx.metal.is_available(), reason="checks the answer of a machine without Metal")
def test_without_metal_the_check_fails_and_the_reference_runs() -> None:
    verdict = examine(fused_attention, mx.bfloat16)
    assert verdict.status == "failed"
    assert "no fused kernel" in verdict.detail
