"""A prompt cache on disk: one safetensors file, valid only for the model that made it.

The file holds these tensors, in this order: ``ids`` (P) int64, with a picture's negative key at each of its soft
tokens; for each layer ``keys`` and ``values`` (1, Hk, S, D);
and ``sha256`` over all bytes before it. Full-attention layers store all P positions. Sliding layers store the windows
before each point to which a prompt can go back: the marks and the end. Positions in several windows are stored once.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np

from dgemma_mlx.checks import is_whole, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import check_writable, whole_file
from dgemma_mlx.generation.identity import ModelIdentity
from dgemma_mlx.json_text import parse_json
from dgemma_mlx.model.cache import FullLayerCache, PrefixCache, Snapshot
from dgemma_mlx.model.text import DiffusionGemma

_FORMAT, _VERSION = "dgemma-mlx prompt cache", 2
_DTYPES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.int64: "I64", mx.uint8: "U8"}
_MAX_HEADER = 1 << 20  # bytes; the header of a thousand layers takes a quarter of this
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, struct.error)
_OTHER_FILE = "Choose another file; --prompt-cache continues only from files that it has written."
_DELETE = "Delete it; the prompt is then encoded again."


class _Stored(NamedTuple):
    """A tensor of the file."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


def write(
    path: Path, network: DiffusionGemma, identity: ModelIdentity, ids: Sequence[int], cache: PrefixCache,
    marks: Mapping[str, Snapshot],
) -> None:
    """Write a cache of this network, whole or not at all.

    ``ids`` are those that the cache holds; every mark lies at or before its end. Raises ``DgemmaError`` when the file
    cannot be written, and when it holds anything but a prompt cache.
    """
    _check_target(path)
    window = network.config.sliding_window
    snapshots = {mark.offset: mark for mark in (*marks.values(), cache.snapshot())}
    points = sorted(snapshots)
    metadata = {
        "weights": identity.weights, "made_with": identity.made_with, "format": f"{_FORMAT} {_VERSION}",
        "model": identity.name, "marks": json.dumps({name: mark.offset for name, mark in marks.items()}),
    }  # fmt: skip
    header = _header(_layout(cache, points, window), metadata)
    digest = hashlib.sha256()
    try:
        with whole_file(path) as file:
            for part in chain([header], _data(ids, cache, [snapshots[point] for point in points], window)):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
    except OSError as error:
        raise _unwritable(path, error) from None


def check_place(path: Path) -> None:
    """Raise ``DgemmaError`` when ``write`` could not write this file, before there is anything to write."""
    _check_target(path)
    try:
        check_writable(path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _check_target(path: Path) -> None:
    """Raise ``DgemmaError`` if the path leads to anything but an empty file, a prompt cache, or nothing yet."""
    _refuse_non_file(path)
    try:
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                _read_header(file, path, hashlib.sha256())
    except OSError as error:
        raise _unwritable(path, error) from None


def _refuse_non_file(path: Path) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        raise DgemmaError(f"{path} is not a file", "Choose another place for the prompt cache.")


def _unwritable(path: Path, error: OSError) -> DgemmaError:
    return DgemmaError(f"cannot write {path}: {error.strerror}", "Choose another place for the prompt cache.")


def read(
    path: Path, network: DiffusionGemma, identity: ModelIdentity
) -> tuple[list[int], PrefixCache, dict[str, Snapshot]]:
    """Read the ids, the cache and the marks that ``write`` was given for this model.

    Raises ``DgemmaError`` for any other file.
    """
    _refuse_non_file(path)
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            entries, metadata = _read_header(file, path, digest)
            _check_identity(path, metadata, identity)
            try:
                return _read_data(file, digest, entries, parse_json(metadata["marks"]), network)
            except _MALFORMED:
                raise DgemmaError(f"{path} is damaged", _DELETE) from None
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", _OTHER_FILE) from None


def _check_identity(path: Path, found: Mapping[str, str], here: ModelIdentity) -> None:
    """Raise ``DgemmaError`` when the file was made by another model, or computed in another way."""
    if found.get("weights") != here.weights:
        raise DgemmaError(
            f"{path} belongs to another model, or to other weights of {shown(found.get('model'))}",
            "Use the model and the adapter that wrote it, or choose another file.",
        )
    if found.get("made_with") != here.made_with:
        raise DgemmaError(
            f"{path} was computed with {str(found.get('made_with'))[:200]}; this run uses {here.made_with}",
            "The numbers differ. Use the same --dtype, --cpu-dequantize, --no-kernels, --image-attention, or another "
            "file.",
        )


def _layout(like: PrefixCache, points: Sequence[int], window: int) -> dict[str, _Stored]:
    """Return the file's tensors, in order, for a cache that is shaped ``like`` this one, which is not empty."""
    layout = {"ids": _Stored(mx.int64, (points[-1],))}
    for i, layer in enumerate(like.layers):
        full = isinstance(layer, FullLayerCache)
        length = points[-1] if full else sum(new for _, new in _windows(points, window))
        for name, array in zip(("keys", "values"), layer.state(), strict=True):
            _, heads, _, head_dim = array.shape
            layout[f"layers.{i}.{name}"] = _Stored(array.dtype, (1, heads, length, head_dim))
    return {**layout, "sha256": _Stored(mx.uint8, (hashlib.sha256().digest_size,))}


def _windows(points: Sequence[int], window: int) -> Iterator[tuple[int, int]]:
    """Yield, for each point in ascending order, how many positions a sliding layer holds and how many of them are new.

    New positions are those that the window of the previous point does not hold.
    """
    for before, point in zip((0, *points[:-1]), points, strict=True):
        held = min(point, window - 1)
        yield held, min(held, point - before)


def _entries(layout: Mapping[str, _Stored]) -> dict[str, Any]:
    """Return the tensors as a safetensors header lists them."""
    ends = list(accumulate(stored.nbytes for stored in layout.values()))
    return {
        name: {
            "dtype": _DTYPES[stored.dtype], "shape": list(stored.shape), "data_offsets": [end - stored.nbytes, end]
        }
        for (name, stored), end in zip(layout.items(), ends, strict=True)
    }  # fmt: skip


def _header(layout: Mapping[str, _Stored], metadata: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **_entries(layout)}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _data(
    ids: Sequence[int], cache: PrefixCache, snapshots: Sequence[Snapshot], window: int
) -> Iterator[bytes | memoryview]:
    """Yield the stored bytes, up to the digest. ``snapshots`` are those of the points."""
    news = [new for _, new in _windows([snapshot.offset for snapshot in snapshots], window)]
    yield _bytes(mx.array(list(ids), mx.int64))
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, FullLayerCache):
            yield from map(_bytes, layer.state())
            continue
        for part in (0, 1):
            states = [snapshot.sliding[i][part] for snapshot in snapshots]
            stored = [state[:, :, state.shape[2] - new :] for state, new in zip(states, news, strict=True)]
            yield _bytes(mx.concatenate(stored, axis=2))


def _bytes(array: Any) -> memoryview:
    plain: Any = mx.contiguous(array).reshape(-1).view(mx.uint8)
    return memoryview(plain)


def _read_header(file: BinaryIO, path: Path, digest: hashlib._Hash) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries of the tensors and the metadata, and leave the file at the start of the data."""
    try:
        start = file.read(8)
        (length,) = struct.unpack("<Q", start)
        if length > _MAX_HEADER:
            raise ValueError("too long")
        text = file.read(length)
        entries = parse_json(text)
        metadata = entries.pop("__metadata__")
        name, _, number = metadata["format"].rpartition(" ")
        if name != _FORMAT or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("not ours")
        version = int(number)
    except _MALFORMED:
        raise DgemmaError(f"{path} is not a prompt cache, or it is damaged", _OTHER_FILE) from None
    if version > _VERSION:
        raise DgemmaError(f"{path} was written by a newer dgemma-mlx", "Update dgemma-mlx, or choose another file.")
    if version < _VERSION:
        raise DgemmaError(f"{path} was written by an older dgemma-mlx", _DELETE)
    digest.update(start + text)
    return entries, metadata


def _read_data(
    file: BinaryIO, digest: hashlib._Hash, entries: Mapping[str, Any], marks: dict[str, int],
    network: DiffusionGemma,
) -> tuple[list[int], PrefixCache, dict[str, Snapshot]]:
    """Read the data. Raises one of ``_MALFORMED`` when it does not fit the header, or not the network's shapes."""
    text = network.config
    (count,) = entries["ids"]["shape"]
    _require(is_whole(count) and 0 < count <= text.max_position_embeddings)
    _require(all(is_whole(mark) and 0 < mark <= count for mark in marks.values()))
    points = sorted({*marks.values(), count})
    like = network.new_cache()
    network.extend(mx.zeros((1, 1), mx.int32), like)  # for its shapes; never evaluated
    layout = _layout(like, points, text.sliding_window)
    _require(entries == _entries(layout))
    left = os.fstat(file.fileno()).st_size - file.tell()
    _require(left == sum(stored.nbytes for stored in layout.values()))

    def take(name: str) -> mx.array:
        data = file.read(layout[name].nbytes)
        digest.update(data)
        return mx.array(np.frombuffer(data, np.uint8)).view(layout[name].dtype).reshape(layout[name].shape)

    ids: Any = take("ids").tolist()
    _require(max(ids) < text.vocab_size)
    cache = network.new_cache()
    snapshots = {point: Snapshot(point, {}) for point in points}
    for i, layer in enumerate(cache.layers):
        keys, values = take(f"layers.{i}.keys"), take(f"layers.{i}.values")
        if isinstance(layer, FullLayerCache):
            layer.update(keys, values, count)
            mx.eval(layer.state())
            continue
        windows = list(_windows(points, text.sliding_window))
        ends = accumulate(new for _, new in windows)
        for point, (held, _), end in zip(points, windows, ends, strict=True):
            state = [mx.contiguous(array[:, :, end - held : end]) for array in (keys, values)]
            mx.eval(state)
            snapshots[point].sliding[i] = (state[0], state[1])
    _require(file.read() == digest.digest())
    cache.restore(snapshots[count])
    return ids, cache, {name: snapshots[mark] for name, mark in marks.items()}


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("the data differs from what was written")
