"""The memory that loading a slice takes: its own part of the weights, and hardly more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.models import uneven_checkpoint

# About 1 GB in bfloat16.
LARGE: dict[str, Any] = {
    "vocab_size": 65536, "hidden_size": 1024, "intermediate_size": 1088, "moe_intermediate_size": 704,
    "num_hidden_layers": 6, "num_experts": 32, "top_k_experts": 8, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 64, "global_head_dim": 128, "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
}  # fmt: skip


def loaded(folder: Path, rank: int, size: int) -> dict[str, int]:
    """Load one slice in a process of its own, and return what it prints."""
    program = [sys.executable, "-m", "tests.distributed.cut_memory", str(folder), str(rank), str(size)]
    found: dict[str, int] = json.loads(subprocess.run(program, check=True, capture_output=True, timeout=200).stdout)
    return found


def test_mlx_holds_no_more_than_the_slice(tmp_path: Path) -> None:
    folder = uneven_checkpoint(tmp_path / "model", bits=4, hidden_size=512)
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for rank in range(2):
        found = loaded(folder, rank, 2)
        assert found["own"] < 0.8 * stored
        assert found["mlx"] <= 1.1 * found["own"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_gigabyte(tmp_path: Path) -> None:
    folder = uneven_checkpoint(tmp_path / "model", dtype="bfloat16", **LARGE)
    for rank in range(2):
        found = loaded(folder, rank, 2)
        print(found)
        assert found["process"] <= 1.1 * found["own"]
