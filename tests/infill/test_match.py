"""Where the expression of ``edit --match`` matches."""

from __future__ import annotations

import pytest

from dgemma_mlx import DgemmaError
from dgemma_mlx.infill.match import matches


def test_matches_are_found_within_the_bounds_and_are_not_empty() -> None:
    text = "é😀ab\nabab\x00\udc80ab"
    assert matches("(ab)*", text, 0, len(text)) == [(2, 4), (5, 9), (11, 13)]
    assert matches("^ab|a", text, 3, 8) == [(5, 6), (7, 8)]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        *(pytest.param(pattern, marks=pytest.mark.slow) for pattern in ("(a|a)*$", "(?=(a+)+$)b")),
    ],
)
def test_a_search_that_explodes_is_one_error(pattern: str) -> None:
    with pytest.raises(DgemmaError, match="takes too long") as caught:
        matches(pattern, "a" * 60 + "b", 0, 61)
    assert caught.value.exit_code == 2
