"""The manifest of an interrupted conversion, damaged: refused with one line, and everything stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma_convert import carry_out, prepare
from dgemma_convert.plan import MANIFEST
from dgemma_mlx.errors import DgemmaError
from tests.convert.checkpoints import smallest_source, snapshot, user_error


@pytest.mark.parametrize("shards", [None, 5, "x", [], [["a", "b"]], {"model.safetensors": 5}])
def test_a_manifest_without_a_list_of_shards_is_damaged(tmp_path: Path, shards: Any) -> None:
    plan = prepare(str(smallest_source(tmp_path / "source")), tmp_path / "new")
    plan.partial.mkdir()
    (plan.partial / MANIFEST).write_text(json.dumps({"plan": plan.fingerprint(), "shards": shards}))
    before = snapshot(tmp_path)
    with pytest.raises(DgemmaError) as error:
        carry_out(plan, resume=True)
    assert "is damaged" in user_error(error.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_an_output_without_a_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    folder = tmp_path / "somewhere" / "here"
    folder.mkdir(parents=True)
    source = smallest_source(tmp_path / "source")
    monkeypatch.chdir(folder)
    before = snapshot(tmp_path)
    with pytest.raises(DgemmaError) as error:
        carry_out(prepare(str(source), output))
    assert user_error(error.value)
    assert snapshot(tmp_path) == before
