"""Reading and writing of adapter folders.

Adapters are written in the format of PEFT, which can read them. ``adapter_model.safetensors`` holds float32 tensors
``base_model.model.<module>.lora_A.weight`` (r, I) and ``lora_B.weight`` (O, r), and for DoRA ``lora_magnitude_vector``
(O,), where ``<module>`` is the module's name in a published checkpoint. Each tensor is stored twice, under the names of
the decoder and of the encoder, because transformers has separate modules for both, with tied weights. The factors of
experts are (E, r, I) and (E, O, r); PEFT defines no format for these. ``adapter_config.json`` is PEFT's file. A canvas
length is stored in the metadata of the tensors' file.

Adapters of mlx_lm can be read as well: ``adapters.safetensors`` with ``<path>.lora_a`` (I, r) and ``<path>.lora_b``
(r, O).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from dgemma_mlx.checkpoint.names import parameter_names, some_of, source_name
from dgemma_mlx.checkpoint.shards import read_header
from dgemma_mlx.checks import is_whole, reason, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import write_whole
from dgemma_mlx.json_text import read_json
from dgemma_mlx.model.adapter import AdapterConfig, DoRALinear, adapted_modules, attach
from dgemma_mlx.model.text import DiffusionGemma

CONFIG, WEIGHTS, MLX_LM_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
_CANVAS_LENGTH = "dgemma_mlx.canvas_length"
_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b", ".lora_magnitude_vector": "m"}
_OWN = re.compile(r"(.+)\.(lora_a|lora_b|m)")
_DAMAGED = "An adapter is a folder written by `dgemma-mlx train`, PEFT or mlx_lm."
_MADE_FOR = "The adapter was made for another model, or its files are damaged."
_NOT_SUPPORTED = "LoRA and DoRA are supported without biases or other trained modules, with one rank and one alpha."
_FLOATS = ("F32", "F16", "BF16")

# PEFT's settings (0.21). A setting of any other name must be empty: it may change the mathematics.
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
_WITHOUT_EFFECT = (  # on a trained adapter: origin, choice of the modules, and how the training was run
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "eva_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
)  # fmt: skip
# Others, such as PiSSA, OLoRA, CorDA and LoftQ, subtract the initial factors from the base weights.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_MLX_LM_READ = ("rank", "scale", "dropout", "keys")


def save_adapter(network: DiffusionGemma, config: AdapterConfig, folder: Path, base: str) -> None:
    """Write the adapter of a network to a folder, which is created if necessary.

    Each file is written completely or not at all. ``config`` holds the adapter's settings, and ``base`` is the name of
    the base model. Raises ``DgemmaError`` when the folder cannot be written.
    """
    tensors: dict[str, mx.array] = {}
    for path, module in adapted_modules(network).items():
        for suffix, name in _SUFFIXES.items():
            if name in module:
                value = module[name] if name == "m" else mx.contiguous(module[name].swapaxes(-1, -2))
                for stem in _stems(path):
                    tensors[f"{_PREFIX}{stem}{suffix}"] = value.astype(mx.float32)
    stems = sorted({stem for path in adapted_modules(network) for stem in _stems(path)})
    record = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "use_dora": config.dora,
        "bias": "none", "fan_in_fan_out": False, "target_modules": stems,
    }  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{os.getpid()}.safetensors"
        own = {} if config.canvas_length is None else {_CANVAS_LENGTH: str(config.canvas_length)}
        mx.save_safetensors(str(unfinished), tensors, metadata={"format": "pt", **own})
        unfinished.replace(folder / WEIGHTS)
        write_whole(folder / CONFIG, json.dumps(record, indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        raise DgemmaError(
            f"cannot write the adapter to {folder}: {reason(error)}", "Check its permissions and the disk."
        ) from None


def load_adapter(network: DiffusionGemma, folder: Path) -> AdapterConfig:
    """Add the adapter in a folder to a network, freeze the network, and return the adapter's settings.

    Raises ``DgemmaError`` when the folder cannot be read, or when the adapter does not fit the network.
    """
    config, tensors = read_adapter(folder)
    ranks = {path: parts["lora_a"].shape[-1] for path, parts in tensors.items()}
    modules = dict(network.named_modules())
    if missing := sorted(ranks.keys() - modules.keys()):
        raise DgemmaError(f"{folder} adapts {some_of(missing)}, which the model does not have", _MADE_FOR)
    attach(network, config, ranks)
    adapted = adapted_modules(network)
    if refused := sorted(ranks.keys() - adapted.keys()):
        raise DgemmaError(f"{folder} adapts {some_of(refused)}, which cannot be adapted", _MADE_FOR)
    for path, parts in tensors.items():
        for name, whole in parts.items():
            value = network.own_part(path, name, whole)
            if name not in adapted[path] or adapted[path][name].shape != value.shape:
                raise DgemmaError(f"{folder}: {name} of {path} has shape {value.shape}, which does not fit", _MADE_FOR)
            adapted[path][name] = value.astype(mx.float32)
        if adapted[path].keys() & {"lora_a", "lora_b", "m"} != parts.keys():
            raise DgemmaError(f"{folder} lacks parts of {path}", _MADE_FOR)
    network.freeze()
    network.eval()
    for module in adapted.values():
        if isinstance(module, DoRALinear):
            module.kept_row_factors(network.dtype)
    return config


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, dict[str, mx.array]]]:
    """Read an adapter folder and return its settings and its tensors.

    The tensors are grouped by module path: ``lora_a`` (..., I, r), ``lora_b`` (..., r, O) and, for DoRA, ``m`` (O,).
    Raises ``DgemmaError`` when the folder is missing, incomplete or damaged, or uses features that are not supported.
    """
    if not folder.is_dir():
        raise DgemmaError(f"there is no adapter folder {folder}", _DAMAGED)
    if not (folder / CONFIG).exists():
        raise DgemmaError(f"{folder} has no {CONFIG}", _DAMAGED)
    raw = read_json(folder / CONFIG)
    weights = weights_file(folder)
    stored, metadata = _load(weights)
    parts = (_from_peft if weights.name == WEIGHTS else _from_mlx_lm)(stored, weights)
    config = (_peft_config if "peft_type" in raw else _mlx_lm_config)(raw, folder / CONFIG, tuple(parts))
    for path, found in parts.items():
        _check_parts(path, found, config, weights)
    length = metadata.get(_CANVAS_LENGTH)
    if length is not None and not re.fullmatch(r"[1-9]\d{0,8}", length):
        raise DgemmaError(f"{weights}: the canvas length cannot be {shown(length)}", _DAMAGED)
    return replace(config, canvas_length=None if length is None else int(length)), parts


def weights_file(folder: Path) -> Path:
    """Return the path of an adapter folder's tensors: PEFT's file if there is one, otherwise mlx_lm's.

    Raises ``DgemmaError`` when the folder has neither.
    """
    found = next((folder / name for name in (WEIGHTS, MLX_LM_WEIGHTS) if (folder / name).exists()), None)
    if found is None:
        raise DgemmaError(f"{folder} has no {WEIGHTS}", _DAMAGED)
    return found


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256, in hex, of an adapter folder's configuration and tensors.

    Raises ``DgemmaError`` when the tensors' file is missing, and ``OSError`` when a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in (folder / CONFIG, weights_file(folder)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stems(path: str) -> list[str]:
    """Return a module's names in a published checkpoint: the decoder's and, if the encoder has it, the encoder's."""
    name = source_name(f"{path}.weight").removesuffix(".weight")
    if path.startswith("self_conditioning."):
        return [name]
    return [name, name.replace("model.decoder.", "model.encoder.language_model.", 1)]


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises ``DgemmaError`` for a damaged file, and for a tensor that is not of float32, float16 or bfloat16.
    """
    for name, tensor in read_header(path).items():
        if tensor.dtype not in _FLOATS:
            raise DgemmaError(f"{path}: {name} has dtype {tensor.dtype}", f"Supported are {', '.join(_FLOATS)}.")
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise DgemmaError(f"{path} cannot be loaded: {reason(error)}", _DAMAGED) from None
    return loaded


def _check_parts(path: str, parts: Mapping[str, mx.array], config: AdapterConfig, file: Path) -> None:
    """Raise ``DgemmaError`` unless a module has the parts that the settings ask for, with fitting shapes."""
    if not parts.keys() >= {"lora_a", "lora_b"}:
        raise DgemmaError(f"{file} has only one of two factors of {path}", _DAMAGED)
    a, b = parts["lora_a"], parts["lora_b"]
    if ("m" in parts) != (config.dora and a.ndim == 2):
        raise DgemmaError(f"{file} {'has' if 'm' in parts else 'lacks'} parts of DoRA for {path}", _MADE_FOR)
    if a.shape[-1] != config.rank or b.shape[-2] != config.rank:
        found = f"{path} has factors of rank {a.shape[-1]} and {b.shape[-2]}"
        raise DgemmaError(f"{file}: {found}, which does not fit the rank {config.rank} in {CONFIG}", _MADE_FOR)


def _check_axes(name: str, part: str, tensor: mx.array, file: Path) -> None:
    """Raise ``DgemmaError`` unless a part has as many axes as its kind has."""
    if tensor.ndim not in ((1,) if part == "m" else (2, 3)):
        raise DgemmaError(f"{file}: {name} has shape {tensor.shape}, which does not fit", _MADE_FOR)


def _from_peft(stored: Mapping[str, mx.array], file: Path) -> dict[str, dict[str, mx.array]]:
    """Group the tensors of PEFT's ``file`` by module path, with the factors in this package's orientation.

    Raises ``DgemmaError`` for a tensor that does not belong to an adapter, or when encoder and decoder differ.
    """
    parts: dict[str, dict[str, mx.array]] = {}
    for full_name, tensor in stored.items():
        suffix = next((suffix for suffix in _SUFFIXES if full_name.endswith(suffix)), None)
        if suffix is None or not full_name.startswith(_PREFIX):
            raise DgemmaError(f"{file} has {full_name}, which is not part of a LoRA or DoRA adapter", _DAMAGED)
        stem, part = full_name.removeprefix(_PREFIX).removesuffix(suffix), _SUFFIXES[suffix]
        _check_axes(full_name, part, tensor, file)
        decoders = stem.replace("model.encoder.language_model.", "model.decoder.", 1)
        text, vision = parameter_names([f"{decoders}.weight"])
        if vision:
            raise DgemmaError(f"{file} adapts the vision tower: {stem}", _NOT_SUPPORTED)
        (path,) = text
        value = tensor if part == "m" else mx.contiguous(tensor.swapaxes(-1, -2))
        before = parts.setdefault(path.removesuffix(".weight"), {}).setdefault(part, value)
        if before is not value and not mx.array_equal(before, value).item():
            raise DgemmaError(
                f"{file} adapts encoder and decoder differently in {path}",
                "Encoder and decoder share their weights, so their adapters must be equal.",
            )
    return parts


def _from_mlx_lm(stored: Mapping[str, mx.array], file: Path) -> dict[str, dict[str, mx.array]]:
    """Group the tensors of mlx_lm's ``file`` by module path.

    Raises ``DgemmaError`` for a tensor that does not belong to an adapter.
    """
    parts: dict[str, dict[str, mx.array]] = {}
    for name, value in stored.items():
        found = _OWN.fullmatch(name.removeprefix("model.decoder."))
        if found is None:
            raise DgemmaError(f"{file} has {name}, which is not part of a LoRA or DoRA adapter", _DAMAGED)
        _check_axes(name, found[2], value, file)
        parts.setdefault(found[1], {})[found[2]] = value
    return parts


def _peft_config(raw: Mapping[str, Any], path: Path, targets: tuple[str, ...]) -> AdapterConfig:
    """Convert PEFT's settings. ``targets`` are the paths of the adapted modules.

    Raises ``DgemmaError`` for a malformed setting, and for one that changes the mathematics and is not supported.
    """
    if raw["peft_type"] != "LORA":
        raise DgemmaError(f"{path}: {shown(raw['peft_type'])} adapters are not supported", _NOT_SUPPORTED)
    accepted = {"bias": ("none",), "init_lora_weights": _PLAIN_STARTS}
    for name, value in raw.items():
        if name not in (*_READ, *_WITHOUT_EFFECT) and value and value not in accepted.get(name, ()):
            raise DgemmaError(f"{path}: {name} {shown(value)} is not supported", _NOT_SUPPORTED)
    rank, alpha = _rank(raw, path), _number(raw, "lora_alpha", path)
    if _flag(raw, "use_rslora", path):
        alpha *= rank**0.5
    return AdapterConfig(rank, alpha, _number(raw, "lora_dropout", path, 0.0), targets, _flag(raw, "use_dora", path))


def _mlx_lm_config(raw: Mapping[str, Any], path: Path, targets: tuple[str, ...]) -> AdapterConfig:
    """Convert mlx_lm's settings. ``targets`` are the paths of the adapted modules.

    Raises ``DgemmaError`` for a malformed setting, and for one that changes the mathematics and is not supported.
    """
    values, kind = raw.get("lora_parameters"), raw.get("fine_tune_type", "lora")
    if not isinstance(values, dict):
        raise DgemmaError(f"{path} has neither peft_type nor lora_parameters", _DAMAGED)
    if kind not in ("lora", "dora"):
        raise DgemmaError(f"{path}: fine_tune_type {shown(kind)} is not supported", _NOT_SUPPORTED)
    if unknown := [name for name in values if name not in _MLX_LM_READ]:
        raise DgemmaError(f"{path}: {shown(unknown[0])} of lora_parameters is not supported", _NOT_SUPPORTED)
    rank = _rank(values, path, "rank")
    return AdapterConfig(
        rank, _number(values, "scale", path) * rank, _number(values, "dropout", path, 0.0), targets, kind == "dora"
    )


def _rank(raw: Mapping[str, Any], path: Path, name: str = "r") -> int:
    """Return the rank in the settings. Raises ``DgemmaError`` unless it is a whole number that a rank can be."""
    value: Any = raw.get(name)
    if not is_whole(value) or not 0 <= value < 1 << 31:
        raise _malformed(path, name, value)
    return int(value)


def _number(raw: Mapping[str, Any], name: str, path: Path, default: float | None = None) -> float:
    """Return a number of the settings, or the default where it is missing. Raises ``DgemmaError`` for anything else."""
    value: Any = default if raw.get(name) is None else raw[name]
    if not is_whole(value) and not isinstance(value, float):
        raise _malformed(path, name, value)
    return float(value)


def _flag(raw: Mapping[str, Any], name: str, path: Path) -> bool:
    """Return a truth value of the settings, False where it is missing. Raises ``DgemmaError`` for anything else."""
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise _malformed(path, name, value)
    return bool(value)


def _malformed(path: Path, name: str, value: Any) -> DgemmaError:
    """Return the error for a setting that no adapter has."""
    found = "is missing" if value is None else f"cannot be {shown(value)}"
    return DgemmaError(f"{path} is not a valid adapter configuration: {name} {found}", _DAMAGED)
