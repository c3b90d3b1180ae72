"""The encoded prefix of a conversation, kept from one call of ``stream`` to the next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.model.cache import PrefixCache, Snapshot
from dgemma_mlx.model.text import DiffusionGemma


class PromptCache:
    """Lets a new turn encode only what is new: of the ids encoded before, the longest reusable prefix is kept.

    A prefix can be reused where the cache still is, or at a mark: sliding-window layers forget what lies behind the
    window, so going back needs the state they had. Marks are kept at the start of the last model turn (``turn``),
    behind the last canvas that was encoded whole (``canvas``), and where a prompt parted from the one before it
    (``shared``: one long document, one question after the other); each holds the sliding layers' keys and values.
    """

    def __init__(self) -> None:
        self._network: DiffusionGemma | None = None
        self._cache: PrefixCache | None = None
        self._ids: list[int] = []
        self._marks: dict[str, Snapshot] = {}
        self.shared = 0
        """how many positions the last prompt had in common with what was encoded before it"""
        self._stored: Path | None = None  # the file that holds all this

    @classmethod
    def load(cls, path: str | Path, model: Model) -> PromptCache:
        """What ``save`` has written. ``DgemmaError`` for any other file, and for that of another model."""
        from dgemma_mlx.generation.prompt_cache_file import read

        memory = cls()
        memory._network, memory._stored = model.network, Path(path)
        memory._ids, memory._cache, memory._marks = read(Path(path), model)
        return memory

    def save(self, path: str | Path, model: Model) -> None:
        """Writes a safetensors file, whole or not at all; none where nothing is encoded, or nothing more than it holds.

        ``model`` is the one that all this was encoded with. ``DgemmaError`` where the file cannot be written.
        """
        from dgemma_mlx.generation.prompt_cache_file import write

        if self._cache is None:
            return
        if self._network is not model.network:
            raise DgemmaError("the prompt cache was filled by another model", "Save it with that one.")
        if not self._is_exact():
            self._go_back(len(self._ids))
        if self._ids and self._stored != Path(path):
            write(Path(path), model, self._ids, self._cache, self._marks)
            self._stored = Path(path)

    def reuse(self, network: DiffusionGemma, ids: Sequence[int], leave: bool = False) -> PrefixCache:
        """The cache, at the end of the longest reusable prefix of ``ids`` (``offset`` says how many). With ``leave``
        at least the last of them is left to encode."""
        if self._cache is None or self._network is not network:
            self._network, self._cache, self._ids, self._marks = network, network.new_cache(), [], {}
        common = _common_prefix(self._ids, ids[:-1] if leave else ids)
        self.shared = common
        if self._cache.offset > common or not self._is_exact():
            self._go_back(common)
        return self._cache

    def append(self, ids: Sequence[int], mark: str | None = None) -> None:
        """Notes that ``ids`` have been encoded; sets the mark of that name behind them."""
        assert self._cache is not None
        self._stored = None
        self._ids += ids
        if mark is not None:
            self._marks[mark] = self._cache.snapshot()

    def _is_exact(self) -> bool:
        """Whether the ids are those that the cache holds: not so where encoding them was interrupted."""
        return self._cache is not None and self._cache.is_whole and self._cache.offset == len(self._ids)

    def _go_back(self, most: int) -> None:
        """To the last mark with at most so many positions, or to the beginning."""
        assert self._network is not None and self._cache is not None
        self._marks = {name: mark for name, mark in self._marks.items() if mark.offset <= most}
        best = max(self._marks.values(), key=lambda mark: mark.offset, default=None)
        if best is None:
            self._cache = self._network.new_cache()
        else:
            self._cache.restore(best)
        del self._ids[self._cache.offset :]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
