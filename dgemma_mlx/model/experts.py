"""Mixture of experts: the router, and the experts' weights as 3-D tensors.

Reference: transformers ``DiffusionGemmaTextRouter`` and ``DiffusionGemmaTextExperts``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.config import TextConfig
from dgemma_mlx.model.mlp import geglu

_SORT_FROM = 64  # rows; sorting by expert pays once several rows share one


class Router(nn.Module):
    """Picks K of E experts for each row. It reads the residual stream itself, not its normed copy."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self._top_k, self._eps = config.top_k_experts, config.rms_norm_eps
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones(config.hidden_size)
        self.per_expert_scale = mx.ones(config.num_experts)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """x (N, M) -> probabilities (N, E) float32, weights (N, K), expert indices (N, K)."""
        normed = mx.fast.rms_norm(x, self.scale * x.shape[-1] ** -0.5, self._eps)
        probabilities = mx.softmax(self.proj(normed).astype(mx.float32), axis=-1)
        indices = mx.stop_gradient(mx.argpartition(-probabilities, self._top_k - 1, axis=-1)[..., : self._top_k])
        weights = mx.take_along_axis(probabilities, indices, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return probabilities, weights * self.per_expert_scale[indices], indices


class ExpertLinear(nn.Module):
    """E linear maps without bias: weight (E, O, I)."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = mx.random.normal((experts, outputs, inputs)) * inputs**-0.5

    def __call__(self, x: mx.array, indices: mx.array, *, sorted_indices: bool) -> mx.array:
        """x (..., 1, I) and one expert index for each of its rows -> (..., 1, O)."""
        weight = self.weight.swapaxes(-1, -2)
        if mx.default_device() == mx.Device(mx.cpu) and x.dtype != mx.float32:
            # MLX's CPU GatherMM takes float32 only.
            wide = mx.gather_mm(
                x.astype(mx.float32), weight.astype(mx.float32), rhs_indices=indices, sorted_indices=sorted_indices
            )
            return wide.astype(x.dtype)
        return mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **_: Any
    ) -> QuantizedExpertLinear:
        """Called by ``mlx.nn.quantize``; None stands for the mode's own value."""
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """``ExpertLinear`` with packed weights (E, O, I * bits / 32) uint32, scales and, in affine mode, biases."""

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
    """down(gelu(gate x) * up x) of the chosen experts, weighted and summed. Gate rows come first."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        E, M, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self._few_experts = E <= 4 * config.top_k_experts
        self.gate_up_proj: ExpertLinear | QuantizedExpertLinear = ExpertLinear(E, M, 2 * inner)
        self.down_proj: ExpertLinear | QuantizedExpertLinear = ExpertLinear(E, inner, M)

    def __call__(self, x: mx.array, weights: mx.array, indices: mx.array) -> mx.array:
        """x (N, M), weights and indices (N, K) -> (N, M)."""
        whole = isinstance(self.gate_up_proj, ExpertLinear) and isinstance(self.down_proj, ExpertLinear)
        if self.training and self._few_experts and whole:
            return self._all_experts(x, weights, indices)
        N, K = indices.shape
        flat = indices.flatten()
        in_order = N * K >= _SORT_FROM
        if in_order:
            order = mx.argsort(flat)
            flat, rows = flat[order], order // K
        else:
            rows = mx.arange(N * K) // K
        y = self.gate_up_proj(x[rows][:, None], flat, sorted_indices=in_order)
        y = self.down_proj(geglu(*mx.split(y, 2, axis=-1)), flat, sorted_indices=in_order)[:, 0]
        if in_order:
            y = y[mx.argsort(order)]
        return (y.reshape(N, K, -1) * weights[..., None].astype(y.dtype)).sum(axis=1)

    def _all_experts(self, x: mx.array, weights: mx.array, indices: mx.array) -> mx.array:
        """The same sum by two plain matmuls over all experts: for training a model with few of them,
        where the gradient of a gather costs more than the products it saves."""
        assert isinstance(self.gate_up_proj, ExpertLinear) and isinstance(self.down_proj, ExpertLinear)
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
