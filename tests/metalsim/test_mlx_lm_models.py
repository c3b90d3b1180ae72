"""Tests of the simulator with the unmodified kernels of mlx_lm's models and losses."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.metalsim.published import (
    BF16,
    F16,
    F32,
    TOLERANCE,
    Wide,
    agree,
    believe_in_metal,
    folder,
    load,
    normal,
    rms_norm,
    wide,
)
from tests.metalsim.simulate import SimulationError
from tests.metalsim.toolchain import available

pytestmark = [pytest.mark.kernels, pytest.mark.skipif(not available(), reason="needs Clang: pip install ziglang")]

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def test_every_kernel_of_mlx_lm_is_here() -> None:
    """A new file outside of ``kernels/`` that contains a kernel needs a test here."""
    files = {path for path in folder().rglob("*.py") if "fast.metal_kernel(" in path.read_text("utf-8")}
    assert {path.relative_to(folder()).as_posix() for path in files if path.parent.name != "kernels"} == {
        "models/bitlinear_layers.py", "models/deepseek_v41.py", "models/gated_delta.py", "models/kimi_k3.py",
        "models/rwkv7.py", "models/ssm.py", "tuner/losses.py",
    }


Sizes = tuple[int, int, int, int, int, int]


def delta_inputs(dtype: mx.Dtype, sizes: Sizes, vector: bool) -> dict[str, mx.array]:
    B, T, Hk, Hv, Dk, Dv = sizes
    q, k = normal(B, T, Hk, Dk, dtype=dtype), normal(B, T, Hk, Dk, dtype=dtype, seed=1)
    g, beta = mx.sigmoid(normal(B, T, Hv, *[Dk] * vector, seed=3)), mx.sigmoid(normal(B, T, Hv, seed=4))
    q, k = load("mlx_lm.models.gated_delta").normalize_qk(q, k, inv_scale=Dk**-0.5, eps=1e-6)
    v, state = normal(B, T, Hv, Dv, dtype=dtype, seed=2), normal(B, Hv, Dv, Dk, seed=5)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta.astype(dtype), "state": state}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize(("dtype", "sizes"), [(F32, (2, 3, 1, 2, 64, 8)), (BF16, (1, 2, 2, 2, 32, 4))])
def test_gated_delta(dtype: mx.Dtype, sizes: Sizes, vector: bool, masked: bool) -> None:
    # Where the mask is false, all lanes write the same zero. A checked run reports this harmless race.
    module, inputs = load("mlx_lm.models.gated_delta", check=not masked), delta_inputs(dtype, sizes, vector)
    mask = mx.array([[t != 1 for t in range(sizes[1])]] * sizes[0]) if masked else None
    y, state = module.gated_delta_kernel(**inputs, mask=mask)
    in_mlx, mlx_state = module.gated_delta_ops(**{key: x.astype(F32) for key, x in inputs.items()}, mask=mask)
    if mask is not None:
        in_mlx = mx.where(mask[..., None, None], in_mlx, 0)  # the kernel writes zeros where the operations continue
    in_numpy, numpy_state = delta_rule({key: wide(x) for key, x in inputs.items()}, mask)
    assert (y.dtype, state.dtype) == (dtype, F32)
    agree(y, in_numpy, in_mlx, 3 * TOLERANCE[dtype])
    agree(state, numpy_state, mlx_state, 1e-5)


def delta_rule(x: dict[str, Wide], mask: mx.array | None) -> tuple[Wide, Wide]:
    repeat = x["v"].shape[2] // x["k"].shape[2]
    state, ys = x["state"], np.zeros_like(x["v"])
    for t in range(x["v"].shape[1]):
        q, k = (np.repeat(x[key][:, t], repeat, 1)[..., None, :] for key in "qk")
        g = x["g"][:, t]
        new = state * (g[..., None, None] if g.ndim == 2 else g[..., None, :])
        new = new + k * ((x["v"][:, t] - (new * k).sum(-1)) * x["beta"][:, t, :, None])[..., None]
        keep = np.ones(len(state), bool) if mask is None else np.array(mask[:, t])
        state = np.where(keep[:, None, None, None], new, state)
        ys[:, t] = np.where(keep[:, None, None], (new * q).sum(-1), 0)
    return ys, state


@pytest.mark.parametrize("dtype", [F32, F16])
def test_packed_gated_delta_equals_the_explicit_tree_in_every_bit(dtype: mx.Dtype) -> None:
    """Its authors state this ("by construction"): the shuffles differ, but the sums have the same order."""
    module, inputs = load("mlx_lm.models.gated_delta"), delta_inputs(dtype, (1, 3, 1, 2, 128, 16), vector=False)
    packed, tree, plain = (
        run(**inputs) for run in
        (module.gated_delta_kernel, module.gated_delta_kernel_xtree, module.gated_delta_kernel_unpacked)
    )
    for a, b, c in zip(packed, tree, plain, strict=True):
        assert mx.array_equal(a, b)
        np.testing.assert_allclose(wide(a), wide(c), atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "n", "h", "groups", "d", "ds"), [(F32, 2, 4, 2, 8, 64), (BF16, 1, 2, 1, 12, 32)])
def test_ssm(dtype: mx.Dtype, n: int, h: int, groups: int, d: int, ds: int) -> None:
    x, dt, state = normal(n, 1, h, d, dtype=dtype), normal(n, 1, h, seed=1), normal(n, h, d, ds, seed=2)
    B, C = normal(n, 1, groups, ds, dtype=dtype, seed=3), normal(n, 1, groups, ds, dtype=dtype, seed=4)
    a, D, bias = 0.3 * normal(h, seed=5), normal(h, seed=6), normal(h, seed=7)
    y, new_state = load("mlx_lm.models.ssm").ssm_update_kernel(x, a, B, C, D, dt, bias, state, (0.01, 1.0))

    step = np.clip(np.log1p(np.exp(wide(dt) + wide(bias))), 0.01, 1.0)[:, 0, :, None, None]
    drive = (np.repeat(wide(part)[:, 0], h // groups, 1)[:, :, None] for part in (B, C))
    b, c = drive
    expected = np.exp(-np.exp(wide(a))[:, None, None] * step) * wide(state) + step * wide(x)[:, 0, ..., None] * b
    found = (expected * c).sum(-1) + wide(x)[:, 0] * wide(D)[:, None]
    assert (y.dtype, new_state.dtype) == (dtype, F32)
    np.testing.assert_allclose(wide(new_state), expected, atol=1e-5)
    np.testing.assert_allclose(wide(y)[:, 0], found, atol=TOLERANCE[dtype] * 2 * np.abs(found).max())


@pytest.mark.parametrize(("B", "T", "H", "D"), [(1, 1, 1, 32), (2, 3, 2, 64)])
def test_wkv7(B: int, T: int, H: int, D: int) -> None:
    r, w, k, v, a, b = (normal(B, T, H, D, seed=i) for i in range(6))
    w, state = mx.sigmoid(w), normal(B, H, D, D, seed=6)
    module = load("mlx_lm.models.rwkv7")
    y, new_state = module.wkv7_kernel(r, w, k, v, a / D, b, state)
    for t in range(T):
        step, state = module._wkv7_step_ops(*(x[:, t] for x in (r, w, k, v, a / D, b)), state)
        np.testing.assert_allclose(wide(y[:, t]), wide(step[..., 0]), atol=1e-5 * float(mx.abs(step).max()))
    np.testing.assert_allclose(wide(new_state), wide(state), atol=1e-5 * float(mx.abs(state).max()))


@pytest.mark.parametrize(
    ("dtype", "blocks", "rows", "D"), [(F32, 1, (1,), 100), (F32, 5, (2, 2), 1024), (BF16, 3, (2,), 600)]
)
def test_attention_residuals(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, blocks: int, rows: tuple[int, ...], D: int
) -> None:
    module = load("mlx_lm.models.kimi_k3")
    partial, weight = normal(*rows, D, dtype=dtype, seed=9), 0.1 * normal(D, seed=8)
    residuals = module.ResidualBlocks(1e-6)
    for i in range(blocks):
        residuals.append(normal(*rows, D, dtype=dtype, seed=i))
    expected = module._attn_res_mix(residuals, partial, weight, 1e-6, use_kernel=False)
    believe_in_metal(monkeypatch)
    found = module._attn_res_mix(residuals, partial, weight, 1e-6)
    raw, scale, last = wide(residuals.raw), wide(residuals.inv_rms)[..., None], wide(partial)
    own = rms_norm(last, 1e-6) @ wide(weight)
    shares = np.exp(np.concatenate([raw @ wide(weight)[:, None] * scale, own[None, ..., None]]))
    shares /= shares.sum(0)
    assert found.dtype == dtype
    agree(found, (shares * np.concatenate([raw, last[None]])).sum(0), expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize(("rows", "width", "iterations"), [((1,), 4, 1), ((3, 100), 4, 20), ((7,), 2, 3)])
def test_sinkhorn(monkeypatch: pytest.MonkeyPatch, rows: tuple[int, ...], width: int, iterations: int) -> None:
    module, combine = load("mlx_lm.models.deepseek_v41"), mx.softmax(normal(*rows, width, width), -1)
    expected = module._sinkhorn(combine, iters=iterations, eps=mx.array([1e-6]))
    believe_in_metal(monkeypatch)
    found = module._sinkhorn(combine, iters=iterations, eps=mx.array([1e-6]))
    np.testing.assert_allclose(wide(found), wide(expected), atol=1e-6)


@pytest.mark.parametrize(("dtype", "rows", "width", "outputs"), [(F32, (1,), 128, 8), (F16, (2, 3), 200, 12)])
@pytest.mark.parametrize("invert", [False, True])
def test_bitlinear(dtype: mx.Dtype, rows: tuple[int, ...], width: int, outputs: int, invert: bool) -> None:
    layer = load("mlx_lm.models.bitlinear_layers").BitLinear(width, outputs, bias=False, invert_weight_scales=invert)
    layer.weight = mx.random.randint(0, 256, layer.weight.shape, key=mx.random.key(0)).astype(mx.uint8)
    layer.weight_scale = mx.array([1.5], dtype)
    x = normal(*rows, width, dtype=dtype)
    packed = np.array(layer.weight, np.int64)
    weight = np.concatenate([(packed >> 2 * i & 3) - 1 for i in range(4)])  # output i of 4 has the bits 2i and 2i + 1
    expected = wide(x) @ weight.T * (1 / 1.5 if invert else 1.5)
    np.testing.assert_allclose(wide(layer(x)), expected, atol=TOLERANCE[dtype] * np.abs(expected).max())


LOSSES = pytest.mark.parametrize("loss", ["kl_div_loss", "js_div_loss"])


@LOSSES
def test_the_losses_lack_a_barrier(monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """As of mlx_lm 0.32.2, a SIMD-group may store its sum before another one has read the maximum there."""
    compute = getattr(load("mlx_lm.tuner.losses"), loss)
    believe_in_metal(monkeypatch)
    with pytest.raises(SimulationError, match=r"race: .* shared\["):
        compute(normal(1, 100), normal(1, 100, seed=1))


def with_barriers(text: str) -> str:
    """Add the missing barriers: after each read of shared values, and in place of a barrier that orders no memory."""
    text = text.replace("= shared[simd_lane_id * 2 + 1];", "= shared[simd_lane_id * 2 + 1];" + BARRIER)
    return text.replace("mem_none", "mem_threadgroup")


@LOSSES
@pytest.mark.parametrize(("dtype", "V"), [(F32, 5000), (F16, 4096), (BF16, 100)])
def test_losses_and_their_gradients(monkeypatch: pytest.MonkeyPatch, loss: str, dtype: mx.Dtype, V: int) -> None:
    compute = getattr(load("mlx_lm.tuner.losses", with_barriers), loss)
    q, p = normal(3, V, dtype=dtype), normal(3, V, dtype=dtype, seed=1)
    in_mlx = mx.grad(lambda q: compute(q, p.astype(F32)).sum())(q.astype(F32))
    believe_in_metal(monkeypatch)
    found, gradient = compute(q, p), mx.grad(lambda q: compute(q, p).sum())(q)
    expected, in_numpy = divergence(wide(q), wide(p), loss)
    assert (found.dtype, gradient.dtype) == (dtype, dtype)
    np.testing.assert_allclose(wide(found), expected, rtol=4 * TOLERANCE[dtype])
    agree(gradient, in_numpy, in_mlx, 4 * TOLERANCE[dtype])


def divergence(q: Wide, p: Wide, loss: str) -> tuple[Wide, Wide]:
    """Return a divergence between softmax(p) and softmax(q), and its gradient with respect to q.

    It is the Kullback-Leibler or the Jensen-Shannon divergence.
    """
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (q, p))
    if loss == "kl_div_loss":
        return (p * np.log(p / q)).sum(-1), q - p
    to_q, to_p = (x * np.log(2 * x / (p + q)) for x in (q, p))
    slope = to_q - q * to_q.sum(-1, keepdims=True)
    return (to_q + to_p).sum(-1) / 2, slope / 2
