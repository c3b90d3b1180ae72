"""Which requests may begin."""

from __future__ import annotations

import pytest

import dgemma_mlx
from dgemma_mlx.generation.memory import Budget, Need, Work, answer_need, run_memory
from dgemma_mlx.server.admission import Admission, Place
from dgemma_mlx.server.errors import ApiError


def asking(admission: Admission, begun: list[str], **needs: Need) -> list[Place]:
    """Let requests with these names enter and wait."""
    places = []
    for name, need in needs.items():
        place = admission.enter()
        place.wait(need, lambda name=name: begun.append(name))  # type: ignore[misc]
        places.append(place)
    return places


def test_requests_begin_in_order_as_long_as_there_is_memory_for_what_they_keep() -> None:
    begun: list[str] = []
    admission = Admission(9, lambda: 100)
    a, b, c, d = asking(admission, begun, a=Need(20, 50), b=Need(20, 60), c=Need(20, 10), d=Need(1, 1))
    assert begun == ["a", "b"]  # 40 are kept, and one of them works with 60; c would exceed it, and d does not overtake
    assert (admission.running, admission.waiting, admission.need) == (2, 2, Need(40, 60))
    a.leave()
    assert begun == ["a", "b", "c"] and admission.need == Need(40, 60)
    b.leave()
    assert begun == ["a", "b", "c", "d"]
    c.leave()
    d.leave()
    d.leave()
    assert (admission.running, admission.waiting, admission.need) == (0, 0, Need(0, 0))


def test_a_request_alone_begins_whatever_it_needs_and_others_wait() -> None:
    begun: list[str] = []
    admission = Admission(9, lambda: 100)
    big, small = asking(admission, begun, big=Need(500, 500), small=Need(1, 1))
    assert begun == ["big"] and not small.has_begun
    big.leave()
    assert begun == ["big", "small"]


def test_a_request_that_leaves_while_it_waits_never_begins() -> None:
    begun: list[str] = []
    admission = Admission(9, lambda: 100)
    a, b, _ = asking(admission, begun, a=Need(90, 0), b=Need(90, 0), c=Need(90, 0))
    b.leave()
    a.leave()
    assert begun == ["a", "c"]


def test_more_requests_than_places_are_turned_away_with_a_time_to_come_back() -> None:
    admission = Admission(2, lambda: 100)
    place, _ = admission.enter(), admission.enter()  # also requests that are still being read take a place
    with pytest.raises(ApiError) as raised:
        admission.enter()
    assert raised.value.status == 503 and int(raised.value.headers["retry-after"]) > 0
    place.leave()
    admission.enter()


@pytest.mark.parametrize("positions", [1, 50, 500, 4000])
def test_the_need_of_an_answer_is_the_estimate_for_it(positions: int) -> None:
    config = dgemma_mlx.load("demo").config
    smallest = Budget(64, (32 << 20) // 8)
    estimate = run_memory(config, 0, positions, smallest, Work())
    need = answer_need(config, positions)
    assert estimate <= need.total <= 1.5 * estimate
