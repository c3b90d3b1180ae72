"""Pictures in a prompt: read from a conversation, placed among the ids, and encoded by the vision tower."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.vision_config import VisionConfig
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.soft_tokens import SoftTokens
from dgemma_mlx.text.images import MAX_IMAGES, images_of, place_pictures
from dgemma_mlx.text.messages import Message
from dgemma_mlx.vision.pixels import Picture, read_picture

if TYPE_CHECKING:
    from dgemma_mlx.vision.tower import VisionTower

_KEPT_BYTES = 128 << 20  # of features; those of a picture of 280 soft tokens take 1.6 MB in half precision
_RECENT = 16  # pictures that were read from bytes last, of 2 MB each at 280 soft tokens
_recent: OrderedDict[tuple[bytes, int, VisionConfig], Picture] = OrderedDict()
_OTHER = "`dgemma-mlx info MODEL` says whether a model has one; or leave the images out."


class PromptIds(list[int]):
    """The ids of a prompt. At the places of a picture stands its key, which is negative.

    Attributes:
        pictures: The pictures by their keys.
    """

    def __init__(self, ids: Iterable[int] = (), pictures: Mapping[int, Picture] | None = None) -> None:
        super().__init__(ids)
        self.pictures = dict(pictures or {})

    def followed_by(self, ids: Iterable[int]) -> PromptIds:
        """Return this prompt with more ids after it."""
        return PromptIds([*self, *ids], self.pictures)


def most_patches(prompts: Iterable[PromptIds]) -> int:
    """Return the number of patches of the largest picture in the prompts; 0 without pictures."""
    pictures = (picture for ids in prompts for picture in ids.pictures.values())
    return max((picture.grid[0] * picture.grid[1] for picture in pictures), default=0)


def read_pictures(
    messages: Sequence[Message], config: ModelConfig, model_name: str
) -> tuple[list[Message], list[Picture]]:
    """Read the images and videos of messages that ``conversation`` has returned.

    Returns the messages in which each image is ``{"type": "image"}``, as chat templates know it, and each video is its
    frames, with the time before each; and the pictures in the same order. Raises ``DgemmaError`` (exit code 2) when the
    model reads no images, a file is not an image, and for more than ``MAX_IMAGES``.
    """
    images = images_of(messages)
    if not images:
        return list(messages), []
    vision = require_vision(config, model_name)
    if len(images) > MAX_IMAGES:
        raise _too_many(len(images))
    pictures: list[Picture] = []

    def bare(part: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        if part["type"] == "video":
            frames = _read_video(part["path"], vision)
            pictures.extend(picture for _, picture in frames)
            return _frames([seconds for seconds, _ in frames])
        if part["type"] == "image":
            name = part.get("path") or f"image {len(pictures) + 1}"
            read = _read_bytes if "bytes" in part else read_picture
            source = part["bytes"] if "bytes" in part else part["path"]
            pictures.append(read(source, vision, part.get("budget") or vision.default_budget, name))
            return [{"type": "image"}]
        return [part]

    found: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            found.append({**message, "content": [new for part in content for new in bare(part)]})
        else:
            found.append(message)
    if len(pictures) > MAX_IMAGES:
        raise _too_many(len(pictures))
    return found, pictures


def require_vision(config: ModelConfig, model_name: str) -> VisionConfig:
    """Return the configuration of a model's vision tower. Raises ``DgemmaError`` when the model reads no images."""
    if config.vision is None or config.image_token_id is None:
        raise DgemmaError(f"{model_name} reads no images: the checkpoint has no vision tower", _OTHER, exit_code=2)
    config.vision.require_supported()
    return config.vision


def _read_bytes(data: bytes, config: VisionConfig, budget: int, name: str) -> Picture:
    """Return what ``read_picture`` returns. A conversation shows the same files in every turn: each is read once."""
    key = sha256(data).digest(), budget, config
    picture = _recent.pop(key, None) or read_picture(data, config, budget, name)
    _recent[key] = picture
    while len(_recent) > _RECENT:
        with suppress(KeyError):  # another thread was faster
            _recent.popitem(last=False)
    return replace(picture, name=name)


def _read_video(path: str, config: VisionConfig) -> tuple[tuple[float, Picture], ...]:
    """Return the frames of a video with their times in seconds; those read last, while the file is the same."""
    try:
        about = os.stat(path)
    except OSError:  # which reading it says
        return _frames_of(path, 0, 0, config)
    return _frames_of(path, about.st_mtime_ns, about.st_size, config)


@lru_cache(maxsize=2)
def _frames_of(path: str, changed: int, length: int, config: VisionConfig) -> tuple[tuple[float, Picture], ...]:
    """Return the frames of a video that was changed at a time in nanoseconds, and has so many bytes."""
    from dgemma_mlx.vision.video import read_frames

    return tuple(read_frames(path, config, path))


def _frames(times: Sequence[float]) -> list[Mapping[str, Any]]:
    """Return the parts of a video's frames: the time of each as mm:ss, and the frame; spaces between them."""
    parts: list[Mapping[str, Any]] = []
    for number, time in enumerate(times):
        minutes, seconds = divmod(int(time), 60)
        text = f"{' ' if number else ''}{minutes:02}:{seconds:02} "
        parts += [{"type": "text", "text": text}, {"type": "image"}]
    return parts


def with_pictures(ids: Sequence[int], pictures: Sequence[Picture], config: ModelConfig) -> PromptIds:
    """Return the ids of a prompt with the block of each picture in place of its marker.

    Raises ``DgemmaError`` (exit code 2) when the chat template has not written a marker for each picture.
    """
    if not pictures:
        return PromptIds(ids)
    assert config.image_token_id is not None, "read_pictures has refused it"
    before, after = ([] if id is None else [id] for id in (config.boi_token_id, config.eoi_token_id))
    blocks = [[*before, *[picture.key] * picture.tokens, *after] for picture in pictures]
    return PromptIds(
        place_pictures(ids, blocks, config.image_token_id), {picture.key: picture for picture in pictures}
    )


def _too_many(count: int) -> DgemmaError:
    return DgemmaError(f"{count} images are too many for a prompt", f"It may have {MAX_IMAGES}.", exit_code=2)


class PictureEncoder:
    """The vision tower of a loaded checkpoint, which is read from disk at the first picture.

    The features of the pictures that were used last are kept. The thread that owns MLX uses it.
    """

    def __init__(self, folder: Path, config: ModelConfig, dtype: mx.Dtype) -> None:
        """``folder`` is the checkpoint's, and ``dtype`` that of the text network's activations."""
        self._folder, self._config, self._dtype = folder, config, dtype
        self._tower: VisionTower | None = None
        self._features: OrderedDict[int, mx.array] = OrderedDict()  # by key; the one that was used last at the end

    def features(self, picture: Picture) -> mx.array:
        """Return the features (n, M) of a picture, evaluated, in the dtype of the text network's activations.

        Raises ``DgemmaError`` when the tower cannot be read.
        """
        found = self._features.pop(picture.key, None)
        if found is None:
            if self._tower is None:
                from dgemma_mlx.vision.load import load_tower

                self._tower = load_tower(self._folder, self._config, self._dtype)
            found = self._tower(mx.array(picture.patches()), picture.grid).astype(self._dtype)
            mx.eval(found)
        self._features[picture.key] = found
        while len(self._features) > 1 and sum(each.nbytes for each in self._features.values()) > _KEPT_BYTES:
            self._features.popitem(last=False)
        return found


def soft_tokens(rows: Sequence[Sequence[int]], features: Callable[[int], mx.array]) -> SoftTokens | None:
    """Return the soft tokens of a chunk of prompts (B, L), which holds each block whole; None without a picture.

    ``features`` returns the features (n, M) of the picture with a key.
    """
    firsts: dict[int, int] = {}  # the first row of each picture's features
    lengths: dict[int, int] = {}
    arrays: list[mx.array] = []
    places, blocks, count, block = [], [], 0, -1
    for ids in rows:
        own_places, own_blocks, before, place = [], [], 0, 0
        for id in ids:
            if id < 0:
                if id not in firsts:
                    arrays.append(features(id))
                    firsts[id], lengths[id] = count, arrays[-1].shape[0]
                    count += lengths[id]
                if id != before or place == lengths[id]:  # one picture may stand twice without ids between
                    block, place = block + 1, 0
                own_places.append(firsts[id] + place)
                place += 1
            else:
                own_places.append(-1)
            own_blocks.append(block if id < 0 else -1)
            before = id
        places.append(own_places)
        blocks.append(own_blocks)
    if not arrays:
        return None
    return SoftTokens(mx.concatenate(arrays), mx.array(places, mx.int32), mx.array(blocks, mx.int32))
