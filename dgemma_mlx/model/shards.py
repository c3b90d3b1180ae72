"""The safetensors files of a checkpoint folder: found, checked for completeness, opened lazily."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from dgemma_mlx.config import read_json
from dgemma_mlx.errors import DgemmaError

_FETCH_AGAIN = "The download may not have finished; fetch the checkpoint again."
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


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
    names = sorted(set(weight_map.values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DgemmaError(f"{index} names a shard outside the folder: {name!r}")
        if not (folder / name).exists():
            raise DgemmaError(f"{index.name} names {name}, which is not in {folder}", _FETCH_AGAIN)
    return [folder / name for name in names]


def check_complete(path: Path) -> None:
    """Compares the file's size with the end of its last tensor; a ``DgemmaError`` names a cut-off file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER):
                raise ValueError("its header does not fit")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (OSError, struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DgemmaError(f"{path} is no readable safetensors file: {error}", _FETCH_AGAIN) from None
    if size != expected:
        raise DgemmaError(f"{path} has {size:,} bytes, its header promises {expected:,}", _FETCH_AGAIN)


def open_tensors(folder: Path) -> dict[str, mx.array]:
    """Every tensor of the checkpoint under its own name; nothing is read from disk before it is used."""
    tensors: dict[str, mx.array] = {}
    for path in shard_files(folder):
        check_complete(path)
        try:
            loaded = mx.load(str(path), format="safetensors")
        except RuntimeError as error:
            raise DgemmaError(f"{path} cannot be loaded: {error}", _FETCH_AGAIN) from None
        assert isinstance(loaded, dict)
        if doubled := tensors.keys() & loaded.keys():
            raise DgemmaError(f"{path} holds {min(doubled)} again, which another shard has", _FETCH_AGAIN)
        tensors.update(loaded)
    return tensors
