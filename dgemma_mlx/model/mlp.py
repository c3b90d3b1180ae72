"""The dense feed-forward block (GeGLU) and the self-conditioning block, which is built on it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.model.joined import SharedInput
from dgemma_mlx.model.packed import Linear


def gelu(x: mx.array) -> mx.array:
    """Return the tanh approximation of GELU, elementwise, in x's dtype.

    The usual form is x (1 + tanh u) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3). Since (1 + tanh u) / 2 equals
    sigmoid(2 u), this function computes x * sigmoid(2 u), where 2 sqrt(2/pi) is the constant below.
    """
    return x * mx.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return gelu(gate) * up, elementwise."""
    return gelu(gate) * up


if mx.metal.is_available():  # Compiled, it is one fused kernel. On CPU, compiling calls a C++ compiler for no gain.
    geglu = mx.compile(geglu, shapeless=True)  # shapeless: not traced again for each prompt length, canvas or batch


class MLP(SharedInput):
    """The dense feed-forward block: down(gelu(gate x) * up x), where gate x and up x have ``intermediate_size`` values.

    Reference: transformers ``DiffusionGemmaText4MLP``.

    Attributes:
        gate_proj: Linear map from M to ``intermediate_size`` values, whose GELU scales the values of ``up_proj``.
        up_proj: Linear map from M to ``intermediate_size`` values.
        down_proj: Linear map from ``intermediate_size`` to M values.
    """

    shared_input = ("gate_proj", "up_proj")

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply the block to x (..., M) and return (..., M)."""
        return self.down_proj(geglu(*self.products(x)))


class SelfConditioning(MLP):
    """The block that adds the previous step's prediction to the embeddings of the canvas.

    Reference: transformers ``DiffusionGemmaSelfConditioning``. The idea is from Chen et al., arXiv 2208.04202.

    Attributes:
        pre_norm: Norm of the expected embeddings, before the feed-forward block.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.pre_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._eps = config.rms_norm_eps

    def signal(self, expected: mx.array) -> mx.array:
        """Return mlp(pre_norm(expected)), (B, C, M): what the block adds to the embeddings of a canvas.

        ``expected`` (B, C, M) holds the expected embeddings under the previous step's prediction, or zeros in the first
        step. The signal does not depend on the canvas, so it can be computed before the canvas is known.
        """
        return self(self.pre_norm(expected))

    def condition(self, embeddings: mx.array, signal: mx.array) -> mx.array:
        """Return rms_norm(embeddings + signal), all (B, C, M); the norm has no weight.

        ``embeddings`` are those of the canvas, and ``signal`` is the result of ``signal``.
        """
        return mx.fast.rms_norm(embeddings + signal, None, self._eps)
