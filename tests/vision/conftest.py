"""Fixtures of a checkpoint that reads images."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_mlx.generation.load import load
from dgemma_mlx.generation.model import Model
from tests.vision.seeing import write_seeing


@pytest.fixture(scope="session")
def seeing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small checkpoint with a vision tower. Tests must not change it."""
    return write_seeing(tmp_path_factory.mktemp("models") / "seeing")


@pytest.fixture(scope="session")
def seeing(seeing_folder: Path) -> Model:
    """The loaded checkpoint."""
    return load(seeing_folder)
