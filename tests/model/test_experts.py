"""Tests of both ways to compute experts, against a loop over rows and experts, in float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.kernels import Route
from dgemma_mlx.model.experts import Experts
from tests.model.checkpoint import flat_config


def moe(experts: int, dtype: mx.Dtype, rows: int) -> tuple[Experts, mx.array, mx.array, mx.array]:
    config = TextConfig.from_dict(flat_config(num_experts=experts)["text_config"])
    rng = np.random.default_rng(experts + rows)
    layer = Experts(config)
    layer.gate_up_proj.weight = mx.array(rng.normal(size=(experts, 128, 128)) * 128**-0.5, dtype)
    layer.down_proj.weight = mx.array(rng.normal(size=(experts, 128, 64)) * 64**-0.5, dtype)
    indices = np.stack([rng.permutation(experts)[:2] for _ in range(rows)])
    x = mx.array(rng.normal(size=(rows, 128)), dtype)
    return layer, x, mx.array(rng.uniform(0.1, 1, (rows, 2)), mx.float32), mx.array(indices)


def route(weights: mx.array, indices: mx.array) -> Route:
    """Return the route of these weights and indices, with the work sorted by expert."""
    order = mx.argsort(indices.flatten())
    slots = mx.argsort(order).reshape(indices.shape)
    return Route(weights, indices, indices.flatten()[order], order // indices.shape[1], slots)


def norm(dtype: mx.Dtype) -> nn.RMSNorm:
    norm = nn.RMSNorm(128, 1e-6)
    norm.weight = mx.linspace(0.25, 1, 128).astype(dtype)
    return norm


def moe_by_rows(layer: Experts, x: mx.array, weights: mx.array, indices: mx.array) -> np.ndarray[Any, Any]:
    """Compute the experts' weighted sum and its norm in float64, one row and one expert at a time."""
    up, down = (np.array(m.weight.astype(mx.float32), np.float64) for m in (layer.gate_up_proj, layer.down_proj))
    rows, w = np.array(x.astype(mx.float32), np.float64), np.array(weights)
    out = np.zeros_like(rows)
    for n, chosen in enumerate(np.array(indices)):
        for k, expert in enumerate(chosen):
            gate, value = np.split(up[expert] @ rows[n], 2)
            gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            out[n] += w[n, k] * (down[expert] @ (gelu * value))
    return np.asarray(out / np.sqrt((out**2).mean(axis=-1, keepdims=True) + 1e-6) * np.linspace(0.25, 1, 128))


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 2e-5), (mx.bfloat16, 5e-2)], ids=["f32", "bf16"])
@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("experts", [4, 16])  # in training, all of 4 experts are computed, and 16 are gathered
def test_experts_equal_a_loop(experts: int, rows: int, dtype: mx.Dtype, tolerance: float) -> None:
    layer, x, weights, indices = moe(experts, dtype, rows)
    expected = moe_by_rows(layer, x, weights, indices)  # values near 1; bfloat16 has 8 bits of precision
    for training in (False, True):
        y = layer.train(training)(x, route(weights, indices), norm(dtype))
        assert y.dtype == dtype
        np.testing.assert_allclose(np.array(y.astype(mx.float32)), expected, atol=tolerance)


@pytest.mark.parametrize("rows", [9, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float32, 1e-4), (mx.bfloat16, 3e-2)], ids=["f32", "bf16"])
def test_the_gradient_of_experts(rows: int, dtype: mx.Dtype, tolerance: float) -> None:
    layer, x, weights, indices = moe(4, mx.float32, rows)
    goal = mx.random.normal(x.shape, key=mx.random.key(0))

    def gradients(training: bool, dtype: mx.Dtype) -> list[mx.array]:
        def loss(x: mx.array, weights: mx.array, up: mx.array, down: mx.array) -> mx.array:
            layer.gate_up_proj.weight, layer.down_proj.weight = up, down
            return (layer(x, route(weights, indices), norm(x.dtype)).astype(mx.float32) * goal).sum()

        layer.train(training)
        up, down = plain
        found = mx.grad(loss, argnums=(0, 1, 2, 3))(x.astype(dtype), weights, up.astype(dtype), down.astype(dtype))
        return [gradient.astype(mx.float32) for gradient in found]

    plain = layer.gate_up_proj.weight, layer.down_proj.weight
    exact = gradients(True, mx.float32)
    for training in (True, False):
        for found, expected in zip(gradients(training, dtype), exact, strict=True):
            assert mx.abs(found - expected).max() < tolerance * mx.abs(expected).max()
