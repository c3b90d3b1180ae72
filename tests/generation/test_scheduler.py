"""The order in which requests take turns."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from dgemma_mlx.generation.scheduler import Scheduler, Standing

CANVAS = 16 * 0.374  # seconds of a canvas: 16 steps of the time that one was seen to take


@dataclass(eq=False)
class Asked(Standing):
    """A request of a simulation: when it comes, in seconds, and how many canvases it takes."""

    name: str = ""
    comes: float = 0.0
    canvases: int = 1


def ends(requests: list[Asked]) -> dict[str, float]:
    """Return when each request ends, in seconds."""
    scheduler: Scheduler[Asked] = Scheduler()
    coming, time, found = sorted(requests, key=lambda each: each.comes), 0.0, {}

    def arrive() -> None:
        while coming and coming[0].comes <= time:
            scheduler.add(coming.pop(0))

    arrive()
    while coming or scheduler.waiting:
        if not scheduler.waiting:
            time = coming[0].comes
            arrive()
        request = scheduler.next()
        time += CANVAS
        arrive()
        request.written += 256
        if request.written < 256 * request.canvases:
            scheduler.add(request)
        else:
            found[request.name] = time
    return found


def waiting(*standings: Standing) -> Scheduler[Standing]:
    scheduler: Scheduler[Standing] = Scheduler()
    for standing in standings:
        scheduler.add(standing)
    return scheduler


def test_a_short_question_does_not_wait_for_a_long_answer() -> None:
    long, short = Asked(name="long", canvases=8), Asked(name="short", comes=1.0)
    found = ends([long, short])
    assert found["short"] - 1.0 == pytest.approx(11.0, abs=0.05)
    assert found["long"] == pytest.approx(53.9, abs=0.05)
    first_come = 8 * CANVAS
    assert first_come == pytest.approx(47.9, abs=0.05)
    assert first_come + CANVAS - 1.0 == pytest.approx(52.9, abs=0.05)


def test_a_long_answer_goes_on_among_short_ones_that_never_cease() -> None:
    long = Asked(name="long", canvases=3)
    found = ends([long, *(Asked(name=str(number), comes=number * CANVAS) for number in range(40))])
    assert found["long"] == pytest.approx(8 * CANVAS)  # it had the first turn, and then every fourth


def test_what_is_written_counts_before_what_is_left_to_encode_and_the_arrival() -> None:
    late, early = Standing(written=0, to_encode=5000), Standing(written=1)
    first, second = Standing(written=0, to_encode=7), Standing(written=0, to_encode=7)
    scheduler = waiting(early, late, first, second)
    order = [scheduler.next() for _ in range(3)]
    assert order == [first, second, late]
    assert scheduler.waiting == (early,)


def test_every_fourth_turn_goes_to_the_one_that_waits_longest() -> None:
    old, young = Standing(written=1000), Standing()
    scheduler = waiting(old, young)
    turns = []
    for _ in range(9):
        turns.append(scheduler.next())
        scheduler.add(turns[-1])
    assert [number for number, each in enumerate(turns, 1) if each is old] == [4, 8]
