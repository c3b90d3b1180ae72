"""Compares an output with its source on built-in prompts, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from dgemma_convert.walk import Walk, make_samples, number
from dgemma_mlx.checkpoint.config import ModelConfig


@dataclass(frozen=True)
class Verification:
    """How far the output's numbers are from the source's, over the built-in prompts.

    ``encoder_error`` and ``decoder_error``: for each layer, |output - source| / |source| of the hidden states
    (Frobenius norms, worst prompt). ``kl_divergence``: mean over canvas positions of KL(source || output), nats.
    ``top1_agreement``: share of canvas positions with the same most probable token.
    """

    encoder_error: tuple[float, ...]
    decoder_error: tuple[float, ...]
    kl_divergence: float
    top1_agreement: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(source: Path, output: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Verification:
    """Runs both checkpoints in step, so that no more than one layer of one of them is in memory.

    ``progress`` is told layers done and layers in all.
    """
    source_config, output_config = ModelConfig.load(source), ModelConfig.load(output)
    samples = make_samples(source, source_config)
    ours, theirs = Walk(output, output_config, samples), Walk(source, source_config, samples)
    encoder_error, decoder_error = [], []
    layers = source_config.text.num_hidden_layers
    for layer in range(layers):
        theirs.next_layer()
        ours.next_layer()
        encoder_error.append(_worst(ours.encoded, theirs.encoded))
        decoder_error.append(_worst(ours.drafts, theirs.drafts))
        progress(layer + 1, layers)
    expected = list(theirs.logits())
    mx.eval(expected)
    divergence, agreement = [], []
    for logits, reference in zip(ours.logits(), expected, strict=True):
        log_p, log_q = _log_softmax(reference), _log_softmax(logits)
        divergence.append(number((mx.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()))
        agreement.append(number((logits.argmax(-1) == reference.argmax(-1)).mean()))
    return Verification(
        tuple(encoder_error), tuple(decoder_error),
        round(sum(divergence) / len(divergence), 6), round(sum(agreement) / len(agreement), 4),
    )  # fmt: skip


def _worst(states: list[mx.array], references: list[mx.array]) -> float:
    """The largest relative error over the samples."""

    def norm(x: mx.array) -> mx.array:
        return mx.sqrt(mx.square(x.astype(mx.float32)).sum())

    errors = [norm(a - b) / norm(b) for a, b in zip(states, references, strict=True)]
    return round(max(number(error) for error in errors), 6)


def _log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
