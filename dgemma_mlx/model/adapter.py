"""Adapters: low-rank additions to the matrices of a network whose own weights stay as they are, packed or not.

LoRA: Hu et al., arXiv 2106.09685; DoRA: Liu et al., arXiv 2402.09353. Encoder and decoder share their weights, and so
their additions. ``mlx_lm.tuner`` has such layers, and a test holds these to the same numbers; but importing mlx_lm
takes seconds and brings transformers, which the way from prompt to answer does without, and it has none for experts
as they are here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.experts import ExpertLinear, QuantizedExpertLinear, expert_matmul
from dgemma_mlx.model.text import DiffusionGemma

GROUPS = {
    "attention": r"layers\.\d+\.self_attn\.[qkvo]_proj",
    "mlp": r"layers\.\d+\.mlp\.(gate|up|down)_proj",
    "experts": r"layers\.\d+\.experts\.(gate_up|down)_proj",
    "self_conditioning": r"self_conditioning\.(gate|up|down)_proj",
}
"""What can be adapted, as patterns of module paths; routers, norms and embeddings cannot."""
DEFAULT_TARGETS = ("attention", "mlp")


@dataclass(frozen=True)
class AdapterConfig:
    """The shape of an adapter."""

    rank: int = 16
    alpha: float = 32.0
    """what is added is scaled by alpha / rank"""
    dropout: float = 0.0
    """of the additions' inputs, in training"""
    targets: tuple[str, ...] = DEFAULT_TARGETS
    """names of ``GROUPS``, or of modules: ``q_proj``, ``mlp.down_proj``"""
    dora: bool = False
    canvas_length: int | None = None
    """instead of the checkpoint's"""

    def __post_init__(self) -> None:
        for name, good, wish in (
            ("rank", self.rank >= 0, "at least 0"), ("alpha", 0 < self.alpha < math.inf, "above 0"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("canvas_length", self.canvas_length is None or self.canvas_length > 0, "above 0"),
        ):  # fmt: skip
            if not good:
                raise DgemmaError(f"the adapter's {name} must be {wish}, not {getattr(self, name)}", exit_code=2)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


class LoRALinear(nn.Module):
    """``linear(x) + scale * (dropout(x) @ lora_a) @ lora_b``, with lora_a (I, r) and lora_b (r, O) float32."""

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear, config: AdapterConfig, rank: int) -> None:
        super().__init__()
        outputs, inputs = _shape(linear)
        self.linear = linear
        self.dropout = nn.Dropout(config.dropout)
        self._scale = config.scale
        self.lora_a, self.lora_b = _initial((inputs, rank)), mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., I) -> (..., O)."""
        return self.linear(x) + self._addition(x)

    def _addition(self, x: mx.array) -> mx.array:
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        return (self._scale * z).astype(x.dtype)


class DoRALinear(LoRALinear):
    """As ``LoRALinear``, with each output's weights brought to a learned length m (O,) float32; the length they have
    is taken for a constant in training, as the paper proposes."""

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear, config: AdapterConfig, rank: int) -> None:
        super().__init__(linear, config, rank)
        self.m = mx.linalg.norm(plain_weight(linear).astype(mx.float32), axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        whole = merged(plain_weight(self.linear), self.lora_a, self.lora_b, self._scale)
        lengths = mx.stop_gradient(mx.linalg.norm(whole, axis=1))
        return (self.m / lengths).astype(x.dtype) * super().__call__(x)


class LoRAExpertLinear(nn.Module):
    """The same for a stack of E matrices: lora_a (E, I, r), lora_b (E, r, O)."""

    def __init__(self, linear: ExpertLinear | QuantizedExpertLinear, config: AdapterConfig, rank: int) -> None:
        super().__init__()
        E, outputs, inputs = _shape(linear)
        self.linear = linear
        self.dropout = nn.Dropout(config.dropout)
        self._drops = config.dropout > 0
        self._scale = config.scale
        self.lora_a, self.lora_b = _initial((E, inputs, rank)), mx.zeros((E, rank, outputs))

    def __call__(self, x: mx.array, indices: mx.array, *, sorted_indices: bool) -> mx.array:
        """x (..., 1, I) and one expert index for each of its rows -> (..., 1, O)."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = expert_matmul(self.dropout(x).astype(mx.float32), self.lora_a, indices, sorted_indices)
        z = expert_matmul(z, self.lora_b, indices, sorted_indices)
        return y + (self._scale * z).astype(x.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether ``weight`` stands for all that is done here."""
        return self.linear.is_plain and not self._drops

    @property
    def weight(self) -> mx.array:
        """(E, O, I): of base and addition together."""
        weight = self.linear.weight
        return merged(weight, self.lora_a, self.lora_b, self._scale).astype(weight.dtype)


Adapted = (LoRALinear, LoRAExpertLinear)


def merged(
    weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float, m: mx.array | None = None
) -> mx.array:
    """A plain weight (..., O, I) and its addition -> the weight that does both, float32; ``m`` is DoRA's."""
    whole = weight.astype(mx.float32) + scale * (lora_a @ lora_b).swapaxes(-1, -2)
    return whole if m is None else (m / mx.linalg.norm(whole, axis=-1))[:, None] * whole


def matching(network: DiffusionGemma, targets: Iterable[str]) -> list[str]:
    """The paths of the modules that the targets name; ``DgemmaError`` (exit code 2) for one that names none."""
    able = [path for path, module in network.named_modules() if _can_be_adapted(path, module)]
    chosen: set[str] = set()
    for target in targets:
        found = {
            path for path in able
            if (re.fullmatch(GROUPS[target], path) if target in GROUPS else f".{path}".endswith(f".{target}"))
        }
        if not found:
            names = ", ".join(sorted({path.rpartition(".")[2] for path in able}))
            raise DgemmaError(
                f"the adapter's target {target!r} names nothing that can be adapted",
                f"Targets are {', '.join(GROUPS)}, or modules: {names}.", exit_code=2,
            )
        chosen |= found
    return sorted(chosen)


def attach(network: DiffusionGemma, config: AdapterConfig, ranks: dict[str, int] | None = None) -> None:
    """Freezes the network and puts a new adapter on it, which adds nothing yet: its second factors are zero.

    ``ranks`` gives the modules and their ranks; by default those of ``config``. Random numbers are MLX's.
    """
    if ranks is None:
        ranks = dict.fromkeys(matching(network, config.targets), config.rank)
    network.freeze()

    def adapted(path: str, module: Any) -> nn.Module:
        if path not in ranks or not _can_be_adapted(path, module):
            return module
        if isinstance(module, (ExpertLinear, QuantizedExpertLinear)):
            return LoRAExpertLinear(module, config, ranks[path])
        return (DoRALinear if config.dora else LoRALinear)(module, config, ranks[path])

    network.update_modules(tree_map_with_path(adapted, network.leaf_modules(), is_leaf=nn.Module.is_module))
    unfreeze(network)


def unfreeze(network: DiffusionGemma) -> None:
    """Makes the additions, and nothing else, what is trained."""
    network.freeze()
    for module in adapted_modules(network).values():
        module.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)


def adapted_modules(network: DiffusionGemma) -> dict[str, Any]:
    """Path -> module, of those that have additions."""
    return {path: module for path, module in network.named_modules() if isinstance(module, Adapted)}


def plain_weight(linear: Any) -> mx.array:
    """The weight of a module, unpacked where it is packed."""
    if "scales" not in linear:
        return linear.weight
    return mx.dequantize(
        linear.weight, linear.scales, linear.get("biases"), linear.group_size, linear.bits, mode=linear.mode
    )


def _can_be_adapted(path: str, module: nn.Module) -> bool:
    kinds = (nn.Linear, nn.QuantizedLinear, ExpertLinear, QuantizedExpertLinear)
    return isinstance(module, kinds) and any(re.fullmatch(pattern, path) for pattern in GROUPS.values())


def _shape(linear: Any) -> tuple[int, ...]:
    """(..., O, I), as if it were not packed."""
    *rest, width = linear.weight.shape
    return (*rest, width * 32 // linear.bits if "scales" in linear else width)


def _initial(shape: tuple[int, ...]) -> mx.array:
    """Uniform within ±1 / sqrt(I)."""
    bound = shape[-2] ** -0.5
    return mx.random.uniform(-bound, bound, shape)
