"""Tests of the embeddings that condition the next step, against exact expected embeddings in float64."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.kernels import MAX_KEPT, canvas_sampler
from dgemma_mlx.model.prediction import least_kept
from dgemma_mlx.model.text import DiffusionGemma

Array = np.ndarray[Any, Any]

V, M, CAP = 2000, 64, 30.0
CONFIG = TextConfig.from_dict({
    "vocab_size": V, "hidden_size": M, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "num_global_key_value_heads": 1, "head_dim": 32, "global_head_dim": 32,
    "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16, "sliding_window": 64,
    "final_logit_softcapping": CAP,
})  # fmt: skip
PACKINGS: dict[str, dict[str, Any] | None] = {
    "plain": None, "affine 4": {"bits": 4, "group_size": 64}, "affine 8": {"bits": 8, "group_size": 64},
}  # fmt: skip
FLAT, PEAKED = (V, 0.0, 0.0), (1, 29.0, 0.0)


def new_model(dtype: mx.Dtype, packing: dict[str, Any] | None) -> tuple[DiffusionGemma, Array]:
    """Return a model and the values of its (packed) embedding table in float64."""
    model = DiffusionGemma(CONFIG)
    table: Any = nn.Embedding(V, M)
    table.weight = 3 + mx.random.normal((V, M), key=mx.random.key(7))  # mean 3: omitted tokens do not cancel
    model.embed_tokens = table
    model.set_dtype(dtype)
    weight = table.weight
    if packing is not None:
        packed: Any = table.to_quantized(**packing)
        model.embed_tokens = packed
        scales, biases = (part.astype(mx.float32) for part in (packed.scales, packed.biases))
        weight = mx.dequantize(packed.weight, scales, biases, packed.group_size, packed.bits)
    return model, np.array(weight.astype(mx.float32), np.float64)


def some_logits(rows: list[tuple[int, float, float]], seed: int, dtype: mx.Dtype) -> mx.array:
    """Return random logits (1, C, V), with one position for each (k, gap, spread) in ``rows``.

    The logits have the standard deviation ``spread``, and k of them are raised by ``gap``.
    """
    rng = np.random.default_rng(seed)
    logits = np.stack([spread * rng.standard_normal(V) for _, _, spread in rows])
    for row, (k, gap, _) in zip(logits, rows, strict=True):
        row[rng.choice(V, k, replace=False)] += gap
    return mx.array(logits[None], mx.float32).astype(dtype)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@settings(max_examples=20)
@example(rows=[(1, 10.0, 0.0)], temperature=0.75, seed=0)
@example(rows=[(1, 11.5, 0.0)], temperature=0.6640625, seed=0)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 40, MAX_KEPT - 1, MAX_KEPT, MAX_KEPT + 1]), st.floats(0, 40), st.floats(0, 10)
        ),
        max_size=6,
    ),
    temperature=st.floats(0.4, 0.8),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_error_of_the_expected_embedding_is_bounded(
    dtype: mx.Dtype, packing: str, rows: list[tuple[int, float, float]], temperature: float, seed: int
) -> None:
    """The error of a list is at most the omitted mass times the largest value, plus the result's rounding error.

    The error of a full softmax is at most the rounding errors of the logits, the probabilities and the table.
    """
    model, table = new_model(dtype, PACKINGS[packing])
    raw = some_logits([PEAKED, *rows, FLAT], seed, dtype)
    sample = canvas_sampler(raw, mx.zeros(raw.shape[:2]), CAP, temperature)
    mx.eval(*sample)
    prediction = model.predict(raw, sample, temperature)
    soft = model._soft_embeddings(prediction, raw.shape[:2])
    assert soft.dtype == dtype

    y = CAP * np.tanh(np.array(raw[0].astype(mx.float32), np.float64) / CAP) / temperature
    p = np.exp(y - y.max(axis=-1, keepdims=True))
    exact = math.sqrt(M) * (p / p.sum(axis=-1, keepdims=True)) @ table
    largest = math.sqrt(M) * np.abs(table).max()
    unit = 2.0**-9 if dtype == mx.bfloat16 else 2.0**-24  # relative rounding error
    # Error of float32 probabilities: 6.6e-5 with MLX's CPU softmax in a row of the second example
    float32 = 2.0**-13
    bound = largest * (1 - least_kept(dtype) + float32) + 3 * unit * np.abs(exact)
    assert prediction.dense is not None
    dense = np.array(prediction.dense.positions)
    assert 0 not in dense and len(rows) + 1 in dense
    of_logits = np.expm1(2 * unit * np.abs(y[dense]).max(axis=-1, keepdims=True))
    bound[dense] = largest * (of_logits + 8 * unit + float32)
    assert (np.abs(np.array(soft[0].astype(mx.float32), np.float64) - exact) <= bound).all()
