"""How long the gaps are: lengths to try, and the best of what came of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from dgemma_mlx.infill.layout import Lengths

_LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
_DIGITS = 2
"""of a score: what differs by less than 0.01 nats a token is a tie, as two certain texts differ by rounding"""


@dataclass(frozen=True)
class Candidate:
    """The gaps written at certain lengths."""

    lengths: Lengths
    """tokens"""
    texts: tuple[str, ...]
    """of the gaps"""
    score: float
    """mean log-probability, in nats, of the tokens from the first gap to the end, by the causal encoder"""
    low_confidence: bool
    """all denoising steps were used, and the canvas is still uncertain"""
    tokens: tuple[int, ...]
    """of the canvas"""

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Less is better: settled before uncertain, then the more probable, then the shorter."""
        return self.low_confidence, -round(self.score, _DIGITS), sum(self.lengths)


_REFINEMENTS = 2
"""of a gap's length: of 15 that lie between two rungs, 8 are tried, then those next to the best of them"""

Evaluate = Callable[[list[Lengths]], list[Candidate]]


def ladder(most: int, count: int) -> list[int]:
    """About ``count`` lengths for a gap of which nothing is known, up to ``most`` tokens."""
    rungs = [rung for rung in _LADDER if rung <= most]
    last = min(len(rungs), max(count, 1)) - 1
    return sorted({rungs[round(i * (len(rungs) - 1) / last)] for i in range(last + 1)}) if last else rungs[:1]


def around(length: int, most: int, count: int) -> list[int]:
    """``count`` lengths near that of a text which is replaced; the nearest first."""
    steps = (0, 1, -1, 2, -2, 3, length // 2, -3, -(length // 2), length, 4, -4, 2 * length)
    near = dict.fromkeys(length + step for step in steps)
    return [size for size in near if 1 <= size <= most][: max(count, 1)]


def search(ladders: Sequence[Sequence[int]], room: int, count: int, evaluate: Evaluate) -> list[Candidate]:
    """Writes the gaps ``count`` times at once, until their lengths are found; returns all candidates, the best first.

    First all gaps go up their ladders together, then one gap after the other tries its other rungs and what lies
    between the best and the next ones. Combinations of more than ``room`` tokens are left out. Where all lengths are
    known, the same ones are written ``count`` times.
    """
    tried: dict[Lengths, Candidate] = {}

    def attempt(wanted: Sequence[Lengths]) -> None:
        fresh = [lengths for lengths in dict.fromkeys(wanted) if lengths not in tried and sum(lengths) <= room][:count]
        if fresh:
            tried.update(zip(fresh, evaluate(fresh), strict=True))

    if all(len(rungs) == 1 for rungs in ladders):
        [lengths] = zip(*ladders, strict=True)
        return _ranked(evaluate([lengths] * count))
    attempt([tuple(rungs[min(i, len(rungs) - 1)] for rungs in ladders) for i in range(max(map(len, ladders)))])
    if not tried:  # the first rungs are too high together
        attempt([tuple(min(rungs) for rungs in ladders)])
    for gap, rungs in enumerate(ladders):
        if len(rungs) > 1:
            if len(ladders) > 1:
                attempt(_replaced(_best(tried).lengths, gap, rungs))
            for _ in range(_REFINEMENTS):
                best = _best(tried).lengths
                near = {lengths[gap] for lengths in tried if _replaced(lengths, gap, [0]) == _replaced(best, gap, [0])}
                attempt(_replaced(best, gap, _between(best[gap], near, count)))
    return _ranked(tried.values())


def _ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The best first, each text once."""
    best: dict[tuple[str, ...], Candidate] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.rank):
        best.setdefault(candidate.texts, candidate)
    return list(best.values())


def _best(tried: dict[Lengths, Candidate]) -> Candidate:
    return min(tried.values(), key=lambda candidate: candidate.rank)


def _replaced(lengths: Lengths, gap: int, sizes: Sequence[int]) -> list[Lengths]:
    return [(*lengths[:gap], size, *lengths[gap + 1 :]) for size in sizes]


def _between(length: int, tried: Collection[int], count: int) -> list[int]:
    """Up to ``count`` lengths between this one and those next to it that were tried, evenly spaced."""
    low = max((size for size in tried if size < length), default=length)
    high = min((size for size in tried if size > length), default=length)
    inner = [size for size in range(low + 1, high) if size != length]
    if len(inner) <= count:
        return inner
    return [inner[(2 * i + 1) * len(inner) // (2 * count)] for i in range(count)]
