"""``dgemma-mlx models``: list and remove checkpoints in the Hub's cache."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.cli.help import Command, Group
from dgemma_mlx.cli.parameters import output_option
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

models = typer.Typer(cls=Group, invoke_without_command=True, subcommand_metavar="[COMMAND] [ARGS]...")

AsJsonArray = Annotated[bool, output_option("--json", help="Print the list as one JSON array.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME", help="Hub id of a checkpoint, as the list shows it.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")]


@models.callback()
def show(context: typer.Context, as_json: AsJsonArray = False) -> None:
    """List and remove checkpoints in the Hub's cache.

    Without a command, the DiffusionGemma checkpoints and their sizes are listed. HF_HOME names the folder of the cache.

    Examples:
        dgemma-mlx models
        dgemma-mlx models rm mlx-community/diffusiongemma-26B-A4B-it-4bit
    """
    if context.invoked_subcommand is not None:
        return
    from dgemma_mlx.sizes import size

    found = _cached(_scan())
    with quiet_when_closed():
        if as_json:
            print(json.dumps(found))
            return
        for model in found:
            print(f"{model['name']}  {size(model['bytes'])}")
        if not found:
            print("no checkpoint is in the cache; the demo is built in", file=sys.stderr)


@models.command("rm", cls=Command)
def remove(names: Names, yes: Yes = False) -> None:
    """Remove checkpoints from the cache.

    All revisions of the named checkpoints are removed.

    Examples:
        dgemma-mlx models rm mlx-community/diffusiongemma-26B-A4B-it-4bit
        dgemma-mlx models rm -y owner/one owner/two
    """
    from dgemma_mlx.sizes import size

    cache = _scan()
    known = {model["name"] for model in _cached(cache)}
    missing = [name for name in names if name not in known]
    if missing or cache is None:
        raise DgemmaError(f"{missing[0]} is not in the cache", "`dgemma-mlx models` lists what is in the cache.")
    plans = [
        # One repository at a time: forks share commits, and the library removes the first repository that has one.
        replace(cache, repos=frozenset({repo})).delete_revisions(*(revision.commit_hash for revision in repo.revisions))
        for repo in cache.repos if repo.repo_type == "model" and repo.repo_id in names
    ]
    freed = size(sum(plan.expected_freed_size for plan in plans))
    if not yes:
        if not sys.stdin.isatty():
            raise DgemmaError(
                "cannot ask for confirmation, because stdin is not a terminal", "Add -y to remove without asking.", 2
            )
        if not typer.confirm(f"Remove {', '.join(names)} ({freed})?", err=True):
            return
    for plan in plans:
        plan.execute()
    print(f"removed {', '.join(names)}, {freed}", file=sys.stderr)


def _scan() -> HFCacheInfo | None:
    """Return the contents of the Hub's cache, or None when there is no cache yet."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None
    except (OSError, ValueError) as error:
        raise DgemmaError(f"cannot read the Hub's cache: {error}", "HF_HOME names the folder of the cache.") from None


def _cached(cache: HFCacheInfo | None) -> list[dict[str, Any]]:
    """Return the name, size and folder of each DiffusionGemma model in the cache, sorted by name."""
    found = [
        {"name": repo.repo_id, "bytes": repo.size_on_disk, "folder": str(repo.repo_path)}
        for repo in (cache.repos if cache else ())
        if repo.repo_type == "model" and any(_is_ours(revision.snapshot_path) for revision in repo.revisions)
    ]
    return sorted(found, key=lambda model: str(model["name"]))


def _is_ours(snapshot: Any) -> bool:
    """Return whether the configuration in the folder says that the model is DiffusionGemma."""
    from dgemma_mlx.json_text import read_json

    try:
        return read_json(snapshot / "config.json").get("model_type") == "diffusion_gemma"
    except DgemmaError:
        return False
