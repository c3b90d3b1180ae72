"""Downloads into the Hub's cache: killed, broken, damaged, throttled, and from Xet storage.

Everything comes from a Hub server on the loopback interface.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path

import pytest

from dgemma_mlx.checkpoint import download
from dgemma_mlx.checkpoint.download import RemoteFile
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER, is_complete
from dgemma_mlx.checkpoint.vision_config import VISION_FILE
from tests.hub_server import Files, HubServer, Repository
from tests.waiting import wait_until

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SIZE = 1_500_000  # bytes of each shard
BLOBS = Path("hub/models--owner--name/blobs")

RESOLVE = """
import sys
from dgemma_mlx.checkpoint.hub import resolve
from dgemma_mlx import DgemmaError
try: print(resolve(sys.argv[1], weights="--small" not in sys.argv, refresh=True).folder)
except DgemmaError as error: sys.exit(f"{error.message}; {error.hint}")
"""
STORE = """
import sys, hf_xet
with hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[1]) as commit:
    upload = commit.start_upload_bytes(sys.stdin.buffer.read())
print(upload.result().xet_info.hash)
"""


def random_files() -> Files:
    """Return the files of a repository whose weights are random bytes."""
    index = {"weight_map": {f"tensor.{i}": name for i, name in enumerate(SHARDS)}}
    numbers = random.Random(1)
    return {
        "config.json": (DEMO_FOLDER / "config.json").read_bytes(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "tokenizer.json": b"{}",
        **{name: numbers.randbytes(SIZE) for name in SHARDS},
    }


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer({"owner/name": Repository({"main": random_files()})}) as server:
        yield server


def start(
    hub: HubServer, home: Path, *arguments: str, code: str = RESOLVE, **environment: str
) -> subprocess.Popen[str]:
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "DGEMMA_"))}
    return subprocess.Popen(
        [sys.executable, "-c", code, "owner/name", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**kept, "HF_HOME": str(home), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1",
             "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
    )  # fmt: skip


def check_whole(hub: HubServer, home: Path, **environment: str) -> None:
    """Download the rest, and check that all files are right and nothing else is left."""
    with start(hub, home, **environment) as process:
        printed, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    files = hub.repositories["owner/name"].files("main")
    assert {path.name: path.read_bytes() for path in Path(printed.strip()).iterdir()} == files
    assert not list((home / BLOBS).glob("*.incomplete"))


def fails(hub: HubServer, home: Path, *arguments: str) -> str:
    """Download, and return the error."""
    with start(hub, home, *arguments) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    return error.strip()


def kill_after(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    with process:
        wait_until(reached)
        process.send_signal(signal.SIGKILL)
        process.communicate()


def on_disk(home: Path, data: bytes) -> int:
    """Return how much of a large file with this content is in the cache."""
    blob = home / BLOBS / sha256(data).hexdigest()
    return max(download.size_of(blob), download.size_of(blob.with_name(f"{blob.name}.incomplete")), 0)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_no_byte_is_downloaded_twice_after_kills_at_random_moments(hub: HubServer, tmp_path: Path, kills: int) -> None:
    """Each download asks for what is not on the disk yet. What is under way when the process is killed is lost."""
    hub.rate = 2_000_000
    there = dict.fromkeys(SHARDS, 0)
    for moment in (*sorted(random.sample(range(2 * SIZE), kills)), None):
        before = len(hub.downloads)
        if moment is None:
            hub.rate = None
            check_whole(hub, tmp_path)
        else:
            kill_after(start(hub, tmp_path), lambda moment=moment: hub.sent.total() > moment)  # type: ignore[misc]
        asked = [(name, begin) for name, begin in hub.downloads[before:] if name in SHARDS]
        assert set(asked) <= {(name, f"bytes={size}-") for name, size in there.items()}
        there = {name: on_disk(tmp_path, random_files()[name]) for name in SHARDS}
    assert there == dict.fromkeys(SHARDS, SIZE)


def test_the_vision_towers_own_file_is_downloaded_and_no_other_in_a_folder(hub: HubServer, tmp_path: Path) -> None:
    tower = random.Random(2).randbytes(1000)
    hub.repositories["owner/name"].revisions["main"] |= {VISION_FILE: tower, "original/model.safetensors": b"other"}
    with start(hub, tmp_path) as process:
        printed, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    snapshot = Path(printed.strip())
    assert (snapshot / VISION_FILE).read_bytes() == tower
    assert not (snapshot / "original").exists()
    (snapshot / VISION_FILE).unlink()
    assert not is_complete(snapshot)


def test_a_part_that_is_damaged_is_downloaded_again(hub: HubServer, tmp_path: Path) -> None:
    hub.rate = 1_000_000
    kill_after(start(hub, tmp_path), lambda: hub.sent.total() > SIZE)
    hub.rate = None
    part = max((tmp_path / BLOBS).glob("*.incomplete"), key=lambda path: path.stat().st_size)
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    check_whole(hub, tmp_path)


def test_a_part_that_is_too_long_counts_as_nothing(tmp_path: Path) -> None:
    """Nor does one count more than the whole file in the sum over all files."""
    file = RemoteFile("model.safetensors", 100, "0" * 64, None)
    repository = download.Repository("owner/name", "1" * 40, tmp_path, (file,))
    (tmp_path / "blobs").mkdir()
    for there, counted in ((40, 40), (100, 100), (101, 0)):
        repository.part(file).write_bytes(bytes(there))
        assert (repository.arrived(file), repository.bytes_left([file])) == (counted, 100 - counted)


@pytest.mark.slow
def test_a_part_that_is_too_long_is_downloaded_again(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / BLOBS).mkdir(parents=True)
    for name in ("0" * 64, "1" * 40):
        (tmp_path / BLOBS / f"{name}.incomplete").write_bytes(b"of another commit")
        os.utime(tmp_path / BLOBS / f"{name}.incomplete", (0, 0))
    (etag,) = {path.name for path in whole_blobs(hub, tmp_path / "other") if path.stat().st_size == SIZE and
               path.read_bytes() == random_files()[SHARDS[0]]}  # fmt: skip
    (tmp_path / BLOBS / f"{etag}.incomplete").write_bytes(b"0" * (SIZE + 1))
    hub.repositories["owner/name"].damaged[SHARDS[0]] = 1  # both attempts are left
    check_whole(hub, tmp_path)


def whole_blobs(hub: HubServer, home: Path) -> list[Path]:
    check_whole(hub, home)
    return list((home / BLOBS).iterdir())


@pytest.mark.slow
def test_a_file_that_arrives_damaged_is_downloaded_again(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["owner/name"].damaged[SHARDS[0]] = 1
    check_whole(hub, tmp_path)
    assert hub.sent[SHARDS[0]] == 2 * SIZE


@pytest.mark.slow
def test_a_file_that_is_always_damaged_is_an_error(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["owner/name"].damaged[SHARDS[0]] = 99
    assert f"{SHARDS[0]} of owner/name arrived damaged twice" in fails(hub, tmp_path)
    assert not any(path.read_bytes()[:1] != random_files()[SHARDS[0]][:1] and path.stat().st_size == SIZE and
                   path.read_bytes()[1:] == random_files()[SHARDS[0]][1:]
                   for path in (tmp_path / BLOBS).iterdir())  # fmt: skip


def test_broken_connections_and_busy_servers_are_tried_again(hub: HubServer, tmp_path: Path) -> None:
    troubles = hub.repositories["owner/name"].troubles
    troubles[SHARDS[0]] = [500_000, HTTPStatus.SERVICE_UNAVAILABLE, 300_000]
    check_whole(hub, tmp_path)
    ranges = [part for name, part in hub.downloads if name == SHARDS[0]]
    assert ranges == ["bytes=0-", "bytes=500000-", "bytes=500000-", "bytes=800000-"]


@pytest.mark.slow
def test_a_server_that_knows_no_ranges(hub: HubServer, tmp_path: Path) -> None:
    hub.knows_ranges = False
    hub.repositories["owner/name"].troubles[SHARDS[0]] = [500_000]
    check_whole(hub, tmp_path)
    assert hub.sent[SHARDS[0]] == 500_000 + SIZE


@pytest.mark.slow
def test_a_full_disk_is_foreseen(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["owner/name"].claimed[SHARDS[0]] = 10**16
    error = fails(hub, tmp_path)
    assert error.startswith("10000.0 TB are to be downloaded to ") and "are free there; Free some space" in error
    assert not [name for name, _ in hub.downloads if name in SHARDS]


@pytest.mark.slow
def test_a_file_that_is_refused_is_not_tried_again(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["owner/name"].troubles[SHARDS[1]] = [HTTPStatus.NOT_FOUND] * 9
    assert fails(hub, tmp_path).startswith("owner/name could not be downloaded")
    assert [name for name, _ in hub.downloads].count(SHARDS[1]) == 1


@pytest.mark.slow
def test_partial_files_without_a_writer_are_removed(hub: HubServer, tmp_path: Path) -> None:
    blobs = tmp_path / BLOBS
    blobs.mkdir(parents=True)
    old, new = blobs / f"{'0' * 64}.89abcdef.incomplete", blobs / f"{'1' * 64}.89abcdef.incomplete"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    for arguments, removed in ((["--small"], False), ([], True)):  # a request for a few kB must not cost anybody 50 GB
        with start(hub, tmp_path, *arguments) as process:
            process.communicate(timeout=60)
        assert process.returncode == 0
        assert (old.exists(), new.exists()) == (not removed, True)  # another program may be writing the new one


def test_a_copy_without_its_list_of_files_is_not_taken_for_whole(hub: HubServer, tmp_path: Path) -> None:
    """The library asks for the list as well, and ignores the Hub's refusal where a part of the copy is there."""
    hub.repositories["owner/name"].on_lists = [200, 403]
    assert fails(hub, tmp_path) == (
        "owner/name could not be downloaded: the Hub did not list its files; "
        "Check the connection. The next attempt downloads only what is missing."
    )
    check_whole(hub, tmp_path)


def test_a_refused_file_leaves_no_empty_part(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["owner/name"].on_file = (403, "GatedRepo")
    assert "gated" in fails(hub, tmp_path, "--small")
    assert list((tmp_path / BLOBS).iterdir()) == []


def test_a_disk_without_symbolic_links(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["owner/name"].revisions["main"].update(
        {"generation_config.json": b"{}", "processor_config.json": b"{}"}  # as tokenizer.json: one content, three names
    )
    refused = "import os\ndef refuse(*_, **__): raise PermissionError(1, 'no links here')\nos.symlink = refuse\n"
    for _ in range(2):
        with start(hub, tmp_path, code=refused + RESOLVE) as process:
            printed, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        found = {path.name: path.read_bytes() for path in Path(printed.strip()).iterdir() if not path.is_symlink()}
        assert found == hub.repositories["owner/name"].files("main")
    assert hub.sent[SHARDS[0]] == SIZE


def test_threads_of_a_process_may_download_the_same(hub: HubServer, tmp_path: Path) -> None:
    threads = """
import sys
from concurrent.futures import ThreadPoolExecutor
from dgemma_mlx.checkpoint.hub import resolve
with ThreadPoolExecutor(4) as pool:
    print(*{found.folder for found in pool.map(lambda _: resolve(sys.argv[1]), range(4))})
"""
    with start(hub, tmp_path, code=threads) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    check_whole(hub, tmp_path)


def test_a_copy_that_is_still_the_newest_is_not_written_to(hub: HubServer, tmp_path: Path) -> None:
    check_whole(hub, tmp_path)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    check_whole(hub, tmp_path)
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_copy_that_another_program_removes_is_said(hub: HubServer, tmp_path: Path) -> None:
    hub.rate = 2_000_000
    with start(hub, tmp_path) as process:
        wait_until(lambda: hub.sent.total() > SIZE)
        shutil.rmtree((tmp_path / BLOBS).parent)
        hub.rate = None
        _, error = process.communicate(timeout=60)
    assert error.startswith("another program removed owner/name from the Hub's cache during the download")


@pytest.mark.slow
def test_two_downloads_at_once_share_the_work(hub: HubServer, tmp_path: Path) -> None:
    hub.rate = 2_000_000
    with start(hub, tmp_path) as one, start(hub, tmp_path) as other:
        assert [process.communicate(timeout=60)[1] for process in (one, other)] == ["", ""]
    assert hub.sent[SHARDS[0]] == hub.sent[SHARDS[1]] == SIZE
    check_whole(hub, tmp_path)


def test_xet_storage_is_resumed_inside_a_file(hub: HubServer, tmp_path: Path) -> None:
    """The library's own storage in a folder, which takes the place of the server."""
    pytest.importorskip("hf_xet")
    (tmp_path / "storage").mkdir()
    hub.xet_endpoint = f"local://{tmp_path}/storage"
    for name in SHARDS:  # in a process of its own, because the storage is open in one process at a time
        stored = subprocess.run(
            [sys.executable, "-c", STORE, hub.xet_endpoint], input=random_files()[name], stdout=subprocess.PIPE,
            timeout=60, check=True,
        )  # fmt: skip
        hub.repositories["owner/name"].xet[name] = stored.stdout.decode().strip()
    check_whole(hub, tmp_path / "whole")
    for blob in (tmp_path / "whole" / BLOBS).iterdir():
        if blob.stat().st_size == SIZE:
            (tmp_path / "half" / BLOBS).mkdir(parents=True, exist_ok=True)
            (tmp_path / "half" / BLOBS / f"{blob.name}.incomplete").write_bytes(blob.read_bytes()[: SIZE // 2])
    check_whole(hub, tmp_path / "half")
    assert not [name for name, _ in hub.downloads if name in SHARDS]


@pytest.mark.slow
def test_xet_storage_can_be_switched_off(hub: HubServer, tmp_path: Path) -> None:
    hub.repositories["owner/name"].xet[SHARDS[0]] = "0" * 64
    check_whole(hub, tmp_path, HF_HUB_DISABLE_XET="1")
    assert not [path for path in hub.requests if "xet-read-token" in path]


@pytest.mark.slow
def test_plain_http_takes_over_where_xet_storage_fails(hub: HubServer, tmp_path: Path) -> None:
    hub.xet_endpoint = "http://127.0.0.1:9"  # nobody listens there
    hub.repositories["owner/name"].xet[SHARDS[0]] = "0" * 64
    check_whole(hub, tmp_path, HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1")
    assert hub.sent[SHARDS[0]] == SIZE
