"""Tests of soft tokens in the encoder: who sees whom, and that chunks do not change the cache."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import FULL, SLIDING, ModelConfig
from dgemma_mlx.generation.memory import Budget
from dgemma_mlx.generation.pictures import soft_tokens
from dgemma_mlx.generation.prefill import prefill
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.soft_tokens import IMAGE_ATTENTION, ImageAttention
from dgemma_mlx.model.text import DiffusionGemma
from tests.model.checkpoint import flat_config

# Text, a picture, text, two pictures with one token between them, text. A negative number is a picture's key.
IDS = [5, 6, *[-1] * 9, 7, 8, 9, *[-2] * 4, 3, *[-1] * 9, 4, 5]
LENGTHS = {-1: 9, -2: 4}


def network(rule: ImageAttention, window: int = 8, seed: int = 0) -> DiffusionGemma:
    """Return a random network with two full layers, so that the rules of full layers matter."""
    kinds = [SLIDING, FULL, SLIDING, FULL]
    config = flat_config(sliding_window=window, num_hidden_layers=4, layer_types=kinds)
    mx.random.seed(seed)
    model = DiffusionGemma(ModelConfig.from_dict(config).text).eval()
    model.image_attention = rule
    mx.eval(model.parameters())
    return model


def features(key: int) -> mx.array:
    return mx.random.normal((LENGTHS[key], 128), key=mx.random.key(-key))


def blocks_of(ids: list[int]) -> list[int]:
    """Return the number of the block of each position, or -1."""
    found, number = [], -1
    for place, id in enumerate(ids):
        number += id < 0 and (place == 0 or ids[place - 1] != id)
        found.append(number if id < 0 else -1)
    return found


def expected(ids: list[int], rule: ImageAttention, window: int) -> dict[str, Any]:
    """Return the masks (P, P) of a whole prompt, position by position."""
    blocks, P = blocks_of(ids), len(ids)
    masks = {kind: np.zeros((P, P), bool) for kind in (FULL, SLIDING)}
    for i in range(P):
        for j in range(P):
            causal, near = j <= i, j > i - window
            same = blocks[i] == blocks[j] >= 0
            if rule == "google":
                masks[SLIDING][i, j], masks[FULL][i, j] = (causal or same) and near, causal
            elif rule == "transformers":
                masks[SLIDING][i, j], masks[FULL][i, j] = (causal and near) or same, causal or same
            else:
                masks[SLIDING][i, j], masks[FULL][i, j] = causal and near, causal
    return masks


@pytest.mark.parametrize("rule", IMAGE_ATTENTION)
@pytest.mark.parametrize("window", [4, 8, 100])
def test_masks_are_those_of_the_rule_in_every_chunk(rule: ImageAttention, window: int) -> None:
    config = ModelConfig.from_dict(flat_config(sliding_window=window)).text
    whole = expected(IDS, rule, window)
    for cuts in ([0, 28], [0, 2, 28], [0, 11, 14, 18, 28], [0, 1, 13, 19, 28]):
        cache = PrefixCache(config)
        for start, end in pairwise(cuts):
            soft = soft_tokens([IDS[start:end]], features)
            masks = cache.encode_masks(end - start, soft, rule)
            for kind, mask in masks.items():
                keys = range(end) if kind == FULL else range(start - min(start, window - 1), end)
                causal = np.tri(end - start, len(keys), len(keys) - (end - start), bool)
                found = causal if isinstance(mask, str) else np.array(mask).reshape(causal.shape)
                assert (found == whole[kind][start:end, list(keys)]).all(), kind
            cache.advance(end - start)


@pytest.mark.parametrize("rule", IMAGE_ATTENTION)
def test_every_chunk_size_gives_the_same_cache_and_logits(rule: ImageAttention) -> None:
    model, canvas = network(rule), mx.arange(16)[None]

    def encoded(step: int) -> tuple[PrefixCache, mx.array]:
        cache = model.new_cache()
        counts = list(prefill(model, [IDS], cache, Budget(step), features=features))
        assert sum(counts) == len(IDS) and max(counts) <= max(step, 9)
        return cache, model.decode(canvas, cache)

    whole, logits = encoded(len(IDS))
    for step in range(1, len(IDS)):
        cache, found = encoded(step)
        assert mx.allclose(found, logits, atol=2e-5), step
        for one, other in zip(cache.state(), whole.state(), strict=True):
            assert mx.allclose(one, other, atol=2e-5), step


def test_a_picture_that_is_split_gives_another_cache() -> None:
    """Otherwise the test above would not see a boundary within a picture."""
    model, ids = network("google"), [5, 6, *[-1] * 9, 7]
    whole, split = model.new_cache(), model.new_cache()
    list(prefill(model, [ids], whole, Budget(), features=features))
    for part, rows in ((ids[:5], features(-1)[:3]), (ids[5:], features(-1)[3:])):
        model.extend(mx.array([[max(id, 0) for id in part]]), split, soft_tokens([part], lambda _, rows=rows: rows))
    assert not mx.allclose(whole.state()[-1], split.state()[-1], atol=1e-2)


def test_the_rows_of_a_batch_are_encoded_as_they_are_alone() -> None:
    model, canvas = network("google"), mx.arange(16)[None]
    prompts = [IDS, [3, 4, *[-2] * 4, 9], [5, 6, 7]]
    longest = max(map(len, prompts))
    padding = [longest - len(ids) for ids in prompts]
    together = model.new_cache(mx.array(padding, mx.int32))
    rows = [[0] * pad + ids for pad, ids in zip(padding, prompts, strict=True)]
    list(prefill(model, rows, together, Budget(21), features=features))  # 7 positions of each row at a time
    logits = model.decode(mx.repeat(canvas, 3, axis=0), together)
    for row, ids in enumerate(prompts):
        cache = model.new_cache()
        list(prefill(model, [ids], cache, Budget(), features=features))
        assert mx.allclose(model.decode(canvas, cache)[0], logits[row], atol=1e-4)


def test_the_rules_differ() -> None:
    """Otherwise the tests above would not see which of them is used."""
    found = []
    for rule in IMAGE_ATTENTION:
        model = network(rule)
        cache = model.new_cache()
        list(prefill(model, [IDS], cache, Budget(), features=features))
        found.append(model.decode(mx.arange(16)[None], cache))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert mx.abs(found[one] - found[other]).max() > 0.05


def test_features_stand_in_place_of_embeddings_unscaled() -> None:
    ids = mx.array([[5, 0, 0, 7]])
    model, soft = network("google"), soft_tokens([[5, -2, -2, 7]], lambda key: mx.full((4, 128), 3.0))
    assert soft is not None
    x = soft.put_into(model.embed(ids))
    assert mx.array_equal(x[0, 1:3], mx.full((2, 128), 3.0))
    assert mx.array_equal(x[0, 0], model.embed(ids)[0, 0]) and mx.array_equal(x[0, 3], model.embed(ids)[0, 3])
