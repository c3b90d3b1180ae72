"""Adapters: trainable low-rank additions to the weight matrices of a network whose own weights stay frozen.

The two methods are LoRA (Hu et al., arXiv 2106.09685) and DoRA (Liu et al., arXiv 2402.09353). The network's weights
may be packed. Encoder and decoder share their weights and therefore also their adapters.

``mlx_lm.tuner`` has LoRA and DoRA layers as well, and a test compares the layers of this module with them. They are not
used here, because importing mlx_lm takes seconds and also imports transformers, which generating an answer does not
need, and because mlx_lm has no layer for this network's stacks of experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import is_not
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.experts import ExpertLinear, QuantizedExpertLinear, expert_matmul
from dgemma_mlx.model.packed import WEIGHTS
from dgemma_mlx.model.text import DiffusionGemma

# The modules that can be adapted, as named groups of path patterns. Routers, norms and embeddings cannot be adapted.
GROUPS = {
    "attention": r"layers\.\d+\.self_attn\.[qkvo]_proj",
    "mlp": r"layers\.\d+\.mlp\.(gate|up|down)_proj",
    "experts": r"layers\.\d+\.experts\.(gate_up|down)_proj",
    "self_conditioning": r"self_conditioning\.(gate|up|down)_proj",
}
DEFAULT_TARGETS = ("attention", "mlp")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter, validated when created.

    Raises ``DgemmaError`` (exit code 2) for a value out of range.

    Attributes:
        rank: Rank of the low-rank matrices; at least 0.
        alpha: Scale of the addition, which is multiplied by alpha / rank; above 0.
        dropout: Probability with which an input of the addition is dropped in training; at least 0 and below 1.
        targets: The adapted modules: names of ``GROUPS``, or ends of module paths such as ``q_proj`` or
            ``mlp.down_proj``.
        dora: Whether the adapted linear layers use DoRA instead of LoRA. Experts always use LoRA.
        canvas_length: Canvas length to generate with, in tokens; None keeps the checkpoint's.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    dora: bool = False
    canvas_length: int | None = None

    def __post_init__(self) -> None:
        for name, good, requirement in (
            ("rank", self.rank >= 0, "at least 0"), ("alpha", 0 < self.alpha < math.inf, "above 0"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("canvas_length", self.canvas_length is None or self.canvas_length > 0, "above 0"),
        ):  # fmt: skip
            if not good:
                message = f"the adapter's {name} must be {requirement}, not {getattr(self, name)}"
                raise DgemmaError(message, "Change it, or leave it out for the default.", exit_code=2)

    @property
    def scale(self) -> float:
        """The factor alpha / rank on the addition; 0 for rank 0."""
        return self.alpha / self.rank if self.rank else 0.0


class LoRALinear(nn.Module):
    """A linear layer with a LoRA addition: ``linear(x) + scale * (dropout(x) @ lora_a) @ lora_b``.

    A new layer adds nothing, because ``lora_b`` begins with zeros.

    Attributes:
        linear: The adapted layer, plain or packed.
        dropout: Dropout of the addition's input.
        lora_a: First factor, (I, r) float32, where r is the rank.
        lora_b: Second factor, (r, O) float32.
    """

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear, config: AdapterConfig, rank: int) -> None:
        super().__init__()
        outputs, inputs = _shape(linear)
        self.linear = linear
        self.dropout = nn.Dropout(config.dropout)
        self._scale = config.scale
        self.lora_a, self.lora_b = _initial((inputs, rank)), mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the layer to x (..., I) and return (..., O)."""
        return self.linear(x) + self._addition(x)

    def _addition(self, x: mx.array) -> mx.array:
        """Return the low-rank addition (..., O) for x (..., I), computed in float32 and rounded to x's dtype."""
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        return (self._scale * z).astype(x.dtype)


class DoRALinear(LoRALinear):
    """A linear layer with a DoRA addition: LoRA, then a learned norm for the weights of each output.

    The row of the adapted weight matrix that belongs to an output is rescaled to the length ``m`` of that output. In
    training, the row's length before rescaling counts as a constant, which the paper proposes to save memory.

    In evaluation mode the factors of the rows are computed once, because that unpacks and merges the whole matrix. They
    are computed again when any array they depend on has been replaced by another one; an array that is changed in place
    (``layer.m *= 2``) is not noticed.

    Attributes:
        m: Learned length of each output's row, (O,) float32. It begins with the length of the unadapted row.
    """

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear, config: AdapterConfig, rank: int) -> None:
        super().__init__(linear, config, rank)
        self.m = mx.linalg.norm(plain_weight(linear).astype(mx.float32), axis=1)
        self._kept: _RowFactors | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the layer to x (..., I) and return (..., O)."""
        factors = self._row_factors() if self.training else self.kept_row_factors(x.dtype)
        return factors.astype(x.dtype) * super().__call__(x)

    def kept_row_factors(self, dtype: mx.Dtype) -> mx.array:
        """Return the factors (O,) in this dtype, computed and evaluated only if none are kept for the present weights.

        ``load_adapter`` calls this, so that the first step of an answer does not pay for it.
        """
        sources = [self.m, self.lora_a, self.lora_b, *(self.linear.get(name) for name in WEIGHTS)]
        kept = self._kept
        if kept is None or kept.factors.dtype != dtype or any(map(is_not, kept.sources, sources)):
            kept = self._kept = _RowFactors(sources, self._row_factors().astype(dtype))
            mx.eval(kept.factors)
        return kept.factors

    def _row_factors(self) -> mx.array:
        """Return m divided by the length of each row of the merged weights, (O,) float32."""
        whole = merged(plain_weight(self.linear), self.lora_a, self.lora_b, self._scale)
        return self.m / mx.stop_gradient(mx.linalg.norm(whole, axis=1))


@dataclass(frozen=True)
class _RowFactors:
    """Factors of a DoRA layer's rows, evaluated, and the arrays from which they were computed."""

    sources: list[mx.array | None]
    factors: mx.array


class LoRAExpertLinear(nn.Module):
    """A stack of E expert matrices with a LoRA addition for each expert.

    A new layer adds nothing, because ``lora_b`` begins with zeros.

    Attributes:
        linear: The adapted stack, plain or packed.
        dropout: Dropout of the addition's input.
        lora_a: First factor of each expert, (E, I, r) float32, where r is the rank.
        lora_b: Second factor of each expert, (E, r, O) float32.
    """

    def __init__(self, linear: ExpertLinear | QuantizedExpertLinear, config: AdapterConfig, rank: int) -> None:
        super().__init__()
        E, outputs, inputs = _shape(linear)
        self.linear = linear
        self.dropout = nn.Dropout(config.dropout)
        self._drops = config.dropout > 0
        self._scale = config.scale
        self.lora_a, self.lora_b = _initial((E, inputs, rank)), mx.zeros((E, rank, outputs))

    def __call__(self, x: mx.array, indices: mx.array, *, sorted_indices: bool) -> mx.array:
        """Apply the expert ``indices[...]`` to each row of x (..., 1, I) and return (..., 1, O)."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        z = expert_matmul(self.dropout(x).astype(mx.float32), self.lora_a, indices, sorted_indices)
        z = expert_matmul(z, self.lora_b, indices, sorted_indices)
        return y + (self._scale * z).astype(x.dtype)

    @property
    def is_plain(self) -> bool:
        """Whether multiplying by ``weight`` is equivalent to calling the layer: a plain stack without dropout."""
        return self.linear.is_plain and not self._drops

    @property
    def weight(self) -> mx.array:
        """The weights with the addition merged in, (E, O, I), in the dtype of the base weights."""
        weight = self.linear.weight
        return merged(weight, self.lora_a, self.lora_b, self._scale).astype(weight.dtype)


Adapted = (LoRALinear, LoRAExpertLinear)


def merged(
    weight: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float, m: mx.array | None = None
) -> mx.array:
    """Return a plain weight (..., O, I) with its low-rank addition merged in, as float32.

    ``lora_a`` is (..., I, r) and ``lora_b`` is (..., r, O). With DoRA, ``m`` (O,) is the length to which each output's
    row is rescaled, and the weight must have two axes.
    """
    whole = weight.astype(mx.float32) + scale * (lora_a @ lora_b).swapaxes(-1, -2)
    return whole if m is None else (m / mx.linalg.norm(whole, axis=-1))[:, None] * whole


def matching(network: DiffusionGemma, targets: Iterable[str]) -> list[str]:
    """Return the sorted paths of the modules that the targets name.

    A target is a name of ``GROUPS`` or the end of a module path, such as ``q_proj``. Raises ``DgemmaError`` (exit code
    2) for a target that names no module that can be adapted.
    """
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
    """Freeze the network and add a new adapter to it, whose parameters are the only trainable ones.

    The new adapter does not change the network's results, because its second factors begin with zeros. The first
    factors are drawn from MLX's global random generator.

    ``ranks`` maps the path of each module to adapt to its rank. By default it is built from the targets and the rank of
    ``config``. Raises ``DgemmaError`` (exit code 2) for a target that names no module that can be adapted.
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
    """Make the adapter's parameters trainable and all other parameters of the network frozen."""
    network.freeze()
    for module in adapted_modules(network).values():
        module.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)


def adapted_modules(network: DiffusionGemma) -> dict[str, Any]:
    """Return the adapted modules of a network by their paths."""
    return {path: module for path, module in network.named_modules() if isinstance(module, Adapted)}


def plain_weight(linear: Any) -> mx.array:
    """Return the weight (..., O, I) of a linear layer or a stack of experts, unpacked if it is packed."""
    if "scales" not in linear:
        return linear.weight
    return mx.dequantize(
        linear.weight, linear.scales, linear.get("biases"), linear.group_size, linear.bits, mode=linear.mode
    )


def _can_be_adapted(path: str, module: nn.Module) -> bool:
    """Return whether the module at a path is a linear layer or a stack of experts in one of ``GROUPS``."""
    kinds = (nn.Linear, nn.QuantizedLinear, ExpertLinear, QuantizedExpertLinear)
    return isinstance(module, kinds) and any(re.fullmatch(pattern, path) for pattern in GROUPS.values())


def _shape(linear: Any) -> tuple[int, ...]:
    """Return the shape (..., O, I) of the layer's weight before packing."""
    *rest, width = linear.weight.shape
    return (*rest, width * 32 // linear.bits if "scales" in linear else width)


def _initial(shape: tuple[int, ...]) -> mx.array:
    """Return float32 values for a first factor (..., I, r), uniform between -1/sqrt(I) and 1/sqrt(I)."""
    bound = shape[-2] ** -0.5
    return mx.random.uniform(-bound, bound, shape)
