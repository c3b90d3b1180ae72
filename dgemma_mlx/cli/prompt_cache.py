"""``--prompt-cache``: the encoded prompt, kept in a file from one run to the next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.generation.model import Model
    from dgemma_mlx.generation.prompt_cache import PromptCache

PromptCacheFile = Annotated[
    Path | None,
    typer.Option("--prompt-cache", help="Keep what was encoded in this file; the next run encodes only what is new."),
]

_EXPECTED = (DgemmaError, OSError, KeyboardInterrupt, SystemExit, typer.Exit)


@contextmanager
def kept_prompt_cache(path: Path | None, model: Model) -> Iterator[PromptCache | None]:
    """The cache that the file holds, an empty one where there is no file, None without ``path``.

    The file is written when the block ends, also when it is interrupted: what was encoded is not lost. Only after an
    error that nobody foresaw it stays as it was. That it can be written is found out first.
    """
    if path is None:
        yield None
        return
    from dgemma_mlx.generation.prompt_cache import PromptCache
    from dgemma_mlx.generation.prompt_cache_file import check_place

    check_place(path)
    memory = PromptCache.load(path, model) if os.path.exists(path) else PromptCache()
    try:
        yield memory
    except _EXPECTED:
        memory.save(path, model)
        raise
    memory.save(path, model)
