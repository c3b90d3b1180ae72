"""Prompt caches in a folder, from one run of a server to the next."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dgemma_mlx.checks import reason
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import locked_folder
from dgemma_mlx.generation.identity import ModelIdentity
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.prompt_cache import PromptCache

_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.prompt")  # the model's weights, and the ids
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.\d+")  # left by a run that was killed while it wrote


class PromptCacheFolder:
    """A folder with a file for each prompt cache. One process at a time uses it; other files in it stay as they are.

    The folder holds the last ``count`` prompt caches of the model in use, and as many of other models.
    """

    def __init__(self, folder: Path, count: int, log: Callable[[str], None]) -> None:
        """Create the folder if necessary, for its owner's eyes only, and lock it until ``close``.

        ``log`` gets a line for each file that cannot be used. Raises ``DgemmaError`` when another process uses the
        folder, and when it cannot be created.
        """
        self._folder, self._count, self._log, self._lock = folder, count, log, ExitStack()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.enter_context(locked_folder(folder))
        except OSError as error:
            message = f"the folder of prompt caches, {folder}, cannot be used: {reason(error)}"
            raise DgemmaError(message, "Choose another folder.") from None

    def close(self) -> None:
        """Let other processes use the folder."""
        self._lock.close()

    def read(self, model: Model) -> list[PromptCache]:
        """Return the prompt caches of a model, the most recently used one last, without those that cannot be read."""
        found = []
        with self._logged("the prompt caches are not read"):
            for path in self._split(self._files(_start(ModelIdentity.of(model))))[1]:
                with self._logged("a prompt cache is left out"):
                    found.append(PromptCache.load(path, model))
        return found

    def write(self, model: Model, caches: Sequence[PromptCache]) -> None:
        """Write the prompt caches of a model, the most recently used one last, and delete what there is too much of."""
        with self._logged("the prompt caches are not written"):
            start, kept = _start(ModelIdentity.of(model)), []
            now = time.time_ns()
            for age, cache in enumerate(caches):
                path = self._folder / f"{start}{_digest(cache.ids)}.prompt"
                with self._logged("a prompt cache is not written"):
                    cache.save(path, model)
                    os.utime(path, ns=(now, now + age))
                    kept.append(path)
            own = self._files(start)
            others = [path for path in self._files() if path not in own]
            old = [path for path in own if path not in kept]
            for path in (*old, *self._split(others)[0], *self._named(_UNFINISHED)):
                with self._logged("an old prompt cache is not deleted"):
                    path.unlink(missing_ok=True)

    @contextmanager
    def _logged(self, problem: str) -> Iterator[None]:
        """Log an error of the block as one line."""
        try:
            yield
        except DgemmaError as error:
            self._log(f"{problem}: {error.message}")
        except OSError as error:
            self._log(f"{problem}: {reason(error)}")

    def _split(self, files: Sequence[Path]) -> tuple[Sequence[Path], Sequence[Path]]:
        """Return the files that are too many, and the last ones, which are not."""
        place = max(0, len(files) - self._count)
        return files[:place], files[place:]

    def _files(self, start: str = "") -> list[Path]:
        """Return the files with prompt caches whose names start so, the one that was used last at the end."""
        files = [path for path in self._named(_NAME) if path.name.startswith(start)]
        return sorted(files, key=lambda path: path.lstat().st_mtime_ns)

    def _named(self, pattern: re.Pattern[str]) -> list[Path]:
        return [path for path in self._folder.iterdir() if pattern.fullmatch(path.name)]


def _start(identity: ModelIdentity) -> str:
    """Return the start of the names of a model's files."""
    return f"{identity.weights[:16]}-"


def _digest(ids: Sequence[int]) -> str:
    """Return a short name of ids."""
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()[:16]
