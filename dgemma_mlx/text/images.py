"""Images in a prompt: how callers give them, and where their soft tokens stand among the ids.

A chat template writes one marker, the token ``<|image|>``, where a message has an image. In the ids this marker becomes
a block: the begin-of-image id, one place for each soft token of the picture, and the end-of-image id. At the places of
a picture stands its key, a negative number, which no token id is. Prompts with the same keys show the same pictures,
whatever their files are called.

Reference: transformers ``Gemma4Processor``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.messages import Message

# The path of a file, the bytes of one, or a part of a message's content (see ``text.messages.conversation``).
Image = str | os.PathLike[str] | bytes | Mapping[str, Any]

MAX_IMAGES = 64  # in a prompt, frames of videos included


def with_images(prompt: str | Sequence[Message], images: Sequence[Image] | None) -> list[Message]:
    """Return the messages of a prompt, with images before the text of the last user message.

    Raises ``DgemmaError`` (exit code 2) for what is not a list of images, and for messages without a user's.
    """
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if images is None:
        return messages
    if not isinstance(images, (list, tuple)):
        raise DgemmaError(f"images must be a list, not {shown(images)}", 'As in ["cat.png"].', exit_code=2)
    if not images:
        return messages
    parts = [_part(image) for image in images]
    for index in range(len(messages) - 1, -1, -1):
        message = messages[index]
        if isinstance(message, Mapping) and message.get("role") == "user":
            content = message.get("content")
            if not (content is None or isinstance(content, (str, list, tuple))):
                return messages  # ``conversation`` refuses it
            rest = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
            messages[index] = {**message, "content": [*parts, *rest]}
            return messages
    raise DgemmaError("there is no user message to put the images into", "Add one, or put them into the messages.", 2)


def _part(image: Any) -> Mapping[str, Any]:
    """Return an image as a part of a message's content."""
    if isinstance(image, Mapping):
        return image
    if isinstance(image, (str, os.PathLike)):
        return {"type": "image", "path": image}
    if isinstance(image, (bytes, bytearray, memoryview)):
        return {"type": "image", "bytes": bytes(image)}
    raise DgemmaError(f"not an image: {shown(image)}", "It is a path, the bytes of a file, or a part of a message.", 2)


def is_image(part: Any) -> bool:
    """Return whether a part of a checked content is an image or a video."""
    return isinstance(part, Mapping) and part.get("type") in ("image", "video")


def images_of(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """Return the images and videos of messages that ``conversation`` has returned, in order."""
    contents = [message.get("content") for message in messages]
    return [part for content in contents if isinstance(content, list) for part in content if is_image(part)]


def place_pictures(ids: Sequence[int], blocks: Sequence[Sequence[int]], marker: int) -> list[int]:
    """Return the ids (P) of a prompt in which each ``marker`` is replaced by a picture's block, in order.

    Raises ``DgemmaError`` (exit code 2) when there are not as many markers as blocks: templates show images only where
    they expect them.
    """
    places = [place for place, id in enumerate(ids) if id == marker]
    if len(places) != len(blocks):
        raise DgemmaError(
            f"the model's chat template shows {len(places)} of {len(blocks)} images",
            "Put images into messages of the user.", exit_code=2,
        )  # fmt: skip
    found: list[int] = []
    start = 0
    for place, block in zip(places, blocks, strict=True):
        found += [*ids[start:place], *block]
        start = place + 1
    return [*found, *ids[start:]]
