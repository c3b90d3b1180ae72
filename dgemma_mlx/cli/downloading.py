"""Getting a model from the Hub: the verdict before a byte of it, a question on a terminal, and one bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dgemma_mlx.cli.interrupt import ending_at_once
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import size

if TYPE_CHECKING:
    from dgemma_mlx.checkpoint.download import Progress
    from dgemma_mlx.checkpoint.hub import Checkpoint


def obtain(checkpoint: Checkpoint, *, ask_if_it_fits: bool = True, cpu_dequantize: str = "auto") -> Checkpoint:
    """Download the weights of a checkpoint that has only its small files, and return the complete one.

    The verdict is printed to stderr first: the size, the free disk, the memory, and whether the model fits. On a
    terminal a question follows, unless the model fits and ``ask_if_it_fits`` is False. Raises ``DgemmaError`` if the
    user declines, if the disk is too full, or if the download fails.
    """
    import typer

    from dgemma_convert.source import open_source
    from dgemma_mlx.checkpoint.download import check_space, free_space
    from dgemma_mlx.checkpoint.hub import remote_files
    from dgemma_mlx.cli.verdict import judge, loaded_bytes

    with ending_at_once():
        repository, missing = remote_files(checkpoint.name)
        source = open_source(checkpoint)
    verdict = judge(source, loaded_bytes(source, cpu_dequantize))
    total, left = sum(file.size for file in missing), repository.bytes_left(missing)
    already = "" if left == total else f", of which {size(total - left)} are here already"
    free = size(free_space(repository.folder))
    print(f"{checkpoint.name}: {size(total)} to download{already}; {free} free on the disk", file=sys.stderr)
    print(verdict.needs(), verdict.sentence(), sep="\n", file=sys.stderr)
    check_space(repository, missing)
    if (
        sys.stdin.isatty() and sys.stderr.isatty() and (ask_if_it_fits or not verdict.fits)
        and not typer.confirm(f"Download {size(left)}?", default=verdict.fits, err=True)
    ):  # fmt: skip
        raise DgemmaError("nothing was downloaded", "`-m demo` is the built-in model, which needs no download.")
    return download(checkpoint.name, refresh=True)


def download(name: str, *, refresh: bool = False) -> Checkpoint:
    """Return a checkpoint as ``resolve`` does, with one bar on a terminal, and elsewhere a line before and after.

    Ctrl-C ends the download at once. What has arrived stays, and the next download goes on from there.
    """
    from dgemma_mlx.checkpoint.hub import resolve

    with _bar(name) as progress:
        return resolve(name, refresh=refresh, progress=progress)


@contextmanager
def _bar(name: str) -> Iterator[Progress]:
    """Yield a function that draws the progress of all files together, from its first call on."""
    from rich.console import Console
    from rich.constrain import Constrain
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)

    class Bar(Progress):
        def get_renderable(self) -> Constrain:
            return Constrain(super().get_renderable(), console.width - 2)  # the terminal echoes ^C after it

    draws = console.is_terminal and not console.is_dumb_terminal
    bars = Bar(
        BarColumn(bar_width=None), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console,
        disable=not draws, expand=True,
    )  # fmt: skip
    sizes: list[int] = []

    def progress(done: int, total: int) -> None:
        if not sizes:
            sizes.append(total)
            if draws:
                bars.start()
                bars.add_task("", total=total, completed=done)
            else:
                print(f"downloading {name}, {size(total - done)} of {size(total)}", file=sys.stderr)
        if draws:
            bars.update(bars.task_ids[0], completed=done)

    try:
        yield progress
        bars.live.transient = True  # a bar that was interrupted stays, and shows how far it came
    finally:
        bars.stop()
    if sizes:
        print(f"downloaded {name}, {size(sizes[0])}", file=sys.stderr)
