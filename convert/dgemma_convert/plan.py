"""What a conversion will write, worked out from the headers before a byte of the weights is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgemma_convert.formats import PLAIN, Format, Part
from dgemma_convert.recipes import CLASSES, VISION, Recipe, class_of, layer_of
from dgemma_convert.source import Source, Weight
from dgemma_mlx.checkpoint.names import some_of
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.memory import run_memory
from dgemma_mlx.version import __version__

SHARD_BYTES = 5_000_000_000
MANIFEST = "conversion_manifest.json"
_ROOM = 10_000_000  # on the disk, for headers, index, report and card
CONTEXT = 8192  # positions that the estimate of memory assumes


@dataclass(frozen=True)
class Target:
    """One weight of the output: where it comes from, how it is packed (None: not), what is stored."""

    tensor_class: str
    weight: Weight
    format: Format | None
    parts: tuple[Part, ...]

    @property
    def is_copy(self) -> bool:
        """Whether the stored bytes go over as they are: packed, and the source is packed alike."""
        return self.format is not None and self.format == self.weight.format

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class ClassSummary:
    """A row of the plan's table."""

    tensor_class: str
    tensors: int
    formats: tuple[str, ...]
    values: int
    bytes_in: int
    bytes_out: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_out / self.values


@dataclass(frozen=True)
class Plan:
    """A checked source and, for each shard of the output, what stands in it."""

    source: Source
    output: Path
    recipe: Recipe
    shards: dict[str, tuple[Target, ...]]
    warnings: tuple[str, ...] = ()
    mixed: Mapping[str, Any] | None = field(default=None)
    """the table of measured errors, for the mixed recipe"""

    @property
    def partial(self) -> Path:
        """Where the output is written until it is whole."""
        return self.output.with_name(f".{self.output.name}.partial")

    @property
    def targets(self) -> list[Target]:
        return [target for shard in self.shards.values() for target in shard]

    @property
    def bytes_in(self) -> int:
        return sum(target.weight.nbytes for target in self.targets)

    @property
    def bytes_out(self) -> int:
        return sum(target.nbytes for target in self.targets)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_out / sum(target.weight.size for target in self.targets)

    @property
    def bytes_needed(self) -> int:
        """On the disk, beside the shards that an earlier run has finished."""
        done = sum((self.partial / name).stat().st_size for name in self.shards if os.path.exists(self.partial / name))
        small = sum(path.stat().st_size for path in self.source.small_files())
        return self.bytes_out + small + _ROOM - done

    @property
    def bytes_to_download(self) -> int:
        return 0 if self.source.checkpoint.has_weights else self.bytes_in

    @property
    def _parent(self) -> Path:
        """The nearest folder around the output that exists."""
        return next(parent for parent in self.output.absolute().parents if parent.exists())

    @property
    def bytes_free(self) -> int:
        return shutil.disk_usage(self._parent).free

    @property
    def memory_to_run(self) -> int:
        """Bytes that generating with the result will take, an estimate."""
        return run_memory(self.source.config, self.bytes_out, CONTEXT)

    def classes(self) -> list[ClassSummary]:
        """Totals of each tensor class."""
        rows = []
        for name in CLASSES:
            members = [target for target in self.targets if target.tensor_class == name]
            if members:
                formats = {str(target.format) if target.format else "bf16" for target in members}
                rows.append(ClassSummary(
                    name, len(members), tuple(sorted(formats)), sum(target.weight.size for target in members),
                    sum(target.weight.nbytes for target in members), sum(target.nbytes for target in members),
                ))  # fmt: skip
        return rows

    def quantization(self) -> dict[str, Any] | None:
        """config.json's ``quantization``: the format most values have, and every module that differs."""
        sizes: dict[Format, int] = {}
        for target in self.targets:
            if target.format is not None:
                sizes[target.format] = sizes.get(target.format, 0) + target.weight.size
        if not sizes:
            return None
        common = max(sizes, key=lambda packing: sizes[packing])
        entries: dict[str, Any] = common.as_config()
        for target in self.targets:
            if target.format is not None and target.format != common:
                entries[target.weight.name] = target.format.as_config()
            elif target.format is None and target.weight.suffix == ".weight" and len(target.weight.shape) > 1:
                entries[target.weight.name] = False
        return entries

    def as_dict(self) -> dict[str, Any]:
        """The plan for ``--json``."""
        return {
            "source": self.source.checkpoint.name, "output": str(self.output), "recipe": self.recipe.name,
            "classes": [
                {"class": row.tensor_class, "tensors": row.tensors, "formats": list(row.formats),
                 "values": row.values, "bytes_in": row.bytes_in, "bytes_out": row.bytes_out,
                 "bits_per_weight": round(row.bits_per_weight, 3)}
                for row in self.classes()
            ],
            "shards": len(self.shards), "bytes_in": self.bytes_in, "bytes_out": self.bytes_out,
            "bytes_to_download": self.bytes_to_download,
            "bits_per_weight": round(self.bits_per_weight, 3), "bytes_needed": self.bytes_needed,
            "bytes_free": self.bytes_free, "memory_to_run": self.memory_to_run, "warnings": list(self.warnings),
        }  # fmt: skip

    def fingerprint(self) -> str:
        """Of all that decides the output's bytes; a run may go on only where this is the same."""
        layout = {
            name: [[target.weight.name, str(target.format), [part.suffix for part in target.parts]] for target in shard]
            for name, shard in self.shards.items()
        }
        decided = [__version__, str(self.source.folder.resolve()), self.source.fingerprint, layout]
        return hashlib.sha256(json.dumps(decided).encode()).hexdigest()

    def check_room(self) -> None:
        """Raises a ``DgemmaError`` where the disks cannot take the download and the output."""
        needed = {self._parent.stat().st_dev: (self._parent, self.bytes_needed)}
        if self.bytes_to_download:
            cache = self.source.folder
            _, already = needed.get(cache.stat().st_dev, (cache, 0))
            needed[cache.stat().st_dev] = (cache, already + self.bytes_to_download)
        for folder, count in needed.values():
            free = shutil.disk_usage(folder).free
            if count > free:
                raise DgemmaError(
                    f"{count / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free",
                    "Free some space, choose a smaller recipe, or name a folder on another disk with -o.",
                )


def make_plan(source: Source, output: Path, recipe: Recipe, *, shard_bytes: int = SHARD_BYTES,
              formats: Mapping[str, Format] | None = None, mixed: Mapping[str, Any] | None = None) -> Plan:
    """Applies a recipe to a source. ``formats`` (by parameter path) stand before the recipe's rules."""
    layers = source.config.text.num_hidden_layers
    targets, odd = [], []
    for path, weight in source.text.items():
        tensor_class = class_of(path + weight.suffix)
        packing = (formats or {}).get(path) or recipe.format_of(tensor_class, layer_of(path), layers)
        if packing is not None and not packing.fits(weight.shape):
            odd.append(weight.name)
            packing = None
        targets.append(_target(tensor_class, weight, packing))
    targets += [_target(VISION, weight, weight.format) for weight in source.vision]
    warnings = []
    if odd:
        warnings.append(f"rows that no group fits stay bf16: {some_of(odd)}")
    if source.unknown:
        warnings.append(f"unknown tensors are left out: {some_of(source.unknown)}")
    if source.is_packed:
        warnings.append(_loss(recipe))
    return Plan(source, output, recipe, _shards(targets, shard_bytes), tuple(warnings), mixed)


def _target(tensor_class: str, weight: Weight, packing: Format | None) -> Target:
    if packing is not None:
        return Target(tensor_class, weight, packing, packing.parts(weight.shape))
    stored = weight.stored[0].dtype
    kept = weight.format is None and stored in ("U8", "U32")  # no numbers to round: as it is
    return Target(tensor_class, weight, None, (Part(weight.suffix, stored if kept else PLAIN, weight.shape),))


def _shards(targets: list[Target], shard_bytes: int) -> dict[str, tuple[Target, ...]]:
    """In order, as many to a shard as fit; the parts of one weight stay together."""
    groups: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if groups[-1] and size + target.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += target.nbytes
    if len(groups) == 1:
        return {"model.safetensors": tuple(groups[0])}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": tuple(group) for i, group in enumerate(groups, 1)}


def _loss(recipe: Recipe) -> str:
    if recipe.name == "bf16":
        return "the source is packed already: bf16 makes it larger, and brings nothing back that packing has lost"
    return (
        "the source is packed already: parts that change their format are rounded a second time, so this is less exact "
        "than the same recipe from the bf16 checkpoint"
    )
