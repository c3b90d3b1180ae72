"""Checkpoint folders that tests of the loader begin with."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from tests.model.checkpoint import Tensors, flat_config, random_tensors, write_checkpoint


@pytest.fixture(scope="session")
def tensors() -> Tensors:
    """A whole source checkpoint of ``flat_config()``, float32: not to be changed."""
    tensors = random_tensors(flat_config())
    mx.eval(tensors)
    return tensors


@pytest.fixture
def folder(tmp_path: Path, tensors: Tensors) -> Path:
    """That checkpoint written as one file."""
    return write_checkpoint(tmp_path / "model", flat_config(), tensors)
