"""Checkpoints rewritten with changed weights: an adapter merged into its base, or weights that were trained in full.

The output has the tensor names, the shards, the packing and the dtypes of the checkpoint that it comes from. It is
written shard by shard: memory holds one shard of the output and one unpacked matrix.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.hub import resolve
from dgemma_mlx.checkpoint.names import module_quantization, parameter_names, some_of
from dgemma_mlx.checkpoint.output import SMALL_FILES, check_output, output_folder, write_fuse_report
from dgemma_mlx.checkpoint.shards import INDEX, open_tensors, stored_tensors, weight_files
from dgemma_mlx.checks import reason
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import is_clutter, locked_folder, replace_folder, write_whole
from dgemma_mlx.generation.model import Model
from dgemma_mlx.json_text import read_json
from dgemma_mlx.model.adapter import AdapterConfig, merged
from dgemma_mlx.model.adapter_file import read_adapter

CONFIG = "config.json"
_PACKING = (".scales", ".biases")

# (parameter path, name of its tensor, all tensors of the source by parameter path) -> the tensors to write, by name
Change = Callable[[str, str, Mapping[str, mx.array]], dict[str, mx.array]]


def fuse(
    model: str | None, adapter: Path, output: Path, *, dequantize: bool = False, force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Merge an adapter into a checkpoint and write the result as a new checkpoint.

    The output folder appears only when it is complete.

    Args:
        model: The checkpoint: a folder, a Hub id ``owner/name[@revision]``, ``demo``, or None for the default.
        adapter: The folder of the adapter.
        output: The folder to write.
        dequantize: Write all packed weights as plain bfloat16. Otherwise they are packed again in the same way.
        force: Replace an existing output of ``fuse`` or ``convert``.
        progress: Called after each shard with the number of shards done and the number of all shards.

    Raises:
        DgemmaError: If there is no such model or adapter, if the adapter does not fit the model, if the output must not
            be written (exit code 2, see ``check_output``), or if writing fails.
    """
    checkpoint = resolve(model)
    config = ModelConfig.load(checkpoint.folder)
    adapter_config, parts = read_adapter(adapter)
    output = output_folder(output)
    check_output(output, force, [checkpoint.folder, adapter])
    tensors = open_tensors(checkpoint.folder)
    _check_fit(parts, parameter_names(tensors)[0], adapter)
    change = _merging(config, adapter_config, parts, dequantize)
    raw = read_json(checkpoint.folder / CONFIG)
    if adapter_config.canvas_length is not None:
        raw["canvas_length"] = adapter_config.canvas_length
    if dequantize:
        raw = {name: value for name, value in raw.items() if not name.startswith("quantization")}
    unfinished = output.with_name(f".{output.name}.unfinished")
    try:
        with locked_folder(unfinished):
            try:
                for path in unfinished.iterdir():  # of a merge that was killed
                    path.unlink()
                rewrite(checkpoint.folder, unfinished, raw, change, progress, tower=change)
                write_fuse_report(unfinished)
                check_output(output, force, [checkpoint.folder, adapter])  # again: it may have come into being
                replace_folder(unfinished, output)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
    except (OSError, RuntimeError) as error:
        raise DgemmaError(
            f"writing {output} failed: {reason(error)}",
            "Check the free space on the disk and the permissions of the folder.",
        ) from None


def write_trained(model: Model, folder: Path) -> None:
    """Write a checkpoint with the weights of a model that was trained in full into a folder that may hold an older one.

    The dtypes, and the files other than weights and config.json, are those of the model's own checkpoint. The folder
    has a config.json only while all of its files belong together, so a crash leaves nothing that loads as a mixture.
    Raises ``DgemmaError`` if the folder cannot be written.
    """
    trained = dict(tree_flatten(model.network.parameters()))

    def change(path: str, name: str, source: Mapping[str, mx.array]) -> dict[str, mx.array]:
        return {name: trained[path].astype(source[path].dtype)}

    raw = {**read_json(model.folder / CONFIG), "canvas_length": model.config.canvas_length}
    unfinished = folder / "unfinished"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        rewrite(model.folder, unfinished, raw, change)
        (folder / CONFIG).unlink(missing_ok=True)
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == CONFIG):
            path.replace(folder / path.name)
        unfinished.rmdir()
    except (OSError, RuntimeError) as error:
        raise DgemmaError(
            f"cannot write the weights to {folder}: {reason(error)}",
            "The last checkpoint is kept; continue with --resume.",
        ) from None


def rewrite(
    source: Path, folder: Path, config: Mapping[str, Any], change: Change,
    progress: Callable[[int, int], None] = lambda done, total: None, tower: Change | None = None,
) -> None:
    """Write a checkpoint whose text tensors are those of a source after ``change``.

    The tokenizer and the other small files are copied unchanged.

    Args:
        source: The checkpoint folder to read.
        folder: The checkpoint folder to write.
        config: The content of the new config.json.
        change: Returns the tensors to write for one tensor of the source.
        tower: The change of the vision tower's tensors, whose paths are their names. None copies them unchanged.
        progress: Called after each shard with the number of shards done and the number of all shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    files, stored = weight_files(source), stored_tensors(source)
    for number, file in enumerate(files, 1):
        tensors = open_tensors(source)  # opened again for each shard, which frees what the one before has read
        names, vision = parameter_names(tensors)
        by_path = {path: tensors[name] for path, name in names.items()}
        paths = {name: path for path, name in names.items()}
        written: dict[str, mx.array] = {}
        for name in [name for name, tensor in stored.items() if tensor.path == file]:
            if name in paths:
                written |= change(paths[name], name, by_path)
            elif name in vision:
                written |= {name: tensors[name]} if tower is None else tower(name, name, tensors)
        mx.save_safetensors(str(folder / file.name), written, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(written, file.name)
        mx.clear_cache()
        progress(number, len(files))
    write_whole(folder / INDEX, json.dumps({"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}, indent=2))
    for path in source.iterdir():
        if path.is_file() and not is_clutter(path) and any(fnmatch(path.name, pattern) for pattern in SMALL_FILES):
            shutil.copyfile(path, folder / path.name)
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _check_fit(parts: Mapping[str, Mapping[str, mx.array]], names: Mapping[str, str], adapter: Path) -> None:
    """Raise ``DgemmaError`` if the adapter has parts for modules that the model does not have."""
    if missing := sorted(path for path in parts if f"{path}.weight" not in names):
        raise DgemmaError(
            f"{adapter} adapts {some_of(missing)}, which the model does not have",
            "The adapter was made for another model.",
        )


def _merging(
    config: ModelConfig, adapter: AdapterConfig, parts: Mapping[str, Mapping[str, mx.array]], dequantize: bool
) -> Change:
    """Return the change that merges the adapter's ``parts`` (by module path) and packs or unpacks the weights."""
    quantization = config.quantization or {}

    def change(path: str, name: str, source: Mapping[str, mx.array]) -> dict[str, mx.array]:
        module, _, parameter = path.rpartition(".")
        packed = f"{module}.scales" in source
        if f".{parameter}" in _PACKING:
            return {} if dequantize or module in parts else {name: source[path]}
        if parameter != "weight" or not (module in parts or (packed and dequantize)):
            return {name: source[path]}
        packing = module_quantization(quantization, module) if packed else {}
        weight = _plain(module, packing, source) if packed else source[path]
        if module in parts:
            weight = _merged(module, weight, parts[module], adapter)
        if not packed or dequantize:
            return {name: weight.astype(mx.bfloat16 if packed else source[path].dtype)}
        names = [name, *(name.removesuffix(".weight") + suffix for suffix in _PACKING)]
        scales = source[f"{module}.scales"].dtype
        quantized = mx.quantize(weight.astype(scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16), **packing)
        return dict(zip(names, quantized, strict=False))

    return change


def _plain(module: str, packing: Mapping[str, Any], source: Mapping[str, mx.array]) -> mx.array:
    """Unpack a matrix to float32. In the dtype of the scales, MLX would round twice."""
    scales, biases = source[f"{module}.scales"], source.get(f"{module}.biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(source[f"{module}.weight"], scales, biases, **packing, dtype=mx.float32)


def _merged(
    module: str, weight: mx.array, parts: Mapping[str, mx.array], adapter: AdapterConfig
) -> mx.array:
    """Return a plain weight (..., O, I) with the adapter's part for its module added."""
    a, b, m = parts["lora_a"], parts["lora_b"], parts.get("m")
    *stack, outputs, inputs = weight.shape
    if [*a.shape[:-1], *b.shape[-1:]] != [*stack, inputs, outputs] or (m is not None and m.shape != (outputs,)):
        raise DgemmaError(
            f"the adapter's part for {module} does not fit a matrix of shape {weight.shape}",
            "The adapter was made for another model.",
        )
    return merged(weight, a, b, adapter.scale, m)
