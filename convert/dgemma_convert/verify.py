"""Comparison of an output with its source on built-in prompts, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from dgemma_convert.walk import Walk, as_float, make_samples
from dgemma_mlx.checkpoint.config import ModelConfig


@dataclass(frozen=True)
class Verification:
    """Differences between an output and its source, measured on the built-in prompts.

    Attributes:
        encoder_error: For each layer, |output - source| / |source| of the encoder's hidden states (Frobenius norms),
            for the prompt where it is largest.
        decoder_error: The same for the decoder's hidden states.
        kl_divergence: Mean over canvas positions of KL(source || output), in nats.
        top1_agreement: Share of canvas positions where both have the same most probable token.
    """

    encoder_error: tuple[float, ...]
    decoder_error: tuple[float, ...]
    kl_divergence: float
    top1_agreement: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, for the report."""
        return asdict(self)


def verify(source: Path, output: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Run two checkpoint folders side by side, layer by layer, and compare them.

    Memory holds at most one layer of one of the checkpoints. ``progress`` is called with the number of layers done and
    the number of all layers. Raises ``DgemmaError`` if a checkpoint, or the tokenizer of the source, cannot be read.
    """
    source_config, output_config = ModelConfig.load(source), ModelConfig.load(output)
    samples = make_samples(source, source_config)
    ours, theirs = Walk(output, output_config, samples), Walk(source, source_config, samples)
    encoder_error, decoder_error = [], []
    layers = source_config.text.num_hidden_layers
    for layer in range(layers):
        theirs.next_layer()
        ours.next_layer()
        encoder_error.append(_worst(ours.encoder_states, theirs.encoder_states))
        decoder_error.append(_worst(ours.decoder_states, theirs.decoder_states))
        progress(layer + 1, layers)
    expected = list(theirs.logits())
    mx.eval(expected)
    divergence, agreement = [], []
    for logits, reference in zip(ours.logits(), expected, strict=True):
        log_p, log_q = _log_softmax(reference), _log_softmax(logits)
        divergence.append(as_float((mx.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()))
        agreement.append(as_float((logits.argmax(-1) == reference.argmax(-1)).mean()))
    return Verification(
        tuple(encoder_error), tuple(decoder_error),
        round(sum(divergence) / len(divergence), 6), round(sum(agreement) / len(agreement), 4),
    )  # fmt: skip


def _worst(states: list[mx.array], references: list[mx.array]) -> float:
    """Return the largest relative error over the samples, rounded to six digits."""

    def norm(x: mx.array) -> mx.array:
        return mx.sqrt(mx.square(x.astype(mx.float32)).sum())

    errors = [norm(a - b) / norm(b) for a, b in zip(states, references, strict=True)]
    return round(max(as_float(error) for error in errors), 6)


def _log_softmax(logits: mx.array) -> mx.array:
    """Return log probabilities over the last axis."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
