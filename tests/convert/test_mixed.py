"""The recipe "mixed": measured errors, the activations that weight them, and the budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dgemma_convert import convert, mixed
from dgemma_convert.formats import Format
from dgemma_convert.mixed import BITS, Group
from dgemma_convert.source import open_source
from dgemma_convert.walk import make_samples
from dgemma_mlx.checkpoint.hub import resolve
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.text import DiffusionGemma
from tests.convert.checkpoints import (
    check_output,
    digests,
    read,
    smallest_source,
    some_tensors,
    stored,
)
from tests.model.checkpoint import load, logits


def random_groups(rng: np.random.Generator) -> list[Group]:
    groups = []
    for i in range(rng.integers(1, 5)):
        values = int(rng.integers(1, 50)) * 64
        size = {bits: values * bits // 8 + values // 16 for bits in BITS}
        error = dict(zip(BITS, sorted(rng.uniform(0, 0.5, len(BITS)), reverse=True), strict=True))
        groups.append(Group(f"group {i}", (f"path {i}",), values, size, error))
    return groups


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_budget_is_spent_and_never_overdrawn(seed: int, by_size: bool) -> None:
    rng = np.random.default_rng(seed)
    groups = random_groups(rng)
    every = [dict(zip((g.name for g in groups), bits, strict=True)) for bits in product(BITS, repeat=len(groups))]

    def cost(chosen: dict[str, int]) -> int:
        return sum(group.size[chosen[group.name]] for group in groups)

    costs = sorted(map(cost, every))
    for budget in (costs[0], *rng.integers(costs[0], costs[-1] + 1, 5), costs[-1] - 1):
        chosen = mixed.solve(groups, int(budget), by_size=by_size)
        assert cost(chosen) <= budget
        upgrades = [{**chosen, g.name: bits} for g in groups for bits in BITS if bits > chosen[g.name]]
        assert all(cost(upgrade) > budget for upgrade in upgrades)
    assert mixed.solve(groups, costs[-1], by_size=by_size) == {group.name: 8 for group in groups}
    with pytest.raises(DgemmaError, match="too small") as caught:
        mixed.solve(groups, costs[0] - 1, by_size=by_size)
    assert caught.value.exit_code == 2


def test_bits_go_where_they_take_most_error() -> None:
    size = {bits: bits * 100 for bits in BITS}
    good = Group("good", ("a",), 800, size, {3: 0.1, 4: 0.05, 5: 0.02, 6: 0.01, 8: 0.001})
    bad = Group("bad", ("b",), 800, size, {3: 0.9, 4: 0.5, 5: 0.3, 6: 0.2, 8: 0.1})
    assert mixed.solve([good, bad], 1100, by_size=False) == {"good": 3, "bad": 8}
    useless = Group("useless", ("c",), 800, size, dict.fromkeys(BITS, 0.5))
    assert mixed.solve([useless, good], 10_000, by_size=False) == {"useless": 3, "good": 8}
    large = Group("large", ("d",), 8000, {bits: bits * 1000 for bits in BITS}, good.error)
    assert mixed.solve([good, large], 4200, by_size=False)["good"] == 8  # ten times cheaper
    worse = Group("worse", ("d",), 8000, large.size, {bits: 1.2 * error for bits, error in good.error.items()})
    assert mixed.solve([good, worse], 4300, by_size=True) == {"good": 3, "worse": 4}  # ten times the values


def relative_error(tensors: list[mx.array], bits: int, moments: list[mx.array] | None = None) -> float:
    wrong = whole = 0.0
    for i, tensor in enumerate(tensors):
        packing, scale = Format(bits), 1.0 if moments is None else np.array(moments[i])
        values = np.array(tensor.astype(mx.float32), np.float64)
        error = np.array(packing.unpack(packing.pack(tensor)).astype(mx.float32), np.float64) - values
        wrong += float((error**2 * scale).sum())
        whole += float((values**2 * scale).sum())
    return math.sqrt(wrong / whole)


def experts_of(layer: int) -> list[str]:
    return [f"layers.{layer}.experts.{name}_proj" for name in ("gate_up", "down")]


def test_measured_errors(source: Path) -> None:
    calls: list[tuple[int, int]] = []
    groups = mixed.measure(open_source(resolve(str(source))), 64, {}, lambda *counts: calls.append(counts))
    assert {group.name for group in groups} == {
        "embeddings", "self-conditioning",
        *(f"layer {i} {name}" for i in range(3) for name in ("attention", "dense MLP", "router", "experts")),
    }  # fmt: skip
    assert calls == [(i + 1, len(groups)) for i in range(len(groups))]
    assert sum(group.values for group in groups) == sum(t.size for t in some_tensors().values() if t.ndim > 1)
    for group in groups:
        assert list(group.error.values()) == sorted(group.error.values(), reverse=True)
        assert [group.size[b] for b in BITS] == [group.values * b // 8 + group.values // 16 for b in BITS]
    (experts,) = (group for group in groups if group.name == "layer 1 experts")
    assert sorted(experts.paths) == sorted(experts_of(1))
    tensors = [some_tensors()[f"model.decoder.{path}"] for path in experts.paths]
    for bits in BITS:
        assert experts.error[bits] == pytest.approx(relative_error(tensors, bits), rel=1e-4)


def test_channels_count_by_their_activations(source: Path) -> None:
    paths = [f"layers.0.self_attn.{name}_proj" for name in "qkvo"]
    loud = {path: mx.array(np.where(np.arange(128) < 8, 100.0, 0.01).astype(np.float32)) for path in paths}
    groups = mixed.measure(open_source(resolve(str(source))), 64, loud, lambda *_: None)
    (attention,) = (group for group in groups if group.name == "layer 0 attention")
    tensors = [some_tensors()[f"model.decoder.{path}.weight"] for path in attention.paths]
    moments = [loud[path] for path in attention.paths]
    for bits in BITS:
        assert attention.error[bits] == pytest.approx(relative_error(tensors, bits, moments), rel=1e-4)


def test_a_sample_of_the_rows_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_source(resolve(str(smallest_source(tmp_path / "source"))))
    whole = mixed.measure(opened, 64, {}, lambda *_: None)
    monkeypatch.setattr(mixed, "_SAMPLE_VALUES", 4000)
    for group, reference in zip(mixed.measure(opened, 64, {}, lambda *_: None), whole, strict=True):
        assert (group.name, group.values, group.size) == (reference.name, reference.values, reference.size)
        assert [group.error[b] for b in BITS] == pytest.approx([reference.error[b] for b in BITS], rel=0.15)


def recorded(module: Callable[..., mx.array], rows: list[mx.array]) -> Callable[..., mx.array]:
    def call(x: mx.array, *args: Any, **options: Any) -> mx.array:
        rows.append(x.reshape(-1, x.shape[-1]))
        return module(x, *args, **options)

    return call


class Recorded(nn.Module):
    """The same as a module: layers that share an input are found only if they are modules."""

    def __init__(self, module: Callable[..., mx.array], rows: list[mx.array]) -> None:
        super().__init__()
        self._call = recorded(module, rows)

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        return self._call(x, *args, **options)


def test_calibration_records_what_goes_into_each_matrix(talking: Path) -> None:
    source = open_source(resolve(str(talking)))
    texts = [("Sort these numbers", "one two three"), ("a longer line of calibration text", "and its answer")]
    moments = mixed.calibrate(source, texts, lambda *_: None)
    matrices = {path for path, weight in source.text.items() if len(weight.shape) > 1}
    assert moments.keys() == {path for path in matrices if "self_conditioning" not in path}

    model: DiffusionGemma = load(talking)[0]
    paths = {
        "layers.0.self_attn.q_proj": (model.layers[0].self_attn, "q_proj"),
        "layers.1.mlp.down_proj": (model.layers[1].mlp, "down_proj"),
        "layers.1.router.proj": (model.layers[1].router, "proj"),
        "layers.2.experts.down_proj": (model.layers[2].experts, "down_proj"),
    }
    rows: dict[str, list[mx.array]] = {path: [] for path in (*paths, "embed_tokens")}
    for path, (parent, name) in paths.items():
        setattr(parent, name, Recorded(getattr(parent, name), rows[path]))
    model.embed_tokens.as_linear = recorded(model.embed_tokens.as_linear, rows["embed_tokens"])
    for sample in make_samples(talking, source.config, texts):
        cache = model.new_cache()
        mx.eval(model.encode(sample.prompt, cache))
        mx.eval(model.decode(sample.canvas, cache))
    for path, inputs in rows.items():
        expected = np.square(np.concatenate(inputs).astype(np.float64)).mean(axis=0)
        np.testing.assert_allclose(np.array(moments[path]), expected, rtol=1e-3, err_msg=path)


@pytest.mark.parametrize("calibrated", [False, True])
def test_mixed_stays_within_its_target(talking: Path, tmp_path: Path, calibrated: bool) -> None:
    calibration = None
    if calibrated:
        calibration = tmp_path / "texts.txt"
        calibration.write_text("sort 3 1 2 please\n\nwhat is the capital of France\n")
    whole = sum(tensor.size for tensor in some_tensors(vocab_size=768).values())
    target = whole * 5 // 8
    stages: set[str] = set()
    report = convert(str(talking), tmp_path / "out", "mixed", target_bytes=target, calibration=calibration,
                     progress=lambda stage, done, total: stages.add(stage))  # fmt: skip
    written = sum(tensor.nbytes for tensor in stored(report.output).values())
    assert 0.97 * target < written == report.plan.bytes_out <= target
    assert stages == {"measure", "convert", *(["calibrate"] if calibrated else [])}
    check_output(report, some_tensors(vocab_size=768))
    table = read(report.output / "conversion_report.json")["mixed"]
    assert (table["budget_bytes"], table["calibrated"]) == (target, calibrated)
    bits = {group["bits"] for group in table["groups"].values()}
    assert len(bits) > 1 and bits <= set(BITS)
    assert report.plan.quantization() is not None
    for name, group in table["groups"].items():
        assert set(group["error"]) == set(group["bytes"]) == set(map(str, BITS)), name
    assert np.isfinite(logits(load(report.output)[0])).all()


@pytest.mark.parametrize("bpw", [5.0, 6.5, 16.0])
def test_mixed_by_bits_per_weight(tmp_path: Path, bpw: float) -> None:
    plan = convert(str(smallest_source(tmp_path / "source")), None, "mixed", target_bpw=bpw, group_size=32).plan
    assert plan.bits_per_weight <= bpw
    packed = {target.format for target in plan.targets if target.format}
    assert {packing.group_size for packing in packed} == {32}
    if bpw == 16:
        assert packed == {Format(8, 32)}


def test_mixed_of_one_source_is_always_the_same(tmp_path: Path) -> None:
    source = smallest_source(tmp_path / "source")
    outputs = [convert(str(source), tmp_path / n / "out", "mixed", target_bpw=5).output for n in ("1", "2")]
    assert digests(outputs[0]) == digests(outputs[1])
