"""Fixtures for tests with data that is fetched, or lies beside the project. Where it is missing, tests are skipped."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from dgemma_mlx.text import Tokenizer, load_tokenizer

ROOT = Path(__file__).parents[1]
VOCABULARY = Path(os.environ.get("DGEMMA_TEST_VOCABULARY", ROOT / "runs" / "gemma4"))
DATA = Path(os.environ.get("DGEMMA_TEST_DATA", ROOT.parent / "shared" / "data"))

# No test fails because the machine is slow.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

MARKED = ("agents", "clients", "page")  # folders whose tests all have the mark of the same name


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the program's conversations, history and log of answers out of those of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGEMMA_STATE", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of some folders."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in MARKED:
            item.add_marker(folder)


@pytest.fixture(scope="session")
def public_data() -> Path:
    """The folder of public data that is not part of the project: schemas, templates, vectors of other programs."""
    if not DATA.is_dir():
        pytest.skip("the public test data is not there")
    return DATA


@pytest.fixture(scope="session")
def gemma4_folder(tmp_path_factory: pytest.TempPathFactory, public_data: Path) -> Path:
    """A folder with Gemma 4's tokenizer, all 262,144 tokens, and DiffusionGemma's published chat template."""
    if not (VOCABULARY / "tokenizer.json").exists():
        pytest.skip("Gemma's vocabulary is not there; make vocabulary fetches it")
    folder = tmp_path_factory.mktemp("gemma4")
    for path in VOCABULARY.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    shutil.copy(public_data / "gemma4" / "diffusiongemma_chat_template.jinja", folder / "chat_template.jinja")
    return folder


@pytest.fixture(scope="session")
def gemma4(gemma4_folder: Path) -> Tokenizer:
    """Gemma 4's tokenizer, with all 262,144 tokens."""
    return load_tokenizer(gemma4_folder)
