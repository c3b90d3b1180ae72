"""The encoded prefix of a conversation, kept from one call of ``stream`` to the next."""

from __future__ import annotations

from collections.abc import Sequence

from dgemma_mlx.model.cache import PrefixCache, Snapshot
from dgemma_mlx.model.text import DiffusionGemma


class PromptCache:
    """Lets a new turn encode only what is new: of the ids encoded before, the longest reusable prefix is kept.

    A prefix can be reused where the cache still is, or at a mark: sliding-window layers forget what lies behind the
    window, so going back needs the state they had. Two marks are kept, the start of the last model turn (``turn``)
    and the last canvas that was encoded whole (``canvas``); each holds the sliding layers' keys and values.
    """

    def __init__(self) -> None:
        self._network: DiffusionGemma | None = None
        self._cache: PrefixCache | None = None
        self._ids: list[int] = []
        self._marks: dict[str, Snapshot] = {}

    def reuse(self, network: DiffusionGemma, ids: Sequence[int]) -> PrefixCache:
        """The cache, at the end of the longest reusable prefix of ``ids`` (``offset`` says how many)."""
        if self._cache is None or self._network is not network:
            self._network, self._cache, self._ids, self._marks = network, network.new_cache(), [], {}
        common = _common_prefix(self._ids, ids)
        if self._cache.offset > common:
            self._marks = {name: mark for name, mark in self._marks.items() if mark.offset <= common}
            best = max(self._marks.values(), key=lambda mark: mark.offset, default=None)
            if best is None:
                self._cache = network.new_cache()
            else:
                self._cache.restore(best)
        self._ids = list(ids[: self._cache.offset])
        return self._cache

    def append(self, ids: Sequence[int], mark: str | None = None) -> None:
        """Notes that ``ids`` have been encoded; sets the mark of that name behind them."""
        assert self._cache is not None
        self._ids += ids
        if mark is not None:
            self._marks[mark] = self._cache.snapshot()


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
