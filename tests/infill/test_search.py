"""Which lengths are tried, and which candidate wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma_mlx.infill.layout import Lengths
from dgemma_mlx.infill.search import Candidate, around, ladder, search


class Judge:
    """Judge that prefers some lengths, and others the less the further they are from these."""

    def __init__(self, best: Lengths) -> None:
        self.best, self.batches = best, list[int]()

    def __call__(self, wanted: list[Lengths]) -> list[Candidate]:
        self.batches.append(len(wanted))
        return [
            Candidate(lengths, tuple("x" * size for size in lengths), -self.distance(lengths), False, ())
            for lengths in wanted
        ]

    def distance(self, lengths: Lengths) -> float:
        return float(sum(abs(one - other) for one, other in zip(lengths, self.best, strict=True)))


@given(st.integers(1, 192), st.integers(1, 12))
def test_a_ladder_goes_from_one_to_the_top(most: int, count: int) -> None:
    rungs = ladder(most, count)
    assert rungs == sorted(set(rungs))
    assert 1 <= len(rungs) <= count
    assert rungs[0] == 1
    assert rungs[-1] <= most
    if count > 1:
        assert rungs[-1] * 2 > most


@given(st.integers(1, 100), st.integers(1, 200), st.integers(1, 8))
def test_lengths_near_one_that_is_known(length: int, most: int, count: int) -> None:
    sizes = around(length, most, count)
    assert len(sizes) == len(set(sizes)) <= count
    assert all(1 <= size <= most for size in sizes)
    assert not sizes or length > most or sizes[0] == length


@pytest.mark.parametrize("best", [1, 2, 5, 7, 11, 20, 37, 50])
def test_one_gap_of_unknown_length_is_found_or_nearly(best: int) -> None:
    judge = Judge((best,))
    found = search([ladder(64, 8)], 64, 8, judge)
    assert judge.distance(found[0].lengths) == 0
    assert all(size <= 8 for size in judge.batches)
    assert len(judge.batches) <= 3


@given(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)))
def test_gaps_of_different_lengths_are_found_one_after_the_other(best: Lengths) -> None:
    found = search([ladder(30, 8)] * 3, 60, 8, Judge(best))
    assert Judge(best).distance(found[0].lengths) <= 1


def test_no_combination_passes_the_room() -> None:
    found = search([ladder(16, 8), [4], ladder(16, 8)], 20, 8, Judge((16, 4, 16)))
    assert all(sum(candidate.lengths) <= 20 and candidate.lengths[1] == 4 for candidate in found)
    assert sum(found[0].lengths) == 20


def test_known_lengths_are_written_several_times() -> None:
    judge = Judge((3, 5))
    assert [candidate.lengths for candidate in search([[3], [5]], 20, 4, judge)] == [(3, 5)]  # one text, listed once
    assert judge.batches == [4]


def test_the_whole_come_first_then_the_settled_then_the_probable_then_the_short() -> None:
    def candidate(length: int, score: float, low: bool = False, cut: bool = False) -> Candidate:
        return Candidate((length,), (str(length),), score, low, (), cut)

    order = [
        candidate(2, -0.101), candidate(3, -0.099), candidate(1, -0.2), candidate(4, -0.01, low=True),
        candidate(5, -0.001, cut=True),
    ]  # fmt: skip
    found = search([[1]], 9, 4, lambda wanted: list(reversed(order)))
    assert found == order
