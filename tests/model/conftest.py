"""Fixtures of checkpoint tensors and folders."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from tests.model.checkpoint import Tensors, flat_config, random_tensors, write_checkpoint


@pytest.fixture(scope="session")
def tensors() -> Tensors:
    """The tensors of a complete checkpoint of ``flat_config()`` in float32. Tests must not change them."""
    tensors = random_tensors(flat_config())
    mx.eval(tensors)
    return tensors


@pytest.fixture
def folder(tmp_path: Path, tensors: Tensors) -> Path:
    """A folder with this checkpoint, its tensors in one file."""
    return write_checkpoint(tmp_path / "model", flat_config(), tensors)
