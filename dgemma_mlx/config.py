"""Configuration read from a checkpoint's ``config.json`` and ``generation_config.json``.

Every number comes from the files; a missing key takes the default of the reference's classes
(transformers ``models/diffusion_gemma``), because ``save_pretrained`` leaves out keys at their default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dgemma_mlx.errors import DgemmaError

FULL = "full_attention"
SLIDING = "sliding_attention"

_DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DgemmaError(f"config.json: {message}", "The checkpoint may be damaged, or of another model.")


@dataclass(frozen=True)
class TextConfig:
    """The text network's shape. ``head_dim`` and ``num_key_value_heads`` are those of sliding layers,
    ``global_head_dim`` and ``num_global_key_value_heads`` those of full-attention layers."""

    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    vocab_size: int = 262_144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    global_head_dim: int = 512
    num_global_key_value_heads: int = 4
    sliding_window: int = 512
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0
    layer_types: tuple[str, ...] = ()
    rope_parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: _DEFAULT_ROPE)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TextConfig:
        """Reads both layouts: the published flat one, and ``per_layer_config`` (transformers >= 5.23)."""
        values = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            _require(name in values, f"text_config has no {name!r}")
        layers = values.get("num_hidden_layers", cls.num_hidden_layers)
        types = values.get("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)]
        if types:
            types = [*types[:-1], FULL]  # the reference forces the last layer to full attention
        values["layer_types"] = tuple(types)
        values.setdefault("num_global_key_value_heads", values.get("num_key_value_heads", cls.num_key_value_heads))
        values.update(_full_layer_overrides(raw.get("per_layer_config"), types))
        config = cls(**values)
        config._validate(raw)
        return config

    def _validate(self, raw: Mapping[str, Any]) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int":
                good = isinstance(value, int) and not isinstance(value, bool) and value > 0
                _require(good, f"{f.name} must be a positive integer, not {value!r}")
        _require(len(self.layer_types) == self.num_hidden_layers,
                 f"{len(self.layer_types)} layer_types for {self.num_hidden_layers} layers")
        unknown = set(self.layer_types) - {FULL, SLIDING}
        _require(not unknown, f"unknown layer types {sorted(unknown)}")
        for kind in set(self.layer_types):
            _require(kind in self.rope_parameters, f"rope_parameters has no {kind!r}")
            heads, kv_heads = self.num_attention_heads, self.kv_heads(kind)
            _require(heads % kv_heads == 0, f"{heads} query heads are no multiple of {kv_heads} key/value heads")
        _require(self.top_k_experts <= self.num_experts, "top_k_experts is larger than num_experts")
        activation = raw.get("hidden_activation", "gelu_pytorch_tanh")
        _require(activation == "gelu_pytorch_tanh", f"unsupported hidden_activation {activation!r}")
        _require(not raw.get("attention_bias"), "attention_bias is not supported")
        _require(raw.get("use_bidirectional_attention") in (None, "vision"),
                 f"unsupported use_bidirectional_attention {raw.get('use_bidirectional_attention')!r}")
        _require(raw.get("tie_word_embeddings", True) is True, "untied word embeddings are not supported")

    def layer_head_dim(self, kind: str) -> int:
        return self.global_head_dim if kind == FULL else self.head_dim

    def kv_heads(self, kind: str) -> int:
        return self.num_global_key_value_heads if kind == FULL else self.num_key_value_heads


def _full_layer_overrides(per_layer: Any, layer_types: list[str]) -> dict[str, int]:
    """``per_layer_config`` -> the two values that differ in full-attention layers.

    The mapping's keys are layer indices (as JSON strings), its values the keys that differ from the
    flat configuration; every full-attention layer must say the same, no sliding layer may differ.
    """
    if not per_layer:
        return {}
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    found: dict[str, int] = {}
    for index, overrides in per_layer.items():
        _require(str(index).isdigit() and int(index) < len(layer_types), f"per_layer_config has layer {index!r}")
        for key, value in overrides.items():
            if key not in names:
                continue
            _require(layer_types[int(index)] == FULL, f"per_layer_config changes {key} of sliding layer {index}")
            _require(found.setdefault(names[key], value) == value, f"per_layer_config: layers differ in {key}")
    return found


@dataclass(frozen=True)
class ModelConfig:
    """The whole checkpoint: text network, canvas, special ids, quantization, and vision kept aside."""

    text: TextConfig
    canvas_length: int = 256
    image_token_id: int | None = None
    pad_token_id: int = 0
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = (1,)
    quantization: Mapping[str, Any] | None = None
    vision: Mapping[str, Any] | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        kind = raw.get("model_type")
        _require(kind == "diffusion_gemma", f"model_type is {kind!r}, not 'diffusion_gemma'")
        text = raw.get("text_config")
        _require(isinstance(text, Mapping), "no text_config")
        assert isinstance(text, Mapping)
        canvas_length = raw.get("canvas_length", cls.canvas_length)
        _require(isinstance(canvas_length, int) and canvas_length > 0, f"canvas_length is {canvas_length!r}")
        return cls(
            text=TextConfig.from_dict(text),
            canvas_length=canvas_length,
            image_token_id=raw.get("image_token_id"),
            pad_token_id=_first_of(raw, text, "pad_token_id", 0),
            bos_token_id=_first_of(raw, text, "bos_token_id", 2),
            eos_token_ids=_ids(_first_of(raw, text, "eos_token_id", 1)),
            quantization=raw.get("quantization") or raw.get("quantization_config"),
            vision=raw.get("vision_config"),
        )

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Reads ``config.json`` of a checkpoint folder."""
        return cls.from_dict(read_json(folder / "config.json"))


@dataclass(frozen=True)
class GenerationConfig:
    """The denoising loop's parameters; the defaults are the reference's."""

    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    eos_token_ids: tuple[int, ...] = (1,)
    pad_token_id: int = 0

    @classmethod
    def load(cls, folder: Path, config: ModelConfig) -> GenerationConfig:
        """Reads ``generation_config.json`` where there is one; absent keys take the defaults."""
        path = folder / "generation_config.json"
        raw = read_json(path) if path.exists() else {}
        sampler = raw.get("sampler_config") or {}
        raw = {**raw, **{k: v for k, v in sampler.items() if k == "entropy_bound"}}
        eos = raw.get("eos_token_id")
        raw["eos_token_ids"] = config.eos_token_ids if eos is None else _ids(eos)
        raw.setdefault("pad_token_id", config.pad_token_id)
        known = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        try:
            return cls().override(**known)
        except DgemmaError as error:
            raise DgemmaError(f"generation_config.json: {error.message}", error.hint) from None

    def override(self, **values: Any) -> GenerationConfig:
        """A copy with the values that are not None replaced, checked (exit code 2)."""
        config = replace(self, **{name: value for name, value in values.items() if value is not None})
        _check(config.max_denoising_steps, "max_denoising_steps", minimum=1, whole=True)
        _check(config.stability_threshold, "stability_threshold", minimum=0, whole=True)
        _check(config.entropy_bound, "entropy_bound", minimum=0.0)
        _check(config.confidence_threshold, "confidence_threshold", minimum=0.0)
        _check(config.t_min, "t_min", minimum=0.0)
        _check(config.t_max, "t_max", minimum=0.0)
        if config.t_max <= 0 or config.t_max < config.t_min:
            raise DgemmaError(
                f"t_max ({config.t_max}) must be above 0 and not below t_min ({config.t_min})",
                "The temperature falls from t_max to t_min over the steps.", exit_code=2,
            )
        return config


def _check(value: Any, name: str, *, minimum: float, whole: bool = False) -> None:
    right_type = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not right_type or isinstance(value, bool) or not minimum <= value < float("inf"):
        kind = "a whole number" if whole else "a number"
        raise DgemmaError(f"{name} must be {kind} of at least {minimum:g}, not {value!r}", exit_code=2)


def _first_of(raw: Mapping[str, Any], text: Mapping[str, Any], name: str, default: int) -> Any:
    """A token id of the outer config, else of text_config, else the default."""
    for source in (raw, text):
        if source.get(name) is not None:
            return source[name]
    return default


def _ids(value: int | list[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; anything else is a ``DgemmaError`` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DgemmaError(
            f"{path.parent} has no {path.name}", "Is this a checkpoint folder, and is it complete?"
        ) from None
    except (OSError, ValueError) as error:
        raise DgemmaError(f"cannot read {path}: {error}", "The file may be cut off; fetch it again.") from None
    if not isinstance(value, dict):
        raise DgemmaError(f"{path} holds no JSON object", "The file may be damaged; fetch it again.")
    return value
