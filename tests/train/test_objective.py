"""The training objective, compared with the network's inference path and with finite differences."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.train.objective import (
    Batch,
    ObjectiveConfig,
    TeacherCache,
    block_diffusion_loss,
    corrupt,
    load_balance,
)

PAD = 0
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "num_experts": 4, "moe_intermediate_size": 8,
    "sliding_window": 5, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}


def small_model(top_k: int = 2) -> DiffusionGemma:
    mx.random.seed(0)
    model = DiffusionGemma(TextConfig.from_dict({**SIZES, "top_k_experts": top_k}))
    mx.eval(model.parameters())
    return model


@pytest.fixture
def batch() -> Batch:
    ids = mx.random.randint(1, 40, (3, 18), key=mx.random.key(1)).astype(mx.int32)
    starts = mx.array([4, 9, 10], mx.int32)
    canvas = mx.random.randint(1, 40, (3, 8), key=mx.random.key(2)).astype(mx.int32)
    return Batch(ids, starts, mx.where(mx.arange(8) < mx.array([[8], [5], [3]]), canvas, PAD))


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_cache_shows_each_row_its_own_prefix(batch: Batch, training: bool) -> None:
    model = small_model().train(training)
    teacher = TeacherCache(model.config.sliding_window, batch.starts)
    hidden = model.encode(batch.ids, teacher)  # type: ignore[arg-type]
    logits = model.decode(batch.canvas, teacher)  # type: ignore[arg-type]
    for row, start in enumerate(batch.starts.tolist()):
        alone = model.new_cache()
        expected = model.encode(batch.ids[row : row + 1, :start], alone)
        np.testing.assert_allclose(hidden[row, :start], expected[0], atol=1e-4)
        np.testing.assert_allclose(logits[row], model.decode(batch.canvas[row : row + 1], alone)[0], atol=1e-4)


def test_the_loss_is_the_weighted_sum_of_its_parts(batch: Batch) -> None:
    config = ObjectiveConfig(full_noise=1.0, pad_weight=0.25)
    model = small_model()
    total, parts = block_diffusion_loss(model, batch, config, PAD, mx.random.key(0), self_condition=False)
    keys = mx.random.split(mx.random.key(0), 6)
    noise = mx.random.randint(0, 40, batch.canvas.shape, key=keys[2])
    cache = TeacherCache(model.config.sliding_window, batch.starts)
    hidden = model.encode(batch.ids, cache)  # type: ignore[arg-type]
    log_p = nn.log_softmax(model.decode(noise, cache))  # type: ignore[arg-type]
    next_log_p = nn.log_softmax(model.logits(hidden))
    sums = {"diffusion": [0.0, 0.0], "causal": [0.0, 0.0]}
    for row, start in enumerate(batch.starts.tolist()):
        for i, token in enumerate(batch.canvas[row].tolist()):
            weight = config.pad_weight if token == PAD else 1.0
            sums["diffusion"][0] -= weight * log_p[row, i, token].item()
            sums["diffusion"][1] += weight
            if token != PAD:
                sums["causal"][0] -= next_log_p[row, min(start - 1 + i, 17), token].item()
                sums["causal"][1] += 1
    for name, (loss, weight) in sums.items():
        assert parts[name].item() == pytest.approx(loss / weight, rel=1e-4)
    expected = parts["diffusion"] + config.causal_weight * parts["causal"] + config.balance_weight * parts["balance"]
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_agree_with_finite_differences(batch: Batch) -> None:
    # All experts are chosen: a changed choice would make the loss jump.
    model = small_model(top_k=4).train()

    def loss() -> mx.array:
        return block_diffusion_loss(model, batch, ObjectiveConfig(), PAD, mx.random.key(3), self_condition=False)[0]

    _, gradients = nn.value_and_grad(model, loss)()
    flat, parameters = dict(tree_flatten(gradients)), dict(tree_flatten(model.parameters()))
    for name in (
        "layers.1.layer_scalar", "layers.0.encoder_layer_scalar", "layers.0.self_attn.v_proj.weight",
        "layers.2.self_attn.k_proj.weight", "layers.1.experts.gate_up_proj.weight", "embed_tokens.weight",
    ):
        length = mx.sqrt((flat[name] ** 2).sum())
        step = 4e-3 * flat[name] / length
        ends = []
        for sign in (1, -1):
            model.load_weights([(name, parameters[name] + sign * step)], strict=False)
            ends.append(loss().item())
        model.load_weights([(name, parameters[name])], strict=False)
        assert (ends[0] - ends[1]) / 8e-3 == pytest.approx(length.item(), rel=0.02), name


def test_only_a_self_conditioned_batch_trains_the_self_conditioning_block(batch: Batch) -> None:
    model = small_model().train()
    for self_condition in (False, True):
        _, gradients = nn.value_and_grad(model, lambda: block_diffusion_loss(
            model, batch, ObjectiveConfig(), PAD, mx.random.key(3), self_condition=self_condition  # noqa: B023
        )[0])()
        reached = mx.abs(gradients["self_conditioning"]["down_proj"]["weight"]).max().item() > 0
        assert reached == self_condition


def test_corruption_replaces_the_given_share_of_ids() -> None:
    canvas, noise = mx.zeros((2, 2000), mx.int32), mx.ones((2, 2000), mx.int32)
    draw = mx.random.uniform(shape=canvas.shape, key=mx.random.key(0))
    share = corrupt(canvas, noise, draw, mx.array([0.25, 1.0])).mean(axis=1)
    assert share[0].item() == pytest.approx(0.25, abs=0.04)
    assert share[1].item() == 1.0


def test_balance_is_one_for_an_even_load_and_grows_with_its_unevenness() -> None:
    even = mx.full((8, 4), 0.25)
    spread = mx.array([[i % 4, (i + 1) % 4] for i in range(8)])
    assert load_balance([(even, spread)]).item() == pytest.approx(1.0)
    skewed = mx.array([[0.97, 0.01, 0.01, 0.01]] * 8)
    assert load_balance([(skewed, mx.zeros((8, 1), mx.int32))]).item() == pytest.approx(4 * 0.97)
