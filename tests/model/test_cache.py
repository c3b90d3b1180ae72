"""Tests of the prefix cache alone: what a canvas sees after any sequence of calls, and the memory that writes take."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from dgemma_mlx.checkpoint.config import FULL, SLIDING, TextConfig
from dgemma_mlx.model.cache import SPARE, PrefixCache, Snapshot

B, HK, D, WINDOW = 2, 2, 4, 9
Pair = tuple[NDArray[Any], NDArray[Any]]


def new_cache(window: int = WINDOW, left_padding: mx.array | None = None) -> PrefixCache:
    """Return a cache with one sliding-window layer and one full-attention layer."""
    return PrefixCache(TextConfig.from_dict({
        "num_experts": 1, "top_k_experts": 1, "moe_intermediate_size": 1, "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL], "sliding_window": window,
    }), left_padding)


class History:
    """A cache, together with NumPy copies of everything that was appended to each of its layers."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.cache = new_cache()
        self.appended = [self.random(0), self.random(0)]

    def random(self, length: int) -> Pair:
        keys, values = self.rng.normal(size=(2, B, HK, length, D)).astype(np.float32)
        return keys, values

    def encode(self, length: int) -> None:
        for layer in range(2):
            new = self.random(length)
            seen = self.cache.update(layer, *map(mx.array, new))
            old = self.appended[layer]
            before = old if layer == 1 else tuple(part[:, :, -(WINDOW - 1) :] for part in old)
            check(seen, before, new)
            self.appended[layer] = (np.concatenate([old[0], new[0]], 2), np.concatenate([old[1], new[1]], 2))
        self.cache.advance(length)

    def decode(self, length: int) -> list[tuple[tuple[mx.array, mx.array], Any, Any]]:
        """Return, for each layer, what a canvas sees (unevaluated) and the two parts that it should see."""
        found = []
        for layer in range(2):
            new, old = self.random(length), self.appended[layer]
            before = old if layer == 1 else tuple(part[:, :, -(WINDOW - 1) :] for part in old)
            found.append((self.cache.with_canvas(layer, *map(mx.array, new)), before, new))
        return found


def check(found: tuple[mx.array, mx.array], before: Any, new: Any) -> None:
    for array, old, latest in zip(found, before, new, strict=True):
        np.testing.assert_array_equal(np.array(array), np.concatenate([old, latest], axis=2))


@pytest.mark.parametrize("seed", range(8))
def test_a_canvas_sees_the_prefix_and_itself_whatever_came_before(seed: int) -> None:
    """Drafts may be dropped before they are evaluated, kept after later drafts, and never committed."""
    history = History(seed)
    held: list[tuple[tuple[mx.array, mx.array], Any, Any]] = []
    mark: tuple[Snapshot, list[Pair]] | None = None
    for _ in range(40):
        match history.rng.integers(6):
            case 0:
                history.encode(int(history.rng.integers(1, 2 * WINDOW)))
            case 1 | 2:
                for one in history.decode(int(history.rng.integers(1, 2 * WINDOW))):
                    check(*one)
            case 3:
                held += history.decode(int(history.rng.integers(1, WINDOW)))
            case 4 if history.cache.offset:
                mark = history.cache.snapshot(), list(history.appended)
            case 5 if mark is not None:
                history.cache.restore(mark[0])
                history.appended = list(mark[1])
    for one in held:
        check(*one)


def test_buffers_grow_beyond_their_spare_room() -> None:
    history = History(0)
    for length in (1, SPARE, 1, SPARE + 1, 3):
        history.encode(length)
        for one in history.decode(SPARE + 5):
            check(*one)


def test_a_denoising_step_copies_nothing_of_the_prefix() -> None:
    """Full-attention layers never copy, even after a snapshot. Sliding-window layers copy their window once."""
    prefix, canvas, head_dim = 50_000, 4, 16
    cache = new_cache(window=1000)
    cache.reserve(prefix)

    def random(length: int) -> mx.array:
        return mx.random.normal((1, 1, length, head_dim))

    for layer in range(2):
        cache.update(layer, random(prefix), random(prefix))
    cache.advance(prefix)
    mark = cache.snapshot()
    mx.eval(cache.state())
    window_bytes = 2 * 4 * (1000 + canvas) * head_dim
    for step in range(3):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        sums = [part.sum() for layer in range(2) for part in cache.with_canvas(layer, random(canvas), random(canvas))]
        mx.eval(sums)
        extra = 10_000 + (2 * window_bytes if step == 0 else 0)
        assert mx.get_peak_memory() - before < extra < cache.nbytes / 10
    assert mark.offset == prefix


def test_a_repeated_cache_is_independent() -> None:
    history = History(3)
    history.encode(5)
    one = history.cache.rows([0, 0, 0])
    before = [np.array(array) for array in history.cache.state()]
    for layer in range(2):
        new = np.random.default_rng(layer).normal(size=(2, 3, HK, 4, D)).astype(np.float32)
        seen = one.with_canvas(layer, *map(mx.array, new))
        old = history.appended[layer]
        check(seen, tuple(np.repeat(part[:1], 3, axis=0) for part in old), new)
    assert one.offset == history.cache.offset
    for array, expected in zip(history.cache.state(), before, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_a_copy_that_goes_on_leaves_the_cache_whole() -> None:
    history = History(0)
    history.encode(5)
    other = history.cache.rows([1])
    for layer in range(2):
        other.update(layer, mx.ones((1, HK, 3, D)), mx.ones((1, HK, 3, D)))
    other.advance(3)
    assert other.is_whole and history.cache.is_whole


@pytest.mark.parametrize("kind", [FULL, SLIDING])
def test_every_position_sees_a_key_even_one_of_padding(kind: str) -> None:
    cache = new_cache(left_padding=mx.array([3, 0], mx.int32))
    for length in (2, 5, 12):
        assert np.array(cache.encode_masks(length)[kind]).any(axis=-1).all()
        cache.advance(length)
