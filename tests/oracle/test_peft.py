"""Adapters in PEFT: with our files and transformers' network, it computes our logits, and we read what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.model.adapter import AdapterConfig, adapted_modules, attach
from dgemma_mlx.model.adapter_file import load_adapter, save_adapter
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.text import DiffusionGemma
from tests.oracle.reference import Array, Reference, write_checkpoint

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]  # PEFT looks for the base on the Hub and warns

peft: Any = pytest.importorskip("peft")


def ours(model: DiffusionGemma, ids: Array, canvas: Array) -> Array:
    """Return our logits of a second step, which is self-conditioned on the first one."""
    cache = model.new_cache()
    model.encode(mx.array(ids), cache)
    first = model.decode(mx.array(canvas), cache)
    return np.array(model.decode(mx.array(canvas), cache, first))


def theirs(reference: Reference, ids: Array, canvas: Array) -> Array:
    """Return the reference's logits of a second step, which is self-conditioned on the first one."""
    reference.start([0])
    reference.encode(ids)
    return reference.decode(canvas, reference.decode(canvas))


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_go_to_peft_and_come_back(tmp_path: Path, dora: bool) -> None:
    write_checkpoint(tmp_path / "base", seed=4)

    def load() -> DiffusionGemma:
        return load_model(tmp_path / "base", ModelConfig.load(tmp_path / "base"))[0]

    model, config = load(), AdapterConfig(4, 8.0, targets=("attention", "mlp", "self_conditioning"), dora=dora)
    attach(model, config)
    mx.random.seed(0)
    for module in adapted_modules(model).values():
        module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape)
        if dora:
            module.m = module.m * mx.random.uniform(0.8, 1.2, module.m.shape)
    save_adapter(model.eval(), config, tmp_path / "adapter", "base")
    ids, canvas = (np.array(mx.random.randint(1, 96, (1, n), key=mx.random.key(n))) for n in (13, 16))
    reference = Reference(tmp_path / "base")
    before = theirs(reference, ids, canvas)
    adapted = peft.PeftModel.from_pretrained(reference.model, tmp_path / "adapter")
    reference.model = adapted.base_model.model.eval()
    expected = theirs(reference, ids, canvas)
    assert np.abs(expected - before).max() > 1
    np.testing.assert_allclose(ours(model, ids, canvas), expected, atol=1e-4)
    adapted.save_pretrained(tmp_path / "back")
    again = load()
    load_adapter(again, tmp_path / "back")
    np.testing.assert_allclose(ours(again, ids, canvas), expected, atol=1e-4)
