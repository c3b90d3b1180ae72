"""Sums of records by task and way, compared with the first way, as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .intervals import paired_difference, ratio_of_sums, wilson
from .records import Record

ALL = "all"  # the name of the sums over tasks
APART = "sudoku6"  # measured with an adapter, and therefore not part of the sums
Interval = tuple[float, float]


@dataclass(frozen=True)
class Sums:
    """One way on one task or on all tasks.

    Attributes:
        task: Name of the task, or ``ALL``.
        way: The way of answering.
        records: Its records.
        share_interval: Interval of the share of right answers.
        difference: Interval of that share minus the share of the first way; None for the first way.
        saving: The work of the first way divided by this way's.
        saving_interval: Its interval; None for the first way.
    """

    task: str
    way: str
    records: tuple[Record, ...]
    share_interval: Interval
    difference: Interval | None
    saving: float
    saving_interval: Interval | None

    @property
    def right(self) -> int:
        """Number of right answers."""
        return sum(record.right for record in self.records)

    @property
    def share(self) -> float:
        """Share of right answers."""
        return self.right / len(self.records)

    @property
    def work(self) -> int:
        """Positions that passed through the layers of decoder or encoder."""
        return sum(record.work for record in self.records)

    @property
    def canvases(self) -> int:
        """Number of canvases."""
        return sum(record.canvases for record in self.records)

    @property
    def decoder_passes(self) -> int:
        """Number of decoder passes."""
        return sum(record.decoder_passes for record in self.records)

    @property
    def encoder_passes(self) -> int:
        """Number of encoder passes over canvases."""
        return sum(record.encoder_passes for record in self.records)


def compare(records: Sequence[Record]) -> list[Sums]:
    """Return the sums of each way on each task, and on all tasks when there are several; ways in their first order.

    A way that has not been tried on a task is left out there. Raises ``ValueError`` when this is the first way, and
    unless all others have answered the same questions of the task.
    """
    tasks = dict.fromkeys(record.task for record in records)
    ways = list(dict.fromkeys(record.way for record in records))
    groups = {task: [record for record in records if record.task == task] for task in tasks}
    together = [record for record in records if record.task != APART]
    if len({record.task for record in together}) > 1:
        groups[ALL] = together
    found = []
    for task, own in groups.items():
        first = _of(own, ways[0])
        if not first:
            raise ValueError(f"{ways[0]}, to compare with, has not answered {task}")
        found += [_sums(task, way, first, tried) for way in ways if (tried := _of(own, way))]
    return found


def _of(records: Sequence[Record], way: str) -> list[Record]:
    """Return the records of a way in the order of the questions."""
    return sorted((record for record in records if record.way == way), key=lambda record: (record.task, record.number))


def _sums(task: str, way: str, first: list[Record], own: list[Record]) -> Sums:
    asked = [(record.task, record.number) for record in first]
    if len(set(asked)) < len(asked) or asked != [(record.task, record.number) for record in own]:
        raise ValueError(f"{way} and {first[0].way} have not answered the same questions of {task}, each once")
    share = wilson(sum(record.right for record in own), len(own))
    works = [record.work for record in first], [record.work for record in own]
    saving = sum(works[0]) / sum(works[1])
    if way == first[0].way:
        return Sums(task, way, tuple(own), share, None, saving, None)
    difference = paired_difference([record.right for record in first], [record.right for record in own])
    return Sums(task, way, tuple(own), share, difference, saving, ratio_of_sums(*works))


def table(sums: Sequence[Sums]) -> str:
    """Format sums as a Markdown table. Intervals are of 95 %."""
    first = sums[0].way
    columns = (
        "task", "way", "right", "share", f"points to {first}", "steps per canvas", "decoder passes", "encoder passes",
        "work, positions", f"less work than {first}",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for own in sums:
        points, less = "-", "-"
        if own.difference is not None and own.saving_interval is not None:
            base = next(other for other in sums if (other.task, other.way) == (own.task, first))
            low, high = (100 * bound for bound in own.difference)
            points = f"{100 * (own.share - base.share):+.1f} ({low:+.1f} to {high:+.1f})"
            less = f"{own.saving:.2f} times ({own.saving_interval[0]:.2f} to {own.saving_interval[1]:.2f})"
        low, high = (100 * bound for bound in own.share_interval)
        lines.append(
            f"| {own.task} | {own.way} | {own.right} of {len(own.records)} "
            f"| {100 * own.share:.1f} % ({low:.1f} to {high:.1f}) | {points} "
            f"| {own.decoder_passes / own.canvases:.2f} | {own.decoder_passes:,} | {own.encoder_passes:,} "
            f"| {own.work:,} | {less} |"
        )
    return "\n".join(lines)


def doubts(sums: Sequence[Sums]) -> str:
    """Format, for ways that ask the encoder, how many right and wrong answers hold a token that it doubts."""
    columns = ("task", "way", "low confidence", "doubted: right", "wrong")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for own in (one for one in sums if any(record.doubted for record in one.records)):
        right = sum(record.right and record.doubted > 0 for record in own.records)
        wrong = sum(not record.right and record.doubted > 0 for record in own.records)
        uncertain = sum(record.low_confidence > 0 for record in own.records)
        lines.append(
            f"| {own.task} | {own.way} | {uncertain} | {right} of {own.right} "
            f"| {wrong} of {len(own.records) - own.right} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def front(sums: Sequence[Sums]) -> list[Sums]:
    """Return the ways that no other way beats: none has at least as many right answers for less work, or more right
    answers for the same work. The result begins with the least work.
    """
    best: list[Sums] = []
    for own in sorted(sums, key=lambda one: (one.work, -one.right)):
        if not best or own.right > best[-1].right:
            best.append(own)
    return best
