"""Images of a chat: the commands /image and /video, and files that are dragged into a line."""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.command import Command, say
from dgemma_mlx.cli.chat.files import say_waiting
from dgemma_mlx.cli.chat.paths import paths_of
from dgemma_mlx.cli.image_options import check_file
from dgemma_mlx.cli.images import AttachedImage, image_of, kept_image, media_type, read_image
from dgemma_mlx.cli.render.thumbnail import thumbnail
from dgemma_mlx.errors import DgemmaError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
# An absolute path as terminals paste it: in quotation marks, as a URL, or with backslashes; or one that begins with ~/.
_PATH = re.compile(r"""(?<!\S)(?:'(?P<single>/[^']+)'|"(?P<double>/[^"]+)"|(?P<plain>(?:file://|~?/)(?:\\.|[^\s\\])+))""")
_AFTER_A_WORD = ".,;:!?)"


class Dragged(NamedTuple):
    """What a line holds besides its words.

    Attributes:
        paths: The images.
        text: The line with the name of each image in place of its path; "" when it has no other words.
    """

    paths: list[Path]
    text: str


def dragged(line: str) -> Dragged:
    """Return the files of images whose absolute paths are in a line; none for a text of several lines."""
    if "\n" in line or "/" not in line:
        return Dragged([], line)
    try:
        alone = [path for word in paths_of(line, "") for path in [_of_url(str(word))]]
    except DgemmaError:
        alone = []
    if alone and all(path.is_absolute() and _is_image(path) for path in alone):
        return Dragged(alone, "")
    paths: list[Path] = []

    def name_of(found: re.Match[str]) -> str:
        for text, rest in _readings(found):
            if _is_image(path := _of_url(os.path.expanduser(text))):
                paths.append(path)
                return path.name + rest
        return found[0]

    text = _PATH.sub(name_of, line)
    return Dragged(paths, text)


def _readings(found: re.Match[str]) -> list[tuple[str, str]]:
    """Return what a path may be, each with the rest that is no part of it: a path may end a sentence."""
    if quoted := found["single"] or found["double"]:
        return [(quoted, "")]
    word = found["plain"]
    bare = word.rstrip(_AFTER_A_WORD)
    return [(re.sub(r"\\(.)", r"\1", each), word[len(each) :]) for each in dict.fromkeys((word, bare))]


def _of_url(text: str) -> Path:
    """Return the path of a ``file:`` URL of this machine, and that of any other text."""
    text = text.replace("file:/", "file:///", 1) if re.match("file:/[^/]", text) else text  # a ``Path`` joins slashes
    if not text.startswith(("file:///", "file://localhost/")):
        return Path(text)
    return Path(unquote(urlsplit(text.replace("?", "%3F").replace("#", "%23")).path))


def _is_image(path: Path) -> bool:
    """Return whether a file has the name and the first bytes of an image."""
    try:
        if path.suffix.lower() not in _SUFFIXES or not path.is_file():
            return False
        with path.open("rb") as file:
            return media_type(file.read(32)) is not None
    except (OSError, ValueError):  # a name that is too long, or that no file can have
        return False


def attach(chat: Chat, paths: Sequence[Path]) -> None:
    """Attach images to the next message, show them, and say so. Raises `DgemmaError`, without a change."""
    found = []
    budget = {} if chat.image_budget is None else {"budget": chat.image_budget}
    for path in paths:
        data = read_image(path)
        tokens = chat.look({"type": "image", "path": str(path), **budget})
        found.append(AttachedImage(str(path), {**image_of(path.name, data), **budget}, tokens))
    _add(chat, found)


def _add(chat: Chat, found: Sequence[AttachedImage]) -> None:
    again = {each.name for each in found}
    chat.attachments = [*(old for old in chat.attachments if old.name not in again), *found]
    for each in found:
        if chat.draw and "base64" in each.image:
            sys.stdout.write(thumbnail(base64.b64decode(each.image["base64"]), sys.stdout))
        say(str(each))


def _image(chat: Chat, rest: str) -> None:
    if rest:
        paths = [_of_url(str(path)) for path in paths_of(rest, "/image FILE")]
        for path in paths:
            check_file(path, "/image")
        attach(chat, paths)
        say_waiting(chat)
        return
    images = [(n, each) for n, each in enumerate(chat.attachments, 1) if isinstance(each, AttachedImage)]
    for number, each in images:
        say(f"{number}  {each}")
    if not images:
        say("no image waits for your next message; /image FILE adds one")


def _video(chat: Chat, rest: str) -> None:
    found = []
    for path in paths_of(rest, "/video FILE"):
        check_file(path, "/video")
        part = {"type": "video", "path": str(path)}
        found.append(AttachedImage(str(path), kept_image(part), chat.look(part)))
    _add(chat, found)
    say_waiting(chat)


COMMANDS = {
    "image": Command("[FILE...]", "show images with the next message; alone, list them", _image),
    "video": Command("FILE...", "show up to 32 frames of a video with the next message", _video),
}
