"""Runs a checkpoint layer by layer on a few samples: a layer's weights are read when it is its turn, then dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.model.attention import AppendKV
from dgemma_mlx.model.cache import Mask, row_positions
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.text import Layer
from dgemma_mlx.text.chat import ChatTemplate, encode_chat
from dgemma_mlx.text.tokenizer import load_tokenizer

CANVAS = 64  # positions at most; enough to tell, and the logits of a large vocabulary stay small
_REPLACED = 0.5  # share of the canvas that is noise, as halfway through denoising

TEXTS = (
    ("What is the capital of France?", "The capital of France is Paris, a city on the river Seine."),
    ("Sort these numbers: 31, 7, 19, 2, 44", "2, 7, 19, 31, 44"),
    ("Write a Python function that says whether a number is even.",
     "def is_even(number: int) -> bool:\n    return number % 2 == 0"),
    ("Explain in one sentence why the sky is blue.",
     "Sunlight is scattered by the molecules of the air, and blue light is scattered more than red."),
)  # fmt: skip
"""Built-in prompts and answers."""


@dataclass(frozen=True)
class Sample:
    """Prompt ids (1, P) and a canvas (1, C), both int32."""

    prompt: mx.array
    canvas: mx.array


def make_samples(folder: Path, config: ModelConfig, texts: Sequence[tuple[str, str]] = TEXTS) -> list[Sample]:
    """Prompts in the checkpoint's chat format; canvases of the answers, half of them noise (always the same)."""
    tokenizer, template = load_tokenizer(folder), ChatTemplate.load(folder)
    rng = np.random.default_rng(0)
    length = min(config.canvas_length, CANVAS)
    samples = []
    for prompt, answer in texts:
        ids = encode_chat(tokenizer, template, [{"role": "user", "content": prompt}])
        clean = [*tokenizer.encode(answer), config.eos_token_ids[0], *[config.pad_token_id] * length][:length]
        noise = rng.integers(0, config.text.vocab_size, length)
        canvas = np.where(rng.random(length) < _REPLACED, noise, clean)
        samples.append(Sample(mx.array([ids], mx.int32), mx.array(canvas[None], mx.int32)))
    return samples


class Walk:
    """The states of all samples in one checkpoint, moved on a layer at a time.

    ``encoded`` and ``drafts`` hold, for each sample, the encoder's (1, P, M) and the decoder's (1, C, M) hidden state.
    """

    def __init__(self, folder: Path, config: ModelConfig, samples: Sequence[Sample]) -> None:
        self._folder, self._config = folder, config
        embedding, _ = load_model(folder, config, strict=False)
        self.encoded = [embedding.embed(sample.prompt) for sample in samples]
        drafts = [embedding.embed(sample.canvas) for sample in samples]
        self.drafts = [embedding.self_conditioning.condition(draft, mx.zeros_like(draft)) for draft in drafts]
        mx.eval(self.encoded, self.drafts)
        # Another one for the layers: the first goes, and the embedding table with it.
        self._model, _ = load_model(folder, config, strict=False)
        self._layer = 0

    def next_layer(self, prepare: Callable[[Layer], None] = lambda layer: None) -> None:
        """Runs the next layer on every sample; ``prepare`` may change it before."""
        layer, i = self._model.layers.pop(0), self._layer
        prepare(layer)
        kind = self._config.text.layer_types[i]
        for number, (encoded, draft) in enumerate(zip(self.encoded, self.drafts, strict=True)):
            cache = self._model.new_cache()
            length, append = encoded.shape[1], partial(cache.update, i)
            mask = cache.encode_masks(length)[kind]
            self.encoded[number] = _run(layer, encoded, 0, mask, append, layer.encoder_layer_scalar)
            cache.advance(length)
            mask, append = cache.canvas_masks(draft.shape[1])[kind], partial(cache.with_canvas, i)
            self.drafts[number] = _run(layer, draft, cache.rope_offset, mask, append, layer.layer_scalar)
        mx.eval(self.encoded, self.drafts)
        self._layer += 1
        del layer
        mx.clear_cache()

    def final_states(self) -> list[mx.array]:
        """The decoder's hidden states after the final norm, (1, C, M) each."""
        return [self._model.norm(draft) for draft in self.drafts]

    def logits(self) -> Iterator[mx.array]:
        """Each sample's canvas logits (1, C, V) float32, after all layers."""
        head, _ = load_model(self._folder, self._config, strict=False)
        for state in self.final_states():
            yield head.logits(state)


def _run(
    layer: Layer, x: mx.array, rope_offset: int | mx.array, mask: Mask, append: AppendKV, scalar: mx.array
) -> mx.array:
    """x (1, L, M) -> (1, L, M). The norm for the next layer, which is not there, is left uncomputed."""
    norm = layer.input_layernorm
    x, _ = layer(x, norm(x), row_positions(rope_offset, *x.shape[:2]), mask, append, scalar, norm)
    return x


def number(x: mx.array) -> float:
    """The one value of an array."""
    return float(np.array(x))
