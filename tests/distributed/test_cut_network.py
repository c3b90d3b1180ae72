"""A network that is cut over processes, beside the whole one: all numbers, and what is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dgemma_mlx.generation.load import load
from dgemma_mlx.model.adapter import AdapterConfig, adapted_modules, attach
from dgemma_mlx.model.adapter_file import save_adapter
from tests.distributed.machines import run_on_ranks
from tests.distributed.models import uneven_checkpoint


def numbers(folder: Path, model: Path, shares: list[float], *adapter: str) -> dict[str, Any]:
    """Run ``cut_numbers`` in a process for each share, and return what rank 0 prints."""
    program = ("tests.distributed.cut_numbers", str(model), json.dumps(shares), *adapter)
    found: dict[str, Any] = run_on_ranks(folder, len(shares), *program)
    return found


@pytest.mark.parametrize(("bits", "shares"), [(None, [1.0, 1.0]), (4, [1.0, 1.0, 1.0]), (8, [1.0, 2.0])])
def test_numbers(tmp_path: Path, bits: int | None, shares: list[float]) -> None:
    """Logits within 1e-4, the same samples, and as many messages and bytes as predicted."""
    found = numbers(tmp_path, uneven_checkpoint(tmp_path / "model", bits), shares)
    assert found.pop("traffic") == found.pop("expected traffic")
    for name, difference in found.items():
        assert difference <= (0 if name.startswith(("argmax", "sample")) else 1e-4), (name, difference)


def test_an_adapter_is_cut_as_well(tmp_path: Path) -> None:
    model = uneven_checkpoint(tmp_path / "model")
    network = load(model).network
    config = AdapterConfig(rank=4, targets=("attention", "mlp", "experts", "self_conditioning"))
    attach(network, config)
    for number, module in enumerate(adapted_modules(network).values()):
        module.lora_b = mx.random.normal(module.lora_b.shape, scale=0.05, key=mx.random.key(number))
    save_adapter(network, config, tmp_path / "adapter", str(model))
    found = numbers(tmp_path, model, [2.0, 1.0], str(tmp_path / "adapter"))
    assert max(found["logits 0"], found["logits 1"], found["logits 2"], found["last"]) <= 1e-4
