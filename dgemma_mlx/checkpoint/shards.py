"""The safetensors files (shards) of a checkpoint folder: finding, checking and opening them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from dgemma_mlx.checkpoint.names import vision_name
from dgemma_mlx.checkpoint.vision_config import VISION_FILE
from dgemma_mlx.checks import is_whole, reason, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json, read_json

INDEX = "model.safetensors.index.json"
_T = TypeVar("_T")
_FETCH_AGAIN = "The download may be incomplete. Fetch the checkpoint again."
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MOST_LENGTH = 2**31 - 1  # of an axis: MLX counts in 32 bits
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_LFS_POINTER = b"version "  # start of a Git LFS pointer file; https://git-lfs.github.com/spec/v1 follows


@dataclass(frozen=True)
class StoredTensor:
    """The location and type of a tensor in a safetensors file.

    Attributes:
        path: Path of the file.
        dtype: Name of the dtype in the safetensors format, for example "BF16".
        shape: Shape of the tensor.
        start: Offset of the tensor's first byte from the start of the file.
        end: Offset after the tensor's last byte from the start of the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the stored tensor in bytes."""
        return self.end - self.start


def shard_files(folder: Path) -> list[Path]:
    """Return the paths of a checkpoint's weight files, sorted.

    Raises ``DgemmaError`` as ``shard_names`` does, and when a file is missing.
    """
    files = [folder / name for name in shard_names(folder)]
    for file in files:
        if not os.path.isfile(file):
            missing = f"{file} is not a file" if os.path.exists(file) else f"{folder} has no {file.name}"
            named = f"{INDEX} names {file.name}, which is not in {folder}"
            raise DgemmaError(named if (folder / INDEX).exists() else missing, _FETCH_AGAIN)
    return files


def weight_files(folder: Path) -> list[Path]:
    """Return the paths of a checkpoint's weight files: its shards, then the file of the vision tower if it has one.

    Raises ``DgemmaError`` as ``shard_files`` does.
    """
    files, tower = shard_files(folder), folder / VISION_FILE
    return [*files, tower] if os.path.isfile(tower) else files


def shard_names(folder: Path) -> list[str]:
    """Return the names of a checkpoint's weight files, sorted, whether or not they are there.

    These are the files that ``model.safetensors.index.json`` names, or ``model.safetensors`` without an index. Raises
    ``DgemmaError`` when the index is damaged or names a file outside the folder.
    """
    index = folder / INDEX
    if not index.exists():
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise DgemmaError(f"{index} has no weight_map", _FETCH_AGAIN)
    names = list(weight_map.values())
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise DgemmaError(f"{index} names a shard outside the folder: {shown(outside[0])}", _FETCH_AGAIN)
    return sorted(set(names))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, read from its header without their data.

    Raises ``DgemmaError`` when the file cannot be read, is not a safetensors file, has another size than its header
    says, or its tensors overlap, leave gaps or have another size than their shapes ask for.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == _LFS_POINTER:
                raise DgemmaError(f"{path} is a Git LFS pointer, not the file itself", "Run `git lfs pull` there.")
            (length,) = struct.unpack("<Q", start)
            header = parse_json(file.read(min(length, size, _MAX_HEADER)))
        tensors = {
            name: _stored(path, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"
        }
        expected = max((tensor.end for tensor in tensors.values()), default=8 + length)
    except OSError as error:
        raise DgemmaError(f"{path} cannot be read: {error.strerror}", _FETCH_AGAIN) from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise DgemmaError(f"{path} is not a safetensors file, or its header is cut off", _FETCH_AGAIN) from None
    if size != expected:
        raise DgemmaError(f"{path} has {size:,} bytes, but its header promises {expected:,}", _FETCH_AGAIN)
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position or tensor.nbytes != prod(tensor.shape) * _ITEM_BYTES.get(tensor.dtype, 0):
            raise DgemmaError(f"{path}: the place or size of {name} is wrong in the header", _FETCH_AGAIN)
        position = tensor.end
    return tensors


def _stored(path: Path, entry: Mapping[str, Any], data: int) -> StoredTensor:
    """Return the tensor of a header's entry. ``data`` is the offset of the first tensor.

    Raises ``KeyError``, ``TypeError`` or ``ValueError`` when the entry is malformed.
    """
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if not all(is_whole(number) and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
        raise ValueError("a shape or an offset is not a number of bytes")
    if max(shape, default=0) > _MOST_LENGTH:
        raise ValueError("an axis is too long")
    return StoredTensor(path, str(entry["dtype"]), tuple(shape), data + begin, data + end)


def merged(headers: Iterable[Mapping[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Return the tensors of all shards in one dict. Raises ``DgemmaError`` when two shards hold the same tensor."""
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        if doubled := tensors.keys() & header.keys():
            name = min(doubled)
            raise DgemmaError(
                f"{header[name].path} holds {name}, which another shard holds as well",
                f"The other shard is {tensors[name].path}. {_FETCH_AGAIN}",
            )
        tensors.update(header)
    return tensors


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint by its name, read from the headers of its files.

    Tensors in the vision tower's own file have the names that they would have in a shard, and are left out where a
    shard has them as well. Raises ``DgemmaError`` when a file is missing, damaged or incomplete, or when two shards
    hold the same tensor.
    """
    tensors, file = merged(map(read_header, shard_files(folder))), folder / VISION_FILE
    return {**tower_only(read_header(file)), **tensors} if os.path.isfile(file) else tensors


def tower_only(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Return those of a file's tensors that are the vision tower's, by the names that they would have in a shard."""
    return {name: tensor for old, tensor in tensors.items() if (name := vision_name(old))}


def open_tensors(folder: Path) -> dict[str, mx.array]:
    """Return every tensor of a checkpoint by its name, lazily. The names are those of ``stored_tensors``.

    MLX reads the data of a tensor from disk when it is first used. The headers are checked now. Raises ``DgemmaError``
    as ``stored_tensors`` does.
    """
    stored_tensors(folder)  # for its checks: every file is complete, and no tensor is stored twice
    tensors: dict[str, mx.array] = {}
    for path in weight_files(folder):
        try:
            loaded = mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise DgemmaError(f"{path} cannot be loaded: {reason(error)}", _FETCH_AGAIN) from None
        assert isinstance(loaded, dict)
        tensors = {**tower_only(loaded), **tensors} if path == folder / VISION_FILE else {**tensors, **loaded}
    return tensors
