"""What a fine-tuning run is going to do, and how much memory it takes, estimated from the network's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.config import TextConfig
from dgemma_mlx.engine import Model
from dgemma_mlx.train.data import Conversation
from dgemma_mlx.train.finetune import FinetuneConfig

_STATES = {"adamw": 2, "muon": 1}  # arrays of a parameter's size that the optimizer keeps
_GRADIENTS = 3  # of a parameter's size: the gradient, the sum of those before, the new value
_LOGITS = 6  # arrays of the logits' size: raw, capped, their softmax, and the gradients of these


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes, by what they are for."""

    weights: int
    training: int
    """gradients and the optimizer's state"""
    activations: int
    """intermediate results that wait for the gradient"""

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations


def training_memory(model: Model, conversations: Sequence[Conversation], config: FinetuneConfig) -> TrainingMemory:
    """For a prepared model, at a step with the longest conversations."""
    text, canvas, element = model.config.text, model.config.canvas_length, model.network.dtype.size
    rows = (config.batch_size + 1) // 2  # of the larger part
    prefix = max(len(prompt) + len(answer) for prompt, answer in conversations)
    if not config.causal_weight:
        prefix = max(len(prompt) + (len(answer) - 1) // canvas * canvas for prompt, answer in conversations)
    tokens = rows * (prefix + canvas)
    layer = tokens * _layer_values(text, model.network) * element
    layer += 4 * rows * text.num_attention_heads * (prefix**2 + canvas * (prefix + canvas)) * element
    if config.checkpoint_layers:
        activations = layer + 2 * text.num_hidden_layers * tokens * text.hidden_size * element
    else:
        activations = layer * text.num_hidden_layers
    logits = rows * canvas * (2 if config.causal_weight else 1) * text.vocab_size * 4 * _LOGITS
    trained = _bytes(model.network.trainable_parameters())
    return TrainingMemory(
        _bytes(model.network.parameters()), trained * (_GRADIENTS + _STATES[config.optimizer]), activations + logits
    )


def make_plan(model: Model, conversations: Sequence[Conversation], config: FinetuneConfig) -> dict[str, Any]:
    """Of a prepared model, as ``--dry-run --json`` prints it; bytes and tokens."""
    memory = training_memory(model, conversations, config)
    return {
        "model": model.name, "examples": len(conversations),
        "longest": max(len(prompt) + len(answer) for prompt, answer in conversations),
        "canvas_length": model.config.canvas_length, "steps": config.steps,
        "epochs": round(config.steps * config.batch_size * config.accumulate / len(conversations), 2),
        "trained_parameters": sum(array.size for array in _arrays(model.network.trainable_parameters())),
        "estimated_memory": {**asdict(memory), "total": memory.total},
    }  # fmt: skip


def _layer_values(text: TextConfig, network: Any) -> int:
    """What a position leaves in a layer, as counts of arrays of each width."""
    heads, kv_heads = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    K, inner = text.top_k_experts, text.moe_intermediate_size
    experts = K * (2 * text.hidden_size + 9 * inner)
    if text.num_experts <= 4 * K and network.layers[0].experts.gate_up_proj.is_plain:  # all of them are worked out
        experts += text.num_experts * 5 * inner
    return 16 * text.hidden_size + 6 * (heads + kv_heads) + 9 * text.intermediate_size + experts


def _bytes(parameters: Any) -> int:
    return sum(array.nbytes for array in _arrays(parameters))


def _arrays(parameters: Any) -> list[mx.array]:
    flat: Any = tree_flatten(parameters)
    return [array for _, array in flat]
