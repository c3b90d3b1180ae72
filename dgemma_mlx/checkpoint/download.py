"""Download files of a Hub repository into the Hub's cache: several at a time, resumed inside a file, and checked.

The layout of the cache is that of ``huggingface_hub``, so that all programs share it: ``blobs/ETAG`` holds a file's
content and ``snapshots/COMMIT/NAME`` links to it. The library itself keeps nothing of a file whose download ends early.
Here, what has arrived stays in ``blobs/ETAG.incomplete``, and the next attempt goes on from its end.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import write_whole
from dgemma_mlx.sizes import size

if TYPE_CHECKING:
    from hashlib import _Hash

# Called about ten times a second with the number of bytes that are there, and of all bytes.
Progress = Callable[[int, int], None]

WORKERS = 4  # files at a time
_FAILURES = 5  # attempts in a row without a single byte, after which the download fails
_STALE_SECONDS = 3600.0  # a partial file that nobody has written to for this long has no writer
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a Hub repository.

    Attributes:
        name: The name in the repository.
        size: Number of bytes.
        etag: The checksum in hexadecimal digits: SHA-256 (64 digits), or git's SHA-1 of a blob (40) for a small file.
        xet_hash: The name of the content in Xet storage, or None if it is not there.
    """

    name: str
    size: int
    etag: str
    xet_hash: str | None


@dataclass(frozen=True)
class Repository:
    """One commit of a Hub repository, and the folder of the Hub's cache that belongs to the repository.

    Attributes:
        repo_id: The id ``owner/name``.
        commit: The commit, 40 hexadecimal digits.
        folder: The repository's folder in the Hub's cache, which may not exist yet.
        files: The files of the commit that are not in a subfolder.
    """

    repo_id: str
    commit: str
    folder: Path
    files: tuple[RemoteFile, ...]

    @property
    def snapshot(self) -> Path:
        """The folder of the commit's files."""
        return self.folder / "snapshots" / self.commit

    def missing(self, patterns: Iterable[str]) -> list[RemoteFile]:
        """Return the files that match any of the patterns and are not whole in the cache."""
        wanted = list(patterns)
        files = [file for file in self.files if any(fnmatch(file.name, pattern) for pattern in wanted)]
        return [file for file in files if _size_of(self.snapshot / file.name) != file.size]

    def part(self, file: RemoteFile) -> Path:
        """Return the path of what has arrived of a file."""
        return self.folder / "blobs" / f"{file.etag}.incomplete"

    def bytes_left(self, files: Iterable[RemoteFile]) -> int:
        """Return the number of bytes of files that have not arrived."""
        return sum(max(0, file.size - max(0, _size_of(self.part(file)))) for file in files)


def cache_folder(repo_id: str) -> Path:
    """Return the folder of a repository in the Hub's cache, which may not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"


def list_files(repo_id: str, revision: str | None) -> Repository:
    """Ask the Hub for the files of a revision; None is the main branch. Raises the errors of ``huggingface_hub``."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = api.model_info(repo_id, revision=revision).sha
    assert commit is not None, "the Hub names the commit of every revision"
    entries = [entry for entry in api.list_repo_tree(repo_id, revision=commit) if isinstance(entry, RepoFile)]
    files = tuple(
        RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.xet_hash)
        for entry in entries if "/" not in entry.path
    )  # fmt: skip
    for file in files:
        if not _ETAG.fullmatch(file.etag):
            raise DgemmaError(f"the Hub names a strange checksum of {shown(file.name)}", "Check HF_ENDPOINT.")
    return Repository(repo_id, commit, cache_folder(repo_id), files)


def free_space(folder: Path) -> int:
    """Return the free bytes on the disk of a folder that may not exist yet."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def download(
    repository: Repository, files: Sequence[RemoteFile], revision: str | None, progress: Progress | None = None
) -> None:
    """Download files of a commit, and note that ``revision`` is this commit.

    A killed or failed download is continued. Each file is whole and its checksum right before it gets its name. Partial
    files that nothing will continue are removed first. ``progress`` is called by the calling thread alone.

    Raises ``DgemmaError`` before a byte is downloaded if the disk has too little space, or if a file arrives damaged
    twice. Other errors are those of ``huggingface_hub``, of its HTTP library, and ``OSError``.
    """
    blobs = repository.folder / "blobs"
    _remove_stale(blobs, {repository.part(file) for file in files})
    _check_space(repository, files)
    blobs.mkdir(parents=True, exist_ok=True)
    repository.snapshot.mkdir(parents=True, exist_ok=True)
    storage = _open_xet(repository) if any(file.xet_hash for file in files) else None
    transfers = [_Transfer(repository, file, storage) for file in sorted(files, key=lambda file: -file.size)]
    _run(transfers, progress)
    for file in sorted(files, key=lambda file: file.size):  # a copy that has its weights has everything
        link = repository.snapshot / file.name
        link.unlink(missing_ok=True)
        with suppress(FileExistsError):  # another process was faster
            link.symlink_to(Path("../../blobs") / file.etag)
    if revision != repository.commit:
        write_whole(repository.folder / "refs" / (revision or "main"), repository.commit)


def _run(transfers: list[_Transfer], progress: Progress | None) -> None:
    """Run transfers in threads until all have ended or one has failed, and raise its error."""
    total = sum(transfer.file.size for transfer in transfers)
    waiting, errors, stop = deque(transfers), list[Exception](), threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                waiting.popleft().run(stop)
        except IndexError:
            return  # nothing is waiting
        except Exception as error:
            errors.append(error)
            stop.set()

    # Daemons, because a signal must not wait for a connection that is silent.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(WORKERS, len(transfers)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                if progress is not None:
                    progress(sum(transfer.arrived for transfer in transfers), total)
    finally:
        stop.set()
    if errors:
        raise errors[0]


class _Transfer:
    """The download of one file.

    Attributes:
        file: The file.
        arrived: Number of its bytes that are on the disk.
    """

    def __init__(self, repository: Repository, file: RemoteFile, storage: Any) -> None:
        self.file = file
        self._repository = repository
        self._blob = repository.folder / "blobs" / file.etag
        self._part = repository.part(file)
        self._storage = storage if file.xet_hash else None
        self.arrived = max(0, _size_of(self._part))

    def run(self, stop: threading.Event) -> None:
        """Download what is missing of the file, check it, and give it its name, unless ``stop`` is set before."""
        with _locked(self._part) as part:
            if _size_of(self._blob) == self.file.size:  # another process has completed it
                self._part.unlink(missing_ok=True)
                self.arrived = self.file.size
                return
            for _ in range(2):
                digest = self._receive(part, stop)
                if stop.is_set():
                    return
                if self.arrived == self.file.size and digest == self.file.etag:
                    os.fsync(part.fileno())
                    self._part.replace(self._blob)
                    return
                self._restart(part)
        raise DgemmaError(
            f"{self.file.name} of {self._repository.repo_id} arrived damaged twice: its checksum is wrong",
            "Try again later, or over another connection.",
        )

    def _restart(self, part: BinaryIO) -> None:
        part.truncate(0)
        self.arrived = 0

    def _receive(self, part: BinaryIO, stop: threading.Event) -> str:
        """Append the rest of the file to ``part``, over as many connections as it takes, and return the checksum."""
        checksum, failures = self._checksum(part), 0
        while self.arrived < self.file.size and not stop.is_set():
            before = self.arrived
            try:
                for piece in self._pieces(part):
                    if self.arrived == 0:
                        checksum = _new_checksum(self.file)
                    part.write(piece)
                    checksum.update(piece)
                    self.arrived += len(piece)
                    if stop.is_set() or self.arrived > self.file.size:
                        return ""
            except Exception as error:  # includes those of the HTTP library, which depends on the version
                if self._storage is None and _is_final(error):
                    raise
                failures = 0 if self.arrived > before else failures + 1
                if failures == _FAILURES:
                    raise
                self._storage = None  # plain HTTP works everywhere
                stop.wait(min(8.0, 0.5 * 2**failures))
        return checksum.hexdigest()

    def _checksum(self, part: BinaryIO) -> _Hash:
        """Return the checksum of what has arrived before."""
        checksum = _new_checksum(self.file)
        part.seek(0)
        while block := part.read(1 << 20):
            checksum.update(block)
        self.arrived = part.tell()
        return checksum

    def _pieces(self, part: BinaryIO) -> Iterator[bytes]:
        """Yield the bytes of the file from the end of ``part`` on. A server that knows no ranges starts it again."""
        if self._storage is not None:
            from hf_xet import XetFileInfo  # type: ignore[import-untyped]

            yield from self._storage.download_stream(
                XetFileInfo(self.file.xet_hash, self.file.size), start=self.arrived
            )  # fmt: skip
            return
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={self.arrived}-"}
        url = hf_hub_url(self._repository.repo_id, self.file.name, revision=self._repository.commit)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                self._restart(part)
            yield from response.iter_raw()


def _open_xet(repository: Repository) -> Any:
    """Return the Xet storage of a repository's files, or None if it cannot be used here.

    It is an ``XetDownloadStreamGroup`` of hf_xet. The part of that library which ``huggingface_hub`` itself uses writes
    whole files only, from their beginning.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if constants.HF_HUB_DISABLE_XET:
        return None
    headers = build_hf_headers()
    try:
        from hf_xet import XetSession

        return XetSession().new_download_stream_group(
            token_refresh_url=f"{constants.ENDPOINT}/api/models/{repository.repo_id}/xet-read-token/{repository.commit}",
            token_refresh_headers=headers,
            custom_headers={name: value for name, value in headers.items() if name.lower() != "authorization"},
        )
    except Exception:  # not installed, too old, or no connection; plain HTTP works everywhere
        return None


def _is_final(error: Exception) -> bool:
    """Return whether another attempt is of no use: the Hub refuses the file, or the disk fails."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, OSError)


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Open a partial file to append to, after waiting for the process that is writing it.

    On a disk without locks nothing is waited for. The checksum then finds what two writers do to a file.
    """
    while True:
        with part.open("a+b", buffering=0) as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            # The other process may have completed the file, or given up on it.
            if os.path.exists(part) and os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                yield file
                return


def _new_checksum(file: RemoteFile) -> _Hash:
    """Return the beginning of a file's checksum."""
    return hashlib.sha256() if len(file.etag) == 64 else hashlib.sha1(b"blob %d\0" % file.size)


def _size_of(path: Path) -> int:
    """Return the size of a file, or -1 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _remove_stale(blobs: Path, kept: set[Path]) -> None:
    """Remove the partial files that nothing will continue: those of earlier commits, and of the Hub's library."""
    for path in blobs.glob("*.incomplete"):
        with suppress(OSError):  # gone, or somebody else's
            if path not in kept and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def _check_space(repository: Repository, files: Sequence[RemoteFile]) -> None:
    """Raise ``DgemmaError`` if the disk has no space for the files."""
    needed, free = repository.bytes_left(files), free_space(repository.folder)
    if needed > free:
        raise DgemmaError(
            f"{size(needed)} are to be downloaded to {repository.folder.parent}, but only {size(free)} are free there",
            "Free some space, or name a folder on another disk in HF_HOME.",
        )
