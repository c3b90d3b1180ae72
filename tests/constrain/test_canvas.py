"""The projection of one step: how the temperature and the model's own doubt enter it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.constrain.canvas import CanvasProjection, ConstraintState, RowStart
from dgemma_mlx.constrain.languages import of_regex
from dgemma_mlx.constrain.tokens import TokenMachine
from dgemma_mlx.diffusion.stopping import gap
from dgemma_mlx.kernels import CanvasSample, canvas_sampler
from tests.constrain.small import EOS, PAD, TURN, tokenizer_of

C = 3


def projected(regex: str, logits: np.ndarray, temperature: float) -> tuple[CanvasSample, CanvasSample]:
    """Return the model's own sample of the logits (C, V), and its projection."""
    tokenizer = tokenizer_of("a", "b", "c")
    machine = TokenMachine(of_regex(regex), tokenizer, (EOS, TURN), PAD, tokenizer.vocab_size)
    projection = CanvasProjection([RowStart(ConstraintState.first(machine), 100)])
    raw, uniforms = mx.array(logits[None].astype(np.float32)), mx.full((1, C), 0.5)
    own = canvas_sampler(raw, uniforms, None, temperature)
    return own, projection(own, projection.gather(raw, None), uniforms, temperature)


def logits_of(**scores: float) -> np.ndarray:
    """Return logits (C, V) that are alike at each position; tokens that are not named have -20."""
    row = [scores.get(name, -20.0) for name in ("pad", "eos", "turn", "a", "b", "c")]
    return np.array([row] * C)


def test_a_position_is_as_uncertain_as_the_model_is_without_the_constraint() -> None:
    """Only "a" may be written, so the projection alone would be certain; the model would as well write "c"."""
    own, found = projected("a{3}", logits_of(a=1.0, c=1.0), 1.0)
    assert found.argmax.tolist() == found.sample.tolist() == [[3] * C]
    np.testing.assert_allclose(found.entropy, own.entropy)
    np.testing.assert_allclose(found.entropy, np.log(2), rtol=1e-4)
    np.testing.assert_allclose(gap(found), 0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_temperature_enters_the_projection(temperature: float) -> None:
    """Of "a" and "b", which the model finds less probable than "c", the constraint leaves one or the other."""
    _, found = projected("[ab]{3}", logits_of(a=2.0, b=1.0, c=30.0), temperature)
    p = 1 / (1 + np.exp(-1 / temperature))
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-4)
