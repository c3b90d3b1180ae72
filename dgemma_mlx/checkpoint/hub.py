"""Finding a checkpoint by name: the built-in demo, a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.download import (
    WORKERS,
    Progress,
    RemoteFile,
    Repository,
    download,
    hub_cache,
    list_files,
    remove_stale,
    size_of,
)
from dgemma_mlx.checkpoint.shards import shard_files, shard_names
from dgemma_mlx.checkpoint.vision_config import VISION_FILE
from dgemma_mlx.checks import reason, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import write_whole
from dgemma_mlx.json_text import read_json

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo"
MODEL_VARIABLE = "DGEMMA_MODEL"

_HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@(\w(?!.*\.\.)[\w./-]*))?", re.ASCII)
_FORMS = "A model is a folder, a Hub id (owner/name or owner/name@revision), or 'demo'."
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # of an open file, whose name the error does not have
_ACCESS = "accept the licence on its page and log in with `hf auth login`."
# What `info` shows, and the list of weight files, by which the Hub is asked for the headers of each.
_FACTS = (
    "config.json", "conversion_report.json", "generation_config.json", "model.safetensors.index.json",
    "processor_config.json",
)  # fmt: skip
# The files of a repository that a complete copy has: no README, and no weights in other formats.
FILES = (
    *_FACTS,
    "preprocessor_config.json",
    "tokenizer*",
    "chat_template*",
    "*.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
    VISION_FILE,
)


def full_name(name: str | Path | None) -> str | None:
    """Return a model's name by which any folder and machine finds it: of a folder, the full path."""
    if name is None:
        return None
    return os.path.abspath(name) if name != DEMO and os.path.isdir(name) else str(name)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a folder on this machine.

    Attributes:
        folder: The checkpoint folder.
        name: The name by which the caller asked for it.
        is_demo: Whether this is the built-in demo checkpoint.
        has_weights: Whether the folder holds the weights. False if only the small files were downloaded.
        was_compared: False if the newest commit was wanted, but the Hub could not be asked for it.
    """

    folder: Path
    name: str
    is_demo: bool
    has_weights: bool = True
    was_compared: bool = True

    @property
    def repo_id(self) -> str | None:
        """The Hub id ``owner/name``; None for a folder and for the demo."""
        found = _HUB_ID.fullmatch(self.name)
        return found[1] if found and self.folder != Path(os.path.expanduser(self.name)) else None


def resolve(
    name: str | None = None, *, weights: bool = True, refresh: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Return the checkpoint with a name: ``demo``, a folder, or a Hub id ``owner/name`` or ``owner/name@revision``.

    A name of None stands for the environment variable ``DGEMMA_MODEL`` or, if that is not set, for ``demo``.

    A Hub repository is downloaded once. A complete copy in the Hub's cache is used without any network request, unless
    ``refresh`` asks for the newest commit of the revision; where the Hub cannot be reached, the copy is used all the
    same. If ``weights`` is False, only the files that describe the
    model are downloaded, a few kB, unless the cache holds a complete copy. ``progress`` is called during the download
    of the rest; by default, the Hub's library draws a bar where it draws its own.

    Raises ``DgemmaError`` when the checkpoint does not exist or cannot be downloaded, with exit code 2 for a malformed
    name.
    """
    if name is None:
        name = os.environ.get(MODEL_VARIABLE) or DEMO
    if name == DEMO:
        return Checkpoint(DEMO_FOLDER, DEMO, is_demo=True)
    if not name or "\0" in name:
        raise _malformed(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Checkpoint(Path(path), name, is_demo=False)
    if os.path.exists(path):
        raise DgemmaError(f"{name} is a file, not a folder", f"Name the folder that contains it: {Path(path).parent}")
    if hub_id := _HUB_ID.fullmatch(name):
        return _fetch(name, hub_id[1], hub_id[2], weights, refresh, progress)
    if "/" in name and not name.startswith((".", "/", "~")):
        raise _malformed(name)
    meant = "Did you mean 'demo'? " if get_close_matches(name, [DEMO], cutoff=0.75) else ""
    raise DgemmaError(f"there is no folder {shown(name)}", meant + _FORMS)


def remote_headers(checkpoint: Checkpoint) -> dict[str, Any]:
    """Download the headers of a checkpoint's safetensors files, without the weights, and return them by file name.

    ``checkpoint`` is one that `resolve` has returned without its weights. The values are
    ``huggingface_hub.SafetensorsFileMetadata`` objects, whose ``tensors`` gives the dtype, shape and data_offsets of
    each tensor. Raises ``DgemmaError`` when the download fails.
    """
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import HfApi

    found = _HUB_ID.fullmatch(checkpoint.name)
    assert found is not None, "the name must be a Hub id that resolve() accepted"
    names = shard_names(checkpoint.folder)
    if any(name == VISION_FILE for name, _, _ in needed_files(checkpoint.folder)):
        names.append(VISION_FILE)
    # One file at a time, because the library draws a bar of its own when it reads the headers of all. All are of the
    # commit whose names they are, which gives its name to the folder: a branch may have moved on.
    read = partial(HfApi().parse_safetensors_file_metadata, found[1], revision=checkpoint.folder.name)
    try:
        with ThreadPoolExecutor(WORKERS) as pool:
            return dict(zip(names, pool.map(read, names), strict=True))
    except Exception as error:
        raise _explain(found[1], found[2], error) from error


def remote_files(name: str) -> tuple[Repository, list[RemoteFile]]:
    """Ask the Hub for a repository, and return it with those of its files that a complete copy still lacks.

    ``name`` must be a valid Hub id. Raises ``DgemmaError`` when the Hub cannot be asked.
    """
    found = _HUB_ID.fullmatch(name)
    assert found is not None, "the name must be a Hub id that resolve() accepted"
    try:
        repository = list_files(found[1], found[2])
    except DgemmaError:
        raise
    except Exception as error:
        raise _explain(found[1], found[2], error) from error
    return repository, repository.missing(FILES)


def _fetch(
    name: str, repo_id: str, revision: str | None, weights: bool, refresh: bool, progress: Progress | None
) -> Checkpoint:
    """Return a repository's snapshot from the cache if it is complete there, and download it otherwise.

    See ``resolve``. Raises ``DgemmaError`` when the download fails or the repository is not a complete checkpoint.
    """
    from huggingface_hub import snapshot_download

    try:
        if not refresh and (cached := cached_snapshot(repo_id, revision)):
            return Checkpoint(cached, name, is_demo=False)
        try:
            repository = list_files(repo_id, revision)
        except Exception as error:
            if _is_answer(error) or not (refresh and (cached := cached_snapshot(repo_id, revision))):
                raise
            return Checkpoint(cached, name, is_demo=False, was_compared=False)
        # These files come first, so that an unsupported model is refused before its 50 GB of weights. The library finds
        # them there, and notes the names and sizes of all files, by which an incomplete copy is known. It does not
        # download: it takes a truncated file for a whole one, and removes a link that another process may be reading.
        download(repository, repository.missing(_FACTS))
        snapshot_download(
            repo_id, revision=repository.commit, allow_patterns=list(_FACTS), tqdm_class=_silent_bar()
        )  # fmt: skip
        if not _tree(repository.snapshot).exists():  # the library takes a snapshot without its list for a whole one
            raise ConnectionError("the Hub did not list its files")
        ModelConfig.load(repository.snapshot)
        missing = repository.missing(FILES)
        if missing:
            if not weights:
                return Checkpoint(repository.snapshot, name, is_demo=False, has_weights=False)
            remove_stale(repository)
            with _library_bar(repo_id, progress) as drawn:
                download(repository, missing, drawn)
        _note_revision(repository, revision)
    except DgemmaError:
        raise
    except Exception as error:  # includes those of the HTTP library, which depends on the version
        raise _explain(repo_id, revision, error) from error
    if not is_complete(repository.snapshot):
        raise DgemmaError(
            f"{repo_id} on the Hub is not a complete checkpoint", "It lacks weights or a tokenizer; choose another."
        )
    return Checkpoint(repository.snapshot, name, is_demo=False)


def _note_revision(repository: Repository, revision: str | None) -> None:
    """Note in the cache that a revision, or the main branch for None, is this commit."""
    if revision == repository.commit:
        return
    path = repository.folder / "refs" / (revision or "main")
    if not path.exists() or path.read_bytes() != repository.commit.encode():  # else the cache may be read-only
        write_whole(path, repository.commit)


def cached_snapshot(repo_id: str, revision: str | None = None) -> Path | None:
    """Return the folder of a revision's files if they are all in the Hub's cache, else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(
            repo_id, revision=revision, allow_patterns=list(FILES), ignore_patterns="*/*", local_files_only=True
        ))  # fmt: skip
    except (LocalEntryNotFoundError, UnicodeDecodeError):  # the latter where the name of the commit is damaged
        return None
    return folder if is_complete(folder) else None


def _silent_bar() -> type[Any]:
    """Return the class of the library's bars, drawing nothing."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    return Silent


@contextmanager
def _library_bar(repo_id: str, progress: Progress | None) -> Iterator[Progress]:
    """Yield ``progress``, or if it is None a function that moves one of the library's own bars."""
    if progress is not None:
        yield progress
        return
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    with tqdm(desc=repo_id, unit="B", unit_scale=True) as bar:  # type: ignore[no-untyped-call]

        def move(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield move


def needed_files(snapshot: Path) -> list[tuple[str, str, int]]:
    """Return the name, the checksum and the size of each of a commit's files that are needed.

    They are those of the list that the Hub's library keeps. There is none of a copy that an older version has made.
    """
    try:
        files = read_json(_tree(snapshot)).get("files")
    except DgemmaError:
        return []
    needed = []
    for name, entry in files.items() if isinstance(files, dict) else ():
        known = any(fnmatch(name, pattern) for pattern in FILES) and ("/" not in name or name == VISION_FILE)
        if known and isinstance(entry, dict):
            size: Any = entry.get("lfs_size") or entry.get("size")
            etag: Any = entry.get("lfs_sha256") or entry.get("blob_id")
            if isinstance(size, int) and isinstance(etag, str):
                needed.append((name, Path(etag).name, size))
    return needed


def _tree(snapshot: Path) -> Path:
    """Return the path of the library's list of a commit's files."""
    return snapshot.parent.parent / "trees" / f"{snapshot.name}.json"


def is_complete(folder: Path) -> bool:
    """Return whether a snapshot holds all files that loading needs, with their sizes where the cache knows them.

    ``huggingface_hub`` cannot tell. It accepts an incomplete snapshot as complete if an older version, which stored no
    list of files, left it.
    """
    if not (folder / "config.json").exists():
        return False
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return False
    try:
        shard_files(folder)
    except DgemmaError:
        return False
    return all(size_of(folder / name) == size for name, _, size in needed_files(folder))


def _is_answer(error: Exception) -> bool:
    """Return whether an error is about the name or the Hub's answer to it, and not about reaching the Hub."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return 400 <= error.response.status_code < 500
    return isinstance(error, (DgemmaError, HFValidationError))


def _explain(repo_id: str, revision: str | None, error: Exception) -> DgemmaError:
    """Return the ``DgemmaError`` that explains an error of ``huggingface_hub`` to the user."""
    from huggingface_hub import errors

    name = repo_id if revision is None else f"{repo_id}@{revision}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.HFValidationError):
        return _malformed(name)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return DgemmaError(
            f"no complete copy of {name} is in the cache, and HF_HUB_OFFLINE is set",
            "Unset HF_HUB_OFFLINE to download it.",
        )
    if isinstance(error, errors.GatedRepoError):
        return DgemmaError(f"{name} is gated, and this account has no access", f"To get access, {_ACCESS}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return DgemmaError(
            f"there is neither a folder nor a Hub model {name}",
            f"Check the spelling. If it is private or gated, {_ACCESS}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DgemmaError(
            f"{repo_id} has no revision {shown(revision)}", "A revision is a branch, a tag or a commit."
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return DgemmaError(f"the Hub refuses access to {name}", f"To get access, {_ACCESS}")
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK):
        return _explain_disk(name, error)
    return DgemmaError(
        f"{name} could not be downloaded: {reason(error)}",
        "Check the connection. The next attempt downloads only what is missing.",
    )


def _explain_disk(name: str, error: OSError) -> DgemmaError:
    """Return the ``DgemmaError`` for a file of the Hub's cache that cannot be read or written."""
    path = str(error.filename or hub_cache())
    if isinstance(error, FileNotFoundError) and "models--" in path:
        return DgemmaError(
            f"another program removed {name} from the Hub's cache during the download",
            "The same command downloads it again.",
        )
    return DgemmaError(
        f"cannot use {path}: {reason(error)}",
        "HF_HOME names the folder of the Hub's cache, which needs free space and the permission to write.",
    )


def _malformed(name: str) -> DgemmaError:
    """Return the ``DgemmaError`` for a name that is neither a folder nor a Hub id."""
    return DgemmaError(f"{shown(name)} is neither a folder nor a valid Hub id", _FORMS, exit_code=2)
