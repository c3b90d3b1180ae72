"""A source checkpoint: its tensors are located by their headers and read a few rows at a time."""

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
from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.hub import Checkpoint, remote_headers
from dgemma_mlx.checkpoint.names import module_quantization, parameter_names, source_name
from dgemma_mlx.checkpoint.output import SMALL_FILES
from dgemma_mlx.checkpoint.shards import StoredTensor, merged, stored_tensors, tower_only, weight_files
from dgemma_mlx.checkpoint.vision_config import VISION_FILE
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import is_clutter
from dgemma_mlx.json_text import read_json
from dgemma_mlx.model.text import DiffusionGemma

BLOCK_BYTES = 64 << 20  # size of the values, as bfloat16, that are read and packed at a time

_DAMAGED = "The checkpoint may be damaged; download it again."
_NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "U8": np.uint8, "U32": np.uint32}
_SUFFIXES = (".weight", ".scales", ".biases")
_FLOATING = ("BF16", "F16", "F32")
# For each floating dtype, the bits of the largest magnitude that is finite in bfloat16. Larger bits are NaN,
# infinity, or a number that would be rounded to infinity.
_LARGEST_FINITE = {"BF16": (np.uint16, 0x7F7F), "F16": (np.uint16, 0x7BFF), "F32": (np.uint32, 0x7F7F7FFF)}

Rows = np.ndarray[Any, np.dtype[Any]]  # rows of a tensor in the stored dtype; bfloat16 as uint16


def read_rows(tensor: StoredTensor, start: int, stop: int, name: str) -> Rows:
    """Read rows ``start`` to ``stop`` (exclusive) of the first axis of a tensor.

    ``name`` is the tensor's name for errors. Raises ``DgemmaError`` if the file cannot be read, or the rows hold NaN or
    infinity.
    """
    dtype, row_bytes = _NUMPY[tensor.dtype], tensor.nbytes // (tensor.shape[0] if tensor.shape else 1)
    count = (stop - start) * row_bytes // ITEM_SIZE[tensor.dtype]
    try:
        values = np.fromfile(tensor.path, dtype, count, offset=tensor.start + start * row_bytes)
    except OSError as error:
        raise DgemmaError(f"{tensor.path} cannot be read: {error.strerror}", _DAMAGED) from None
    if len(values) != count:
        raise DgemmaError(f"{tensor.path} ended unexpectedly while {name} was read", _DAMAGED)
    if tensor.dtype in _LARGEST_FINITE:
        bits, largest = _LARGEST_FINITE[tensor.dtype]
        if ((values.view(bits) << bits(1)) > bits(largest << 1)).any():  # the shift drops the sign
            raise DgemmaError(f"{name} in {tensor.path} holds NaN or infinity", _DAMAGED)
    return values.reshape(stop - start, *tensor.shape[1:]) if tensor.shape else values.reshape(())


@dataclass(frozen=True)
class Weight:
    """One weight of the source: a tensor, or a packed tensor with its scales and biases.

    Attributes:
        name: The published name without ``.weight``.
        suffix: ".weight", or "" if the tensor's name has no suffix.
        shape: The shape of the unpacked values.
        stored: The stored tensors: the values, or packed values, scales and (in the affine mode) biases.
        format: How the weight is packed, or None if it is not.
    """

    name: str
    suffix: str
    shape: tuple[int, ...]
    stored: tuple[StoredTensor, ...]
    format: Format | None

    @property
    def nbytes(self) -> int:
        """Size of the stored tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.stored)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows of the first axis, about ``BLOCK_BYTES`` each."""
        largest = max(1, self.nbytes, 2 * self.size)  # packed weights grow when they are read
        step = max(1, BLOCK_BYTES * self.rows // largest)
        return ((start, min(start + step, self.rows)) for start in range(0, self.rows, step))

    def load(self, start: int, stop: int) -> list[Rows]:
        """Read rows of each stored tensor. This does not use MLX, so that any thread may call it.

        Raises ``DgemmaError`` if the rows cannot be read, or hold NaN or infinity.
        """
        return [read_rows(tensor, start, stop, self.name) for tensor in self.stored]

    def arrays(self, rows: list[Rows]) -> list[mx.array]:
        """Return loaded rows as MLX arrays, in the order of ``stored``."""
        pairs = zip(rows, self.stored, strict=True)
        return [mx.array(part).view(mx.bfloat16) if tensor.dtype == "BF16" else mx.array(part)
                for part, tensor in pairs]  # fmt: skip

    def values(self, rows: list[Rows]) -> mx.array:
        """Return the values of loaded rows as bfloat16. Integer tensors that are not packed keep their dtype."""
        parts = self.arrays(rows)
        if self.format is not None:
            return self.format.unpack(parts)
        (values,) = parts
        return values.astype(mx.bfloat16) if mx.issubdtype(values.dtype, mx.floating) else values


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been checked: it has every tensor, in the expected shape.

    Attributes:
        checkpoint: Where the checkpoint is.
        raw_config: The content of config.json.
        config: The parsed configuration.
        text: The weights of the text network by parameter path without ``.weight``, in the network's order.
        vision: The weights of the vision tower, sorted by name.
        unknown: Names of tensors that are not part of DiffusionGemma; they are not converted.
    """

    checkpoint: Checkpoint
    raw_config: dict[str, Any]
    config: ModelConfig
    text: dict[str, Weight]
    vision: list[Weight]
    unknown: list[str]

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return self.checkpoint.folder

    @property
    def is_packed(self) -> bool:
        """Whether any weight of the text network is packed."""
        return any(weight.format is not None for weight in self.text.values())

    def small_files(self) -> list[Path]:
        """Return the files that are copied unchanged: tokenizer, chat template, processor and licence."""
        found = {path for pattern in SMALL_FILES for path in self.folder.glob(pattern)}
        return sorted(path for path in found if path.is_file() and not is_clutter(path))

    @property
    def fingerprint(self) -> list[list[Any]]:
        """Name, size and modification time (nanoseconds) of each weight file."""
        stats = [(path.name, path.stat()) for path in weight_files(self.folder)]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def open_source(checkpoint: Checkpoint) -> Source:
    """Read the configuration and all headers of a checkpoint and check that they agree. No weight is read.

    If the weights are still on the Hub, their headers are read there. Raises ``DgemmaError`` if a file cannot be
    read, or if a tensor is missing or has a wrong shape or dtype.
    """
    folder = checkpoint.folder
    raw = read_json(folder / "config.json")
    config = ModelConfig.load(folder)
    stored = stored_tensors(folder) if checkpoint.has_weights else merged(_remote_headers(checkpoint))
    text_names, vision_names = parameter_names(stored)
    text: dict[str, Weight] = {}
    used: set[str] = set()
    parameters = dict(tree_flatten(DiffusionGemma(config.text).parameters()))
    for path, array in parameters.items():
        stem = path.removesuffix(".weight")
        suffixes = ("",) if stem == path else _SUFFIXES  # scales of norms and layer scalars have no suffix
        names = {suffix: text_names[stem + suffix] for suffix in suffixes if stem + suffix in text_names}
        if not names:
            raise DgemmaError(f"{folder} lacks the tensor {source_name(path)}", _DAMAGED)
        used.update(names.values())
        parts = {suffix: stored[name] for suffix, name in names.items()}
        text[stem] = _weight(source_name(path).removesuffix(".weight"), parts, config, stem, array.shape)
    unknown = sorted(set(text_names.values()) - used)
    return Source(checkpoint, raw, config, text, _vision(stored, vision_names, config), unknown)


def _remote_headers(checkpoint: Checkpoint) -> Iterator[dict[str, StoredTensor]]:
    """Yield the tensors of each weight file of a checkpoint on the Hub."""
    for file, header in remote_headers(checkpoint).items():
        tensors = {
            name: StoredTensor(checkpoint.folder / file, tensor.dtype, tuple(tensor.shape), *tensor.data_offsets)
            for name, tensor in header.tensors.items()
        }
        yield tower_only(tensors) if file == VISION_FILE else tensors


def _weight(name: str, parts: dict[str, StoredTensor], config: ModelConfig, path: str,
            shape: tuple[int, ...] | None) -> Weight:
    """Return the weight that is stored in ``parts`` (by suffix), after checking dtypes and shapes.

    ``path`` is the module's path in ``quantization``. Without ``shape``, any shape is accepted, as for the vision
    tower.
    """
    first = next(iter(parts.values()))
    for suffix, tensor in parts.items():
        size = ITEM_SIZE.get(tensor.dtype)
        if size is None or (shape is not None and len(parts) == 1 and tensor.dtype not in _FLOATING):
            raise DgemmaError(
                f"{name}{suffix} in {tensor.path} has dtype {tensor.dtype}, which cannot be converted", _DAMAGED
            )
        if tensor.nbytes != math.prod(tensor.shape) * size or not tensor.nbytes:
            raise DgemmaError(
                f"{name} in {tensor.path} has {tensor.nbytes} bytes, which do not match its shape", _DAMAGED
            )
    if ".scales" not in parts:
        if shape is not None and first.shape != shape:
            raise DgemmaError(
                f"{name} in {first.path} has shape {first.shape}, but config.json requires {shape}", _DAMAGED
            )
        return Weight(name, next(iter(parts)), first.shape, (first,), None)
    if ".weight" not in parts:
        raise DgemmaError(f"{name} has scales, but no packed weight", _DAMAGED)
    if config.quantization is None:
        raise DgemmaError(f"{name} is packed, but config.json does not describe how", _DAMAGED)
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
            raise DgemmaError(f"{name}{part.suffix} {got}; {packing} requires {part.dtype} {part.shape}", _DAMAGED)
    return Weight(name, ".weight", values, tuple(parts[part.suffix] for part in packing.parts(values)), packing)


def _vision(stored: dict[str, StoredTensor], names: list[str], config: ModelConfig) -> list[Weight]:
    """Return the weights of the vision tower; packed weights include their scales and biases."""
    weights = []
    packed = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    for stem in sorted(packed):
        parts = {suffix: stored[stem + suffix] for suffix in _SUFFIXES if stem + suffix in stored}
        weights.append(_weight(stem, parts, config, stem, None))
    parts_of_packed = {stem + suffix for stem in packed for suffix in _SUFFIXES}
    weights += [_weight(name, {"": stored[name]}, config, name, None) for name in names if name not in parts_of_packed]
    return sorted(weights, key=lambda weight: weight.name)
