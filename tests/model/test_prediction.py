"""What conditions the next step, against the exact expected embedding in float64."""

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
    """A model, and its table in float64 as it is packed."""
    model = DiffusionGemma(CONFIG)
    table: Any = nn.Embedding(V, M)
    table.weight = 3 + mx.random.normal((V, M), key=mx.random.key(7))  # what lists leave out does not cancel
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
    """(1, C, V): for each (k, gap, spread) k tokens lie ``gap`` above the others, all scattered by ``spread``."""
    rng = np.random.default_rng(seed)
    logits = np.stack([spread * rng.standard_normal(V) for _, _, spread in rows])
    for row, (k, gap, _) in zip(logits, rows, strict=True):
        row[rng.choice(V, k, replace=False)] += gap
    return mx.array(logits[None], mx.float32).astype(dtype)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@settings(max_examples=20, deadline=None)
@example(rows=[(1, 10.0, 0.0)], temperature=0.75, seed=0)
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
def test_it_is_the_expected_embedding_within_its_bound(
    dtype: mx.Dtype, packing: str, rows: list[tuple[int, float, float]], temperature: float, seed: int
) -> None:
    """Of lists: what they leave out, at most, times the largest value, and the result's rounding. Of all logits: what
    rounding them, the probabilities and the table to the dtype is worth."""
    model, table = new_model(dtype, PACKINGS[packing])
    raw = some_logits([PEAKED, *rows, FLAT], seed, dtype)
    sample = canvas_sampler(raw, mx.zeros(raw.shape[:2]), CAP, temperature)
    mx.eval(*sample)
    prediction = model.predict(raw, sample, temperature)
    soft = model._soft_embeddings(prediction, mx.zeros((*raw.shape[:2], M), dtype))
    assert soft.dtype == dtype

    y = CAP * np.tanh(np.array(raw[0].astype(mx.float32), np.float64) / CAP) / temperature
    p = np.exp(y - y.max(axis=-1, keepdims=True))
    exact = math.sqrt(M) * (p / p.sum(axis=-1, keepdims=True)) @ table
    largest = math.sqrt(M) * np.abs(table).max()
    unit = 2.0**-9 if dtype == mx.bfloat16 else 2.0**-24  # by which rounding changes a value, relatively
    float32 = 2.0**-14  # what float32 probabilities are off: 3.0e-5 by MLX's CPU softmax, in the row of the example
    bound = largest * (1 - least_kept(dtype) + float32) + 3 * unit * np.abs(exact)
    assert prediction.dense is not None
    dense = np.array(prediction.dense.positions)
    assert 0 not in dense and len(rows) + 1 in dense
    of_logits = np.expm1(2 * unit * np.abs(y[dense]).max(axis=-1, keepdims=True))
    bound[dense] = largest * (of_logits + 8 * unit + float32)
    assert (np.abs(np.array(soft[0].astype(mx.float32), np.float64) - exact) <= bound).all()
