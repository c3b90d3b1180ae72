"""Tests of linear layers that are multiplied as one matrix: results, memory, and that nothing stale is used."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.model.adapter import AdapterConfig, attach
from dgemma_mlx.model.joined import SharedInput, join_projections
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.packed import LEAST_ROWS, Linear
from dgemma_mlx.model.text import DiffusionGemma

WIDTH = 64
OUTPUTS = {"first": 960, "second": 320, "third": 33}
PACKINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "affine 4": {"bits": 4, "group_size": 32},
    "affine 6": {"bits": 6, "group_size": 64},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}


class Three(SharedInput):
    """Three layers, one of which may be absent."""

    shared_input = ("first", "second", "absent", "third")

    def __init__(self) -> None:
        super().__init__()
        for name, outputs in OUTPUTS.items():
            self[name] = Linear(WIDTH, outputs)
        self.eval()


def three(packing: str = "plain") -> Three:
    layers, scheme = Three(), PACKINGS[packing]
    if scheme is not None:
        nn.quantize(layers, **scheme)
    mx.eval(layers.parameters())
    return layers


def weight_bytes(layers: Three) -> int:
    parameters: Any = tree_flatten(layers.parameters())
    return sum(array.nbytes for _, array in parameters)


def inputs(rows: int) -> mx.array:
    return mx.random.normal((1, rows, WIDTH), key=mx.random.key(rows))


def one_by_one(layers: Three, x: mx.array) -> list[mx.array]:
    return [layers[name](x) for name in OUTPUTS]


def assert_equal(found: list[mx.array], expected: list[mx.array]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert mx.array_equal(one, other)


@pytest.mark.parametrize("rows", [1, 7, LEAST_ROWS, 40])
@pytest.mark.parametrize("packing", PACKINGS)
def test_joined_layers_give_the_same_bits(packing: str, rows: int) -> None:
    layers = three(packing)
    before = dict(tree_flatten(layers.parameters()))
    expected = one_by_one(layers, inputs(rows))
    layers.join()
    assert_equal(layers.products(inputs(rows)), expected)
    assert_equal(one_by_one(layers, inputs(rows)), expected)
    after = dict(tree_flatten(layers.parameters()))
    assert list(after) == list(before) and all(mx.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("packing", ["plain", "affine 4"])
def test_joining_takes_one_product_and_no_memory_that_stays(packing: str) -> None:
    mx.clear_cache()  # an array may get a larger buffer that is free
    layers = three(packing)
    gc.collect()
    before = mx.get_active_memory()
    layers.join()
    mx.eval(layers.parameters())
    assert mx.get_active_memory() - before < weight_bytes(layers) / 4
    x = inputs(4)
    mx.eval(x)
    name = "Matmul" if packing == "plain" else "QuantizedMatmul"
    graph = io.StringIO()
    mx.export_to_dot(graph, *layers.products(x))
    assert graph.getvalue().count(f'"{name}"') == 1


def replaced(layers: Three) -> None:
    layers["second"].weight = layers["second"].weight + 1


def updated(layers: Three) -> None:
    layers.update({"third": {"weight": layers["third"].weight * 2}})


def exchanged(layers: Three) -> None:
    layers["first"] = Linear(WIDTH, OUTPUTS["first"])


def packed(layers: Three) -> None:
    nn.quantize(layers, 32, 4, class_predicate=lambda path, _: path == "second")


@pytest.mark.parametrize("change", [replaced, updated, exchanged, packed])
def test_a_changed_layer_is_never_stale(change: Callable[[Three], None]) -> None:
    layers = three()
    layers.join()
    old = layers.products(inputs(3))
    change(layers)
    found = layers.products(inputs(3))
    assert_equal(found, one_by_one(layers, inputs(3)))
    assert not all(mx.array_equal(one, other) for one, other in zip(found, old, strict=True))


def test_gradients_reach_each_layer() -> None:
    layers, x = three(), inputs(3)

    def loss(layers: Three) -> mx.array:
        return sum((product**2).sum() for product in layers.products(x))

    expected = dict(tree_flatten(nn.value_and_grad(layers, loss)(layers)[1]))
    layers.join()
    for module in (layers, layers.train()):
        found = dict(tree_flatten(nn.value_and_grad(module, loss)(module)[1]))
        assert_equal([found[name] for name in expected], list(expected.values()))


def test_training_frees_the_joined_array() -> None:
    mx.clear_cache()
    layers = three()
    layers.join()
    mx.eval(layers.parameters())
    gc.collect()
    before = mx.get_active_memory()
    layers.train()
    mx.eval(layers.products(inputs(1)))
    for name in OUTPUTS:
        layers[name].weight = layers[name].weight * 2
    mx.eval(layers.parameters())
    gc.collect()
    assert mx.get_active_memory() - before < weight_bytes(layers) / 4


def test_layers_that_differ_are_not_joined() -> None:
    mixed_bits, mixed_dtypes, partly = three(), three(), three()
    nn.quantize(mixed_bits, 32, 4, class_predicate=lambda path, _: {"bits": 8 if path == "third" else 4})
    mixed_dtypes["second"].weight = mixed_dtypes["second"].weight.astype(mx.bfloat16)
    nn.quantize(partly, 32, 4, class_predicate=lambda path, _: path == "second")
    for layers in (mixed_bits, mixed_dtypes, partly):
        before = dict(tree_flatten(layers.parameters()))
        layers.join()
        after = dict(tree_flatten(layers.parameters()))
        assert all(after[name] is before[name] for name in before)
        assert_equal(layers.products(inputs(3)), one_by_one(layers, inputs(3)))


def logits(network: DiffusionGemma) -> list[mx.array]:
    cache = network.new_cache()
    ids = mx.arange(20)[None] % network.config.vocab_size
    return [network.encode(ids, cache), network.decode(ids, cache)]


@pytest.mark.parametrize("adapted", [(), ("mlp",), ("q_proj", "up_proj")])
def test_a_network_computes_the_same(folder: Path, adapted: tuple[str, ...]) -> None:
    """Also with an adapter that is attached after joining, and with one that was there before."""
    networks = [load_model(folder, ModelConfig.load(folder))[0] for _ in range(3)]
    join_projections(networks[0])
    before = logits(networks[0])
    for network in networks:
        if adapted:
            mx.random.seed(0)
            attach(network, AdapterConfig(rank=2, targets=adapted))
            for module in network.modules():
                if "lora_b" in module:
                    module.lora_b = mx.full(module.lora_b.shape, 0.1)
            network.eval()
    join_projections(networks[1])
    expected = logits(networks[2])
    assert_equal(logits(networks[0]), expected)
    assert_equal(logits(networks[1]), expected)
    assert adapted or all(map(mx.array_equal, before, expected))
