"""Which models are in the Hub's cache: whole ones, parts of downloads, and descriptions without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dgemma_mlx.checkpoint.download import hub_cache, size_of
from dgemma_mlx.checkpoint.hub import is_complete, needed_files
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import read_json

State = Literal["whole", "partial", "description"]


@dataclass(frozen=True)
class CachedModel:
    """A DiffusionGemma model in the Hub's cache.

    Attributes:
        name: The Hub id ``owner/name``.
        folder: Its folder in the cache.
        state: "whole", "partial" for a download that has begun, or "description" for the small files that say what the
            model is, as `info` downloads them.
        bytes_on_disk: Bytes that the disk has given to its files, parts of downloads included.
        arrived: Bytes of the newest commit's files that are there.
        total: Bytes of all of the newest commit's files, or None if the cache does not say.
    """

    name: str
    folder: Path
    state: State
    bytes_on_disk: int
    arrived: int
    total: int | None


def cached_models() -> list[CachedModel]:
    """Return the DiffusionGemma models in the Hub's cache, sorted by name.

    Raises ``DgemmaError`` if the cache cannot be read.
    """
    try:
        folders = sorted(hub_cache().iterdir())
        found = [_examine(folder) for folder in folders if folder.name.startswith("models--") and folder.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DgemmaError(
            f"cannot read the Hub's cache {hub_cache()}: {error.strerror}", "HF_HOME names the folder of the cache."
        ) from None
    return [model for model in found if model is not None]


def _examine(folder: Path) -> CachedModel | None:
    """Return what is in a repository's folder, or None if it is not a DiffusionGemma model."""
    snapshots = [path for path in (folder / "snapshots").glob("*") if _is_ours(path)]
    if not snapshots:
        return None
    newest = max(snapshots, key=lambda path: path.stat().st_mtime)
    contents = [path.stat() for path in (folder / "blobs").glob("*") if path.is_file()]
    state: State = "description"
    if any(map(is_complete, snapshots)):
        state = "whole"
    elif any((folder / "blobs").glob("*.incomplete")) or any(newest.glob("*.safetensors")):
        state = "partial"
    return CachedModel(
        folder.name.removeprefix("models--").replace("--", "/"), folder, state,
        sum(512 * content.st_blocks for content in contents), _arrived(newest), _total(newest) or None,
    )  # fmt: skip


def _total(snapshot: Path) -> int:
    """Return the bytes of a commit's needed files, or 0 if the cache does not say."""
    return sum(size for _, _, size in needed_files(snapshot))


def _arrived(snapshot: Path) -> int:
    """Return how many bytes of a commit's needed files are there: of whole files, and of parts of the others."""
    blobs = snapshot.parent.parent / "blobs"
    parts = list(blobs.glob("*.incomplete"))
    arrived = 0
    for name, etag, size in needed_files(snapshot):
        if size in (size_of(snapshot / name), size_of(blobs / etag)):
            arrived += size
        else:
            there = [size_of(part) for part in parts if part.name.startswith(f"{etag}.")]
            arrived += max((part for part in there if 0 <= part <= size), default=0)
    return arrived


def _is_ours(snapshot: Path) -> bool:
    """Return whether the configuration in the folder says that the model is DiffusionGemma."""
    try:
        return read_json(snapshot / "config.json").get("model_type") == "diffusion_gemma"
    except DgemmaError:
        return False
