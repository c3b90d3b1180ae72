"""A walk through a checkpoint, layer by layer, with a few samples.

The weights of a layer are read when the layer runs and freed afterwards, so that memory holds one layer at a time.
"""

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
from dgemma_mlx.model.layer import Layer
from dgemma_mlx.model.load import load_model
from dgemma_mlx.text.chat import ChatTemplate, encode_chat
from dgemma_mlx.text.tokenizer import load_tokenizer

CANVAS = 64  # maximum canvas length: enough for a comparison, and the logits of a large vocabulary stay small
_NOISE_SHARE = 0.5  # share of the canvas that is noise, as halfway through denoising

# Built-in (prompt, answer) pairs.
TEXTS = (
    ("What is the capital of France?", "The capital of France is Paris, a city on the river Seine."),
    ("Sort these numbers: 31, 7, 19, 2, 44", "2, 7, 19, 31, 44"),
    ("Write a Python function that says whether a number is even.",
     "def is_even(number: int) -> bool:\n    return number % 2 == 0"),
    ("Explain in one sentence why the sky is blue.",
     "Sunlight is scattered by the molecules of the air, and blue light is scattered more than red."),
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One input of the network.

    Attributes:
        prompt: Ids of the prompt, (1, P) int32.
        canvas: Ids of the partly noisy canvas, (1, C) int32.
    """

    prompt: mx.array
    canvas: mx.array


def make_samples(folder: Path, config: ModelConfig, texts: Sequence[tuple[str, str]] = TEXTS) -> list[Sample]:
    """Return a sample for each (prompt, answer) pair.

    Prompts are in the checkpoint's chat format. Canvases hold the answers, with half of their ids replaced by noise,
    which is the same every time. Raises ``DgemmaError`` if the folder has no usable tokenizer or chat template.
    """
    tokenizer, template = load_tokenizer(folder), ChatTemplate.load(folder)
    rng = np.random.default_rng(0)
    length = min(config.canvas_length, CANVAS)
    samples = []
    for prompt, answer in texts:
        ids = encode_chat(tokenizer, template, [{"role": "user", "content": prompt}])
        clean = [*tokenizer.encode(answer), config.eos_token_ids[0], *[config.pad_token_id] * length][:length]
        noise = rng.integers(0, config.text.vocab_size, length)
        canvas = np.where(rng.random(length) < _NOISE_SHARE, noise, clean)
        samples.append(Sample(mx.array([ids], mx.int32), mx.array(canvas[None], mx.int32)))
    return samples


class Walk:
    """The hidden states of all samples in one checkpoint, which advance one layer at a time.

    Attributes:
        encoder_states: The encoder's hidden states of each sample, (1, P, M).
        decoder_states: The decoder's hidden states of each sample, (1, C, M).
    """

    def __init__(self, folder: Path, config: ModelConfig, samples: Sequence[Sample]) -> None:
        self._folder, self._config = folder, config
        embedding, _ = load_model(folder, config, strict=False)
        self.encoder_states = [embedding.embed(sample.prompt) for sample in samples]
        block = embedding.self_conditioning
        embedded = [embedding.embed(sample.canvas) for sample in samples]
        self.decoder_states = [block.condition(x, block.signal(mx.zeros_like(x))) for x in embedded]
        mx.eval(self.encoder_states, self.decoder_states)
        # The layers are taken from a second model, so that the first one and its embedding table are freed.
        self._model, _ = load_model(folder, config, strict=False)
        self._layer = 0

    def next_layer(self, prepare: Callable[[Layer], None] = lambda layer: None) -> None:
        """Run the next layer on every sample. ``prepare`` is called with the layer first and may change it."""
        layer, i = self._model.layers.pop(0), self._layer
        prepare(layer)
        kind = self._config.text.layer_types[i]
        for number, (encoded, decoded) in enumerate(zip(self.encoder_states, self.decoder_states, strict=True)):
            cache = self._model.new_cache()
            length, append = encoded.shape[1], partial(cache.update, i)
            mask = cache.encode_masks(length)[kind]
            self.encoder_states[number] = _run(layer, encoded, 0, mask, append, layer.encoder_layer_scalar)
            cache.advance(length)
            mask, append = cache.canvas_masks(decoded.shape[1])[kind], partial(cache.with_canvas, i)
            self.decoder_states[number] = _run(layer, decoded, cache.rope_offset, mask, append, layer.layer_scalar)
        mx.eval(self.encoder_states, self.decoder_states)
        self._layer += 1
        del layer
        mx.clear_cache()

    def final_states(self) -> list[mx.array]:
        """Return the decoder's hidden states after the final norm, (1, C, M) for each sample."""
        return [self._model.norm(state) for state in self.decoder_states]

    def logits(self) -> Iterator[mx.array]:
        """Yield the canvas logits of each sample, (1, C, V) float32. All layers must have run."""
        head, _ = load_model(self._folder, self._config, strict=False)
        for state in self.final_states():
            yield head.logits(state)


def _run(
    layer: Layer, x: mx.array, rope_offset: int | mx.array, mask: Mask, append: AppendKV, scalar: mx.array
) -> mx.array:
    """Run a layer on hidden states (1, L, M) and return those after it.

    A layer also returns its output normed for the next layer. That result is not used, so MLX does not compute it.
    """
    norm = layer.input_layernorm
    x, _ = layer(x, norm(x), row_positions(rope_offset, *x.shape[:2]), mask, append, scalar, norm)
    return x


def as_float(x: mx.array) -> float:
    """Return the value of an array that holds one number."""
    return float(np.array(x))
