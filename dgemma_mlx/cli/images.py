"""Images and videos of a conversation: what is kept of them, how they are shown to the model again, and their names.

A message of the user holds its images beside its text, under "images". Each is an object with "type" ("image" or
"video") and "name". An image also has "base64", its file, and "sha256" of that; "size", its width and height, where
they are known; and "budget", where one was chosen. An image whose file was not kept, or is gone, has no "base64". Of a
video only "path" is kept.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import is_text, is_whole, reason
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import counted, size

MOST_BYTES = 32 << 20  # of an image that a conversation keeps
MEDIA_TYPES = {
    rb"\x89PNG\r\n\x1a\n": "image/png", rb"\xff\xd8\xff": "image/jpeg", rb"GIF8[79]a": "image/gif",
    rb"RIFF....WEBP": "image/webp", rb"BM.{12}": "image/bmp", rb"II\*\0|MM\0\*": "image/tiff",
    rb"....ftypavi[fs]": "image/avif",
}  # fmt: skip


def media_type(data: bytes) -> str | None:
    """Return the media type that the first bytes of a file tell; None when it is not an image of a common format."""
    return next((kind for magic, kind in MEDIA_TYPES.items() if re.match(magic, data, re.DOTALL)), None)


def image_size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height of an image, upright; None without Pillow, and for what Pillow does not read."""
    with suppress(Exception):  # Pillow's readers raise errors of many kinds for damaged files
        from PIL import Image

        with Image.open(BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # the tag of the orientation
        return (height, width) if turned else (width, height)
    return None


def read_image(path: Path) -> bytes:
    """Return the bytes of an image's file. Raises `DgemmaError` (exit code 2) for one that is too large to be kept."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {reason(error)}", "Name a picture that can be read.", 2) from None
    if len(data) > MOST_BYTES:
        raise DgemmaError(f"{path} is larger than {size(MOST_BYTES)}", "Save it smaller.", exit_code=2)
    return data


def kept_image(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a conversation keeps of an image or video, a part of a message's content.

    An image that is too large is kept as its name. Raises `DgemmaError` (exit code 2) for a file that cannot be read.
    """
    if part["type"] == "video":
        path = _as_text(os.path.abspath(part["path"]))
        return {"type": "video", "name": os.path.basename(path), "path": path}
    budget = {"budget": part["budget"]} if part.get("budget") else {}
    name, data = "standard input", part.get("bytes")
    if "path" in part:
        name = _as_text(os.path.basename(part["path"]))
        with suppress(DgemmaError):  # another one of it is raised when the model reads the file
            data = read_image(Path(part["path"]))
    elif "base64" in part:
        name, data = "image", base64.b64decode(part["base64"])
    if data is None or len(data) > MOST_BYTES:
        return {"type": "image", "name": name, **budget}
    return {**image_of(name, data), **budget}


def _as_text(path: str) -> str:
    """Return a path as the log and files can hold it: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode(errors="replace")


def image_of(name: str, data: bytes) -> dict[str, Any]:
    """Return an image as a conversation keeps it."""
    shape = image_size(data)
    return {
        "type": "image", "name": _as_text(name), **({} if shape is None else {"size": list(shape)}),
        "sha256": sha256(data).hexdigest(), "base64": base64.b64encode(data).decode(),
    }  # fmt: skip


def image_label(image: Mapping[str, Any]) -> str:
    """Return how a kept image or video is named in a text, such as ``[image: cat.png 640x480]``."""
    shape = f" {image['size'][0]}x{image['size'][1]}" if "size" in image else ""
    return f"[{image['type']}: {image['name']}{shape}{', gone' if is_gone(image) else ''}]"


def is_gone(image: Mapping[str, Any]) -> bool:
    """Return whether the file of a kept image or video is no longer there."""
    return not os.path.exists(image["path"]) if image["type"] == "video" else "base64" not in image


def shown_part(image: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a message's content that shows a kept image to the model; a text where it is gone."""
    if is_gone(image):
        return {"type": "text", "text": image_label(image) + "\n"}
    source = "path" if image["type"] == "video" else "base64"
    return {key: image[key] for key in ("type", source, "budget") if key in image}


def with_text(images: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return the content of a message with kept images before its text."""
    return [*map(shown_part, images), {"type": "text", "text": text}]


def gone_line(messages: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the line about images of a conversation that are gone; None when there are none."""
    names = [image["name"] for message in messages for image in message.get("images", ()) if is_gone(image)]
    if not names:
        return None
    return f"{', '.join(names)}: no longer kept; the model sees only the name{'' if len(names) == 1 else 's'}"


def fault_of(images: Any) -> str | None:
    """Return why a value from a file is not a list of kept images; None when it is."""
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        return "its images are not a list of objects"
    for image in images:
        if image.get("type") not in ("image", "video") or not is_text(image.get("name")):
            return "an image has no type or no name"
        if image["type"] == "video" and not (is_text(image.get("path")) and "\0" not in image["path"]):
            return "a video has no path"
        shape = image.get("size", [1, 1])
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(is_whole, shape)):
            return "the size of an image is not two numbers"
        if "base64" in image:
            try:
                data = base64.b64decode(image["base64"], validate=True)
            except (TypeError, ValueError, binascii.Error):
                return "the base64 text of an image is malformed"
            if image.get("sha256") != sha256(data).hexdigest():
                return "an image has another SHA-256 than it says"
    return None


def without_data(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose images are without the bytes of their files."""
    if "images" not in message:
        return dict(message)
    bare = [{key: value for key, value in image.items() if key != "base64"} for image in message["images"]]
    return {**message, "images": bare}


@dataclass(frozen=True)
class AttachedImage:
    """An image or video that goes with the next message of a chat.

    Attributes:
        name: The path as it was given.
        image: What the conversation keeps of it.
        tokens: Number of tokens that it becomes; None where only a server can tell.
    """

    name: str
    image: dict[str, Any]
    tokens: int | None

    def __str__(self) -> str:
        """Return the name, the size in pixels and the number of tokens in a line, as far as they are known."""
        shape = "{}x{}".format(*self.image["size"]) if "size" in self.image else ""
        tokens = "" if self.tokens is None else counted(self.tokens, "token")
        return "  ".join(part for part in (self.name, shape, tokens) if part)
