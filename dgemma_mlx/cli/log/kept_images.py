"""The files of images in the log: each is stored once, and removed with the last message that shows it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from dgemma_mlx.cli.images import fault_of

if TYPE_CHECKING:
    from sqlite3 import Connection


def store_images(db: Connection, row: int | None, message: Mapping[str, Any]) -> None:
    """Store the files of the images of a message, which is in this row of the table of messages."""
    for image in message.get("images", ()):
        if "base64" in image:
            known = db.execute("SELECT 1 FROM images WHERE sha256 = ?", (image["sha256"],)).fetchone()
            if known is None:
                data = base64.b64decode(image["base64"])
                db.execute("INSERT INTO images VALUES (?, ?)", (image["sha256"], data))
            db.execute("INSERT OR IGNORE INTO image_uses VALUES (?, ?)", (row, image["sha256"]))


def with_files(db: Connection, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages of the log with the files of their images. An image whose file is gone has none.

    Raises ``ValueError`` for damaged images.
    """
    return [
        {**message, "images": [_with_file(db, image) for image in _images(message)]} if "images" in message else message
        for message in messages
    ]


def remove_unused(db: Connection) -> None:
    """Remove the files that no message shows."""
    db.execute("DELETE FROM images WHERE sha256 NOT IN (SELECT sha256 FROM image_uses)")


def _images(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    if (fault := fault_of(message["images"])) is not None:
        raise ValueError(fault)
    images: list[dict[str, Any]] = message["images"]
    return images


def _with_file(db: Connection, image: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(image.get("sha256"), str):
        return image
    row = db.execute("SELECT data FROM images WHERE sha256 = ?", (image["sha256"],)).fetchone()
    if row is None or not isinstance(row[0], bytes) or sha256(row[0]).hexdigest() != image["sha256"]:
        return image
    return {**image, "base64": base64.b64encode(row[0]).decode()}
