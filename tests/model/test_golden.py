"""Tests of hidden states and logits against numbers from transformers. ``make oracle`` compares many more."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.golden.numbers import TOLERANCE, golden_model, golden_numbers


def assert_close(found: mx.array, expected: NDArray[Any], rows: Any = ...) -> None:
    np.testing.assert_allclose(np.array(found)[rows], expected[rows], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("part", "left_padding"), [("plain", (0, 0)), ("padded", (0, 4))])
def test_golden_hidden_states_and_logits(part: str, left_padding: tuple[int, int]) -> None:
    model, numbers = golden_model(), golden_numbers(part)
    prompt, first, second = (mx.array(numbers[name]) for name in ("prompt", "first", "second"))
    text = np.arange(prompt.shape[1]) >= np.array(left_padding)[:, None]
    cache = model.new_cache(mx.array(left_padding) if any(left_padding) else None)
    assert_close(model.encode(prompt, cache), numbers["prompt_hidden"], text)
    assert_close(model.decode(first, cache), numbers["logits"])
    conditioning = mx.array(numbers["logits"] / 0.6)
    assert_close(model.decode(first, cache, conditioning), numbers["conditioned_logits"])
    assert_close(model.encode(first, cache), numbers["first_hidden"])
    assert_close(model.decode(second, cache), numbers["second_logits"])
