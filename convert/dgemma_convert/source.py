"""A source checkpoint: its tensors found by their headers, read a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dgemma_convert.formats import ITEM_SIZE, PLAIN, Format
from dgemma_mlx.checkpoint.config import ModelConfig, read_json
from dgemma_mlx.checkpoint.hub import Checkpoint, remote_headers
from dgemma_mlx.checkpoint.names import module_quantization, parameter_names, source_name
from dgemma_mlx.checkpoint.shards import StoredTensor, merged, read_header, shard_files
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.text import DiffusionGemma

BLOCK_BYTES = 64 << 20  # of values in bfloat16, read and packed at a time

_DAMAGED = "Fetch the checkpoint again."
_NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U8": np.uint8, "U32": np.uint32}
_SUFFIXES = (".weight", ".scales", ".biases")
_COPIED = (
    "generation_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja", "LICENSE*", "NOTICE*",
)  # fmt: skip
_FLOATING = ("BF16", "F16", "F32")
# The bits of the largest magnitude that is finite in bfloat16; above are NaN, infinity and what would round to it.
_LARGEST = {"BF16": (np.uint16, 0x7F7F), "F16": (np.uint16, 0x7BFF), "F32": (np.uint32, 0x7F7F7FFF)}


Rows = np.ndarray[Any, np.dtype[Any]]
"""Rows of a tensor as they are stored; bfloat16 as uint16."""


def read_rows(tensor: StoredTensor, start: int, stop: int, name: str) -> Rows:
    """Rows of the first axis. NaN or infinity is an error that names the tensor."""
    dtype, row_bytes = _NUMPY[tensor.dtype], tensor.nbytes // (tensor.shape[0] if tensor.shape else 1)
    count = (stop - start) * row_bytes // ITEM_SIZE[tensor.dtype]
    try:
        values = np.fromfile(tensor.path, dtype, count, offset=tensor.start + start * row_bytes)
    except OSError as error:
        raise DgemmaError(f"{tensor.path} cannot be read: {error.strerror}", _DAMAGED) from None
    if len(values) != count:
        raise DgemmaError(f"{tensor.path} became shorter while it was read ({name})", _DAMAGED)
    if tensor.dtype in _LARGEST:
        bits, largest = _LARGEST[tensor.dtype]
        if ((values.view(bits) << bits(1)) > bits(largest << 1)).any():  # without the sign
            raise DgemmaError(
                f"{name} in {tensor.path} holds NaN or infinity", "Its weights are damaged; fetch the checkpoint again."
            )
    return values.reshape(stop - start, *tensor.shape[1:]) if tensor.shape else values.reshape(())


@dataclass(frozen=True)
class Weight:
    """A tensor of the source, or a packed weight with its scales and biases.

    ``name`` is the published one without ``.weight``; ``shape`` that of the values, unpacked.
    """

    name: str
    suffix: str
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]
    format: Format | None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of the first axis; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of the first axis, about ``BLOCK_BYTES`` each."""
        largest = max(1, self.nbytes, 2 * self.size)  # packed ones grow when they are read
        step = max(1, BLOCK_BYTES * self.rows // largest)
        return ((start, min(start + step, self.rows)) for start in range(0, self.rows, step))

    def load(self, start: int, stop: int) -> list[Rows]:
        """Some rows of each part as they are stored, without MLX, so that another thread may do it."""
        return [read_rows(tensor, start, stop, self.name) for tensor in self.stored]

    def arrays(self, rows: list[Rows]) -> list[mx.array]:
        """What was loaded: the values, or packed values, scales and biases."""
        pairs = zip(rows, self.stored, strict=True)
        return [mx.array(part).view(mx.bfloat16) if tensor.dtype == "BF16" else mx.array(part)
                for part, tensor in pairs]  # fmt: skip

    def values(self, rows: list[Rows]) -> mx.array:
        """The values of what was loaded, in bfloat16."""
        parts = self.arrays(rows)
        if self.format is not None:
            return self.format.unpack(parts)
        (values,) = parts
        return values.astype(mx.bfloat16) if mx.issubdtype(values.dtype, mx.floating) else values


@dataclass(frozen=True)
class Source:
    """A checkpoint folder that was checked: every tensor is there, in its right shape."""

    checkpoint: Checkpoint
    raw_config: dict[str, Any]
    config: ModelConfig
    text: dict[str, Weight]
    """by parameter path without ``.weight``, in the network's order"""
    vision: list[Weight]
    unknown: list[str]
    """tensors that no DiffusionGemma has; not converted"""

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def is_packed(self) -> bool:
        return any(weight.format is not None for weight in self.text.values())

    def small_files(self) -> list[Path]:
        """Those that go over as they are: tokenizer, chat template, processor, licence."""
        return sorted({path for pattern in _COPIED for path in self.folder.glob(pattern) if path.is_file()})

    @property
    def fingerprint(self) -> list[list[Any]]:
        """Name, size and time of change of each weight file."""
        stats = [(path.name, path.stat()) for path in shard_files(self.folder)]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def open_source(checkpoint: Checkpoint) -> Source:
    """Reads the configuration and all headers and checks them against each other; no weight is read.

    Where the weights are still on the Hub, their headers are read there.
    """
    folder = checkpoint.folder
    raw = read_json(folder / "config.json")
    config = ModelConfig.load(folder)
    stored = merged(map(read_header, shard_files(folder)) if checkpoint.has_weights else _remote_headers(checkpoint))
    text_names, vision_names = parameter_names(stored)
    text: dict[str, Weight] = {}
    used: set[str] = set()
    parameters = dict(tree_flatten(DiffusionGemma(config.text).parameters()))
    for path, array in parameters.items():
        stem = path.removesuffix(".weight")
        suffixes = ("",) if stem == path else _SUFFIXES  # norms' scales and scalars have no suffix
        names = {suffix: text_names[stem + suffix] for suffix in suffixes if stem + suffix in text_names}
        if not names:
            raise DgemmaError(f"{folder} lacks {source_name(path)}", _DAMAGED)
        used.update(names.values())
        parts = {suffix: stored[name] for suffix, name in names.items()}
        text[stem] = _weight(source_name(path).removesuffix(".weight"), parts, config, stem, array.shape)
    unknown = sorted(set(text_names.values()) - used)
    return Source(checkpoint, raw, config, text, _vision(stored, vision_names, config), unknown)


def _remote_headers(checkpoint: Checkpoint) -> Iterator[dict[str, StoredTensor]]:
    for file, header in remote_headers(checkpoint.name).items():
        yield {
            name: StoredTensor(checkpoint.folder / file, tensor.dtype, tuple(tensor.shape), *tensor.data_offsets)
            for name, tensor in header.tensors.items()
        }


def _weight(name: str, parts: dict[str, StoredTensor], config: ModelConfig, path: str,
            shape: tuple[int, ...] | None) -> Weight:
    """Puts the parts of one weight together; without ``shape`` any is right (the vision tower's)."""
    first = next(iter(parts.values()))
    for suffix, tensor in parts.items():
        size = ITEM_SIZE.get(tensor.dtype)
        if size is None or (shape is not None and len(parts) == 1 and tensor.dtype not in _FLOATING):
            raise DgemmaError(
                f"{name}{suffix} in {tensor.path} has dtype {tensor.dtype}, which cannot be converted", _DAMAGED
            )
        if tensor.nbytes != math.prod(tensor.shape) * size or not tensor.nbytes:
            raise DgemmaError(f"{name} in {tensor.path} has {tensor.nbytes} bytes, not those of its shape", _DAMAGED)
    if ".scales" not in parts:
        if shape is not None and first.shape != shape:
            raise DgemmaError(
                f"{name} in {first.path} has shape {first.shape}, config.json asks for {shape}", _DAMAGED
            )
        return Weight(name, next(iter(parts)), first.shape, (first,), None)
    if config.quantization is None or ".weight" not in parts:
        raise DgemmaError(f"{name} is packed, but config.json does not say how", _DAMAGED)
    try:
        packing = Format.from_config(module_quantization(config.quantization, path))
    except ValueError as error:
        raise DgemmaError(f"config.json: {name} cannot be unpacked: {error}", _DAMAGED) from None
    values = shape or (*parts[".scales"].shape[:-1], parts[".scales"].shape[-1] * packing.group_size)
    for part in packing.parts(values):
        found = parts.get(part.suffix)
        dtypes = _FLOATING if part.dtype == PLAIN else (part.dtype,)
        if found is None or found.shape != part.shape or found.dtype not in dtypes:
            got = "is missing" if found is None else f"has dtype {found.dtype} and shape {found.shape}"
            raise DgemmaError(f"{name}{part.suffix} {got}; {packing} asks for {part.dtype} {part.shape}", _DAMAGED)
    return Weight(name, ".weight", values, tuple(parts[part.suffix] for part in packing.parts(values)), packing)


def _vision(stored: dict[str, StoredTensor], names: list[str], config: ModelConfig) -> list[Weight]:
    """The vision tensors, packed ones with their scales."""
    weights = []
    packed = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    for stem in sorted(packed):
        parts = {suffix: stored[stem + suffix] for suffix in _SUFFIXES if stem + suffix in stored}
        weights.append(_weight(stem, parts, config, stem, None))
    parts_of_packed = {stem + suffix for stem in packed for suffix in _SUFFIXES}
    weights += [_weight(name, {"": stored[name]}, config, name, None) for name in names if name not in parts_of_packed]
    return sorted(weights, key=lambda weight: weight.name)
