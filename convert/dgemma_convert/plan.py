"""The plan of a conversion: what it will write, computed from headers before any weight is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgemma_convert.formats import PLAIN, Format, Part
from dgemma_convert.recipes import CLASSES, VISION, Recipe, class_of, layer_of
from dgemma_convert.source import Source, Weight
from dgemma_mlx.checkpoint.names import some_of
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.memory import run_memory, weight_memory
from dgemma_mlx.sizes import size
from dgemma_mlx.version import __version__

SHARD_BYTES = 5_000_000_000
MANIFEST = "conversion_manifest.json"
_EXTRA_BYTES = 10_000_000  # on the disk, for headers, index, report and card
CONTEXT = 8192  # number of tokens of context in the estimate of memory


@dataclass(frozen=True)
class Target:
    """One weight of the output.

    Attributes:
        tensor_class: The class of the weight, one of ``recipes.CLASSES``.
        weight: The weight of the source that it is made from.
        format: How the weight is packed, or None if it is not.
        parts: The tensors that store the weight.
    """

    tensor_class: str
    weight: Weight
    format: Format | None
    parts: tuple[Part, ...]

    @property
    def is_copy(self) -> bool:
        """Whether the stored bytes are copied, because the source is packed in the same format."""
        return self.format is not None and self.format == self.weight.format

    @property
    def nbytes(self) -> int:
        """Size of the stored tensors in bytes."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class ClassSummary:
    """The totals of one class of tensors, a row of the plan's table.

    Attributes:
        tensor_class: Name of the class.
        tensors: Number of weights.
        formats: Names of all formats in the class, sorted; "bf16" for weights that are not packed.
        values: Number of values in all weights.
        bytes_in: Size in the source, in bytes.
        bytes_out: Size in the output, in bytes.
    """

    tensor_class: str
    tensors: int
    formats: tuple[str, ...]
    values: int
    bytes_in: int
    bytes_out: int

    @property
    def bits_per_weight(self) -> float:
        """Mean number of stored bits for each value, including scales and biases."""
        return 8 * self.bytes_out / self.values


@dataclass(frozen=True)
class MixedFormats:
    """The outcome of the recipe "mixed".

    Attributes:
        formats: The format of each packed weight, by parameter path.
        table: The budget and the measured errors, for the report.
    """

    formats: Mapping[str, Format]
    table: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A checked source, and the content of each shard of the output.

    Attributes:
        source: The source checkpoint.
        output: The folder to write.
        recipe: The recipe of the conversion.
        shards: The weights in each weight file, by file name.
        warnings: Lines for the user.
        mixed: The table of measured errors if the recipe is "mixed", else None.
    """

    source: Source
    output: Path
    recipe: Recipe
    shards: dict[str, tuple[Target, ...]]
    warnings: tuple[str, ...] = ()
    mixed: Mapping[str, Any] | None = None

    @property
    def partial(self) -> Path:
        """The hidden folder next to the output, in which the output is written until it is complete."""
        return self.output.with_name(f".{self.output.name}.partial")

    @property
    def targets(self) -> list[Target]:
        """All weights of the output, in file order."""
        return [target for shard in self.shards.values() for target in shard]

    @property
    def bytes_in(self) -> int:
        """Size of all weights in the source, in bytes."""
        return sum(target.weight.nbytes for target in self.targets)

    @property
    def bytes_out(self) -> int:
        """Size of all weights in the output, in bytes."""
        return sum(target.nbytes for target in self.targets)

    @property
    def bits_per_weight(self) -> float:
        """Mean number of stored bits for each value of the output."""
        return 8 * self.bytes_out / sum(target.weight.size for target in self.targets)

    @property
    def bytes_needed(self) -> int:
        """Free disk space that the output needs, in bytes, without the shards that an earlier run has written."""
        done = sum((self.partial / name).stat().st_size for name in self.shards if os.path.exists(self.partial / name))
        small = sum(path.stat().st_size for path in self.source.small_files())
        return self.bytes_out + small + _EXTRA_BYTES - done

    @property
    def bytes_to_download(self) -> int:
        """Size of the weights that are still on the Hub, in bytes."""
        return 0 if self.source.checkpoint.has_weights else self.bytes_in

    @property
    def _parent(self) -> Path:
        """The nearest parent folder of the output that exists."""
        return next(parent for parent in self.output.absolute().parents if parent.exists())

    @property
    def bytes_free(self) -> int:
        """Free space on the disk of the output, in bytes."""
        return shutil.disk_usage(self._parent).free

    @property
    def context(self) -> int:
        """Number of tokens of context in ``memory_to_run``: ``CONTEXT``, or all that the model supports."""
        return min(CONTEXT, self.source.config.text.max_position_embeddings)

    @property
    def memory_to_run(self) -> int:
        """Estimated memory for generating with the output and ``context`` tokens of context, in bytes."""
        return self.memory_with(self.context)

    def memory_with(self, context: int) -> int:
        """Return the estimated memory for generating with the output and a number of tokens of context, in bytes."""
        return run_memory(self.source.config, self.loaded_bytes, context)

    @property
    def loaded_bytes(self) -> int:
        """Size of the output's weights in memory, in bytes. The vision tower is not loaded for generating."""
        return weight_memory(
            part for target in self.targets if target.tensor_class != VISION for part in target.parts
        )  # fmt: skip

    def classes(self) -> list[ClassSummary]:
        """Return the totals of each class that has tensors."""
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
        """Return ``quantization`` for config.json, or None if nothing is packed.

        It holds the format of most values, and an entry for every module that differs.
        """
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
        """Return the plan as ``dgemma-mlx convert --dry-run --json`` prints it."""
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
        """Return a hash of everything that decides the bytes of the output.

        An interrupted conversion can be resumed only with the same fingerprint.
        """
        layout = {
            name: [[target.weight.name, str(target.format), [part.suffix for part in target.parts]] for target in shard]
            for name, shard in self.shards.items()
        }
        content = [__version__, str(self.source.folder.resolve()), self.source.fingerprint, layout]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def check_room(self) -> None:
        """Raise ``DgemmaError`` if there is not enough free disk space for the download and the output."""
        needed = {self._parent.stat().st_dev: (self._parent, self.bytes_needed)}
        if self.bytes_to_download:
            cache = self.source.folder
            _, already = needed.get(cache.stat().st_dev, (cache, 0))
            needed[cache.stat().st_dev] = (cache, already + self.bytes_to_download)
        for folder, count in needed.values():
            free = shutil.disk_usage(folder).free
            if count > free:
                raise DgemmaError(
                    f"{size(count)} are needed in {folder}, but only {size(free)} are free",
                    "Free some space, choose a smaller recipe, or name a folder on another disk with -o.",
                )


def make_plan(source: Source, output: Path, recipe: Recipe, *, shard_bytes: int = SHARD_BYTES,
              mixed: MixedFormats | None = None, vision: Format | None = None) -> Plan:
    """Apply a recipe to a source.

    Args:
        source: The source checkpoint.
        output: The folder to write.
        recipe: The recipe.
        shard_bytes: Maximum size of one weight file, unless a single weight is larger.
        mixed: Formats that the recipe "mixed" has chosen. They take precedence over the rules of the recipe.
        vision: Format of the vision tower's matrices that are not packed in the source; None keeps them as they are.
    """
    layers = source.config.text.num_hidden_layers
    formats: Mapping[str, Format] = {} if mixed is None else mixed.formats
    targets, indivisible = [], []
    for path, weight in source.text.items():
        tensor_class = class_of(path + weight.suffix)
        packing = formats.get(path) or recipe.format_of(tensor_class, layer_of(path), layers)
        if packing is not None and not packing.fits(weight.shape):
            indivisible.append(weight.name)
            packing = None
        targets.append(_target(tensor_class, weight, packing))
    targets += vision_targets(source, vision)
    if vision is not None:
        indivisible += [weight.name for weight in source.vision if is_matrix(weight) and not vision.fits(weight.shape)]
    warnings = []
    if indivisible:
        warnings.append(f"tensors whose rows do not divide into groups stay bf16: {some_of(indivisible)}")
    if source.unknown:
        warnings.append(f"unknown tensors are left out: {some_of(source.unknown)}")
    if source.is_packed:
        warnings.append(_repacking_warning(recipe))
    table = None if mixed is None else mixed.table
    return Plan(source, output, recipe, _shards(targets, shard_bytes), tuple(warnings), table)


def vision_targets(source: Source, packing: Format | None) -> list[Target]:
    """Return the targets of the vision tower, whose plain matrices are packed where a format is given and fits."""
    targets = []
    for weight in source.vision:
        if packing is not None and is_matrix(weight) and packing.fits(weight.shape):
            named = replace(weight, name=weight.name.removesuffix(".weight"), suffix=".weight")
            targets.append(_target(VISION, named, packing))
        else:
            targets.append(_target(VISION, weight, weight.format))
    return targets


def is_matrix(weight: Weight) -> bool:
    """Return whether a weight of the vision tower is the plain matrix of a linear map."""
    plain = weight.format is None and weight.stored[0].dtype not in ("U8", "U32")
    return plain and weight.name.endswith(".weight") and len(weight.shape) == 2


def _target(tensor_class: str, weight: Weight, packing: Format | None) -> Target:
    """Return the target of a weight that is packed in a format, or not packed."""
    if packing is not None:
        return Target(tensor_class, weight, packing, packing.parts(weight.shape))
    stored = weight.stored[0].dtype
    kept = weight.format is None and stored in ("U8", "U32")  # integers are not rounded to bf16
    return Target(tensor_class, weight, None, (Part(weight.suffix, stored if kept else PLAIN, weight.shape),))


def _shards(targets: list[Target], shard_bytes: int) -> dict[str, tuple[Target, ...]]:
    """Distribute targets over shards, in order, as many to each shard as fit. A weight is never split."""
    groups: list[list[Target]] = [[]]
    taken = 0
    for target in targets:
        if groups[-1] and taken + target.nbytes > shard_bytes:
            groups.append([])
            taken = 0
        groups[-1].append(target)
        taken += target.nbytes
    if len(groups) == 1:
        return {"model.safetensors": tuple(groups[0])}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": tuple(group) for i, group in enumerate(groups, 1)}


def _repacking_warning(recipe: Recipe) -> str:
    """Return the warning for a source that is already packed."""
    if recipe.name == "bf16":
        return "the source is already packed: bf16 makes it larger, but does not restore the precision that is lost"
    return (
        "the source is already packed: weights that change their format are rounded a second time, so the output is "
        "less exact than the same recipe from the bf16 checkpoint"
    )
