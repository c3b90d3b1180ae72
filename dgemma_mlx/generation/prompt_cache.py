"""The encoded prefix of a conversation, kept from one call of ``stream`` to the next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation import prompt_cache_file
from dgemma_mlx.generation.identity import ModelIdentity
from dgemma_mlx.generation.model import Model
from dgemma_mlx.model.cache import PrefixCache, Snapshot
from dgemma_mlx.model.text import DiffusionGemma


class PromptCache:
    """The encoded prefix of a conversation. A new prompt reuses the longest prefix that it shares with it.

    A prefix is reusable up to where the cache ends, and up to a mark. Sliding-window layers forget what lies before
    their window, so going back needs the state that they had. A mark holds this state: keys and values of the sliding
    layers. There are three marks: ``turn``, at the start of the last model turn; ``canvas``, after the last canvas that
    was encoded; and ``shared``, where a prompt first differed from the previous one (one long document, several
    questions).

    Attributes:
        shared: Number of positions that the last prompt had in common with what was encoded before it.
    """

    def __init__(self) -> None:
        self._network: DiffusionGemma | None = None
        self._cache: PrefixCache | None = None
        self._ids: list[int] = []
        self._marks: dict[str, Snapshot] = {}
        self.shared = 0
        self._stored: Path | None = None  # the file that holds the same as this cache

    @classmethod
    def load(cls, path: str | Path, model: Model) -> PromptCache:
        """Read a file that ``save`` has written.

        Raises ``DgemmaError`` for any other file, and for a file of another model.
        """
        loaded = cls()
        loaded._network, loaded._stored = model.network, Path(path)
        loaded._ids, loaded._cache, loaded._marks = prompt_cache_file.read(
            Path(path), model.network, ModelIdentity.of(model)
        )
        return loaded

    def save(self, path: str | Path, model: Model) -> None:
        """Write a safetensors file, whole or not at all.

        Nothing is written when nothing is encoded, or when the file holds it already. ``model`` must be the one that
        filled the cache. Raises ``DgemmaError`` when it is not, and when the file cannot be written.
        """
        if self._cache is None:
            return
        if self._network is not model.network:
            raise DgemmaError("the prompt cache was filled by another model", "Save it with that model.")
        if not self._is_exact():
            self._go_back(len(self._ids))
        if self._ids and self._stored != Path(path):
            prompt_cache_file.write(
                Path(path), model.network, ModelIdentity.of(model), self._ids, self._cache, self._marks
            )
            self._stored = Path(path)

    def reuse(self, network: DiffusionGemma, ids: Sequence[int], leave_last: bool = False) -> PrefixCache:
        """Return the cache at the end of the longest reusable prefix of ``ids``; ``offset`` is its length.

        With ``leave_last``, at least the last id is left to encode.
        """
        if self._cache is None or self._network is not network:
            self._network, self._cache, self._ids, self._marks = network, network.new_cache(), [], {}
        common = _common_prefix(self._ids, ids[:-1] if leave_last else ids)
        self.shared = common
        if self._cache.offset > common or not self._is_exact():
            self._go_back(common)
        return self._cache

    def append(self, ids: Sequence[int], mark: str | None = None) -> None:
        """Record that ``ids`` have been encoded, and set the mark of that name after them."""
        assert self._cache is not None
        self._stored = None
        self._ids += ids
        if mark is not None:
            self._marks[mark] = self._cache.snapshot()

    def _is_exact(self) -> bool:
        """Return whether the cache holds exactly the recorded ids. It does not when encoding was interrupted."""
        return self._cache is not None and self._cache.is_whole and self._cache.offset == len(self._ids)

    def _go_back(self, limit: int) -> None:
        """Go back to the last mark with at most ``limit`` positions, or to the beginning."""
        assert self._network is not None and self._cache is not None
        self._marks = {name: mark for name, mark in self._marks.items() if mark.offset <= limit}
        best = max(self._marks.values(), key=lambda mark: mark.offset, default=None)
        if best is None:
            self._cache = self._network.new_cache()
        else:
            self._cache.restore(best)
        del self._ids[self._cache.offset :]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
