"""Finding a checkpoint by name: the built-in demo, a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.shards import shard_files
from dgemma_mlx.checks import reason, shown
from dgemma_mlx.errors import DgemmaError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo"
MODEL_VARIABLE = "DGEMMA_MODEL"

_HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@(\w(?!.*\.\.)[\w./-]*))?", re.ASCII)
_FORMS = "A model is a folder, a Hub id (owner/name or owner/name@revision), or 'demo'."
_ACCESS = "accept the licence on its page and log in with `hf auth login`."
_CONFIG_FILES = (
    "config.json",
    "conversion_report.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "chat_template*",
    "*.jinja",
)
_FILES = (*_CONFIG_FILES, "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a folder on this machine.

    Attributes:
        folder: The checkpoint folder.
        name: The name by which the caller asked for it.
        is_demo: Whether this is the built-in demo checkpoint.
        has_weights: Whether the folder holds the weights. False if only the small files were downloaded.
    """

    folder: Path
    name: str
    is_demo: bool
    has_weights: bool = True

    @property
    def repo_id(self) -> str | None:
        """The Hub id ``owner/name``; None for a folder and for the demo."""
        found = _HUB_ID.fullmatch(self.name)
        return found[1] if found and self.folder != Path(os.path.expanduser(self.name)) else None


def resolve(name: str | None = None, *, weights: bool = True) -> Checkpoint:
    """Return the checkpoint with a name: ``demo``, a folder, or a Hub id ``owner/name`` or ``owner/name@revision``.

    A name of None stands for the environment variable ``DGEMMA_MODEL`` or, if that is not set, for ``demo``.

    A Hub repository is downloaded once. A complete copy in the Hub's cache is used without any network request. If
    ``weights`` is False, only the small files are downloaded, unless the cache holds a complete copy.

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
        return _fetch(name, hub_id[1], hub_id[2], weights)
    if "/" in name and not name.startswith((".", "/", "~")):
        raise _malformed(name)
    meant = "Did you mean 'demo'? " if get_close_matches(name, [DEMO], cutoff=0.75) else ""
    raise DgemmaError(f"there is no folder {shown(name)}", meant + _FORMS)


def remote_headers(name: str) -> dict[str, Any]:
    """Download the headers of a Hub repository's safetensors files, without the weights, and return them by file name.

    ``name`` must be a valid Hub id. The values are ``huggingface_hub.SafetensorsFileMetadata`` objects, whose
    ``tensors`` gives the dtype, shape and data_offsets of each tensor. Raises ``DgemmaError`` when the download fails.
    """
    from huggingface_hub import get_safetensors_metadata

    found = _HUB_ID.fullmatch(name)
    assert found is not None, "the name must be a Hub id that resolve() accepted"
    try:
        return dict(get_safetensors_metadata(found[1], revision=found[2]).files_metadata)
    except Exception as error:
        raise _explain(found[1], found[2], error) from error


def _fetch(name: str, repo_id: str, revision: str | None, weights: bool) -> Checkpoint:
    """Return a repository's snapshot from the cache if it is complete there, and download it otherwise.

    If ``weights`` is False, the download leaves out the weights. Raises ``DgemmaError`` when the download fails or the
    repository is not a complete checkpoint.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    snapshot = partial(snapshot_download, repo_id, revision=revision, ignore_patterns="*/*")
    try:
        try:
            cached = Path(snapshot(allow_patterns=list(_FILES), local_files_only=True))
            if _is_complete(cached):
                return Checkpoint(cached, name, is_demo=False)
        except LocalEntryNotFoundError:
            pass
        # The small files come first, so that an unsupported model is refused before its 50 GB of weights.
        folder = Path(snapshot(allow_patterns=list(_CONFIG_FILES)))
        ModelConfig.load(folder)
        if not weights:
            return Checkpoint(folder, name, is_demo=False, has_weights=False)
        folder = Path(snapshot(allow_patterns=list(_FILES)))
    except DgemmaError:
        raise
    except Exception as error:  # includes those of the HTTP library, which depends on the version
        raise _explain(repo_id, revision, error) from error
    if not _is_complete(folder):
        raise DgemmaError(
            f"the copy of {repo_id} in {folder} is not complete",
            "Go online and try again. If you are online, the repository lacks its weights or its tokenizer.",
        )
    return Checkpoint(folder, name, is_demo=False)


def _is_complete(folder: Path) -> bool:
    """Return whether a snapshot holds all files that loading needs.

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
    return True


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
    return DgemmaError(
        f"{name} could not be downloaded: {reason(error)}",
        "Check the connection and the free disk space. The next attempt downloads only the missing files.",
    )


def _malformed(name: str) -> DgemmaError:
    """Return the ``DgemmaError`` for a name that is neither a folder nor a Hub id."""
    return DgemmaError(f"{shown(name)} is neither a folder nor a valid Hub id", _FORMS, exit_code=2)
