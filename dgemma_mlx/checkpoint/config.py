"""Configuration read from a checkpoint's ``config.json`` and ``generation_config.json``.

Every number comes from the files; a missing key takes the default of the reference's classes
(transformers ``models/diffusion_gemma``), because ``save_pretrained`` leaves out keys at their default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from dgemma_mlx.errors import DgemmaError

FULL = "full_attention"
SLIDING = "sliding_attention"

_DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
_LARGEST = {"int": 1 << 24, "float": 1e30}  # far above any real value; no product of sizes overflows a shape
_MOST_LAYERS = 1024
_DAMAGED = "The checkpoint may be damaged, or of another model."


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise DgemmaError(message, _DAMAGED)


def _require_positive(value: Any, name: str, kind: str) -> None:
    """``kind`` is "int" or "float"; a float may be written without a decimal point."""
    types = int if kind == "int" else (int, float)
    good = isinstance(value, types) and not isinstance(value, bool) and 0 < value <= _LARGEST[kind]
    noun = "integer" if kind == "int" else "number"
    _require(good, f"{name} must be a positive {noun}, not {shortened(value)}")


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
        _require_positive(layers, "num_hidden_layers", "int")
        _require(layers <= _MOST_LAYERS, f"num_hidden_layers is {layers}, more than {_MOST_LAYERS}")
        types = values.get("layer_types", [SLIDING if (i + 1) % 6 else FULL for i in range(layers)])
        _require(isinstance(types, (list, tuple)) and all(kind in (FULL, SLIDING) for kind in types),
                 f"layer_types must be a list of {FULL!r} and {SLIDING!r}, not {shortened(types)}")
        _require(len(types) == layers, f"{len(types)} layer_types for {layers} layers")
        types = [*types[:-1], FULL]  # the reference forces the last layer to full attention
        values["layer_types"] = tuple(types)
        values.setdefault("num_global_key_value_heads", values.get("num_key_value_heads", cls.num_key_value_heads))
        values.update(_full_layer_values(raw.get("per_layer_config"), values, types))
        config = cls(**values)
        config._validate(raw)
        return config

    def _validate(self, raw: Mapping[str, Any]) -> None:
        for f in fields(self):
            if f.type in _LARGEST:
                _require_positive(getattr(self, f.name), f.name, str(f.type))
        _require(isinstance(self.rope_parameters, Mapping), "rope_parameters must be an object")
        for kind in sorted(set(self.layer_types)):
            heads, kv_heads, head_dim = self.num_attention_heads, self.kv_heads(kind), self.layer_head_dim(kind)
            _require(heads % kv_heads == 0, f"{heads} query heads are no multiple of {kv_heads} key/value heads")
            _require(head_dim % 2 == 0, f"the head dimension of {kind} is odd: {head_dim}")
            _require(heads * head_dim <= _LARGEST["int"], f"{heads} heads of {head_dim} are too many")
            _validate_rope(self.rope_parameters.get(kind), f"rope_parameters of {kind}")
        _require(self.top_k_experts <= self.num_experts, "top_k_experts is larger than num_experts")
        activation = raw.get("hidden_activation", "gelu_pytorch_tanh")
        _require(activation == "gelu_pytorch_tanh", f"unsupported hidden_activation {shortened(activation)}")
        _require(not raw.get("attention_bias"), "attention_bias is not supported")
        bidirectional = raw.get("use_bidirectional_attention")
        _require(bidirectional in (None, "vision"),
                 f"unsupported use_bidirectional_attention {shortened(bidirectional)}")
        _require(raw.get("tie_word_embeddings") in (None, True), "untied word embeddings are not supported")

    def layer_head_dim(self, kind: str) -> int:
        """Width of a head in a layer of this kind."""
        return self.global_head_dim if kind == FULL else self.head_dim

    def kv_heads(self, kind: str) -> int:
        """Key/value heads of a layer of this kind."""
        return self.num_global_key_value_heads if kind == FULL else self.num_key_value_heads


def _full_layer_values(per_layer: Any, values: Mapping[str, Any], layer_types: list[str]) -> dict[str, Any]:
    """``per_layer_config`` -> the two values of full-attention layers.

    The mapping's keys are layer indices (as JSON strings), its values the keys that differ from the flat
    configuration, so that an empty mapping says that all layers are alike. Every full-attention layer must
    say the same, no sliding layer may differ.
    """
    if per_layer is None:
        return {}
    good = isinstance(per_layer, Mapping) and all(isinstance(layer, Mapping) for layer in per_layer.values())
    _require(good, "per_layer_config must be an object of objects")
    _require(set(per_layer) <= {str(i) for i in range(len(layer_types))}, "per_layer_config has unknown layers")
    flat = {name: values.get(name, getattr(TextConfig, name)) for name in ("head_dim", "num_key_value_heads")}
    full = {**flat, **per_layer.get(str(len(layer_types) - 1), {})}  # the last layer always is one
    _require(full.keys() == flat.keys(), f"per_layer_config changes more than {', '.join(flat)}")
    for i, kind in enumerate(layer_types):
        expected = full if kind == FULL else flat
        _require({**flat, **per_layer.get(str(i), {})} == expected,
                 f"per_layer_config: layer {i} differs from the others with {kind}")
    return {"global_head_dim": full["head_dim"], "num_global_key_value_heads": full["num_key_value_heads"]}


def _validate_rope(rope: Any, name: str) -> None:
    _require(isinstance(rope, Mapping), f"{name} are missing, or no object")
    kind, theta = rope.get("rope_type", "default"), rope.get("rope_theta")
    _require(kind in ("default", "proportional"), f"{name}: unsupported rope_type {shortened(kind)}")
    _require_positive(theta, f"{name}: rope_theta", "float")
    rotated = rope.get("partial_rotary_factor", 1.0)
    _require_positive(rotated, f"{name}: partial_rotary_factor", "float")
    _require(rotated <= 1, f"{name}: partial_rotary_factor is {rotated}, more than 1")
    _require(rope.get("factor", 1) == 1, f"{name}: factor is not supported")


@dataclass(frozen=True)
class ModelConfig:
    """The whole checkpoint: text network, canvas, special ids, quantization, and vision kept aside."""

    text: TextConfig
    canvas_length: int = 256
    image_token_id: int | None = None
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_ids: tuple[int, ...] = (1,)
    quantization: Mapping[str, Any] | None = None
    vision: Mapping[str, Any] | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """What ``config.json`` holds, in either layout; ``DgemmaError`` says what of it is wrong."""
        kind = raw.get("model_type")
        _require(kind == "diffusion_gemma", f"model_type is {shortened(kind)}, not 'diffusion_gemma'")
        _require(raw.get("tie_word_embeddings") in (None, True), "untied word embeddings are not supported")
        _require(isinstance(raw.get("text_config"), Mapping), "no text_config")
        text: Mapping[str, Any] = raw["text_config"]
        canvas_length = _first(raw.get("canvas_length"), cls.canvas_length)
        _require_positive(canvas_length, "canvas_length", "int")

        def token_id(name: str, default: int) -> Any:
            return _first(raw.get(name), text.get(name), default)

        image_token_id = raw.get("image_token_id")
        config = cls(
            text=TextConfig.from_dict(text),
            canvas_length=canvas_length,
            image_token_id=None if image_token_id is None else _id(image_token_id, "image_token_id"),
            pad_token_id=_id(token_id("pad_token_id", 0), "pad_token_id"),
            bos_token_id=_id(token_id("bos_token_id", 2), "bos_token_id"),
            eos_token_ids=_ids(token_id("eos_token_id", 1), "eos_token_id"),
            quantization=_object(raw, "quantization") or _object(raw, "quantization_config"),
            vision=_object(raw, "vision_config"),
        )
        for name in ("pad_token_id", "bos_token_id"):
            token = getattr(config, name)
            _require(token < config.text.vocab_size, f"{name} {token} is not in the vocabulary")
        return config

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Reads ``config.json`` of a checkpoint folder."""
        path = folder / "config.json"
        raw = read_json(path)
        with _named(path):
            return cls.from_dict(raw)


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
        with _named(path):
            sampler = _object(raw, "sampler_config") or {}
            raw = {**raw, "entropy_bound": _first(sampler.get("entropy_bound"), raw.get("entropy_bound"))}
            eos, pad = raw.get("eos_token_id"), raw.get("pad_token_id")
            raw["eos_token_ids"] = config.eos_token_ids if eos is None else _ids(eos, "eos_token_id")
            raw["pad_token_id"] = config.pad_token_id if pad is None else _id(pad, "pad_token_id")
            return cls().override(**{f.name: raw.get(f.name) for f in fields(cls)})

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
        if config.t_max < _LEAST_TEMPERATURE:
            raise DgemmaError(
                f"t_max must be at least {_LEAST_TEMPERATURE:g}, not {config.t_max:g}",
                "A temperature of 0 (--temp 0) takes the most probable tokens.", exit_code=2,
            )
        return config


_LEAST_TEMPERATURE = 1e-6  # far below it, logits over temperature are no float32 numbers


def _check(value: Any, name: str, *, minimum: float, whole: bool = False) -> None:
    right_type = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not right_type or isinstance(value, bool) or not minimum <= value <= _LARGEST["int" if whole else "float"]:
        kind = "a whole number" if whole else "a number"
        raise DgemmaError(
            f"{name} must be {kind} of at least {minimum:g}, not {value!r}",
            "Leave it out for the checkpoint's own value.", exit_code=2,
        )


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _id(value: Any, name: str) -> int:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST["int"]
    _require(good, f"{name} must be a token id, not {shortened(value)}")
    return int(value)


def _ids(value: Any, name: str) -> tuple[int, ...]:
    """A token id or a list of them."""
    return tuple(_id(item, name) for item in (value if isinstance(value, list) else [value]))


def _object(raw: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """A JSON object of the configuration; None where it is missing, null or empty."""
    value = raw.get(name)
    _require(value is None or isinstance(value, Mapping), f"{name} must be an object, not {shortened(value)}")
    return value or None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors within say which file is at fault."""
    try:
        yield
    except DgemmaError as error:
        raise DgemmaError(f"{path}: {error.message}", _DAMAGED) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; anything else is a ``DgemmaError`` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DgemmaError(
            f"{path.parent} has no {path.name}", "Is this a checkpoint folder, and is it complete?"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DgemmaError(f"cannot read {path}: {error}", "The file may be cut off; fetch it again.") from None
    if not isinstance(value, dict):
        raise DgemmaError(f"{path} holds no JSON object", "The file may be damaged; fetch it again.")
    return value
