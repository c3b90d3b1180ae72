"""Tests of the simulator with Apple's unmodified kernels from mlx_lm.

These kernels run on real GPUs. That their simulated results equal those of MLX's CPU operations and of NumPy in float64
is the reason to trust the simulator. Each kernel is called by its public wrapper, in which only the kernel object is
replaced.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.metalsim.published import BF16, F16, F32, TOLERANCE, Wide, agree, folder, load, normal, rms_norm, wide
from tests.metalsim.toolchain import available

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not available(), reason="needs Clang: pip install ziglang")]

EPS = 1e-5


def fast_rms_norm(x: mx.array, eps: float = EPS) -> mx.array:
    return mx.fast.rms_norm(x.astype(mx.float32), None, eps)


def test_every_kernel_of_mlx_lm_is_here() -> None:
    """A new file in mlx_lm needs a test here."""
    files = (folder() / "kernels").glob("*.py")
    assert {path.stem for path in files if not path.stem.startswith("_")} == {
        "expert_routing", "norm_add_norm", "post_expert_norm_combine", "qk_norm", "qk_norm_rope",
        "rms_norm_sigmoid_gate",
    }


@pytest.mark.parametrize(
    ("dtype", "tokens", "E", "K"),
    [(F32, (1,), 8, 2), (F32, (2, 5), 128, 8), (F16, (9,), 100, 6), (BF16, (3, 3), 64, 1)],
)
def test_expert_routing(dtype: mx.Dtype, tokens: tuple[int, ...], E: int, K: int) -> None:
    logits, bias = normal(*tokens, E, dtype=dtype), 0.1 * normal(E, seed=1)
    inds, weights = load("mlx_lm.kernels.expert_routing").expert_routing(
        logits, bias, top_k=K, multiplier=1.5, score_eps=1e-20, route_scale=2.5
    )
    score = 1 / (1 + np.exp(-1.5 * wide(logits)))
    order = np.argsort(-(score + wide(bias)), axis=-1, kind="stable")[..., :K]
    chosen = np.take_along_axis(score, order, -1)
    mlx_score = mx.sigmoid(1.5 * logits.astype(mx.float32))
    mlx_order = mx.argsort(-(mlx_score + bias), axis=-1)[..., :K]
    mlx_chosen = mx.take_along_axis(mlx_score, mlx_order, -1)
    np.testing.assert_array_equal(np.array(inds), order)
    np.testing.assert_array_equal(np.array(inds), np.array(mlx_order))
    chosen, mlx_chosen = chosen / chosen.sum(-1, keepdims=True), mlx_chosen / mlx_chosen.sum(-1, keepdims=True)
    agree(weights, 2.5 * chosen, 2.5 * mlx_chosen, 2e-6)


def test_expert_routing_takes_the_lowest_of_equal_experts() -> None:
    logits = mx.array([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0], [3.0] * 8])
    inds, weights = load("mlx_lm.kernels.expert_routing").expert_routing(
        logits, mx.zeros(8), top_k=3, multiplier=1.0, score_eps=0.0, route_scale=1.0
    )
    assert inds.tolist() == [[1, 2, 4], [0, 1, 2]]
    np.testing.assert_allclose(np.array(weights), 1 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "rows", "D", "scaled"),
    [
        (F32, (1,), 32, True), (F32, (2,), 1000, False), (F16, (3,), 100, False), (F16, (2, 2), 512, True),
        (BF16, (2,), 1000, True), (BF16, (1, 3), 4096, False),
    ],
)
def test_norm_add_norm(dtype: mx.Dtype, rows: tuple[int, ...], D: int, scaled: bool) -> None:
    module = load("mlx_lm.kernels.norm_add_norm")
    branch, stream = normal(*rows, D, dtype=dtype), 2 * normal(*rows, D, seed=1)
    alpha, beta = normal(D, seed=2), normal(D, seed=3)
    weight = 1 + 0.2 * normal(D, dtype=dtype, seed=4) if scaled else None
    norm = nn.RMSNorm(D, 1e-6)
    norm.weight = 1 + 0.2 * normal(D, seed=5)
    arguments = {"alpha": alpha, "beta": beta, "post_weight": weight, "post_eps": EPS}
    new_stream, normed = module.norm_add_norm(branch, stream, **arguments, next_norm=norm)

    ones = mx.ones(D) if weight is None else weight
    in_numpy = wide(alpha) * wide(stream) + wide(beta) * rms_norm(wide(ones) * wide(branch))
    in_mlx = alpha * stream + beta * fast_rms_norm(ones.astype(mx.float32) * branch.astype(mx.float32))
    assert (new_stream.dtype, normed.dtype) == (F32, dtype)
    agree(new_stream, in_numpy, in_mlx, TOLERANCE[dtype])
    in_numpy, in_mlx = wide(norm.weight) * rms_norm(in_numpy, 1e-6), mx.fast.rms_norm(in_mlx, norm.weight, 1e-6)
    agree(normed, in_numpy, in_mlx, TOLERANCE[dtype])

    alone, nothing = module.norm_add_norm(branch, stream, **arguments, next_norm=None)
    assert nothing is None
    assert mx.array_equal(alone, new_stream)
    assert mx.array_equal(module.pre_norm(new_stream, norm, dtype=dtype), normed)  # as its docstring says


@pytest.mark.parametrize(
    ("dtype", "tokens", "K", "D"),
    [(F32, (1,), 1, 64), (F32, (2,), 8, 2048), (F16, (2, 2), 2, 96), (BF16, (3,), 8, 300)],
)
def test_post_expert_norm_combine(dtype: mx.Dtype, tokens: tuple[int, ...], K: int, D: int) -> None:
    experts, scale = normal(*tokens, K, D, dtype=dtype), 1 + 0.2 * normal(D, seed=1)
    weights = mx.softmax(normal(*tokens, K, seed=2), axis=-1)
    module = load("mlx_lm.kernels.post_expert_norm_combine")
    out = module.post_expert_norm_combine(experts, weights, norm_weight=scale, eps=EPS)
    normed, mlx_normed = rms_norm(wide(experts) * wide(scale)), fast_rms_norm(experts.astype(mx.float32) * scale)
    assert out.dtype == dtype
    in_numpy, in_mlx = (wide(weights)[..., None] * normed).sum(-2), (weights[..., None] * mlx_normed).sum(-2)
    agree(out, in_numpy, in_mlx, TOLERANCE[dtype])


HEADS = pytest.mark.parametrize(
    ("dtype", "batch", "length", "HQ", "HK", "D"),
    [(F32, 2, 3, 4, 2, 128), (F32, 1, 5, 3, 1, 80), (F16, 1, 1, 2, 1, 64), (BF16, 2, 2, 1, 1, 256)],
)


@HEADS
def test_qk_norm(dtype: mx.Dtype, batch: int, length: int, HQ: int, HK: int, D: int) -> None:
    qkvg = normal(batch, length, 2 * (HQ + HK) * D, dtype=dtype)
    module = load("mlx_lm.kernels.qk_norm")
    found = module.qk_norm(qkvg, n_heads=HQ, n_kv_heads=HK, head_dim=D, eps=EPS, query_scale=0.7)
    heads = qkvg.reshape(batch, length, -1, D)
    for result, part, scale in zip(found, (heads[:, :, :HQ], heads[:, :, HQ : HQ + HK]), (0.7, 1.0), strict=True):
        assert result.dtype == dtype
        agree(result, scale * rms_norm(wide(part)), scale * fast_rms_norm(part), TOLERANCE[dtype])


@HEADS
@pytest.mark.parametrize("offset", [0, 1000, [7, 300]], ids=str)
def test_qk_norm_rope(
    dtype: mx.Dtype, batch: int, length: int, HQ: int, HK: int, D: int, offset: int | list[int]
) -> None:
    offsets = np.array(offset[:batch] if isinstance(offset, list) else [offset] * batch)
    qkvg = normal(batch, length, 2 * (HQ + HK) * D, dtype=dtype)
    found = load("mlx_lm.kernels.qk_norm_rope").qk_norm_rope(
        qkvg, n_heads=HQ, n_kv_heads=HK, head_dim=D, eps=EPS, query_scale=0.7, rope_base=10000.0,
        offset=mx.array(offsets) if isinstance(offset, list) else offset,
    )
    heads = qkvg.reshape(batch, length, -1, D)
    for result, part, scale in zip(found, (heads[:, :, :HQ], heads[:, :, HQ : HQ + HK]), (0.7, 1.0), strict=True):
        assert result.dtype == dtype
        in_numpy = rotate(scale * rms_norm(wide(part)), offsets[:, None] + np.arange(length))
        in_mlx = rope(scale * fast_rms_norm(part), mx.array(offsets))
        agree(result, in_numpy, in_mlx, max(TOLERANCE[dtype], 2e-4))  # the float32 error of an angle of 1,000 is 6e-5


def rotate(x: Wide, positions: NDArray[np.int64]) -> Wide:
    """Rotate each pair of neighbours (2i, 2i + 1) by the angle position * base ** (-2i / D)."""
    D = x.shape[-1]
    angle = positions[..., None, None] * 10000.0 ** (-np.arange(0, D, 2) / D)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def rope(x: mx.array, offsets: mx.array) -> mx.array:
    """Rotate x (B, L, H, D) with MLX's own operation."""
    turned = mx.fast.rope(x.swapaxes(1, 2), x.shape[-1], traditional=True, base=10000.0, scale=1.0, offset=offsets)
    return turned.swapaxes(1, 2)


@pytest.mark.parametrize(
    ("dtype", "B", "H", "L", "D"),
    [(F32, 2, 3, 5, 64), (F32, 1, 4, 2, 100), (F16, 1, 1, 1, 32), (BF16, 2, 2, 1, 256)],
)
@pytest.mark.parametrize("strided", [False, True])
def test_rms_norm_sigmoid_gate(dtype: mx.Dtype, B: int, H: int, L: int, D: int, strided: bool) -> None:
    """The kernel reads strides. Its inputs are a transposed view from attention and a slice of the projection."""
    x, gate = normal(B, H, L, D, dtype=dtype), normal(B, L, H * D, dtype=dtype, seed=1)
    if strided:
        x = normal(B, L, H, D, dtype=dtype).transpose(0, 2, 1, 3)
        gate = normal(B, L, 2 * H * D, dtype=dtype, seed=1)[..., H * D :]
    out = load("mlx_lm.kernels.rms_norm_sigmoid_gate").rms_norm_sigmoid_gate(x, gate, eps=EPS)
    normed = rms_norm(wide(x)).transpose(0, 2, 1, 3).reshape(B, L, H * D)
    mlx_normed = fast_rms_norm(x).transpose(0, 2, 1, 3).reshape(B, L, H * D)
    assert out.dtype == dtype
    in_numpy, in_mlx = normed / (1 + np.exp(-wide(gate))), mlx_normed * mx.sigmoid(gate.astype(mx.float32))
    agree(out, in_numpy, in_mlx, TOLERANCE[dtype])
