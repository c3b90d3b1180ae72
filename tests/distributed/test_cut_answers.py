"""Whole answers of a model that is cut over processes: the same as those of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.machines import run_on_ranks

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "dots.png"


KINDS = (
    "greedy", "reference", "batch", "choice", "schema", "verify", "picture", "conversation", "choose", "fill", "edit",
)  # fmt: skip


@pytest.mark.parametrize(("size", "kinds"), [(2, KINDS), (3, ("interrupt", "greedy", "schema", "conversation"))])
def test_answers(tmp_path: Path, size: int, kinds: tuple[str, ...]) -> None:
    found = run_on_ranks(tmp_path, size, "tests.distributed.cut_answers", str(PICTURE), *kinds)
    assert found.keys() == set(kinds)
    for name, (whole, cut) in found.items():
        assert cut == whole, name
        if name == "conversation":
            assert [tokens > 0 for _, tokens in cut] == [False, True, True]
