"""Tests of properties that the network has for any weights: chunks, padding, canvas lengths, the cache, dtypes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray

from dgemma_mlx.model.attention import attend
from dgemma_mlx.model.cache import Mask, PrefixCache
from dgemma_mlx.model.load import load_model
from tests.golden.numbers import CONFIG, FOLDER, TOLERANCE, golden_model

WINDOW = CONFIG.text.sliding_window


def random_ids(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, CONFIG.text.vocab_size, shape))


def encoded(
    ids: mx.array, chunk: int | None = None, left_padding: tuple[int, ...] = ()
) -> tuple[mx.array, PrefixCache]:
    """Encode a prompt in chunks and return its hidden states and the cache."""
    cache = golden_model().new_cache(mx.array(left_padding) if left_padding else None)
    step = chunk or ids.shape[1]
    hidden = [golden_model().encode(ids[:, i : i + step], cache) for i in range(0, ids.shape[1], step)]
    return mx.concatenate(hidden, axis=1), cache


def assert_close(found: mx.array, expected: mx.array) -> None:
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=TOLERANCE)


def least_change(before: mx.array, after: mx.array) -> float:
    """Return the smallest change of any position's logits (B, C, V), where a position changes by its largest change."""
    return float(np.abs(np.array(before) - np.array(after)).max(axis=-1).min())


def attention_in_float64(q: mx.array, k: mx.array, v: mx.array, mask: NDArray[Any]) -> NDArray[Any]:
    """Compute softmax(q k^T) v directly, with a mask (B, H, L, S) bool."""
    queries, keys, values = (np.array(x, np.float64) for x in (q, k, v))
    group = queries.shape[1] // keys.shape[1]
    scores = queries @ keys.repeat(group, axis=1).swapaxes(-1, -2)
    weights = np.where(mask, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.asarray(weights @ values.repeat(group, axis=1))


def test_a_prefix_without_hidden_states_is_the_same_and_ends_before_the_last_layers_attention() -> None:
    """Computing that attention and its experts could only show in the cache as nothing, so they are made to fail."""
    ids, canvas = random_ids(1, 40), random_ids(1, 16, seed=1)
    _, whole = encoded(ids)
    network, short = golden_model(), golden_model().new_cache()
    last = network.layers[-1]
    experts = last.experts
    try:
        last.experts = nn.Identity()  # takes one argument, so a call raises TypeError
        network.extend(ids[:, :25], short)
        network.extend(ids[:, 25:], short)
    finally:
        last.experts = experts
    assert short.offset == whole.offset == 40
    assert_close(network.decode(canvas, short), network.decode(canvas, whole))


@pytest.mark.parametrize("rows", [1, 16, 64, 1000])
@pytest.mark.parametrize("kind", ["none", "causal", "positions", "keys"])
@pytest.mark.parametrize(("L", "S"), [(27, 33), (74, 200), (300, 330)])
def test_attention_does_not_depend_on_its_blocks(kind: str, L: int, S: int, rows: int) -> None:
    """With room for 1 or 16 rows of scores the blocks are of keys, with room for 64 rows of queries."""
    B, H, Hk, D = 2, 4, 2, 8
    rng = np.random.default_rng(0)
    q, k, v = (mx.array(rng.normal(size=shape), mx.float32) for shape in ((B, H, L, D), (B, Hk, S, D), (B, Hk, S, D)))
    q = mx.linspace(0.1, 10, H)[:, None, None] * q  # flat and peaked heads
    causal = np.arange(S) <= np.arange(S - L, S)[:, None]
    positions = (rng.random((B, 1, L, S)) < 0.5) & causal | (np.arange(S) == np.arange(S - L, S)[:, None])
    keys = np.arange(S) >= np.array([0, S - 7]).reshape(B, 1, 1, 1)  # left padding that masks whole blocks
    masks: dict[str, tuple[Mask, NDArray[Any]]] = {
        "none": (None, np.array(True)),
        "causal": ("causal", causal),
        "positions": (mx.array(positions), positions),
        "keys": (mx.array(keys), keys),
    }
    mask, expected = masks[kind]
    found = np.array(attend(q, k, v, mask, rows * 4 * H * S))
    np.testing.assert_allclose(found, attention_in_float64(q, k, v, expected), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("score_bytes", [1, 1 << 14, 1 << 16, 1 << 30])
def test_a_row_is_computed_in_the_same_blocks_in_any_batch(score_bytes: int) -> None:
    H, Hk, L, S, D = 4, 2, 74, 200, 8
    keys = mx.random.split(mx.random.key(0), 3)
    q, k, v = (
        mx.random.normal((5, heads, length, D), key=key)
        for heads, length, key in zip((H, Hk, Hk), (L, S, S), keys, strict=True)
    )
    batch = attend(q, k, v, "causal", score_bytes)
    for row in range(5):
        alone = attend(q[row : row + 1], k[row : row + 1], v[row : row + 1], "causal", score_bytes)
        assert mx.array_equal(batch[row], alone[0])


def test_blocks_of_keys_lose_nothing_in_half_precision() -> None:
    B, H, Hk, L, S, D = 1, 4, 1, 32, 1000, 16
    rng = np.random.default_rng(0)
    shapes = ((B, H, L, D), (B, Hk, S, D), (B, Hk, S, D))
    q, k, v = (mx.array(rng.normal(size=shape)).astype(mx.bfloat16).astype(mx.float32) for shape in shapes)
    expected = attention_in_float64(q, k, v, np.array(True))
    q, k, v = (x.astype(mx.bfloat16) for x in (q, k, v))

    def error(score_bytes: int) -> float:
        found = attend(q, k, v, None, score_bytes)
        assert found.dtype == mx.bfloat16
        return float(np.abs(np.array(found.astype(mx.float32)) - expected).mean())

    assert error(1) < 1.2 * error(1 << 30)


@pytest.mark.parametrize("chunk", [1, 3, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW])
@pytest.mark.parametrize("length", [WINDOW - 2, 4 * WINDOW + 3])
@pytest.mark.parametrize("left_padding", [(), (3, 0)], ids=["unpadded", "padded"])
def test_a_prompt_in_chunks_equals_the_whole_prompt(length: int, chunk: int, left_padding: tuple[int, ...]) -> None:
    ids, canvas = random_ids(2, length), random_ids(2, 7, seed=1)
    whole, whole_cache = encoded(ids, left_padding=left_padding)
    found, cache = encoded(ids, chunk, left_padding)
    assert cache.offset == length
    assert_close(found[:, 3:], whole[:, 3:])
    assert_close(golden_model().decode(canvas, cache), golden_model().decode(canvas, whole_cache))


def test_encoding_is_causal_and_decoding_is_not() -> None:
    ids = random_ids(1, 12)
    changed = mx.concatenate([ids[:, :-1], (ids[:, -1:] + 1) % CONFIG.text.vocab_size], axis=1)
    before, cache = encoded(ids)
    after, _ = encoded(changed)
    assert_close(before[:, :-1], after[:, :-1])
    assert least_change(golden_model().decode(ids, cache), golden_model().decode(changed, cache)) > TOLERANCE


def test_canvas_without_a_prefix() -> None:
    """A prefix of only padding equals no prefix."""
    canvas = random_ids(1, 5)
    _, padding = encoded(random_ids(1, 4, seed=1), left_padding=(4,))
    alone = golden_model().decode(canvas, golden_model().new_cache())
    assert_close(golden_model().decode(canvas, padding), alone)


@pytest.mark.parametrize("length", [1, 5, CONFIG.canvas_length, 2 * CONFIG.canvas_length])
def test_every_position_of_a_canvas_sees_every_other(length: int) -> None:
    """This holds for every canvas length, also beyond the sliding window."""
    _, cache = encoded(random_ids(1, 9))
    canvas = random_ids(1, length, seed=2)
    logits = golden_model().decode(canvas, cache)
    assert logits.shape == (1, length, CONFIG.text.vocab_size)
    assert logits.dtype == mx.float32
    for position in {0, length - 1}:
        changed = np.array(canvas)
        changed[0, position] = (changed[0, position] + 1) % CONFIG.text.vocab_size
        assert least_change(logits, golden_model().decode(mx.array(changed), cache)) > TOLERANCE


@pytest.mark.parametrize("left_padding", [(0, 5), (WINDOW + 2, 1)])
def test_left_padded_rows_equal_the_rows_alone(left_padding: tuple[int, int]) -> None:
    """Compare the prompt, the first canvas, its encoding, and the next canvas with self-conditioning."""
    model = golden_model()
    prompt, first, second = random_ids(2, 15), random_ids(2, 8, seed=1), random_ids(2, 8, seed=2)
    hidden, cache = encoded(prompt, chunk=4, left_padding=left_padding)
    logits = model.decode(first, cache)
    committed = model.encode(first, cache)
    later = model.decode(second, cache, logits)
    for row, padding in enumerate(left_padding):
        one = slice(row, row + 1)
        alone, cache = encoded(prompt[one, padding:])
        assert_close(hidden[one, padding:], alone)
        assert_close(logits[one], model.decode(first[one], cache))
        assert_close(committed[one], model.encode(first[one], cache))
        assert_close(later[one], model.decode(second[one], cache, logits[one]))


@pytest.mark.parametrize("length", [3, WINDOW, 300])
def test_decoding_leaves_the_cache_as_it_is(length: int) -> None:
    canvas = random_ids(1, 6, seed=1)
    _, cache = encoded(random_ids(1, length), chunk=7)
    before = [np.array(array) for array in cache.state()]
    first = golden_model().decode(canvas, cache)
    second = golden_model().decode(canvas, cache)
    assert mx.array_equal(first, second)
    assert cache.offset == length
    for old, new in zip(before, cache.state(), strict=True):
        np.testing.assert_array_equal(old, np.array(new))


def test_reserving_space_changes_nothing() -> None:
    ids, canvas = random_ids(1, 300), random_ids(1, 6, seed=1)
    _, cache = encoded(ids, chunk=100)
    reserved = golden_model().new_cache()
    reserved.reserve(300)
    for start in range(0, 300, 100):
        golden_model().encode(ids[:, start : start + 100], reserved)
    assert mx.array_equal(golden_model().decode(canvas, cache), golden_model().decode(canvas, reserved))


def test_sliding_layers_keep_no_more_than_the_window() -> None:
    _, cache = encoded(random_ids(1, 10 * WINDOW), chunk=WINDOW + 3)
    lengths = [array.shape[2] for array in cache.state()]
    assert lengths == [WINDOW - 1] * 4 + [10 * WINDOW] * 2


@pytest.mark.parametrize("rows", [3, 40])
def test_half_precision_on_this_machine(rows: int) -> None:
    """bfloat16 has 8 bits of precision. Its logits stay close to those of float32, for few rows and for many."""
    model = load_model(FOLDER, CONFIG, mx.bfloat16)[0]
    ids, canvas = random_ids(1, rows), random_ids(1, rows, seed=1)
    _, expected_cache = encoded(ids)
    expected = golden_model().decode(canvas, expected_cache)
    cache = model.new_cache()
    hidden = model.encode(ids, cache)
    logits = model.decode(canvas, cache)
    assert hidden.dtype == model.dtype == mx.bfloat16
    assert logits.dtype == mx.float32
    assert np.abs(np.array(logits - expected)).mean() < 0.1 * np.array(expected).std()
    assert model.decode(canvas, cache, logits).dtype == mx.float32


def test_self_conditioning_depends_on_probabilities() -> None:
    """A constant added to the logits changes nothing, impossible tokens are allowed, and conditioning has an effect."""
    model, canvas = golden_model(), random_ids(1, 5, seed=1)
    _, cache = encoded(random_ids(1, 9))
    predicted = random_ids(1, 5, seed=2)
    certain = mx.where(mx.arange(CONFIG.text.vocab_size) == predicted[..., None], 0.0, -mx.inf)
    logits = model.decode(canvas, cache, certain)
    assert_close(model.decode(canvas, cache, certain + 3.0), logits)
    assert least_change(logits, model.decode(canvas, cache)) > TOLERANCE
