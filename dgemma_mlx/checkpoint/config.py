"""The configuration of a checkpoint, read from ``config.json`` and ``generation_config.json`` and validated.

A missing key takes the default of the configuration classes in transformers (``models/diffusion_gemma``), because
``save_pretrained`` leaves out keys whose value is the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dgemma_mlx.checkpoint.values import (
    LARGEST,
    MOST_LAYERS,
    constant,
    first,
    json_object,
    named,
    require,
    require_size,
    require_usual_layers,
    token_id,
    token_ids,
)
from dgemma_mlx.checkpoint.vision_config import VisionConfig
from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import read_json

FULL = "full_attention"
SLIDING = "sliding_attention"

_DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
_IMAGE_IDS = {"image_token_id": 258_880, "boi_token_id": 255_999, "eoi_token_id": 258_882}  # where they are left out


@dataclass(frozen=True)
class TextConfig:
    """The sizes and constants of the text network, from ``text_config`` in config.json.

    Attributes:
        num_experts: Number of experts per layer (E).
        top_k_experts: Number of experts that process each token (K).
        moe_intermediate_size: Inner width of an expert.
        vocab_size: Number of token ids (V).
        hidden_size: Width of the residual stream (M).
        intermediate_size: Inner width of the dense feed-forward branch.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of query heads per layer (H).
        num_key_value_heads: Number of key/value heads (Hk) in sliding-window layers.
        head_dim: Width of a head (D) in sliding-window layers.
        global_head_dim: Width of a head (D) in full-attention layers.
        num_global_key_value_heads: Number of key/value heads (Hk) in full-attention layers.
        sliding_window: Number of positions, including its own, that a query sees in a sliding-window layer.
        max_position_embeddings: Number of positions that the model supports.
        rms_norm_eps: Constant added to the mean square in every RMSNorm.
        final_logit_softcapping: Bound c of the logits, which become c * tanh(logits / c).
        layer_types: Kind of each layer, first to last: ``FULL`` or ``SLIDING``. The last layer is always ``FULL``.
        rope_parameters: Parameters of the rotary embedding for each kind of layer: ``rope_type``, ``rope_theta`` and,
            for the type "proportional", ``partial_rotary_factor``.
        use_bidirectional_attention: "vision" if the positions of a picture see each other; None if they do not.
    """

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
    use_bidirectional_attention: str | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TextConfig:
        """Create a configuration from ``text_config`` in config.json.

        Both layouts are read: the published one with flat keys, and the one with ``per_layer_config`` that transformers
        5.23 and later write. Raises ``DgemmaError`` for a value that is missing, invalid or not supported.
        """
        values = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None}
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            require(name in values, f"text_config has no {name!r}")
        layers = values.get("num_hidden_layers", cls.num_hidden_layers)
        require_size(layers, "num_hidden_layers")
        require(layers <= MOST_LAYERS, f"num_hidden_layers is {layers}, more than {MOST_LAYERS}")
        types = values.get("layer_types", [SLIDING if (i + 1) % 6 else FULL for i in range(layers)])
        require(isinstance(types, (list, tuple)) and all(kind in (FULL, SLIDING) for kind in types),
                 f"layer_types must be a list of {FULL!r} and {SLIDING!r}, not {shown(types)}")
        require(len(types) == layers, f"{len(types)} layer_types for {layers} layers")
        types = [*types[:-1], FULL]  # the reference forces the last layer to full attention
        values["layer_types"] = tuple(types)
        values.setdefault("num_global_key_value_heads", values.get("num_key_value_heads", cls.num_key_value_heads))
        values.update(_full_layer_values(raw.get("per_layer_config"), values, types))
        for name in ("rms_norm_eps", "final_logit_softcapping"):
            if name in values:
                values[name] = constant(values[name], name)
        config = cls(**values)
        config._validate(raw)
        return config

    def _validate(self, raw: Mapping[str, Any]) -> None:
        """Raise ``DgemmaError`` for an invalid field, or for a setting in ``raw`` that is not supported."""
        for f in fields(self):
            if f.type == "int":
                require_size(getattr(self, f.name), f.name)
        require(isinstance(self.rope_parameters, Mapping), "rope_parameters must be an object")
        for kind in sorted(set(self.layer_types)):
            heads, kv_heads, head_dim = self.num_attention_heads, self.kv_heads(kind), self.layer_head_dim(kind)
            require(heads % kv_heads == 0, f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
            require(head_dim % 2 == 0, f"the head dimension of {kind} is odd: {head_dim}")
            require(heads * head_dim <= LARGEST, f"{heads} heads of {head_dim} are too many")
            _validate_rope(self.rope_parameters.get(kind), f"rope_parameters of {kind}")
        require(self.top_k_experts <= self.num_experts, "top_k_experts is larger than num_experts")
        require_usual_layers(raw)
        bidirectional = raw.get("use_bidirectional_attention")
        require(bidirectional in (None, "vision"),
                 f"unsupported use_bidirectional_attention {shown(bidirectional)}")
        require(raw.get("tie_word_embeddings") in (None, True), "untied word embeddings are not supported")

    def layer_head_dim(self, kind: str) -> int:
        """Return the width of a head (D) in layers of this kind, ``FULL`` or ``SLIDING``."""
        return self.global_head_dim if kind == FULL else self.head_dim

    def kv_heads(self, kind: str) -> int:
        """Return the number of key/value heads (Hk) in layers of this kind, ``FULL`` or ``SLIDING``."""
        return self.num_global_key_value_heads if kind == FULL else self.num_key_value_heads


def _full_layer_values(per_layer: Any, values: Mapping[str, Any], layer_types: list[str]) -> dict[str, Any]:
    """Return the head width and the number of key/value heads of full-attention layers from ``per_layer_config``.

    ``per_layer`` maps layer indices, as strings, to the keys whose values differ from the flat keys in ``values``. An
    empty object therefore means that all layers have the same sizes. All full-attention layers must have the same
    values, and sliding-window layers must have the flat values. Raises ``DgemmaError`` otherwise. transformers 5.24 and
    later pad the indices with zeros to equal width ("05"), transformers 5.23 does not ("5").

    The result holds ``global_head_dim`` and ``num_global_key_value_heads``. It is empty if ``per_layer`` is None.
    """
    if per_layer is None:
        return {}
    good = isinstance(per_layer, Mapping) and all(isinstance(layer, Mapping) for layer in per_layer.values())
    require(good, "per_layer_config must be an object of objects")
    indices, changes = {str(i): i for i in range(len(layer_types))}, {}
    for key, layer in per_layer.items():
        i = indices.get(key.lstrip("0") or key[-1:])  # "05" is "5", and "00" is "0"
        require(i is not None, "per_layer_config has unknown layers")
        require(i not in changes, f"per_layer_config names layer {i} twice")
        changes[i] = layer
    flat = {name: values.get(name, getattr(TextConfig, name)) for name in ("head_dim", "num_key_value_heads")}
    full = {**flat, **changes.get(len(layer_types) - 1, {})}  # the last layer is always a full one
    require(full.keys() == flat.keys(), f"per_layer_config changes more than {', '.join(flat)}")
    for i, kind in enumerate(layer_types):
        expected = full if kind == FULL else flat
        require({**flat, **changes.get(i, {})} == expected,
                 f"per_layer_config: layer {i} differs from the others with {kind}")
    return {"global_head_dim": full["head_dim"], "num_global_key_value_heads": full["num_key_value_heads"]}


def _validate_rope(rope: Any, name: str) -> None:
    """Raise ``DgemmaError`` unless ``rope`` holds supported parameters of a rotary embedding."""
    require(isinstance(rope, Mapping), f"{name} are missing or not an object")
    kind = rope.get("rope_type", "default")
    require(kind in ("default", "proportional"), f"{name}: unsupported rope_type {shown(kind)}")
    constant(rope.get("rope_theta"), "rope_theta", f"{name}: ")
    constant(rope.get("partial_rotary_factor", 1.0), "partial_rotary_factor", f"{name}: ")
    require(rope.get("factor", 1) == 1, f"{name}: factor is not supported")


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of a whole checkpoint, from config.json.

    Attributes:
        text: Configuration of the text network.
        canvas_length: Number of tokens in a canvas (C).
        image_token_id: Id of the token that stands for a soft token of an image; None if there is none.
        boi_token_id: Id of the token that stands before the soft tokens of an image; None if there is none.
        eoi_token_id: Id of the token that stands after the soft tokens of an image; None if there is none.
        pad_token_id: Id of the padding token.
        bos_token_id: Id of the token that begins a sequence.
        eos_token_ids: Ids of the tokens that end a text.
        quantization: Quantization of packed weights: ``group_size``, ``bits`` and ``mode`` for all modules, and objects
            with these keys for single modules; None if no weights are packed.
        vision: Configuration of the vision tower; None if there is none.
    """

    text: TextConfig
    canvas_length: int = 256
    image_token_id: int | None = None
    boi_token_id: int | None = None
    eoi_token_id: int | None = None
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_ids: tuple[int, ...] = (1,)
    quantization: Mapping[str, Any] | None = None
    vision: VisionConfig | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], processor: Mapping[str, Any] | None = None) -> ModelConfig:
        """Create a configuration from the content of config.json and, for pictures, of processor_config.json.

        Raises ``DgemmaError`` for a value that is missing, invalid or not supported. What is not supported of the
        vision tower is noted in ``vision.problem`` instead.
        """
        kind = raw.get("model_type")
        require(kind == "diffusion_gemma", f"model_type is {shown(kind)}, not 'diffusion_gemma'")
        require(raw.get("tie_word_embeddings") in (None, True), "untied word embeddings are not supported")
        require(isinstance(raw.get("text_config"), Mapping), "text_config is missing or not an object")
        text: Mapping[str, Any] = raw["text_config"]
        canvas_length = first(raw.get("canvas_length"), cls.canvas_length)
        require_size(canvas_length, "canvas_length")
        text_config = TextConfig.from_dict(text)

        def text_id(name: str, default: int) -> Any:
            return first(raw.get(name), text.get(name), default)

        def image_id(name: str) -> int | None:
            value = raw.get(name, _IMAGE_IDS[name])
            token = None if value is None else token_id(value, name)
            return token if token is not None and token < text_config.vocab_size else None

        config = cls(
            text=text_config,
            canvas_length=canvas_length,
            image_token_id=image_id("image_token_id"),
            boi_token_id=image_id("boi_token_id"),
            eoi_token_id=image_id("eoi_token_id"),
            pad_token_id=token_id(text_id("pad_token_id", 0), "pad_token_id"),
            bos_token_id=token_id(text_id("bos_token_id", 2), "bos_token_id"),
            eos_token_ids=token_ids(text_id("eos_token_id", 1), "eos_token_id"),
            quantization=json_object(raw, "quantization") or json_object(raw, "quantization_config"),
            vision=VisionConfig.read(raw, processor or {}),
        )
        for name in ("pad_token_id", "bos_token_id"):
            token = getattr(config, name)
            require(token < config.text.vocab_size, f"{name} {token} is not in the vocabulary")
        return config

    @property
    def reads_images(self) -> bool:
        """Whether the model can be shown images."""
        return self.vision is not None and self.vision.problem is None and self.image_token_id is not None

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read config.json of a checkpoint folder and, if it has a vision tower, processor_config.json.

        Raises ``DgemmaError`` when config.json is missing, is not valid JSON, or holds a value that is invalid or not
        supported. A damaged processor_config.json is noted in ``vision.problem`` instead.
        """
        path, processor = folder / "config.json", folder / "processor_config.json"
        raw, problem, pictures = read_json(path), None, None
        if raw.get("vision_config") and processor.exists():
            try:
                pictures = read_json(processor)
            except DgemmaError as error:
                problem = error.message
        with named(path):
            config = cls.from_dict(raw, pictures)
        if problem is not None and config.vision is not None:
            config = replace(config, vision=replace(config.vision, problem=problem))
        return config


@dataclass(frozen=True)
class GenerationConfig:
    """The parameters of the denoising loop, from generation_config.json.

    The defaults are those of transformers. ``override`` validates the values; the constructor does not.

    Attributes:
        max_denoising_steps: Maximum denoising steps per canvas.
        entropy_bound: Bound, in nats, on the summed entropy of the positions accepted before a position (arXiv
            2505.24857).
        t_min: Temperature towards which the schedule falls over the steps.
        t_max: Temperature of the first step.
        stability_threshold: Number of previous steps whose argmax canvas must equal the current one before a canvas is
            finished.
        confidence_threshold: Upper bound, in nats, on the mean entropy of a finished canvas.
        eos_token_ids: Ids of the tokens that end a text.
        pad_token_id: Id of the padding token.
    """

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
        """Read generation_config.json of a checkpoint folder; without this file, use the defaults.

        The end-of-text and padding ids default to those of ``config``. Raises ``DgemmaError`` when the file is not
        valid JSON or holds an invalid value.
        """
        path = folder / "generation_config.json"
        raw = read_json(path) if path.exists() else {}
        with named(path):
            sampler = json_object(raw, "sampler_config") or {}
            raw = {**raw, "entropy_bound": first(sampler.get("entropy_bound"), raw.get("entropy_bound"))}
            eos, pad = raw.get("eos_token_id"), raw.get("pad_token_id")
            raw["eos_token_ids"] = config.eos_token_ids if eos is None else token_ids(eos, "eos_token_id")
            raw["pad_token_id"] = config.pad_token_id if pad is None else token_id(pad, "pad_token_id")
            return cls().override(**{f.name: raw.get(f.name) for f in fields(cls)})

    def override(self, **values: Any) -> GenerationConfig:
        """Return a validated copy in which the given fields are replaced; None leaves a field unchanged.

        Raises ``DgemmaError`` (exit code 2) for an invalid value.
        """
        config = replace(self, **{name: value for name, value in values.items() if value is not None})
        _check(config.max_denoising_steps, "max_denoising_steps", minimum=1, whole=True)
        _check(config.stability_threshold, "stability_threshold", minimum=0, whole=True)
        for name in _FLOATS:
            _check(getattr(config, name), name, minimum=0.0)
        floats: dict[str, Any] = {name: float(getattr(config, name)) for name in _FLOATS}
        config = replace(config, **floats)
        if config.t_max <= 0 or config.t_max < config.t_min:
            raise DgemmaError(
                f"t_max ({config.t_max}) must be above 0 and not below t_min ({config.t_min})",
                "The temperature falls from t_max to t_min over the steps.", exit_code=2,
            )
        if config.t_max < _LEAST_TEMPERATURE:
            raise DgemmaError(
                f"t_max must be at least {_LEAST_TEMPERATURE:g}, not {config.t_max:g}",
                "A temperature of 0 (--temp 0) always takes the most probable token.", exit_code=2,
            )
        return config


# The parameters of the denoising loop that callers may choose.
LOOP_FIELDS = (
    "max_denoising_steps", "entropy_bound", "t_min", "t_max", "confidence_threshold", "stability_threshold",
)  # fmt: skip
_FLOATS = ("entropy_bound", "confidence_threshold", "t_min", "t_max")  # MLX takes no integer above 2^63 - 1
_LEAST_TEMPERATURE = 1e-6  # far below it, logits divided by the temperature overflow float32


def _check(value: Any, name: str, *, minimum: float, whole: bool = False) -> None:
    """Raise ``DgemmaError`` (exit code 2) unless the value is a number, or a whole number, of at least ``minimum``."""
    right_type = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not right_type or isinstance(value, bool) or not minimum <= value <= (LARGEST if whole else 1e30):
        kind = "a whole number" if whole else "a number"
        raise DgemmaError(
            f"{name} must be {kind} of at least {minimum:g}, not {shown(value)}",
            "Leave it out to use the checkpoint's own value.", exit_code=2,
        )
