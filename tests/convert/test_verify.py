"""The comparison of an output with its source, and the walk through their layers."""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dgemma_convert import Report, convert, verify
from dgemma_convert.walk import Sample, Walk, make_samples
from dgemma_mlx.checkpoint.config import ModelConfig
from tests.convert.checkpoints import make_source, some_tensors, stored
from tests.model.checkpoint import load


@pytest.fixture(scope="module")
def bf16(talking: Path) -> Report:
    return convert(str(talking), None, "bf16", check=True)


@pytest.fixture(scope="module")
def four_bit(talking: Path) -> Report:
    return convert(str(talking), None, "q4-small", check=True)


def assembled(folder: Path, samples: list[Sample]) -> list[mx.array]:
    """Return the canvas logits of the whole model for each sample."""
    model, found = load(folder)[0], []
    for sample in samples:
        cache = model.new_cache()
        model.encode(sample.prompt, cache)
        found.append(model.decode(sample.canvas, cache))
    return found


def test_walk_gives_the_logits_of_the_whole_model(tmp_path: Path) -> None:
    folder = make_source(tmp_path, tensors=some_tensors(mx.float32, 768), tokenizer=True)
    config = ModelConfig.load(folder)
    samples = make_samples(folder, config)
    assert any(sample.prompt.shape[1] > config.text.sliding_window for sample in samples)
    walk = Walk(folder, config, samples)
    for _ in range(config.text.num_hidden_layers):
        walk.next_layer()
    for ours, expected in zip(walk.logits(), assembled(folder, samples), strict=True):
        assert ours.shape == (1, config.canvas_length, config.text.vocab_size)
        np.testing.assert_allclose(np.array(ours), np.array(expected), atol=1e-5)


def test_bf16_conversion_compares_as_equal(bf16: Report) -> None:
    assert bf16.verification is not None
    assert bf16.verification.encoder_error == bf16.verification.decoder_error == (0.0, 0.0, 0.0)
    assert (bf16.verification.kl_divergence, bf16.verification.top1_agreement) == (0.0, 1.0)


def test_comparison_agrees_with_a_direct_computation(talking: Path, four_bit: Report) -> None:
    samples = make_samples(talking, ModelConfig.load(talking))
    ours, theirs = (
        np.concatenate(assembled(folder, samples)).astype(np.float64) for folder in (four_bit.output, talking)
    )
    q, p = (values - np.log(np.exp(values).sum(-1, keepdims=True)) for values in (ours, theirs))
    assert four_bit.verification is not None
    assert four_bit.verification.kl_divergence == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), abs=2e-6)
    assert four_bit.verification.kl_divergence > 0.001
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    assert four_bit.verification.top1_agreement == pytest.approx(agreement, abs=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_damage_changes_its_layer_and_all_later_layers(talking: Path, tmp_path: Path, bf16: Report, layer: int) -> None:
    output = shutil.copytree(bf16.output, tmp_path / "out")
    tensors = stored(output)
    name = f"model.decoder.layers.{layer}.self_attn.o_proj.weight"
    tensors[name] = tensors[name] * 1.5
    mx.save_safetensors(str(output / "model.safetensors"), tensors)
    verification = verify(talking, output)
    for errors in (verification.encoder_error, verification.decoder_error):
        assert [error > 0 for error in errors] == [i >= layer for i in range(3)]
