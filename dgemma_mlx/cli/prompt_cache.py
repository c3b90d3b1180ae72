"""The option ``--prompt-cache``, which keeps the encoded prompt in a file from one run to the next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgemma_mlx.cli.parameters import resource_option
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.generation.model import Model
    from dgemma_mlx.generation.prompt_cache import PromptCache

PromptCacheFile = Annotated[
    Path | None,
    resource_option(
        "--prompt-cache", metavar="FILE",
        help="Keep the encoded prompt in this file. The next run encodes only what is new.",
    ),
]  # fmt: skip

_EXPECTED = (DgemmaError, OSError, KeyboardInterrupt, SystemExit, typer.Exit)


@contextmanager
def kept_prompt_cache(path: Path | None, model: Model) -> Iterator[PromptCache | None]:
    """Yield the prompt cache of the file: an empty cache when there is no file yet, and None without a ``path``.

    The file is written when the block ends, also after Ctrl-C or an expected error, so the encoded prompt is not lost.
    After an unexpected error, the file does not change. Raises `DgemmaError` at once when the file cannot be written.
    """
    if path is None:
        yield None
        return
    from dgemma_mlx.generation.prompt_cache import PromptCache, require_whole
    from dgemma_mlx.generation.prompt_cache_file import check_place

    require_whole(model)
    check_place(path)
    cache = PromptCache.load(path, model) if os.path.exists(path) else PromptCache()
    try:
        yield cache
    except _EXPECTED:
        cache.save(path, model)
        raise
    cache.save(path, model)
