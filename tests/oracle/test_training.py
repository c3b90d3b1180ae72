"""The training loss on a corrupted canvas, compared with the cross entropy of transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.model.load import load_model
from dgemma_mlx.train.objective import Batch, ObjectiveConfig, block_diffusion_loss, corrupt
from tests.oracle.reference import CANVAS, WINDOW, Reference, write_checkpoint

pytestmark = pytest.mark.oracle

torch: Any = pytest.importorskip("torch")
PAD, PREFIX, VOCAB = 0, 13, 96
CONFIG = ObjectiveConfig(pad_weight=1.0, causal_weight=1.0, balance_weight=0, full_noise=0, min_noise=0.001)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, seed=4)
    return path


def noisy(canvas: mx.array, key: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return what the objective draws from a key: the corrupted canvas, the noisier one for self-conditioning, and the
    temperature of its logits."""
    B, C = canvas.shape
    keys = mx.random.split(key, 6)
    t = mx.random.uniform(CONFIG.min_noise, 1.0, (B,), key=keys[0])
    noise = mx.random.randint(0, VOCAB, (B, C), key=keys[2])
    draw = mx.random.uniform(shape=(B, C), key=keys[3])
    earlier = t + (1 - t) * mx.random.uniform(shape=(B,), key=keys[4])
    temperature = mx.random.uniform(CONFIG.min_temperature, 1.0, (B, 1, 1), key=keys[5])
    return corrupt(canvas, noise, draw, t), corrupt(canvas, noise, draw, earlier), temperature


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_loss_equals_the_reference_on_the_same_canvas(folder: Path, conditioned: bool) -> None:
    assert PREFIX > WINDOW  # sliding layers do not see the whole prefix
    model, _ = load_model(folder, ModelConfig.load(folder))
    ids = mx.random.randint(1, VOCAB, (2, PREFIX + CANVAS), key=mx.random.key(1)).astype(mx.int32)
    canvas = mx.where(mx.arange(CANVAS) < mx.array([[CANVAS], [9]]), ids[:, PREFIX:], PAD)
    ids = mx.concatenate([ids[:, :PREFIX], canvas], axis=1)
    batch = Batch(ids, mx.array([PREFIX, PREFIX], mx.int32), canvas)
    key = mx.random.key(2)
    _, parts = block_diffusion_loss(model, batch, CONFIG, PAD, key, conditioned)

    reference = Reference(folder)
    current, earlier, temperature = (np.array(array) for array in noisy(canvas, key))
    reference.start([0, 0])
    reference.encode(np.array(ids[:, :PREFIX]))
    signal = reference.decode(earlier) / temperature if conditioned else None
    logits = torch.tensor(reference.decode(current, signal))
    targets = torch.tensor(np.array(canvas)).long()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert parts["diffusion"].item() == pytest.approx(expected.item(), abs=1e-4)

    reference.start([0, 0])
    hidden = torch.tensor(reference.encode(np.array(ids)))
    with torch.no_grad():
        raw = reference.model.lm_head(hidden[:, PREFIX - 1 : PREFIX - 1 + CANVAS])
        capped = torch.tanh(raw / 30) * 30
    causal = torch.nn.functional.cross_entropy(capped.flatten(0, 1), targets.flatten(), ignore_index=PAD)
    assert parts["causal"].item() == pytest.approx(causal.item(), abs=1e-4)
