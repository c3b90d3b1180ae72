"""The plan: the format of each tensor, sizes, the layout of shards, and the fingerprint."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from safetensors import safe_open

from dgemma_convert import RECIPES, Plan, prepare
from dgemma_convert.formats import ITEM_SIZE
from dgemma_convert.plan import Target
from dgemma_convert.recipes import ATTENTION, DENSE, EMBEDDINGS, EXPERTS, KEPT, ROUTER, SELF_CONDITIONING, VISION
from dgemma_convert.writer import header_of
from tests.convert.checkpoints import make_source, names_in, some_tensors, vision_tensors
from tests.model.checkpoint import flat_config, random_tensors

FIXED = [name for name in RECIPES if name != "mixed"]


def formats(plan: Plan) -> dict[str, str]:
    """Return the name of the format of each weight, by the weight's name."""
    return {target.weight.name: str(target.format) if target.format else "bf16" for target in plan.targets}


def by_class(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {row.tensor_class: row.formats for row in plan.classes()}


def nbytes(targets: Sequence[Target]) -> int:
    return sum(target.nbytes for target in targets)


# Recipes


@pytest.mark.parametrize(
    ("recipe", "bulk", "sensitive"),
    [
        ("q4", "4-bit g64", "8-bit g64"), ("q8", "8-bit g64", "8-bit g64"), ("q4-small", "4-bit g64", "4-bit g64"),
        ("mxfp4", "mxfp4", "8-bit g64"), ("mxfp8", "mxfp8", "mxfp8"), ("nvfp4", "nvfp4", "8-bit g64"),
        ("bf16", "bf16", "bf16"),
    ],
)  # fmt: skip
def test_recipes(source: Path, recipe: str, bulk: str, sensitive: str) -> None:
    assert by_class(prepare(str(source), None, recipe)) == {
        **dict.fromkeys((EXPERTS, SELF_CONDITIONING), (bulk,)),
        **dict.fromkeys((EMBEDDINGS, ATTENTION, DENSE, ROUTER), (sensitive,)),
        KEPT: ("bf16",),
    }


def test_names_decide_the_classes_of_tensors(source: Path) -> None:
    marks = {
        EMBEDDINGS: "embed_tokens", ATTENTION: "self_attn", DENSE: ".mlp.", ROUTER: "router", EXPERTS: ".experts.",
        SELF_CONDITIONING: "self_conditioning",
    }  # fmt: skip
    plan = prepare(str(source))
    for target in plan.targets:
        assert marks.get(target.tensor_class, "") in target.weight.name
        assert (target.tensor_class == KEPT) == (len(target.weight.shape) == 1), target.weight.name
    assert len(plan.targets) == len(some_tensors())


def test_q3_packs_the_experts_of_edge_layers_less(tmp_path: Path) -> None:
    types = ["sliding_attention"] * 8 + ["full_attention"]
    config = flat_config(num_hidden_layers=9, layer_types=types, num_experts=2)
    packed = formats(prepare(str(make_source(tmp_path, config, random_tensors(config, mx.bfloat16))), None, "q3"))
    for layer in range(9):
        for name in ("gate_up_proj", "down_proj"):
            expected = "4-bit g64" if layer in (0, 1, 2, 6, 7, 8) else "3-bit g64"
            assert packed[f"model.decoder.layers.{layer}.experts.{name}"] == expected
        assert packed[f"model.decoder.layers.{layer}.mlp.up_proj"] == "8-bit g64"
    assert packed["model.decoder.self_conditioning.up_proj"] == "4-bit g64"


def test_q3_covers_few_layers_as_edge_layers(source: Path) -> None:
    assert by_class(prepare(str(source), None, "q3"))[EXPERTS] == ("4-bit g64",)


@pytest.mark.parametrize("group_size", [32, 128])
def test_group_size_is_for_affine_formats(source: Path, group_size: int) -> None:
    packed = by_class(prepare(str(source), None, "mxfp4", group_size=group_size))
    assert packed[EXPERTS] == ("mxfp4",)
    assert packed[EMBEDDINGS] == (f"8-bit g{group_size}",)


def test_smaller_groups_cost_more(source: Path) -> None:
    sizes = [prepare(str(source), None, "q4", group_size=size).bytes_out for size in (32, 64)]
    matrices = sum(tensor.size for tensor in some_tensors().values() if tensor.ndim > 1)
    assert sizes[0] - sizes[1] == matrices * 32 // 8 // 64  # one more scale and bias, 16 bits each, for every 64 values


def test_rows_that_do_not_divide_into_groups_are_not_packed(source: Path) -> None:
    plan = prepare(str(source), None, "q4", group_size=128)
    narrow = [target for target in plan.targets if target.weight.shape[-1] % 128 and len(target.weight.shape) > 1]
    names = [target.weight.name for target in narrow]
    assert names == [f"model.decoder.layers.{i}.experts.down_proj" for i in range(3)]
    assert all(target.format is None for target in narrow)
    (warning,) = plan.warnings
    assert "stay bf16" in warning and names[0] in warning
    assert by_class(plan)[EXPERTS] == ("4-bit g128", "bf16")
    assert prepare(str(source), None, "q4").warnings == ()


# Sizes


@pytest.mark.parametrize("recipe", FIXED)
def test_totals_are_the_sums_of_the_classes(tmp_path: Path, recipe: str) -> None:
    plan = prepare(str(make_source(tmp_path, tensors={**some_tensors(), **vision_tensors()})), None, recipe)
    rows = plan.classes()
    assert sum(row.tensors for row in rows) == len(plan.targets)
    assert sum(row.bytes_in for row in rows) == plan.bytes_in
    assert plan.bytes_in == sum(t.nbytes for t in (*some_tensors().values(), *vision_tensors().values()))
    assert sum(row.bytes_out for row in rows) == plan.bytes_out
    assert plan.bits_per_weight == pytest.approx(8 * plan.bytes_out / sum(row.values for row in rows))
    assert [row.tensor_class for row in rows][-1] == VISION and rows[-1].formats == ("bf16",)
    assert plan.memory_to_run > plan.bytes_out
    report = json.loads(json.dumps(plan.as_dict()))
    assert report["bytes_out"] == sum(row["bytes_out"] for row in report["classes"])
    assert report["bytes_needed"] > report["bytes_out"] and report["bytes_free"] > 0


def test_planning_writes_nothing(source: Path) -> None:
    before = names_in(source)
    plan = prepare(str(source))
    assert plan.output == source.parent / "source-q4"
    assert names_in(source.parent) == {"source"} and names_in(source) == before


# Layout


def check_header(header: bytes, targets: Sequence[Target]) -> None:
    """Check a header as the specification of safetensors requires it: contiguous offsets from 0, without gaps."""
    length = int.from_bytes(header[:8], "little")
    assert len(header) == 8 + length and length % 8 == 0
    entries: dict[str, Any] = json.loads(header[8:])
    assert all(isinstance(value, str) for value in entries.pop("__metadata__").values())
    end = 0
    for entry in entries.values():
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
        assert end - entry["data_offsets"][0] == math.prod(entry["shape"]) * ITEM_SIZE[entry["dtype"]]
    assert end == nbytes(targets)
    assert len(entries) == sum(len(target.parts) for target in targets)


@pytest.mark.parametrize("recipe", FIXED)
def test_headers_are_what_the_safetensors_library_reads(tmp_path: Path, source: Path, recipe: str) -> None:
    (targets,) = prepare(str(source), None, recipe).shards.values()
    header = header_of(targets)
    check_header(header, targets)
    file = tmp_path / "zeros.safetensors"
    file.write_bytes(header + bytes(nbytes(targets)))
    with safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "mlx"}
        names = opened.keys()
        slices = {name: opened.get_slice(name) for name in names}
        shapes = {name: (found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}
    parts = {target.weight.name + p.suffix: (p.dtype, p.shape) for target in targets for p in target.parts}
    assert shapes == parts


@pytest.mark.parametrize("shard_bytes", [1, 3_000, 20_000, 100_000, 10**9])
@pytest.mark.parametrize("recipe", ["q4", "mxfp4", "bf16"])
def test_shards(source: Path, recipe: str, shard_bytes: int) -> None:
    plan = prepare(str(source), None, recipe, shard_bytes=shard_bytes)
    for targets in plan.shards.values():
        assert nbytes(targets) <= shard_bytes or len(targets) == 1
        check_header(header_of(targets), targets)  # a shard holds all parts of its weights
    count = len(plan.shards)
    numbered = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert list(plan.shards) == (["model.safetensors"] if count == 1 else numbered)
    assert formats(plan) == formats(prepare(str(source), None, recipe))
    for first, second in itertools.pairwise(plan.shards.values()):
        assert nbytes(first) + second[0].nbytes > shard_bytes  # no shard ends too early


def test_vectors_have_no_entries_in_the_config(source: Path) -> None:
    plan = prepare(str(source), None, "q4-small")
    vectors = {target.weight.name for target in plan.targets if len(target.weight.shape) == 1}
    assert vectors and vectors.isdisjoint(plan.quantization() or vectors)


def test_a_shard_may_be_exactly_full(source: Path) -> None:
    total = prepare(str(source), None, "q4").bytes_out
    assert [len(prepare(str(source), None, "q4", shard_bytes=total - less).shards) for less in (0, 1)] == [1, 2]


def test_shards_that_are_written_already_need_no_room_again(tmp_path: Path, source: Path) -> None:
    plan = prepare(str(source), tmp_path / "out", "q4", shard_bytes=20_000)
    needed = plan.bytes_needed
    plan.partial.mkdir()
    (plan.partial / next(iter(plan.shards))).write_bytes(bytes(1000))
    assert plan.bytes_needed == needed - 1000


# The fingerprint


def test_fingerprint(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", shards=2)

    def fingerprint(recipe: str = "q4", output: Path | None = None, **options: Any) -> str:
        return prepare(str(source), output, recipe, **options).fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(output=tmp_path / "elsewhere") == first
    others = [
        fingerprint("q8"), fingerprint("q4-small"), fingerprint("nvfp4"), fingerprint(group_size=32),
        fingerprint(shard_bytes=50_000),
    ]  # fmt: skip
    assert len({first, *others}) == 6
    file = max(source.glob("*.safetensors"))
    before = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert fingerprint() != first
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fingerprint() == first
    copy = make_source(tmp_path / "copy", shards=2)
    assert prepare(str(copy)).fingerprint() != first
