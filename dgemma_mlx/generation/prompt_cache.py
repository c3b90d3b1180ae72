"""The encoded prefix of a conversation, kept from one call of ``stream`` to the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.model.cache import PrefixCache, Snapshot
from dgemma_mlx.model.text import DiffusionGemma

_BLOCK = 1024  # ids
LEAST_SHARED = 512  # positions that two prompts must share for a mark of its own; fewer are soon encoded again


NOT_IN_A_FILE = (  # an error
    "the prompt cache of a model that is cut over several machines cannot be kept in a file",
    "Leave out the file; the cache in memory works as usual.",
)  # fmt: skip


def require_whole(model: Model) -> None:
    """Raise ``DgemmaError`` when each of several machines holds a part of the keys and values."""
    if model.network.machines > 1:
        raise DgemmaError(*NOT_IN_A_FILE, exit_code=2)


class PromptCache:
    """The encoded prefix of a conversation. A new prompt reuses the longest prefix that it shares with it.

    A prefix is reusable up to where the cache ends, and up to a mark. Sliding-window layers forget what lies before
    their window, so going back needs the state that they had. A mark holds this state: keys and values of the sliding
    layers. There are three marks: ``turn``, at the start of the last model turn; ``canvas``, before the last canvas of
    an answer, whose padding is in no later prompt; and ``shared``, where a prompt first differed from the previous one
    (one long document, several questions).

    One answer at a time uses a cache (see ``lease``). Between two uses nothing in it is lazy, so that the next use may
    be in another thread.

    Attributes:
        shared: Number of positions that the last prompt had in common with what was encoded before it.
        known_elsewhere: Number of positions that the next prompt has in common with another cache, so that a mark is
            set there as well.
    """

    def __init__(self) -> None:
        self._encoded: _Encoded | None = None
        self.shared = self.known_elsewhere = 0
        self._stored: Path | None = None  # the file that holds the same as this cache
        self._in_use = threading.Lock()

    @classmethod
    def load(cls, path: str | Path, model: Model) -> PromptCache:
        """Read a file that ``save`` has written.

        Raises ``DgemmaError`` for any other file, and for a file of another model.
        """
        from dgemma_mlx.generation import prompt_cache_file
        from dgemma_mlx.generation.identity import ModelIdentity

        require_whole(model)
        loaded = cls()
        loaded._stored = Path(path)
        ids, cache, marks = prompt_cache_file.read(Path(path), model.network, ModelIdentity.of(model))
        loaded._encoded = _Encoded(model.network, cache, ids, marks)
        return loaded

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Use the cache alone. Its buffers are evaluated at the end, however the use ends.

        After a stream that was closed early, this also computes the layers of a step that had been started, because the
        keys and values of its canvas are in the buffers.

        Raises ``DgemmaError`` when the cache is in use: a second answer would overwrite the first one's prefix.
        """
        if not self._in_use.acquire(blocking=False):
            raise DgemmaError(
                "the prompt cache is in use by another answer",
                "Finish or close that stream first, or give each stream a PromptCache of its own.",
            )
        try:
            yield
        finally:
            try:
                if self._encoded is not None:
                    self._encoded.evaluate()
            except BaseException:
                self._encoded = None  # it cannot be computed, so nothing can be reused
                raise
            finally:
                self._in_use.release()

    def save(self, path: str | Path, model: Model) -> None:
        """Write a safetensors file, whole or not at all.

        Nothing is written when nothing is encoded, or when the file holds it already. ``model`` must be the one that
        filled the cache. Raises ``DgemmaError`` when it is not, when the cache is in use, and when the file cannot be
        written.
        """
        with self.lease():
            self._save(Path(path), model)

    def _save(self, path: Path, model: Model) -> None:
        """Write the file. The caller holds the lease."""
        encoded = self._encoded
        if encoded is None:
            return
        require_whole(model)
        if encoded.network is not model.network:
            raise DgemmaError("the prompt cache was filled by another model", "Save it with that model.")
        if not encoded.is_exact():
            encoded.go_back(len(encoded.ids))
        if encoded.ids and not (self._stored == path and path.exists()):
            from dgemma_mlx.generation import prompt_cache_file
            from dgemma_mlx.generation.identity import ModelIdentity

            identity = ModelIdentity.of(model)
            prompt_cache_file.write(path, model.network, identity, encoded.ids, encoded.cache, encoded.marks)
            self._stored = path

    def reuse(self, network: DiffusionGemma, ids: Sequence[int], leave_last: bool = False) -> PrefixCache:
        """Return the cache at the end of the longest reusable prefix of ``ids``; ``offset`` is its length.

        With ``leave_last``, at least the last id is left to encode.
        """
        if self._encoded is None or self._encoded.network is not network:
            self._encoded = _Encoded(network, network.new_cache())
            self._stored = None
        encoded = self._encoded
        common = _common_prefix(encoded.ids, ids[:-1] if leave_last else ids)
        if encoded.cache.offset > common or not encoded.is_exact():
            encoded.go_back(common)
        self.shared = max(common, self.known_elsewhere)
        return encoded.cache

    def common(self, ids: Sequence[int]) -> int:
        """Return the number of positions that a prompt has in common with what is encoded."""
        return _common_prefix(self.ids, ids)

    def reach(self, ids: Sequence[int]) -> int:
        """Return the number of positions of a prompt that ``reuse`` would not encode again."""
        point = self._encoded and self._encoded.point(self.common(ids))
        return point.offset if point else 0

    def is_continued_by(self, ids: Sequence[int]) -> bool:
        """Return whether a prompt has all that is encoded in common with this cache, but for the last model turn."""
        if not self._encoded:
            return True
        turn = self._encoded.marks.get("turn")
        return self.common(ids) >= (turn.offset if turn else len(self.ids))

    def fork(self, ids: Sequence[int]) -> PromptCache:
        """Return a cache of its own that holds the positions of a prompt up to its ``reach`` here, which is not 0.

        This cache stays as it is, and may be in use by an answer of this thread that is suspended.
        """
        assert self._encoded is not None
        other, point = PromptCache(), self._encoded.point(self.common(ids))
        assert point is not None, "there is a reach"
        cache = self._encoded.cache.fork(point, len(ids))
        other._encoded = _Encoded(self._encoded.network, cache, list(ids[: point.offset]), {"shared": point})
        other._encoded.evaluate()
        return other

    @property
    def ids(self) -> Sequence[int]:
        """The ids of all encoded positions."""
        return self._encoded.ids if self._encoded else ()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the cache takes, with its marks."""
        return self._encoded.nbytes if self._encoded else 0

    def append(self, ids: Sequence[int], mark: str | None = None) -> None:
        """Record that ``ids`` have been encoded, and set the mark of that name after them."""
        assert self._encoded is not None, "reuse() comes first"
        self._stored = None
        self._encoded.ids += ids
        if mark is not None:
            self.mark(mark)

    def mark(self, name: str) -> None:
        """Set the mark of that name after all that is recorded and encoded."""
        assert self._encoded is not None, "reuse() comes first"
        self._encoded.marks[name] = self._encoded.cache.snapshot()


@dataclass
class _Encoded:
    """What one network has encoded.

    Attributes:
        network: The network.
        cache: Keys and values of the encoded ids.
        ids: The encoded ids.
        marks: States to go back to, by name.
    """

    network: DiffusionGemma
    cache: PrefixCache
    ids: list[int] = field(default_factory=list)
    marks: dict[str, Snapshot] = field(default_factory=dict)

    def is_exact(self) -> bool:
        """Return whether the cache holds exactly the recorded ids. It does not when encoding was interrupted."""
        return self.cache.is_whole and self.cache.offset == len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers and of the marks. Marks at one position are the same arrays."""
        marks = {mark.offset: mark for mark in self.marks.values()}.values()
        return self.cache.nbytes + sum(
            array.nbytes for mark in marks for pair in mark.sliding.values() for array in pair
        )

    def point(self, limit: int) -> Snapshot | None:
        """Return the last state to return to that has at most ``limit`` positions; None is the beginning."""
        points = [*self.marks.values(), *([self.cache.snapshot()] if self.is_exact() and self.ids else [])]
        return max((point for point in points if point.offset <= limit), key=lambda point: point.offset, default=None)

    def evaluate(self) -> None:
        """Evaluate everything that is kept: a lazy array can only be computed by the thread that made it."""
        mx.eval(self.cache.buffers(), [list(mark.sliding.values()) for mark in self.marks.values()])

    def go_back(self, limit: int) -> None:
        """Go back to the last mark with at most ``limit`` positions, or to the beginning."""
        self.marks = {name: mark for name, mark in self.marks.items() if mark.offset <= limit}
        best = max(self.marks.values(), key=lambda mark: mark.offset, default=None)
        if best is None:
            self.cache = self.network.new_cache()
        else:
            self.cache.restore(best)
        del self.ids[self.cache.offset :]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    one, other = list(one), list(other)
    length = min(len(one), len(other))
    blocks = range(0, length, _BLOCK)  # compared as a whole, which is faster
    start = next((i for i in blocks if one[i : i + _BLOCK] != other[i : i + _BLOCK]), length)
    return next((i for i in range(start, length) if one[i] != other[i]), length)
