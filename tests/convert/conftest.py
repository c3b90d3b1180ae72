"""Source checkpoints for tests of the converter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.checkpoints import make_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a tokenizer. Tests must not change it."""
    return make_source(tmp_path_factory.mktemp("talking") / "source", tokenizer=True)
