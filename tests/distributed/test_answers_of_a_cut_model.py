"""Whole answers of a model that is cut over processes: the same as those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import Ranks


@pytest.mark.parametrize(
    "options", [("--temp", "0", "Count from 1 to 30"), ("--seed", "3", "Sort 7 3 5 2")]
)
def test_text(tmp_path: Path, options: tuple[str, ...]) -> None:
    with Ranks(tmp_path, ("generate", "-m", "demo", "-q", "--anyway", "--seed", "1", *options), 3) as ranks:
        results = ranks.results()
    assert [code for code, _, _ in results.values()] == [0, 0, 0]
    print(results)
