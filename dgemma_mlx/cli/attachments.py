"""Text files that are sent with a prompt: reading files and folders, and how they stand in the prompt."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgemma_mlx.checks import reason
from dgemma_mlx.cli.images import media_type
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import counted, size

MOST_BYTES = 4 * 10**6  # of all files together; the model's 256K positions hold about 1 MB of English
MOST_FILES = 500  # of a folder
_BOM = b"\xef\xbb\xbf"
_HINT = "Name text files that can be read, or a folder of them."


@dataclass(frozen=True)
class Attachment:
    """A text file that is sent with a prompt.

    Attributes:
        name: The path as it was given, or the given folder and the path within it.
        text: The text, without a byte order mark and otherwise unchanged.
    """

    name: str
    text: str

    def __str__(self) -> str:
        """Return the file as it stands in a prompt: its name, and its text between fences that are in no line of it."""
        name = self.name if self.name.isprintable() else repr(self.name)[1:-1]  # a line feed would end the line
        longest = max(map(len, re.findall("`+", self.text)), default=0)
        fence = "`" * max(3, longest + 1)
        end = "\n" if self.text and not self.text.endswith("\n") else ""
        return f"{name}:\n{fence}\n{self.text}{end}{fence}"


def with_attachments(prompt: str, attachments: Sequence[Attachment]) -> str:
    """Return the prompt after the files, each with its name and between fences.

    The files come first, so that another prompt about them begins with the same text, which a prompt cache then holds.
    No file can break out of its fences: they are longer than every row of backticks in it.
    """
    return "\n\n".join([*map(str, attachments), *([prompt] if prompt else [])])


def _say(message: str) -> None:
    print(f"dgemma-mlx: {visible(message)}", file=sys.stderr)


def read_attachments(paths: Iterable[Path], say: Callable[[str], None] = _say) -> list[Attachment]:
    """Read text files, and all text files in folders, in the order of the paths; a folder's are sorted by name.

    Of a folder, hidden files and folders, binary files and what Git ignores are left out. ``say`` gets a line that
    counts them, for each folder; by default the line goes to stderr. A pipe, such as a shell's ``<(command)``, is read
    to its end.

    Raises `DgemmaError` (exit code 2) for what is missing, unreadable, binary or not UTF-8; for a folder without text
    files or with more than ``MOST_FILES``; and for files of more than ``MOST_BYTES`` together.
    """
    attachments: list[Attachment] = []
    room = MOST_BYTES
    for path in paths:
        for name, data in _folder(path, room, say) if path.is_dir() else [(path, _read(path, room))]:
            room -= len(data)
            attachments.append(Attachment(str(name), _text(name, data)))
    return attachments


def _read(path: Path, room: int) -> bytes:
    """Return the bytes of a file, which are at most ``room``."""
    try:
        with path.open("rb") as file:
            data = file.read(room + 1)
    except OSError as error:
        hint = "Text on standard input needs no option." if str(path) == "-" else _HINT
        raise DgemmaError(f"cannot read {path}: {reason(error)}", hint, exit_code=2) from None
    if len(data) > room and not _is_binary(data):
        hint = "Name fewer or smaller files; the model reads about 1 MB of English at most."
        raise DgemmaError(f"with {path}, the files have more than {size(MOST_BYTES)}", hint, exit_code=2)
    return data


def _is_binary(data: bytes) -> bool:
    """Return whether bytes are no text: a zero byte in the first 8 KiB, as Git tells."""
    return b"\0" in data[:8192]


def _text(path: Path, data: bytes) -> str:
    """Return the text of a file without its byte order mark."""
    message, hint = f"{path} is a binary file", "Only text files can be sent."
    if not _is_binary(data):
        try:
            return data.removeprefix(_BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            message, hint = f"{path} is not UTF-8 text (byte {error.start})", "Convert it to UTF-8."
    if media_type(data) is not None:
        message = f"{path} is a picture, not a text file"
        hint = "Show it to the model with `--image FILE`, or with `/image FILE` in a chat."
    raise DgemmaError(message, hint, exit_code=2)


def _folder(folder: Path, room: int, say: Callable[[str], None]) -> list[tuple[Path, bytes]]:
    """Return the paths and the bytes of a folder's text files, and say how many there are and what is left out."""
    found: list[tuple[Path, bytes]] = []
    left_out: Counter[str] = Counter()
    try:
        for path in _listed(folder, left_out):
            data = _read(path, room)
            try:
                _text(path, data)
            except DgemmaError:
                left_out["binary or not UTF-8"] += 1
                continue
            room -= len(data)
            found.append((path, data))
            if len(found) > MOST_FILES:
                raise DgemmaError(f"{folder} has more than {MOST_FILES} text files", "Name a smaller folder.", 2)
    except OSError as error:
        raise DgemmaError(f"cannot read {error.filename or folder}: {reason(error)}", _HINT, exit_code=2) from None
    without = ", ".join(f"{count:,} {kind}" for kind, count in (+left_out).items())
    if not found:
        raise DgemmaError(f"{folder} has no text file{without and f' (left out: {without})'}", _HINT, exit_code=2)
    say(f"{folder}: {counted(len(found), 'file')}, {size(sum(len(data) for _, data in found))}"
        f"{without and f'; left out: {without}'}")  # fmt: skip
    return found


def _listed(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Yield a folder's files that are not hidden and not ignored by Git, and count the others in ``left_out``.

    Links to files are followed, links to folders are not.
    """
    if any((parent / ".git").exists() for parent in (folder.resolve(), *folder.resolve().parents)):
        names = sorted(set(_git(folder, "--cached", "--others")))
        left_out["ignored by Git"] = len(_git(folder, "--others", "--ignored", "--directory"))
    else:
        names = sorted(_walked(folder))
    for name in names:
        if not any(part.startswith(".") for part in Path(name).parts):
            try:
                mode = (folder / name).stat().st_mode
            except FileNotFoundError:
                continue  # deleted, and Git does not know it yet; or a link to nothing
            if stat.S_ISREG(mode):
                yield folder / name
            else:
                left_out["not files"] += 1  # a repository within this one, for example
        elif not name.startswith(".git/"):
            left_out["hidden"] += 1


def _walked(folder: Path) -> Iterator[str]:
    """Yield the paths within a folder of its files, and of its hidden folders, which are not entered."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in (*files, *hidden))


def _git(folder: Path, *options: str) -> list[str]:
    """Return the paths within a folder that ``git ls-files`` lists, with Git's own rules of what is ignored."""
    import subprocess  # needed only here, and not by most commands

    unhooked = ("-c", "core.fsmonitor=false")  # a repository's own configuration may name a program there
    command = ["git", *unhooked, "-C", str(folder), "ls-files", "-z", "--exclude-standard", *options]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as error:
        raise DgemmaError(f"cannot run git in {folder}: {reason(error)}", "Name the files one by one.") from None
    if done.returncode:
        message = reason(ValueError(done.stderr.decode(errors="replace")))
        raise DgemmaError(f"git cannot list {folder}: {message}", "Name the files one by one.")
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
