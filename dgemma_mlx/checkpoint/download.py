"""Download files of a Hub repository into the Hub's cache: several at a time, resumed inside a file, and checked.

The cache is that of ``huggingface_hub``: ``blobs/ETAG`` holds a file's content, and ``snapshots/COMMIT/NAME`` links to
it. What has arrived of a file stays in ``blobs/ETAG.incomplete``, and the next attempt goes on from its end.
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
from typing import TYPE_CHECKING, BinaryIO

from dgemma_mlx.checkpoint.vision_config import VISION_FILE
from dgemma_mlx.checkpoint.xet import XetStorage
from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import locked_path
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
        return [file for file in files if size_of(self.snapshot / file.name) != file.size]

    def blob(self, file: RemoteFile) -> Path:
        """Return the path of a file's content."""
        return self.folder / "blobs" / file.etag

    def part(self, file: RemoteFile) -> Path:
        """Return the path of what has arrived of a file's content."""
        return self.folder / "blobs" / f"{file.etag}.incomplete"

    def arrived(self, file: RemoteFile) -> int:
        """Return how many bytes of a file's content are there, perhaps for another commit."""
        if size_of(self.blob(file)) == file.size:
            return file.size
        there = size_of(self.part(file))
        return there if 0 <= there <= file.size else 0  # a part that is too long is downloaded again

    def bytes_left(self, files: Iterable[RemoteFile]) -> int:
        """Return the number of bytes of files that have not arrived."""
        return sum(file.size - self.arrived(file) for file in files)


def hub_cache() -> Path:
    """Return the folder of the Hub's cache, which may not exist."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def list_files(repo_id: str, revision: str | None) -> Repository:
    """Ask the Hub for the files of a revision; None is the main branch. Raises the errors of ``huggingface_hub``."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = api.model_info(repo_id, revision=revision).sha
    assert commit is not None, "the Hub names the commit of every revision"
    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    files = tuple(
        RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.xet_hash)
        for entry in entries if isinstance(entry, RepoFile) and ("/" not in entry.path or entry.path == VISION_FILE)
    )  # fmt: skip
    for file in files:
        if not _ETAG.fullmatch(file.etag):
            raise DgemmaError(f"the Hub names a strange checksum of {shown(file.name)}", "Check HF_ENDPOINT.")
    return Repository(repo_id, commit, hub_cache() / f"models--{repo_id.replace('/', '--')}", files)


def free_space(folder: Path) -> int:
    """Return the free bytes on the disk of a folder that may not exist yet."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def check_space(repository: Repository, files: Sequence[RemoteFile]) -> None:
    """Raise ``DgemmaError`` if the disk has no space for the files."""
    needed, free = repository.bytes_left(files), free_space(repository.folder)
    if needed > free:
        raise DgemmaError(
            f"{size(needed)} are to be downloaded to {repository.folder.parent}, but only {size(free)} are free there",
            "Free some space, or name a folder on another disk in HF_HOME.",
        )


def download(repository: Repository, files: Sequence[RemoteFile], progress: Progress | None = None) -> None:
    """Download files of a commit, each of which gets its name when it is whole and its checksum right, and keeps it.

    A killed or failed download is continued. ``progress`` is called by the calling thread alone.

    Raises ``DgemmaError`` before a byte is downloaded if the disk has too little space, or if a file arrives damaged
    twice. Other errors are those of ``huggingface_hub``, of its HTTP library, and ``OSError``.
    """
    blobs = repository.folder / "blobs"
    check_space(repository, files)
    blobs.mkdir(parents=True, exist_ok=True)
    storage = XetStorage(repository.repo_id, repository.commit)
    transfers = [_Transfer(repository, file, storage) for file in sorted(files, key=lambda file: -file.size)]
    _run(transfers, progress)
    with locked_path(blobs):  # or one process may remove the name that another has given, having found a wrong one
        for file in sorted(files, key=lambda file: file.size):  # a copy that has its weights has everything
            _name(repository, file)


def _name(repository: Repository, file: RemoteFile) -> None:
    """Give a blob its name in the snapshot, unless another process was faster, which may be reading the file."""
    name, blob = repository.snapshot / file.name, repository.blob(file)
    if size_of(name) == file.size:
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(name):
        name.unlink()
    try:
        name.symlink_to(os.path.relpath(blob, name.parent))
    except FileExistsError:
        pass  # the Hub's library was faster
    except OSError:  # the disk has no symbolic links
        if sum(other.etag == file.etag for other in repository.files) > 1:
            shutil.copyfile(blob, name)  # of an empty JSON object, for example
        else:
            blob.replace(name)


def _run(transfers: list[_Transfer], progress: Progress | None) -> None:
    """Run transfers in threads until all have ended or one has failed, and raise its error."""
    total = sum(transfer.file.size for transfer in transfers)
    waiting, errors, stop = deque(transfers), list[Exception](), threading.Event()

    def report() -> None:
        if progress is not None:
            progress(sum(transfer.arrived for transfer in transfers), total)

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
    report()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                report()
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

    def __init__(self, repository: Repository, file: RemoteFile, storage: XetStorage) -> None:
        self.file = file
        self._repository = repository
        self._blob = repository.blob(file)
        self._part = repository.part(file)
        self._storage = storage if file.xet_hash and storage.is_allowed() else None
        self.arrived = repository.arrived(file)

    def run(self, stop: threading.Event) -> None:
        """Download what is missing of the file, and check it, unless ``stop`` is set before."""
        with _locked(self._part) as part:
            try:
                self._complete(part, stop)
            finally:
                if size_of(self._part) == 0:  # there is nothing to continue
                    self._part.unlink(missing_ok=True)

    def _complete(self, part: BinaryIO, stop: threading.Event) -> None:
        if size_of(self._blob) == self.file.size:  # another commit has it, or another process was faster
            self._part.unlink(missing_ok=True)
            self.arrived = self.file.size
            return
        if size_of(self._part) > self.file.size:
            self._restart(part)
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
            yield from self._storage.pieces(self.file.xet_hash, self.file.size, self.arrived)
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
            try:
                is_at_path = os.path.samestat(os.fstat(file.fileno()), os.stat(part))
            except FileNotFoundError:
                is_at_path = False  # the other process has completed the file, or given up on it
            if is_at_path:
                yield file
                return


def _new_checksum(file: RemoteFile) -> _Hash:
    """Return the beginning of a file's checksum."""
    return hashlib.sha256() if len(file.etag) == 64 else hashlib.sha1(b"blob %d\0" % file.size)


def size_of(path: Path) -> int:
    """Return the size of a file, or -1 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def remove_stale(repository: Repository) -> None:
    """Remove the partial files that nothing will continue: those of earlier commits, and of the Hub's library."""
    kept = {repository.part(file) for file in repository.files}
    for path in (repository.folder / "blobs").glob("*.incomplete"):
        with suppress(OSError):  # gone, or somebody else's
            if path not in kept and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
