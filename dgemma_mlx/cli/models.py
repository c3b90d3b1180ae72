"""``dgemma-mlx models``: list and remove checkpoints in the Hub's cache."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.checks import reason
from dgemma_mlx.cli.complete import cached_models
from dgemma_mlx.cli.help import Command, Group
from dgemma_mlx.cli.parameters import output_option
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.checkpoint.cached import CachedModel

models = typer.Typer(cls=Group, invoke_without_command=True, subcommand_metavar="[COMMAND] [ARGS]...")

AsJsonArray = Annotated[bool, output_option("--json", help="Print the list as one JSON array.")]
Names = Annotated[
    list[str],
    typer.Argument(
        metavar="NAME", help="Hub id of a checkpoint, as the list shows it.", autocompletion=cached_models
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")]


@models.callback()
def show(context: typer.Context, as_json: AsJsonArray = False) -> None:
    """List and remove checkpoints in the Hub's cache.

    Without a command, the DiffusionGemma checkpoints are listed with the space that they take on the disk. A download
    that has begun is shown with how much has arrived, and `dgemma-mlx pull NAME` continues it. HF_HOME names the folder
    of the cache.

    Examples:
        dgemma-mlx models
        dgemma-mlx models rm mlx-community/diffusiongemma-26B-A4B-it-4bit
    """
    if context.invoked_subcommand is not None:
        return
    from dgemma_mlx.checkpoint.cached import cached_models

    found = cached_models()
    with quiet_when_closed():
        if as_json:
            print(json.dumps([_as_dict(model) for model in found]))
            return
        width = max((len(model.name) for model in found), default=0)
        for model in found:
            print(visible(f"{model.name:{width}}  {_in_words(model)}"))
        if not found:
            print("no checkpoint is in the cache; the demo is built in", file=sys.stderr)


@models.command("rm", cls=Command)
def remove(names: Names, yes: Yes = False) -> None:
    """Remove checkpoints from the cache.

    All revisions of the named checkpoints are removed, and what has arrived of downloads that are not complete.

    Examples:
        dgemma-mlx models rm mlx-community/diffusiongemma-26B-A4B-it-4bit
        dgemma-mlx models rm -y owner/one owner/two
    """
    from dgemma_mlx.checkpoint.cached import cached_models
    from dgemma_mlx.sizes import size

    known = {model.name: model for model in cached_models()}
    if missing := [name for name in names if name not in known]:
        raise DgemmaError(f"{missing[0]} is not in the cache", "`dgemma-mlx models` lists what is in the cache.")
    freed = size(sum(known[name].bytes_on_disk for name in set(names)))
    if not yes:
        if not sys.stdin.isatty():
            raise DgemmaError(
                "cannot ask for confirmation, because stdin is not a terminal", "Add -y to remove without asking.", 2
            )
        if not typer.confirm(visible(f"Remove {', '.join(names)} ({freed})?"), err=True):
            return
    for name in set(names):
        _delete(known[name].folder)
    print(visible(f"removed {', '.join(names)}, {freed}"), file=sys.stderr)


def _delete(folder: Path) -> None:
    """Delete a repository's folder in the cache, as the Hub's library does.

    The library is not asked for the contents of the cache, because one damaged file anywhere in it would be an error.
    Raises ``DgemmaError`` if the folder cannot be deleted.
    """
    from huggingface_hub import DeleteCacheStrategy
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the library would print a traceback
    none: frozenset[Path] = frozenset()
    # From version 2 on, folders may share files, of which the library removes those that no folder needs any more.
    fields = DeleteCacheStrategy.__dataclass_fields__
    shared: dict[str, Any] = {"cache_dir": folder.parent} if "cache_dir" in fields else {}
    failure = ""
    try:
        DeleteCacheStrategy(0, blobs=none, refs=none, repos=frozenset({folder}), snapshots=none, **shared).execute()
    except OSError as error:
        failure = f": {reason(error)}"
    if folder.exists():
        raise DgemmaError(f"cannot remove {folder}{failure}", "Check the permissions of the folder, and who uses it.")


def _as_dict(model: CachedModel) -> dict[str, Any]:
    """Return what `--json` prints about a model, with sizes in bytes."""
    return {
        "name": model.name, "state": model.state, "bytes": model.bytes_on_disk, "arrived": model.arrived,
        "total": model.total, "folder": str(model.folder),
    }  # fmt: skip


def _in_words(model: CachedModel) -> str:
    """Return the size of a model on the disk, and what is there of it if that is not all."""
    from dgemma_mlx.sizes import size

    if model.state == "whole":
        return size(model.bytes_on_disk)
    there = size(model.bytes_on_disk) if model.total is None else f"{size(model.arrived)} of {size(model.total)}"
    if model.state == "description":
        return f"{there}, a description without weights"
    return f"{there}, `dgemma-mlx pull {model.name}` continues"
