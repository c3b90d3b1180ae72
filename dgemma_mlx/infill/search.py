"""Search over gap lengths: which lengths to try, and which candidate wins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from dgemma_mlx.infill.layout import Lengths

_LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
_DIGITS = 2  # of a score: scores within 0.01 nats per token are a tie, because certain texts differ by rounding
_REFINEMENTS = 2  # rounds between two rungs: of the 15 lengths there, 8 are tried, then the neighbours of the best


@dataclass(frozen=True)
class Candidate:
    """The gaps, written at certain lengths.

    Attributes:
        lengths: Number of tokens of each gap.
        texts: Text of each gap.
        score: Mean log-probability per token, in nats, from the first gap to the end, by the causal encoder.
        low_confidence: Whether the canvas was still uncertain when its denoising ended.
        tokens: Ids of the canvas.
        cut: Whether the canvas holds bytes that are no whole character. The texts lack them.
    """

    lengths: Lengths
    texts: tuple[str, ...]
    score: float
    low_confidence: bool
    tokens: tuple[int, ...]
    cut: bool = False

    @property
    def rank(self) -> tuple[bool, bool, float, int]:
        """Sort key, the best first: whole before cut, settled before uncertain, the more probable, the shorter."""
        return self.cut, self.low_confidence, -round(self.score, _DIGITS), sum(self.lengths)


Evaluate = Callable[[list[Lengths]], list[Candidate]]


def ladder(most: int, count: int) -> list[int]:
    """Return about ``count`` lengths, of at most ``most`` tokens, for a gap of unknown length."""
    rungs = [rung for rung in _LADDER if rung <= most]
    last = min(len(rungs), max(count, 1)) - 1
    return sorted({rungs[round(i * (len(rungs) - 1) / last)] for i in range(last + 1)}) if last else rungs[:1]


def around(length: int, most: int, count: int) -> list[int]:
    """Return ``count`` lengths near the length of a text that is replaced, the nearest first."""
    steps = (0, 1, -1, 2, -2, 3, length // 2, -3, -(length // 2), length, 4, -4, 2 * length)
    near = dict.fromkeys(length + step for step in steps)
    return [size for size in near if 1 <= size <= most][: max(count, 1)]


def search(ladders: Sequence[Sequence[int]], room: int, count: int, evaluate: Evaluate) -> list[Candidate]:
    """Write the gaps at several lengths, ``count`` at a time, and return all candidates, the best first.

    First all gaps go up their ladders together. Then each gap in turn tries its other rungs, and lengths between the
    best rung and its neighbours. Combinations of more than ``room`` tokens are left out. When all lengths are known,
    the gaps are written ``count`` times at these lengths.
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
    """Return the candidates, the best first, each text once."""
    best: dict[tuple[str, ...], Candidate] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.rank):
        best.setdefault(candidate.texts, candidate)
    return list(best.values())


def _best(tried: dict[Lengths, Candidate]) -> Candidate:
    return min(tried.values(), key=lambda candidate: candidate.rank)


def _replaced(lengths: Lengths, gap: int, sizes: Sequence[int]) -> list[Lengths]:
    return [(*lengths[:gap], size, *lengths[gap + 1 :]) for size in sizes]


def _between(length: int, tried: Collection[int], count: int) -> list[int]:
    """Return up to ``count`` evenly spaced lengths between this one and its neighbours among those tried."""
    low = max((size for size in tried if size < length), default=length)
    high = min((size for size in tried if size > length), default=length)
    inner = [size for size in range(low + 1, high) if size != length]
    if len(inner) <= count:
        return inner
    return [inner[(2 * i + 1) * len(inner) // (2 * count)] for i in range(count)]
