"""The dense feed-forward blocks: GeGLU, and the self-conditioning block built on it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.model.packed import Linear


def gelu(x: mx.array) -> mx.array:
    """GELU in its tanh approximation, as x * sigmoid(2 u): the same function with one transcendental.

    u = sqrt(2/pi) (x + 0.044715 x^3), and (1 + tanh u) / 2 = sigmoid(2 u).
    """
    return x * mx.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up, elementwise."""
    return gelu(gate) * up


if mx.metal.is_available():  # one fused kernel; on CPU compiling calls a C++ compiler and gains nothing
    geglu = mx.compile(geglu, shapeless=True)  # traced once, not again for each length of prompt, canvas or batch


class MLP(nn.Module):
    """down(gelu(gate x) * up x): (..., M) -> (..., M)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class SelfConditioning(MLP):
    """Adds what the last step predicted to the canvas' embeddings, then norms the sum.

    Reference: transformers ``DiffusionGemmaSelfConditioning``; idea: Chen et al., arXiv 2208.04202.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.pre_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._eps = config.rms_norm_eps

    def condition(self, embeddings: mx.array, signal: mx.array) -> mx.array:
        """Canvas embeddings and soft embeddings of the last prediction, both (B, C, M) -> (B, C, M)."""
        return mx.fast.rms_norm(embeddings + self(self.pre_norm(signal)), None, self._eps)
