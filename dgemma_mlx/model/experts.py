"""The mixture-of-experts branch of a layer: the router, and the experts with their weights stacked as 3-D arrays.

Reference: transformers ``DiffusionGemmaTextRouter`` and ``DiffusionGemmaTextExperts``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.kernels import Route, moe_combine, moe_route
from dgemma_mlx.model.mlp import geglu
from dgemma_mlx.model.packed import Linear, in_blocks, times_experts

# One entry per layer: the router's probabilities (N, E) float32 and the indices (N, K) of the chosen experts.
RouterLog = list[tuple[mx.array, mx.array]]


class Router(nn.Module):
    """The router: it chooses K of E experts for each row of the residual stream.

    Attributes:
        proj: Linear map from M values to E logits.
        scale: Weight (M,) of the router's own RMSNorm. The norm is computed by ``attention_residual``, which uses
            ``scale * M**-0.5``.
        per_expert_scale: Factor (E,) on the weight of each chosen expert.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self._top_k = config.top_k_experts
        self.proj = Linear(config.hidden_size, config.num_experts)
        self.scale = mx.ones(config.hidden_size)
        self.per_expert_scale = mx.ones(config.num_experts)

    def __call__(self, normed: mx.array, log: RouterLog | None = None) -> Route:
        """Return the ``Route`` of N rows.

        ``normed`` (N, M) is the residual stream after the router's norm. If ``log`` is given, the probabilities (N, E)
        float32 and the chosen experts (N, K) are appended to it.
        """
        logits = self.proj(normed)
        route = moe_route(logits, self.per_expert_scale, self._top_k)
        if log is not None:
            log.append((mx.softmax(logits.astype(mx.float32), axis=-1), route.indices))
        return route


def expert_matmul(x: mx.array, weights: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
    """Multiply each row of x (..., 1, I) by the matrix of its expert and return (..., 1, O) in x's dtype.

    ``weights`` (E, I, O) holds the experts' matrices, and ``indices`` (...) the expert of each row. ``sorted_indices``
    states that the indices ascend, which lets MLX group the rows of an expert.
    """
    if mx.default_device() == mx.Device(mx.cpu) and x.dtype != mx.float32:
        # MLX's CPU implementation of gather_mm supports float32 only.
        wide = mx.gather_mm(
            x.astype(mx.float32), weights.astype(mx.float32), rhs_indices=indices, sorted_indices=sorted_indices
        )
        return wide.astype(x.dtype)
    return mx.gather_mm(x, weights, rhs_indices=indices, sorted_indices=sorted_indices)


class ExpertLinear(nn.Module):
    """A stack of E linear maps without bias, of which each row of the input uses one.

    Attributes:
        weight: The matrices, (E, O, I).
        is_plain: Whether ``weight`` is an ordinary floating-point array that can be multiplied directly.
    """

    is_plain = True

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = mx.random.normal((experts, outputs, inputs)) * inputs**-0.5

    def __call__(self, x: mx.array, indices: mx.array, *, sorted_indices: bool) -> mx.array:
        """Apply the map ``indices[...]`` to each row of x (..., 1, I) and return (..., 1, O)."""
        return expert_matmul(x, self.weight.swapaxes(-1, -2), indices, sorted_indices)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine", **_: Any
    ) -> QuantizedExpertLinear:
        """Return these maps with packed weights. ``mlx.nn.quantize`` calls this method.

        ``group_size`` and ``bits`` default to the values that MLX uses for the mode.
        """
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """A stack of E linear maps without bias whose weights are packed, as ``mlx.core.quantize`` stores them.

    Attributes:
        group_size: Number of consecutive weights that share a scale.
        bits: Bits per weight.
        mode: MLX quantization mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        weight: The packed matrices, (E, O, I * bits / 32) uint32.
        scales: Scales, (E, O, I / group_size).
        biases: Offsets, (E, O, I / group_size); only in affine mode.
        is_plain: False, because ``weight`` cannot be multiplied directly.
    """

    is_plain = False

    def __init__(self, weight: mx.array, group_size: int | None, bits: int | None, mode: str) -> None:
        super().__init__()
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        self.group_size = weight.shape[-1] // self.scales.shape[-1]
        self.bits, self.mode = 32 * self.weight.shape[-1] // weight.shape[-1], mode
        if biases:
            self.biases = biases[0]
        self.freeze()

    def __call__(self, x: mx.array, indices: mx.array, *, sorted_indices: bool) -> mx.array:
        """Apply the map ``indices[...]`` to each row of x (..., 1, I) and return (..., 1, O).

        On a CPU, sorted ``indices`` of many rows are evaluated (see ``times_experts``).
        """
        if sorted_indices and in_blocks(x, self):
            y = times_experts(x.reshape(-1, x.shape[-1]), self, indices.flatten())
            return y.reshape(*x.shape[:-1], -1)
        return mx.gather_qmm(
            x, self.weight, self.scales, self.get("biases"), rhs_indices=indices, transpose=True,
            group_size=self.group_size, bits=self.bits, mode=self.mode, sorted_indices=sorted_indices,
        )


class Experts(nn.Module):
    """The experts: for each row, the weighted sum of down(gelu(gate x) * up x) over its K experts, then a norm.

    Attributes:
        gate_up_proj: The experts' gate and up matrices, stacked as (E, 2 * moe_intermediate_size, M), gate rows first.
        down_proj: The experts' down matrices, (E, M, moe_intermediate_size).
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        E, M, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self._few_experts = E <= 4 * config.top_k_experts
        self.gate_up_proj: ExpertLinear | QuantizedExpertLinear = ExpertLinear(E, M, 2 * inner)
        self.down_proj: ExpertLinear | QuantizedExpertLinear = ExpertLinear(E, inner, M)

    def __call__(self, x: mx.array, route: Route, norm: nn.RMSNorm) -> mx.array:
        """Return norm(weighted sum of each row's K experts), (N, M), in x's dtype.

        ``x`` (N, M) is the residual stream after ``pre_feedforward_layernorm_2``, ``route`` the router's result for the
        same rows, and ``norm`` the layer's ``post_feedforward_layernorm_2``.
        """
        if self.training and self._few_experts and self.gate_up_proj.is_plain and self.down_proj.is_plain:
            return norm(self._all_experts(x, route.weights, route.indices))
        return moe_combine(self._outputs(x, route), route.slots, route.weights, norm.weight, norm.eps)

    def summed(self, x: mx.array, route: Route) -> mx.array:
        """Return the weighted sum of each row's K experts without the norm, (N, M), in x's dtype.

        ``x`` and ``route`` are those of a call. A machine that holds a slice of each expert adds the slices up first.
        """
        return (route.weights[:, None].astype(x.dtype) @ self._outputs(x, route)[route.slots])[:, 0]

    def _outputs(self, x: mx.array, route: Route) -> mx.array:
        """Return the output of an expert in each slot, (N * K, M)."""
        y = self.gate_up_proj(x[route.rows][:, None], route.experts, sorted_indices=True)
        return self.down_proj(geglu(*mx.split(y, 2, axis=-1)), route.experts, sorted_indices=True)[:, 0]

    def _all_experts(self, x: mx.array, weights: mx.array, indices: mx.array) -> mx.array:
        """Compute the same weighted sum, (N, M), by two ordinary matrix products over all experts.

        In training a model with few experts this is faster, because the gradient of a gather costs more than the
        products that the gather saves.
        """
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
