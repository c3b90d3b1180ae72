"""The configuration of the vision tower and of its pictures, from ``config.json`` and ``processor_config.json``.

A missing key takes the default of transformers (``Gemma4VisionConfig``, ``Gemma4ImageProcessorPil``). A checkpoint
whose vision part is not supported still answers text, so a problem is kept and reported at the first picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dgemma_mlx.checkpoint.values import (
    DAMAGED,
    LARGEST,
    MOST_LAYERS,
    constant,
    first,
    json_object,
    require,
    require_size,
    require_usual_layers,
)
from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError

BUDGETS = (70, 140, 280, 560, 1120)  # numbers of soft tokens that a picture may aim at
VISION_FILE = "optiq/optiq_vision.safetensors"  # where OptiQ's checkpoints may keep the tower's weights
_BICUBIC = 3  # of Pillow's filters


@dataclass(frozen=True)
class VisionConfig:
    """The sizes and constants of the vision tower, and the budget of its pictures.

    Attributes:
        hidden_size: Width of the residual stream (H).
        intermediate_size: Inner width of the feed-forward blocks.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of heads per layer.
        head_dim: Width of a head (D), a multiple of 4.
        patch_size: Height and width of a patch, in pixels.
        pooling_kernel_size: Height and width, in patches, of the square that becomes one soft token.
        position_embedding_size: Number of positions in the tower's table, for each of the two axes.
        rms_norm_eps: Constant added to the mean square in every RMSNorm.
        rope_theta: Base of the rotary embedding's angles.
        standardize: Whether a bias and a scale are applied to the pooled features.
        use_clipped_linears: Whether the linear maps of the layers clamp their inputs and outputs.
        default_budget: Number of soft tokens that a picture aims at without a budget of its own, one of ``BUDGETS``.
        problem: Why the tower cannot be used, as a message; None if it can. The other fields then have no meaning.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    head_dim: int = 64
    patch_size: int = 16
    pooling_kernel_size: int = 3
    position_embedding_size: int = 10_240
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    standardize: bool = False
    use_clipped_linears: bool = False
    default_budget: int = 280
    problem: str | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> VisionConfig | None:
        """Create a configuration from the content of config.json and of processor_config.json.

        Returns None if config.json describes no tower. A value that is invalid or not supported becomes the field
        ``problem``, except a ``vision_config`` that is not an object: that raises ``DgemmaError``.
        """
        raw = json_object(config, "vision_config")
        if raw is None:
            return None
        try:
            budget = _budget(config, json_object(processor, "image_processor") or {}, raw)
            return cls._from_dict(raw, budget)
        except DgemmaError as error:
            return cls(problem=error.message)

    @classmethod
    def _from_dict(cls, raw: Mapping[str, Any], budget: int) -> VisionConfig:
        """Create a configuration from ``vision_config``. Raises ``DgemmaError`` for what is not supported."""
        rope = json_object(raw, "rope_parameters") or {}
        values = {f.name: raw[f.name] for f in fields(cls) if raw.get(f.name) is not None and f.name != "problem"}
        values["rope_theta"] = constant(first(rope.get("rope_theta"), raw.get("rope_theta"), cls.rope_theta),
                                        "rope_theta")
        values["rms_norm_eps"] = constant(values.get("rms_norm_eps", cls.rms_norm_eps), "rms_norm_eps")
        config = cls(**{**values, "default_budget": budget})
        for f in fields(cls):
            if f.type == "int":
                require_size(getattr(config, f.name), f.name)
            elif f.type == "bool":
                value = getattr(config, f.name)
                require(isinstance(value, bool), f"{f.name} must be true or false, not {shown(value)}")
        require(config.num_hidden_layers <= MOST_LAYERS, f"more than {MOST_LAYERS} layers")
        require(config.head_dim % 4 == 0, f"the head dimension is not a multiple of 4: {config.head_dim}")
        require(config.num_attention_heads * config.head_dim <= LARGEST, "the heads are too many")
        require(config.patch_size * config.pooling_kernel_size <= 1024, "the patches are too large")
        kind = rope.get("rope_type", "axial")
        require(kind in ("default", "axial"), f"unsupported rope_type {shown(kind)}")
        require(rope.get("factor", 1) == 1, "rope_parameters: factor is not supported")
        require_usual_layers(raw)
        kv_heads = first(raw.get("num_key_value_heads"), config.num_attention_heads)
        require(kv_heads == config.num_attention_heads, f"unsupported num_key_value_heads {shown(kv_heads)}")
        return config

    def require_supported(self) -> None:
        """Raise ``DgemmaError`` if this tower cannot be used."""
        if self.problem is not None:
            raise DgemmaError(f"the checkpoint's pictures are not supported: {self.problem}", DAMAGED)


def _budget(config: Mapping[str, Any], processor: Mapping[str, Any], vision: Mapping[str, Any]) -> int:
    """Return the number of soft tokens that a picture aims at.

    ``processor`` is the object ``image_processor`` of processor_config.json. Raises ``DgemmaError`` unless it prepares
    pictures as ``vision.pixels`` does.
    """
    for name, expected in (("do_resize", True), ("do_rescale", True), ("do_normalize", False), ("resample", _BICUBIC)):
        value = first(processor.get(name), expected)
        require(value == expected, f"processor_config.json: unsupported {name} {shown(value)}")
    factor = first(processor.get("rescale_factor"), 1 / 255)
    good = isinstance(factor, float) and abs(factor * 255 - 1) < 1e-6
    require(good, f"processor_config.json: unsupported rescale_factor {shown(factor)}")
    for name in ("patch_size", "pooling_kernel_size"):
        default = getattr(VisionConfig, name)
        size, own = first(processor.get(name), default), first(vision.get(name), default)
        require(size == own, f"processor_config.json: {name} is {shown(size)}, but config.json says {shown(own)}")
    named = (processor.get("max_soft_tokens"), config.get("vision_soft_tokens_per_image"))
    budget = first(*named, VisionConfig.default_budget)
    require(budget in BUDGETS, f"unsupported number of soft tokens per picture: {shown(budget)}")
    return int(budget)
