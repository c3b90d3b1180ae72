"""Tests of parsing human-readable byte counts."""

from __future__ import annotations

import pytest

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import parse_size, rate


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8e9), ("8g", 8e9), ("7.5 GiB", 7.5 * 2**30), ("500M", 5e8), ("1000", 1000), ("64KiB", 65536)],
)
def test_parse_size(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "0GB", "-1GB", "8XB", "8 I", "1e9", "8GB8"])
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(DgemmaError, match="not a size") as caught:
        parse_size(text)
    assert caught.value.exit_code == 2


def test_a_rate_is_0_where_the_clock_has_not_moved() -> None:
    assert rate(3, 2.0) == 1.5
    assert rate(3, 0.0) == rate(0, 0) == 0.0
