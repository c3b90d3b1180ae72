"""Several prompt caches, so that conversations do not evict each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dgemma_mlx.generation.prompt_cache import LEAST_SHARED, PromptCache


class PromptCaches:
    """A pool of prompt caches. All of it is used by the thread of the model; ``kept`` and ``nbytes`` by any thread.

    An answer leases the cache that its prompt continues, or a copy of the part that it shares with another
    conversation, as far as a mark allows (see ``PromptCache``), or an empty one. Two answers never share one.

    What is not leased is bounded in number, and whenever an answer begins also in bytes. Of too many caches, the least
    recently used one is dropped, but first those that other caches hold as well except for a few positions, such as an
    editor's variants of one prompt.

    Attributes:
        kept: Number of caches that are not leased.
        nbytes: Bytes that these take.
    """

    def __init__(self, count: int, room: Callable[[], float] = lambda: math.inf) -> None:
        """``count`` is the largest number of caches that are not leased; ``room`` returns the bytes for them."""
        self._count, self._room = count, room
        self._idle: list[PromptCache] = []  # the most recently used one last
        self._leased: list[PromptCache] = []
        self.kept = self.nbytes = 0

    @contextmanager
    def lease(self, ids: Sequence[int]) -> Iterator[PromptCache]:
        """Yield a cache for an answer to this prompt, which belongs to the answer while the block runs."""
        cache = self._take(ids)
        self._leased.append(cache)
        self.trim()
        try:
            yield cache
        finally:
            self._leased.remove(cache)
            self.keep([cache])

    def keep(self, caches: Sequence[PromptCache]) -> None:
        """Keep further caches, the last of which counts as the most recently used. Drop those that are too many."""
        self._idle += [cache for cache in caches if cache.ids]
        self._drop(math.inf)  # their memory has been there so far; whoever needs it trims

    def trim(self) -> None:
        """Drop caches until the others keep within their room."""
        self._drop(self._room())

    def _drop(self, room: float) -> None:
        """Drop caches until the others are not too many, and take no more than ``room`` bytes."""
        while len(self._idle) > self._count or sum(cache.nbytes for cache in self._idle) > room:
            self._idle.remove(next(filter(self._is_variant, self._idle), self._idle[0]))
        self.kept, self.nbytes = len(self._idle), sum(cache.nbytes for cache in self._idle)

    def idle(self) -> list[PromptCache]:
        """Return the caches that are not leased, the most recently used one last."""
        return list(self._idle)

    def clear(self) -> None:
        """Forget all caches, because their network is unloaded. None is leased."""
        assert not self._leased, "an answer is being written"
        self._idle.clear()
        self._drop(0)

    def _take(self, ids: Sequence[int]) -> PromptCache:
        """Return the cache that an answer to this prompt uses, and which is not idle any more."""
        everywhere = [*self._idle, *self._leased]
        known = max((cache.common(ids) for cache in everywhere), default=0)
        best = max(everywhere, key=lambda cache: cache.reach(ids), default=None)
        reach = best.reach(ids) if best else 0
        own = [cache for cache in self._idle if cache.is_continued_by(ids) and cache.reach(ids) == reach]
        if best is None or not reach:
            cache = PromptCache()
        elif own:
            cache = own[-1]
            self._idle.remove(cache)
        else:
            cache = best.fork(ids)
        cache.known_elsewhere = known
        return cache

    def _is_variant(self, cache: PromptCache) -> bool:
        """Return whether another cache holds nearly all of this one, and enough that it can be returned to."""
        others = (other for other in (*self._idle, *self._leased) if other is not cache)
        common = max((other.common(cache.ids) for other in others), default=0)
        return common >= LEAST_SHARED and len(cache.ids) - common <= LEAST_SHARED
