"""Files that are written whole, and what is no regular file, which is written to and never replaced."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dgemma_mlx.files import check_writable, whole_file, write_whole

# Prints, writes a file whose path is given, and prints again.
PRINTS = """
import sys
from pathlib import Path
from dgemma_mlx.files import check_writable, write_whole
print("before")
check_writable(Path(sys.argv[1]))
write_whole(Path(sys.argv[1]), "written\\n" * 2)
print("after")
"""


def test_after_an_exception_the_file_is_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")

    def fail_halfway() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_fifo_is_written_to(tmp_path: Path) -> None:
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to(fifo)
    check_writable(fifo)
    for path in (fifo, tmp_path / "link"):
        reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
        reader.start()
        write_whole(path, "two\nlines\n")
        reader.join(10)
        assert got.pop() == b"two\nlines\n" and stat.S_ISFIFO(fifo.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link"]


def test_a_device_is_written_to() -> None:
    write_whole(Path("/dev/null"), "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1", "file", "link"])
@pytest.mark.parametrize("piped", [True, False])
def test_the_own_output_keeps_its_order(tmp_path: Path, place: str, piped: bool) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    (tmp_path / "file").touch()
    path = place if place.startswith("/") else str(tmp_path / place)
    if piped and place == "file":
        pytest.skip("a pipe has no name")
    with (tmp_path / "file").open("r+b") as file:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS, path], stdout=subprocess.PIPE if piped else file, check=True, timeout=60
        )
    printed = done.stdout if piped else (tmp_path / "file").read_bytes()
    assert printed == b"before\nwritten\nwritten\nafter\n"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
