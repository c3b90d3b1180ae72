"""Mixture of experts: the router, and the experts' weights as 3-D tensors.

Reference: transformers ``DiffusionGemmaTextRouter`` and ``DiffusionGemmaTextExperts``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.kernels import Route, moe_combine, moe_route
from dgemma_mlx.model.mlp import geglu
from dgemma_mlx.model.packed import Linear

RouterLog = list[tuple[mx.array, mx.array]]
"""For each layer, the probabilities (N, E) and the chosen experts (N, K)."""


class Router(nn.Module):
    """Picks K of E experts for each row of the residual stream, normed with ``scale * M**-0.5`` as its weight."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self._top_k = config.top_k_experts
        self.proj = Linear(config.hidden_size, config.num_experts)
        self.scale = mx.ones(config.hidden_size)
        self.per_expert_scale = mx.ones(config.num_experts)

    def __call__(self, normed: mx.array, log: RouterLog | None = None) -> Route:
        """normed (N, M) -> the route of N rows; ``log`` gets the probabilities (N, E) float32 and indices (N, K)."""
        logits = self.proj(normed)
        route = moe_route(logits, self.per_expert_scale, self._top_k)
        if log is not None:
            log.append((mx.softmax(logits.astype(mx.float32), axis=-1), route.indices))
        return route


def expert_matmul(x: mx.array, weights: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """x (..., 1, I) and one expert index for each of its rows, weights (E, I, O) -> (..., 1, O)."""
    if mx.default_device() == mx.Device(mx.cpu) and x.dtype != mx.float32:
        # MLX's CPU GatherMM takes float32 only.
        wide = mx.gather_mm(
            x.astype(mx.float32), weights.astype(mx.float32), rhs_indices=indices, sorted_indices=sorted_indices
        )
        return wide.astype(x.dtype)
    return mx.gather_mm(x, weights, rhs_indices=indices, sorted_indices=sorted_indices)


class ExpertLinear(nn.Module):
    """E linear maps without bias: weight (E, O, I)."""

    is_plain = True
    """whether ``weight`` can be multiplied by as it is"""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = mx.random.normal((experts, outputs, inputs)) * inputs**-0.5

    def __call__(self, x: mx.array, indices: mx.array, *, sorted_indices: bool) -> mx.array:
        """x (..., 1, I) and one expert index for each of its rows -> (..., 1, O)."""
        return expert_matmul(x, self.weight.swapaxes(-1, -2), indices, sorted_indices)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **_: Any
    ) -> QuantizedExpertLinear:
        """Called by ``mlx.nn.quantize``; None stands for the mode's own value."""
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """``ExpertLinear`` with packed weights (E, O, I * bits / 32) uint32, scales and, in affine mode, biases."""

    is_plain = False

    def __init__(self, weight: mx.array, group_size: int | None, bits: int | None, mode: str) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array, *, sorted_indices: bool) -> mx.array:
        """x (..., 1, I) and one expert index for each of its rows -> (..., 1, O)."""
        return mx.gather_qmm(
            x, self.weight, self.scales, self.get("biases"), rhs_indices=indices, transpose=True,
            group_size=self.group_size, bits=self.bits, mode=self.mode, sorted_indices=sorted_indices,
        )


class Experts(nn.Module):
    """down(gelu(gate x) * up x) of the chosen experts, weighted, summed and normed. Gate rows come first."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        E, M, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self._few_experts = E <= 4 * config.top_k_experts
        self.gate_up_proj: ExpertLinear | QuantizedExpertLinear = ExpertLinear(E, M, 2 * inner)
        self.down_proj: ExpertLinear | QuantizedExpertLinear = ExpertLinear(E, inner, M)

    def __call__(self, x: mx.array, route: Route, norm: nn.RMSNorm) -> mx.array:
        """x (N, M) -> norm(the sum of each row's experts), (N, M)."""
        if self.training and self._few_experts and self.gate_up_proj.is_plain and self.down_proj.is_plain:
            return norm(self._all_experts(x, route.weights, route.indices))
        y = self.gate_up_proj(x[route.rows][:, None], route.experts, sorted_indices=True)
        y = self.down_proj(geglu(*mx.split(y, 2, axis=-1)), route.experts, sorted_indices=True)[:, 0]
        return moe_combine(y, route.slots, route.weights, norm.weight, norm.eps)

    def _all_experts(self, x: mx.array, weights: mx.array, indices: mx.array) -> mx.array:
        """The same sum by two plain matmuls over all experts: for training a model with few of them,
        where the gradient of a gather costs more than the products it saves."""
        N = x.shape[0]
        up, down = self.gate_up_proj.weight, self.down_proj.weight  # (E, 2I, M), (E, M, I)
        E, _, inner = down.shape
        y = (x @ up.reshape(-1, up.shape[-1]).T).reshape(N, E, 2 * inner)
        y = mx.take_along_axis(y, indices[..., None], axis=1)  # (N, K, 2I)
        y = geglu(*mx.split(y, 2, axis=-1)) * weights[..., None].astype(x.dtype)
        chosen = (mx.arange(E) == indices[..., None]).astype(x.dtype)  # (N, K, E)
        spread = mx.zeros((N, E, inner), x.dtype)
        for k in range(indices.shape[1]):
            spread = spread + chosen[:, k, :, None] * y[:, k, None, :]
        return spread.reshape(N, E * inner) @ down.swapaxes(1, 2).reshape(E * inner, -1)
