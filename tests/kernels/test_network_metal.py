"""Tests of the whole network and of the denoising loop with kernels, against both with references."""

from __future__ import annotations

from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.denoiser import Denoiser
from dgemma_mlx.diffusion.sampler import Noise
from dgemma_mlx.events import Draft
from dgemma_mlx.kernels import dispatch
from dgemma_mlx.kernels.dispatch import set_mode
from dgemma_mlx.model.joined import join_projections
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.text import DiffusionGemma
from tests.golden.numbers import CONFIG, FOLDER, TOLERANCE
from tests.kernels.conftest import UseMetal

pytestmark = pytest.mark.kernels

C, V = CONFIG.canvas_length, CONFIG.text.vocab_size
SETTLES = GenerationConfig.load(FOLDER, CONFIG)
PROMPT = mx.array(np.random.default_rng(0).integers(0, V, (2, 9)))
FILES = (
    "attention_residual", "canvas_sampler", "moe_combine", "moe_route", "norm_residual", "qk_norm_rope",
    "sparse_soft_embedding",
)  # fmt: skip


@pytest.fixture
def on_metal(metal: UseMetal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every kernel available, in mode "off"."""
    for name in FILES:
        metal(import_module(f"dgemma_mlx.kernels.{name}"), orders=2)
    monkeypatch.setattr(dispatch, "has_metal", lambda: True)
    monkeypatch.setattr(dispatch._State, "mode", "off")


def golden(dtype: mx.Dtype, *, packed: bool) -> DiffusionGemma:
    """Load the golden checkpoint; ``packed`` quantizes its embedding table to 8 bits."""
    model, _ = load_model(FOLDER, CONFIG, dtype)
    if packed:
        nn.quantize(model, 32, 8, class_predicate=lambda path, _: path == "embed_tokens")
    return model


def logits(model: DiffusionGemma) -> list[mx.array]:
    """Return the logits of a prompt's second chunk, of a canvas after it, and of this canvas with self-conditioning."""
    cache, canvas = model.new_cache(mx.array([0, 3])), PROMPT[:, : C // 2]
    hidden = [model.encode(PROMPT[:, :5], cache), model.encode(PROMPT[:, 5:], cache)]
    first = model.decode(canvas, cache)
    return [model.logits(hidden[1]), first, model.decode(canvas, cache, first / 0.6)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float32, TOLERANCE), (mx.bfloat16, 1.0)], ids=["float32", "bfloat16"]
)
def test_logits(on_metal: None, dtype: mx.Dtype, tolerance: float) -> None:
    """In bfloat16, rounding differences grow in a small random network, so that only large errors are detected."""
    model = golden(dtype, packed=False)
    expected = logits(model)
    join_projections(model)  # as load does for Metal
    set_mode("force")
    for found, right in zip(logits(model), expected, strict=True):
        np.testing.assert_allclose(np.array(found), np.array(right), rtol=0, atol=tolerance)


@pytest.mark.parametrize("packed", [False, True])
def test_a_canvas_finishes_in_the_same_steps(on_metal: None, packed: bool) -> None:
    model = golden(mx.float32, packed=packed)
    config = SETTLES.override(max_denoising_steps=6)

    def drafts() -> list[Draft]:
        cache = model.new_cache()
        model.encode(PROMPT[:1], cache)
        return [draft for (draft,) in Denoiser(model, config).denoise(cache, Noise(3), C)]

    expected = drafts()
    set_mode("force")
    found = drafts()
    assert [draft.tokens for draft in found] == [draft.tokens for draft in expected]
    assert [draft.accepted_mask for draft in found] == [draft.accepted_mask for draft in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.entropy, other.entropy, rtol=0, atol=1e-3)
