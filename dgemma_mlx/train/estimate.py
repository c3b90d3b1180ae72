"""Estimates for a fine-tuning run: its length in steps and epochs, and its memory by the shape of the network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.train.finetune import FinetuneRun

# Numbers of arrays of a parameter's size.
_OPTIMIZER_ARRAYS = {"adamw": 2, "muon": 1}  # state that the optimizer keeps
_GRADIENT_ARRAYS = 3  # the gradient, the sum of earlier gradients, and the updated parameter
# Numbers of arrays that are kept for the backward pass. They are slopes of measured memory peaks (float32, MLX 0.32 on
# Linux), so they need not be whole.
_LOGIT_ARRAYS = 6  # arrays of the logits' size
_SCORE_ARRAYS = 1.25  # arrays of the attention scores' size
_RECOMPUTED_SCORE_ARRAYS = 4.25  # the same for a layer with gradient checkpointing, while it is recomputed
_HIDDEN_ARRAYS = 3  # arrays of the hidden states' size: inputs and outputs of a layer with gradient checkpointing
_FULL_TRAINING_FACTOR = 1.5  # a layer keeps more when all of its weights are trained


@dataclass(frozen=True)
class TrainingMemory:
    """An estimate of the memory that a training step takes, in bytes.

    Attributes:
        weights: The weights of the network, including an adapter.
        training: Gradients and the state of the optimizer.
        activations: Intermediate results that are kept for the backward pass.
    """

    weights: int
    training: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return self.weights + self.training + self.activations


def training_memory(run: FinetuneRun) -> TrainingMemory:
    """Estimate the memory of the step that trains on the longest conversations."""
    model, config, conversations = run.model, run.config, run.conversations
    text, canvas, element = model.config.text, model.config.canvas_length, model.network.dtype.size
    rows = (config.batch_size + 1) // 2  # of the larger part of a batch
    prefix = max(len(prompt) + len(answer) for prompt, answer in conversations)
    if not config.causal_weight:
        prefix = max(len(prompt) + (len(answer) - 1) // canvas * canvas for prompt, answer in conversations)
    tokens = rows * (prefix + canvas)
    position = _layer_values(text, model.network) * element * (_FULL_TRAINING_FACTOR if config.full else 1)
    encoder_scores = rows * text.num_attention_heads * prefix**2 * element
    decoder_scores = rows * text.num_attention_heads * canvas * (prefix + canvas) * element
    if config.checkpoint_layers:
        hidden = text.num_hidden_layers * tokens * text.hidden_size * element
        scores = _RECOMPUTED_SCORE_ARRAYS * (encoder_scores + decoder_scores)
        activations = int(tokens * position + scores) + _HIDDEN_ARRAYS * hidden
    else:
        encoder = rows * prefix * position + _SCORE_ARRAYS * encoder_scores
        decoder = rows * canvas * position + _SCORE_ARRAYS * decoder_scores
        # Without the causal loss, only keys and values of the encoder's last layer are needed.
        encoder_layers = text.num_hidden_layers - (0 if config.causal_weight else 1)
        activations = int(encoder_layers * encoder + text.num_hidden_layers * decoder)
    logits = rows * canvas * (2 if config.causal_weight else 1) * text.vocab_size * 4 * _LOGIT_ARRAYS
    trained = _bytes(model.network.trainable_parameters())
    return TrainingMemory(
        weights=_bytes(model.network.parameters()),
        training=trained * (_GRADIENT_ARRAYS + _OPTIMIZER_ARRAYS[config.optimizer]),
        activations=activations + logits,
    )


def make_plan(run: FinetuneRun) -> dict[str, Any]:
    """Return the plan that ``dgemma-mlx train --dry-run --json`` prints. Lengths are in tokens, memory is in bytes."""
    model, config, conversations, memory = run.model, run.config, run.conversations, training_memory(run)
    return {
        "model": model.name, "examples": len(conversations), **asdict(run.limited),
        "longest": max(len(prompt) + len(answer) for prompt, answer in conversations),
        "canvas_length": model.config.canvas_length, "steps": config.steps,
        "epochs": round(config.steps * config.batch_size * config.accumulate / len(conversations), 2),
        "trained_parameters": sum(array.size for array in _arrays(model.network.trainable_parameters())),
        "estimated_memory": {**asdict(memory), "total": memory.total},
    }  # fmt: skip


def _layer_values(text: TextConfig, network: Any) -> int:
    """Return the number of values that one layer keeps for the backward pass, for each position."""
    heads, kv_heads = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    M, K, inner = text.hidden_size, text.top_k_experts, text.moe_intermediate_size
    experts = K * (2 * M + 5 * inner)
    if text.num_experts <= 4 * K and network.layers[0].experts.gate_up_proj.is_plain:  # all experts are computed
        experts = K * (M + 4 * inner) + text.num_experts * 5 * inner // 2
    return 8 * M + 3 * (heads + kv_heads) + 5 * text.intermediate_size + experts


def _bytes(parameters: Any) -> int:
    """Return the size of all arrays in a parameter tree, in bytes."""
    return sum(array.nbytes for array in _arrays(parameters))


def _arrays(parameters: Any) -> list[mx.array]:
    """Return all arrays of a parameter tree."""
    flat: Any = tree_flatten(parameters)
    return [array for _, array in flat]
