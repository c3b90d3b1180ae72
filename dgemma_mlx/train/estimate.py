"""What a fine-tuning run is going to do, and how much memory it takes, estimated from the network's shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.train.finetune import FinetuneRun

_STATES = {"adamw": 2, "muon": 1}  # arrays of a parameter's size that the optimizer keeps
_GRADIENTS = 3  # of a parameter's size: the gradient, the sum of those before, the new value
# How much waits for the gradient: slopes of measured peaks (float32, MLX 0.32 on Linux).
_LOGITS = 6  # arrays of the logits' size
_SCORES = 1.25  # of the attention scores'
_SCORES_AGAIN = 4.25  # of those of a layer that is worked out again
_HELD = 3  # of the hidden states': what goes in and comes out of such a layer
_FULL = 1.5  # of a layer's, where all weights are trained


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


def training_memory(run: FinetuneRun) -> TrainingMemory:
    """Of a step with the longest conversations."""
    model, config, conversations = run.model, run.config, run.conversations
    text, canvas, element = model.config.text, model.config.canvas_length, model.network.dtype.size
    rows = (config.batch_size + 1) // 2  # of the larger part
    prefix = max(len(prompt) + len(answer) for prompt, answer in conversations)
    if not config.causal_weight:
        prefix = max(len(prompt) + (len(answer) - 1) // canvas * canvas for prompt, answer in conversations)
    tokens = rows * (prefix + canvas)
    layer = tokens * _layer_values(text, model.network) * element * (_FULL if config.full else 1)
    scores = rows * text.num_attention_heads * (prefix**2 + canvas * (prefix + canvas)) * element
    if config.checkpoint_layers:
        held = text.num_hidden_layers * tokens * text.hidden_size * element
        activations = int(layer + _SCORES_AGAIN * scores) + _HELD * held
    else:
        activations = int(text.num_hidden_layers * (layer + _SCORES * scores))
    logits = rows * canvas * (2 if config.causal_weight else 1) * text.vocab_size * 4 * _LOGITS
    trained = _bytes(model.network.trainable_parameters())
    return TrainingMemory(
        _bytes(model.network.parameters()), trained * (_GRADIENTS + _STATES[config.optimizer]), activations + logits
    )


def make_plan(run: FinetuneRun) -> dict[str, Any]:
    """As ``--dry-run --json`` prints it; bytes and tokens."""
    model, config, conversations, memory = run.model, run.config, run.conversations, training_memory(run)
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
    M, K, inner = text.hidden_size, text.top_k_experts, text.moe_intermediate_size
    experts = K * (2 * M + 5 * inner)
    if text.num_experts <= 4 * K and network.layers[0].experts.gate_up_proj.is_plain:  # all of them are worked out
        experts = K * (M + 4 * inner) + text.num_experts * 5 * inner // 2
    return 8 * M + 3 * (heads + kv_heads) + 5 * text.intermediate_size + experts


def _bytes(parameters: Any) -> int:
    return sum(array.nbytes for array in _arrays(parameters))


def _arrays(parameters: Any) -> list[mx.array]:
    flat: Any = tree_flatten(parameters)
    return [array for _, array in flat]
