"""Encoder states and logits, compared with transformers on checkpoints whose weights are all random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import FULL, SLIDING, ModelConfig
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.text import DiffusionGemma
from tests.oracle.reference import CANVAS, VISION, WINDOW, Array, Reference, publish, write_checkpoint

pytestmark = pytest.mark.oracle

# The largest difference found is 1.1e-5, with logits up to 5.5, because float32 sums are in another order. The
# tolerance is small enough to detect a missing scale of the soft embedding, although the norm after it almost removes
# the scale.
TOLERANCE = 1e-4

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "other shape": {
        "num_hidden_layers": 5,
        "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING],  # the last is forced to full attention
        "num_key_value_heads": 4,
        "num_global_key_value_heads": None,
        "num_experts": 5,
        "top_k_experts": 3,
        "final_logit_softcapping": 7.0,
        "rms_norm_eps": 1e-3,
        "use_bidirectional_attention": None,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 500.0},
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 3000.0},
        },
    },
}

Models = tuple[Reference, DiffusionGemma]


def load(folder: Path) -> DiffusionGemma:
    return load_model(folder, ModelConfig.load(folder))[0]


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, seed=3, **CHECKPOINTS[request.param])
    return folder


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> Models:
    return Reference(checkpoint), load(checkpoint)


class Both:
    """One prefix in the reference and in our network. Each call runs both on random ids and compares their results."""

    def __init__(self, models: Models, left_padding: tuple[int, ...] = (0, 0)) -> None:
        self.reference, self.ours = models
        self.left_padding = np.array(left_padding)
        self.reference.start(left_padding)
        self.cache = self.ours.new_cache(mx.array(left_padding) if any(left_padding) else None)
        self.rng = np.random.default_rng(0)

    def random_ids(self, length: int) -> Array:
        return self.rng.integers(0, self.reference.vocab_size, (len(self.left_padding), length))

    def encode(self, length: int, chunk: int | None = None) -> None:
        """Append random ids to the prefix, in chunks for our network. Results at padding positions are ignored."""
        ids, positions = self.random_ids(length), np.arange(self.cache.offset, self.cache.offset + length)
        expected = self.reference.encode(ids)
        step = chunk or length
        parts = [self.ours.encode(mx.array(ids[:, i : i + step]), self.cache) for i in range(0, length, step)]
        text = positions >= self.left_padding[:, None]
        assert_close(np.array(mx.concatenate(parts, axis=1))[text], expected[text])

    def decode(self, length: int = CANVAS) -> None:
        """Decode a canvas, and decode it again with the reference's logits as self-conditioning."""
        canvas, conditioning = self.random_ids(length), None
        for _ in range(2):
            signal = None if conditioning is None else mx.array(conditioning)
            expected = self.reference.decode(canvas, conditioning)
            assert_close(np.array(self.ours.decode(mx.array(canvas), self.cache, signal)), expected)
            conditioning = expected / 0.6


def assert_close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW + 3])
def test_prompt_and_canvas(models: Models, length: int) -> None:
    both = Both(models)
    both.encode(length)
    both.decode()


@pytest.mark.parametrize("chunk", [1, 3, 7, WINDOW - 1, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("length", [WINDOW - 2, 3 * WINDOW + 5])
def test_every_chunking_of_the_prompt(models: Models, length: int, chunk: int) -> None:
    both = Both(models)
    both.encode(length, chunk)
    both.decode()


@pytest.mark.parametrize("prompt", [3, WINDOW, 2 * WINDOW + 1])
def test_later_canvases(models: Models, prompt: int) -> None:
    """Each committed canvas is encoded after the prompt, and the sliding window moves over it."""
    both = Both(models)
    both.encode(prompt)
    for _ in range(3):
        both.decode()
        both.encode(CANVAS)
    both.decode()


@pytest.mark.parametrize("length", [1, WINDOW - 1, CANVAS - 1])
def test_short_canvas(models: Models, length: int) -> None:
    both = Both(models)
    both.encode(WINDOW + 3)
    both.decode(length)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("left_padding", [(0, 3), (5, 0, 1), (0, WINDOW + 4, 2)])
def test_left_padded_batch(models: Models, left_padding: tuple[int, ...], chunk: int | None) -> None:
    both = Both(models, left_padding)
    both.encode(2 * WINDOW + 1, chunk)
    both.decode()
    both.encode(CANVAS)
    both.decode(CANVAS - 3)


def test_left_padded_row_equals_the_row_alone(models: Models) -> None:
    """The reference counts positions from the start of the padding, and we from the start of the text.

    This makes no difference to attention.
    """
    reference, ours = models
    rng = np.random.default_rng(1)
    ids, canvas = rng.integers(0, reference.vocab_size, (2, 19)), rng.integers(0, reference.vocab_size, (2, CANVAS))
    cache = ours.new_cache(mx.array([0, 6]))
    ours.encode(mx.array(ids), cache)
    found = np.array(ours.decode(mx.array(canvas), cache))
    reference.start([0])
    reference.encode(ids[1:, 6:])
    assert_close(found[1:], reference.decode(canvas[1:]))


@pytest.mark.parametrize("vision", [VISION, None, "missing"], ids=["vision", "null", "missing"])
def test_published_layout(
    checkpoint: Path, models: Models, vision: dict[str, Any] | str | None, tmp_path: Path
) -> None:
    publish(checkpoint, tmp_path, vision)
    both = Both((models[0], load(tmp_path)))
    both.encode(2 * WINDOW + 1)
    both.decode()
