"""Source checkpoints that tests of the converter begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.checkpoints import make_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a tokenizer; not to be changed."""
    return make_source(tmp_path_factory.mktemp("talking") / "source", tokenizer=True)
