"""Damaged files and odd values: every reader accepts them or refuses them as ``contract.keeps`` says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.contract import keeps
from tests.fuzz.readers import READERS, make_folder

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    make_folder(made)
    return made


def damage(folder: Path, name: str, data: st.DataObject) -> None:
    """Damage the file of a reader, read it, and put the file back."""
    reader = READERS[name]
    path = folder / reader.file
    intact = path.read_bytes()
    path.write_bytes(data.draw(reader.changes(intact)))
    try:
        keeps(reader.read, folder, folder=folder)
    finally:
        path.write_bytes(intact)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=20, derandomize=True, **COMMON)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    damage(folder, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=2000, **COMMON)
@given(data=st.data())
def test_many_damaged_files_are_read_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    damage(folder, name, data)
