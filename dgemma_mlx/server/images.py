"""Images as clients write them -> parts of a message with the bytes of their files.

The modules of the protocols find an image in a body and leave an ``ImageReference`` in its place: a data URL, or the
address of a file. ``ImageReader`` then decodes or fetches all of a request, on threads of its own. Paths of files are
never read for a client.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from dgemma_mlx.checkpoint.vision_config import BUDGETS
from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import ModelText
from dgemma_mlx.generation.pictures import require_vision
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.image_fetch import FetchError, fetch_image
from dgemma_mlx.server.settings import ServerSettings
from dgemma_mlx.text.images import MAX_IMAGES
from dgemma_mlx.text.messages import Message

# How closely an image is looked at, in OpenAI's words -> soft tokens to aim at. None is the checkpoint's own number.
_DETAILS = {None: None, "auto": None, "low": BUDGETS[0], "high": BUDGETS[-1], "original": BUDGETS[-1]}
_THREADS = 4  # of all requests together; an address that answers slowly keeps one busy


@dataclass(frozen=True)
class ImageReference:
    """An image of a request, before it is decoded or fetched.

    Attributes:
        url: A data URL, or the address of a file.
        place: Where it stands in the body, for messages.
        budget: Number of soft tokens to aim at; None is the checkpoint's own.
    """

    url: str
    place: str
    budget: int | None = None


def url_reference(url: Any, detail: Any, place: str) -> ImageReference:
    """Return the image at a URL, as OpenAI's protocols write it. ``detail`` is "auto", "low", "high" or None.

    Raises ``ApiError`` (400) for anything else.
    """
    if not isinstance(url, str):
        raise ApiError(400, f"{place}: an image has a URL, not {shown(url)}", param=place)
    if not (detail is None or isinstance(detail, str)) or detail not in _DETAILS:
        raise ApiError(400, f"{place}: detail is auto, low or high, not {shown(detail)}", param=place)
    return ImageReference(url, place, _DETAILS[detail])


def part_reference(part: Mapping[str, Any], place: str) -> ImageReference:
    """Return the image of a part of type ``image_url`` or ``input_image``. Raises ``ApiError`` (400)."""
    if part.get("file_id") is not None:
        raise ApiError(400, f"{place}: no files are kept here. Send the image itself, as a data URL", param=place)
    image = part.get("image_url")
    if isinstance(image, Mapping):
        return url_reference(image.get("url"), image.get("detail", part.get("detail")), place)
    return url_reference(image, part.get("detail"), place)


def decoded(url: str, place: str) -> bytes:
    """Return the bytes of a data URL, which names the type of an image. Raises ``ApiError`` (400)."""
    head, comma, data = url.partition(",")
    kind, *options = head[len("data:") :].lower().split(";")
    if not comma:
        raise ApiError(400, f"{place}: a data URL is data:image/png;base64, and the data", param=place)
    if not kind.strip().startswith("image/"):
        raise ApiError(400, f"{place}: a data URL of type {shown(kind)} is not an image", param=place)
    try:
        content = unquote_to_bytes(data)
        return base64.b64decode(b"".join(content.split()), validate=True) if "base64" in options[-1:] else content
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{place}: the base64 text of the image is malformed", param=place) from None


class ImageReader:
    """Decodes and fetches the images of requests, beside the event loop and the thread of the model."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(_THREADS, "dgemma-mlx-images")

    def close(self) -> None:
        """Let go of the threads, without waiting for what they fetch."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def messages(self, text: ModelText, messages: Sequence[Message]) -> list[Message]:
        """Return messages in which each ``ImageReference`` is a part that ``conversation`` reads.

        Raises ``ApiError`` (400), which names the place, for a model that reads no images, too many images, those that
        cannot be decoded or fetched, and addresses where the owner of the server does not let them be fetched.
        """
        contents = [message.get("content") for message in messages]
        references = [part for content in contents if isinstance(content, list)
                      for part in content if isinstance(part, ImageReference)]  # fmt: skip
        read = iter(await self.parts(text, references))
        return [
            {**message, "content": [next(read) if isinstance(part, ImageReference) else part for part in content]}
            if isinstance(content, list) else message
            for message, content in zip(messages, contents, strict=True)
        ]  # fmt: skip

    async def parts(self, text: ModelText, references: Sequence[ImageReference]) -> list[dict[str, Any]]:
        """Return images as parts of a message, in order. Raises ``ApiError`` as ``messages`` does."""
        if not references:
            return []
        first = references[0].place
        try:
            require_vision(text.config, self._settings.model_name)
        except DgemmaError as error:
            raise ApiError(400, f"{first}: {error.message}", param=first) from None
        if len(references) > MAX_IMAGES:
            message = f"{len(references)} images are too many for a prompt. It may have {MAX_IMAGES}"
            raise ApiError(400, message, param=references[MAX_IMAGES].place)
        for each in references:
            self._check(each)
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._read, references)
        return await work

    def _check(self, reference: ImageReference) -> None:
        """Raise ``ApiError`` (400) for an address that is not fetched here."""
        if not reference.url[:5].lower() == "data:" and not self._settings.remote_images:
            raise ApiError(
                400, f"{reference.place}: images are not fetched from addresses. Send a data URL, or start the server "
                "with --allow-remote-images", param=reference.place,
            )  # fmt: skip

    def _read(self, references: Sequence[ImageReference]) -> list[dict[str, Any]]:
        """Return images as parts of a message. What is fetched may have the size of a body at most, all together."""
        found, fetched = [], dict[str, bytes]()
        for each in references:
            if each.url[:5].lower() == "data:":
                data = decoded(each.url, each.place)
            else:
                data = fetched[each.url] = fetched.get(each.url) or self._fetched(each)
                if sum(map(len, fetched.values())) > self._settings.max_body:
                    message = f"{each.place}: the images are together larger than {self._settings.max_body:,} bytes"
                    raise ApiError(400, message, param=each.place)
            found.append({"type": "image", "bytes": data, **({} if each.budget is None else {"budget": each.budget})})
        return found

    def _fetched(self, reference: ImageReference) -> bytes:
        try:
            return fetch_image(reference.url, self._settings.fetch_rules)
        except FetchError as error:
            message = f"{reference.place}: the image cannot be fetched: {error}"
            raise ApiError(400, message, param=reference.place) from None
