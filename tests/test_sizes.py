"""Tests of human-readable byte counts and other counts."""

from __future__ import annotations

import pytest

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import amount, duration, parse_size, rate, size


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


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_951, "1.0 MB"),
     (950_000_000, "950.0 MB"), (999_960_000, "1.0 GB"), (16_600_000_000, "16.6 GB"), (2e15, "2000.0 TB")],
)  # fmt: skip
def test_a_size_has_the_largest_unit_that_it_reaches(count: float, text: str) -> None:
    assert size(count) == text


def test_a_large_count_is_written_in_millions_or_billions() -> None:
    assert [amount(count) for count in (7, 12_345, 999_999, 2_015_232, 999_999_999, 25_823_000_000)] == [
        "7", "12,345", "1.0 M", "2.0 M", "1.0 B", "25.8 B",
    ]  # fmt: skip


def test_a_duration_has_two_units_at_most() -> None:
    assert [duration(seconds) for seconds in (0.4, 59, 61.5, 3600, 7265)] == [
        "0 s", "59 s", "1 min", "1 h 0 min", "2 h 1 min"
    ]  # fmt: skip


def test_a_rate_is_0_where_the_clock_has_not_moved() -> None:
    assert rate(3, 2.0) == 1.5
    assert rate(3, 0.0) == rate(0, 0) == 0.0
