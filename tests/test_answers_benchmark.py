"""The statistics, tables and files of the benchmark of answers."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.measured.comparison import ALL, compare, front, table
from benchmarks.measured.intervals import Z, paired_difference, ratio_of_sums, wilson
from benchmarks.measured.own_ways import is_way
from benchmarks.measured.questions import SUDOKU6, questions
from benchmarks.measured.records import Record, read, share, write
from dgemma_mlx.diffusion.speed import SPEEDS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "answers.py"


def pairs(both: int, only_other: int, only_first: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Return the right answers of the first and of the other way, from a table of counts."""
    first = [True] * both + [False] * only_other + [True] * only_first + [False] * neither
    other = [True] * (both + only_other) + [False] * (only_first + neither)
    return first, other


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),  # of Newcombe, Statistics in Medicine 17, 857-872, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)


def test_the_bounds_of_wilson_are_the_shares_that_a_test_would_just_not_reject() -> None:
    for right, count in ((3, 10), (939, 1000), (50, 60)):
        for bound in wilson(right, count):
            deviation = abs(right / count - bound) / math.sqrt(bound * (1 - bound) / count)
            assert deviation == pytest.approx(Z)


def test_the_paired_difference_gives_the_published_interval() -> None:
    """Newcombe, Statistics in Medicine 17, 2635-2650: 36, 12, 2 and 0 of 50 pairs, method 10."""
    assert paired_difference(*pairs(36, 12, 2, 0)) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_the_paired_difference_changes_its_sign_with_the_order_and_never_shrinks_to_a_point() -> None:
    first, other = pairs(20, 9, 4, 7)
    low, high = paired_difference(first, other)
    assert paired_difference(other, first) == pytest.approx((-high, -low))
    for right in (0, 25, 50):
        low, high = paired_difference(*pairs(right, 0, 0, 50 - right))
        assert -0.15 < low < 0 < high < 0.15


@pytest.mark.parametrize("chances", [(0.8, 0.1, 0.05, 0.05), (0.9, 0.03, 0.03, 0.04), (0.4, 0.2, 0.1, 0.3)])
def test_the_paired_difference_covers_the_truth_in_nearly_95_percent_of_all_outcomes(chances: Sequence[float]) -> None:
    """All outcomes of 16 pairs with their probabilities."""
    count, covered, total = 16, 0.0, 0.0
    for both, other, first in itertools.product(range(count + 1), repeat=3):
        neither = count - both - other - first
        if neither >= 0:
            cells = (both, other, first, neither)
            ways = math.factorial(count) / math.prod(map(math.factorial, cells))
            probability = ways * math.prod(p**n for p, n in zip(chances, cells, strict=True))
            low, high = paired_difference(*pairs(*cells))
            total += probability
            covered += probability * (low <= chances[1] - chances[2] <= high)
    assert total == pytest.approx(1)
    assert covered > 0.93


def test_the_bootstrap_agrees_with_all_possible_draws() -> None:
    above, below = [3.0, 10.0, 4.0, 48.0, 7.0], [2.0, 9.0, 1.0, 12.0, 8.0]
    exact = sorted(
        sum(above[i] for i in drawn) / sum(below[i] for i in drawn) for drawn in itertools.product(range(5), repeat=5)
    )
    low, high = ratio_of_sums(above, below)
    assert np.quantile(exact, 0.015) <= low <= np.quantile(exact, 0.035)
    assert np.quantile(exact, 0.965) <= high <= np.quantile(exact, 0.985)
    assert (low, high) == ratio_of_sums(above, below)


def test_the_ratio_of_proportional_works_has_no_spread() -> None:
    assert ratio_of_sums([2.0, 4.0, 96.0], [1.0, 2.0, 48.0]) == pytest.approx((2.0, 2.0))


def record(way: str, task: str, number: int, right: bool = True, steps: int = 2) -> Record:
    return Record(
        way=way, task=task, number=number, right=right, canvases=1, decoder_passes=steps, decoder_positions=32 * steps,
        encoder_passes=1, encoder_positions=32,
    )  # fmt: skip


def some_records() -> list[Record]:
    """Two ways on two tasks and on 6x6 Sudoku: the second way takes half the steps, and is wrong once."""
    asked = [("sort", 0), ("sort", 1), ("count", 0), ("count", 1), (SUDOKU6, 0)]
    first = [record("reference", *place, steps=5) for place in asked]
    return first + [record("fast", *place, right=place != ("count", 1)) for place in reversed(asked)]


def test_sums_compare_with_the_first_way_and_leave_6x6_sudoku_apart() -> None:
    sums = {(one.task, one.way): one for one in compare(some_records())}
    assert len(sums) == 8
    fast = sums[ALL, "fast"]
    assert (fast.right, len(fast.records), fast.work, fast.encoder_passes) == (3, 4, 4 * 96, 4)
    assert fast.saving == sums[SUDOKU6, "fast"].saving == 192 / 96
    assert fast.difference == paired_difference([True] * 4, [True, True, True, False])
    assert sums[ALL, "reference"].difference is None
    lines = table(list(sums.values())).splitlines()
    assert len(lines) == 2 + len(sums)
    assert lines[-1].startswith("| all | fast | 3 of 4 | 75.0 % (") and "| 2.00 times (2.00 to 2.00) |" in lines[-1]


def test_ways_that_answered_other_questions_are_not_compared() -> None:
    records = some_records()
    partly = [one for one in records if (one.way, one.task, one.number) != ("fast", "sort", 0)]
    for broken in (partly, [*records, records[0]], [*records[:-1], replace(records[-1], number=7)]):
        with pytest.raises(ValueError, match="the same questions"):
            compare(broken)


def test_a_way_may_leave_out_a_task_but_not_the_first_one() -> None:
    records = [one for one in some_records() if (one.way, one.task) != ("fast", SUDOKU6)]
    assert [one.way for one in compare(records) if one.task == SUDOKU6] == ["reference"]
    with pytest.raises(ValueError, match="to compare with"):
        compare([one for one in some_records() if (one.way, one.task) != ("reference", SUDOKU6)])


def test_the_front_holds_the_ways_that_no_other_way_beats() -> None:
    rng = random.Random(0)
    for _ in range(30):
        records = [
            record(f"way {way}", "sort", number, rng.random() < 0.7, rng.randint(1, 3))
            for way in range(6) for number in range(4)
        ]  # fmt: skip
        sums = compare(records)
        best = front(sums)
        for own in sums:
            beaten = any(
                other.work <= own.work and other.right >= own.right
                and (other.work, other.right) != (own.work, own.right) for other in sums
            )  # fmt: skip
            same = any((one.work, one.right) == (own.work, own.right) for one in best)
            assert same != beaten


def test_records_are_read_as_they_were_written_and_shown_again(tmp_path: Path) -> None:
    file, records = tmp_path / "records.json", some_records()
    write(file, records, prompts=2)
    assert read(file) == records
    other = tmp_path / "other.json"  # a later run of a way, one answer of which differs
    write(other, [replace(record, decoder_passes=3) if record.number else record for record in records[:2]])
    shown = subprocess.run(
        [sys.executable, str(SCRIPT), "--from", str(file), str(other), "--tasks", "sort,count"], capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == table(compare([one for one in records if one.task != SUDOKU6]))
    assert shown.stderr.startswith("1 records of later files differ")


def test_a_larger_number_of_questions_only_adds_some_and_processes_share_all() -> None:
    few, many = (questions(["sort", SUDOKU6], count, seed=3) for count in (2, 5))
    kept = [question for question in many if question.number < 2]
    assert [(q.task, q.messages) for q in few] == [(q.task, q.messages) for q in kept]
    parts = [share(many, index, 2) for index in range(2)]
    assert sorted((q.task, q.number) for q in itertools.chain(*parts)) == sorted((q.task, q.number) for q in many)


def test_every_speed_mode_is_a_way() -> None:
    assert all(is_way(speed + check) for speed in SPEEDS for check in ("", "+flag", "+repair"))
    assert not any(map(is_way, ("slow", "balanced+", "balanced+look", "mlx-vlm entropy-bound")))


def test_the_plots_of_the_same_records_are_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.measured.plots import draw

    found = [[path.read_bytes() for path in draw(compare(some_records()), tmp_path / name)] for name in "ab"]
    assert found[0] == found[1]
