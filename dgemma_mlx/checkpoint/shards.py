"""The safetensors files (shards) of a checkpoint folder: finding, checking and opening them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import read_json

INDEX = "model.safetensors.index.json"
_FETCH_AGAIN = "The download may be incomplete. Fetch the checkpoint again."
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
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

    These are the files that ``model.safetensors.index.json`` names, or ``model.safetensors`` without an index. Raises
    ``DgemmaError`` when a file is missing or the index is damaged or names a file outside the folder.
    """
    index = folder / INDEX
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise DgemmaError(f"{folder} has no model.safetensors", _FETCH_AGAIN)
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise DgemmaError(f"{index} has no weight_map", _FETCH_AGAIN)
    names = list(weight_map.values())
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise DgemmaError(f"{index} names a shard outside the folder: {outside[0]!r}", _FETCH_AGAIN)
    for name in names:
        if not os.path.isfile(folder / name):
            raise DgemmaError(f"{index.name} names {name}, which is not in {folder}", _FETCH_AGAIN)
    return [folder / name for name in sorted(set(names))]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, read from its header without their data.

    Raises ``DgemmaError`` when the file cannot be read, is not a safetensors file, or has another size than its header
    says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == _LFS_POINTER:
                raise DgemmaError(f"{path} is a Git LFS pointer, not the file itself", "Run `git lfs pull` there.")
            (length,) = struct.unpack("<Q", start)
            header = json.loads(file.read(min(length, size, _MAX_HEADER)))
        tensors = {
            name: StoredTensor(path, str(entry["dtype"]), shape, 8 + length + begin, 8 + length + end)
            for name, entry in header.items() if name != "__metadata__"
            for shape, (begin, end) in [(tuple(map(int, entry["shape"])), entry["data_offsets"])]
        }
        expected = max((tensor.end for tensor in tensors.values()), default=8 + length)
    except OSError as error:
        raise DgemmaError(f"{path} cannot be read: {error.strerror}", _FETCH_AGAIN) from None
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise DgemmaError(f"{path} is not a safetensors file, or its header is cut off", _FETCH_AGAIN) from None
    if size != expected:
        raise DgemmaError(f"{path} has {size:,} bytes, but its header promises {expected:,}", _FETCH_AGAIN)
    return tensors


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


def open_tensors(folder: Path) -> dict[str, mx.array]:
    """Return every tensor of a checkpoint by its name in the files, lazily.

    MLX reads the data of a tensor from disk when it is first used. The headers are checked now. Raises ``DgemmaError``
    when a file is missing, damaged or incomplete, or when two shards hold the same tensor.
    """
    files = shard_files(folder)
    merged(map(read_header, files))  # for its checks: every file is complete, and no tensor is stored twice
    tensors: dict[str, mx.array] = {}
    for path in files:
        try:
            loaded = mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise DgemmaError(f"{path} cannot be loaded: {error}", _FETCH_AGAIN) from None
        assert isinstance(loaded, dict)
        tensors.update(loaded)
    return tensors
