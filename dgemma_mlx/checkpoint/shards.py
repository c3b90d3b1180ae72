"""The safetensors files of a checkpoint folder: found, checked for completeness, opened lazily."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from dgemma_mlx.checkpoint.config import read_json
from dgemma_mlx.errors import DgemmaError

_FETCH_AGAIN = "The download may not have finished; fetch the checkpoint again."
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_LFS_POINTER = b"version "  # followed by https://git-lfs.github.com/spec/v1


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes ``start`` to ``end`` of the file; dtype in safetensors' words ("BF16", ...)."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: those of the index, else ``model.safetensors``."""
    index = folder / "model.safetensors.index.json"
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
    """The tensors of a safetensors file, without their data; a ``DgemmaError`` names a cut-off or damaged file."""
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
        raise DgemmaError(f"{path} is no safetensors file, or its header is cut off", _FETCH_AGAIN) from None
    if size != expected:
        raise DgemmaError(f"{path} has {size:,} bytes, its header promises {expected:,}", _FETCH_AGAIN)
    return tensors


def merged(headers: Iterable[Mapping[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of all shards; a ``DgemmaError`` names one that two of them have."""
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        if doubled := tensors.keys() & header.keys():
            name = min(doubled)
            raise DgemmaError(
                f"{header[name].path} holds {name} again, which another shard has",
                f"That one is {tensors[name].path}. {_FETCH_AGAIN}",
            )
        tensors.update(header)
    return tensors


def open_tensors(folder: Path) -> dict[str, mx.array]:
    """Every tensor of the checkpoint under its own name; nothing is read from disk before it is used."""
    files = shard_files(folder)
    merged(map(read_header, files))  # complete, and no tensor twice
    tensors: dict[str, mx.array] = {}
    for path in files:
        try:
            loaded = mx.load(str(path), format="safetensors")
        except (RuntimeError, ValueError) as error:
            raise DgemmaError(f"{path} cannot be loaded: {error}", _FETCH_AGAIN) from None
        assert isinstance(loaded, dict)
        tensors.update(loaded)
    return tensors
