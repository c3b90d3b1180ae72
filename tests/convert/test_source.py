"""Damaged sources: one clear error that names the file and the tensor, and no files left behind."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dgemma_convert import carry_out, prepare
from dgemma_convert.formats import Format
from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.errors import DgemmaError
from tests.convert.checkpoints import (
    SMALLEST,
    TOWER,
    failure,
    make_source,
    names_in,
    smallest_tensors,
    some_tensors,
    user_error,
    vision_tensors,
)
from tests.model.checkpoint import Tensors, flat_config, quantized
from tests.model.odd_values import ODD_VALUES, changed, flipped_headers, one_line, places, reported
from tests.model.test_quantized import ODD_QUANTIZATION

INDEX = "model.safetensors.index.json"
QUERY = "model.decoder.layers.0.self_attn.q_proj.weight"
EXPERT = "model.decoder.layers.0.experts.down_proj"
SOME_NAMES = [
    "model.decoder.embed_tokens.weight", EXPERT, "model.decoder.layers.0.layer_scalar", "model.decoder.norm.weight",
    "model.encoder.language_model.layers.0.layer_scalar", "model.decoder.self_conditioning.pre_norm.weight",
]  # fmt: skip


@pytest.fixture
def tensors() -> Tensors:
    return dict(smallest_tensors())


def write(folder: Path, tensors: Tensors, *, shards: int = 1, **config: Any) -> Path:
    return make_source(folder, {**flat_config(**SMALLEST), **config}, tensors, shards=shards)


@pytest.mark.parametrize("name", SOME_NAMES)
def test_missing_tensor(tmp_path: Path, tensors: Tensors, name: str) -> None:
    del tensors[name]
    assert name in failure(write(tmp_path / "source", tensors))


@pytest.mark.parametrize("name", SOME_NAMES)
def test_wrong_shape(tmp_path: Path, tensors: Tensors, name: str) -> None:
    shape = tensors[name].shape
    tensors[name] = mx.zeros((*shape[:-1], shape[-1] + 1), mx.bfloat16)
    source = write(tmp_path / "source", tensors)
    message = failure(source)
    for part in (name.removesuffix(".weight"), "model.safetensors", str(shape), str(tensors[name].shape)):
        assert part in message


@pytest.mark.parametrize("name", SOME_NAMES)
@pytest.mark.parametrize("dtype", [mx.uint32, mx.uint8, mx.int64, mx.bool_], ids=str)
def test_dtypes_that_are_not_weights(tmp_path: Path, tensors: Tensors, name: str, dtype: mx.Dtype) -> None:
    tensors[name] = mx.ones(tensors[name].shape, dtype)
    source = write(tmp_path / "source", tensors)
    for recipe in ("q4", "bf16"):
        assert name.removesuffix(".weight") in failure(source, None, recipe)


@pytest.mark.parametrize("shards", [1, 3])
def test_truncated_shard(tmp_path: Path, tensors: Tensors, shards: int) -> None:
    source = write(tmp_path / "source", tensors, shards=shards)
    file = max(source.glob("*.safetensors"))
    size = file.stat().st_size
    for length in (size - 1, size // 2, 100, 8, 7, 0):
        with file.open("r+b") as handle:
            handle.truncate(length)
        assert str(file) in failure(source)


def test_shard_cut_off_while_it_is_read(tmp_path: Path, tensors: Tensors) -> None:
    source = write(tmp_path / "source", tensors)
    file, plan = source / "model.safetensors", prepare(str(source), tmp_path / "out")
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    with pytest.raises(DgemmaError, match=r"model\.safetensors") as caught:
        carry_out(plan)
    assert "model.decoder." in user_error(caught.value)
    assert names_in(tmp_path) == {"source"}


def test_index_naming_a_missing_shard(tmp_path: Path, tensors: Tensors) -> None:
    source = write(tmp_path / "source", tensors, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    message = failure(source)
    assert INDEX in message and "model-00002-of-00003.safetensors" in message


def test_tensor_in_two_shards(tmp_path: Path, tensors: Tensors) -> None:
    source = write(tmp_path / "source", tensors, shards=2)
    first, second = sorted(source.glob("*.safetensors"))
    held = mx.load(str(second))
    assert isinstance(held, dict)
    mx.save_safetensors(str(second), {**held, QUERY: tensors[QUERY], EXPERT: tensors[EXPERT]})
    message = failure(source)
    assert (QUERY in message or EXPERT in message) and str(first) in message and str(second) in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, "gemma3"),
        ({"model_type": None}, "model_type"),
        ({"text_config": None}, "text_config"),
        ({"tie_word_embeddings": False}, "untied"),
    ],
    ids=str,
)
def test_another_architecture(tmp_path: Path, tensors: Tensors, change: dict[str, Any], message: str) -> None:
    source = write(tmp_path / "source", tensors, **change)
    found = failure(source)
    assert message in found and str(source / "config.json") in found


def test_folder_without_a_checkpoint(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "source").mkdir()
    assert "config.json" in failure(tmp_path / "source")
    source = write(tmp_path / "source", tensors)
    (source / "model.safetensors").unlink()
    assert "model.safetensors" in failure(source)
    assert "nowhere" in failure(tmp_path / "nowhere", code=1)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_nan_and_infinity(tmp_path: Path, tensors: Tensors, dtype: mx.Dtype, value: float) -> None:
    whole = {name: tensor.astype(dtype) for name, tensor in {**tensors, **vision_tensors()}.items()}
    for name in (QUERY, EXPERT, "model.decoder.layers.0.layer_scalar", f"{TOWER}.input_layernorm.weight"):
        flat = mx.flatten(whole[name])
        damaged = mx.where(mx.arange(flat.size) == flat.size - 1, value, flat).astype(dtype).reshape(whole[name].shape)
        source = write(tmp_path / "source", {**whole, name: damaged}, shards=2)
        message = failure(source, None, "q4")
        assert name.removesuffix(".weight") in message and "NaN or infinity" in message
        assert str(source / "model-0000") in message


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_nan_in_the_scales_of_a_packed_weight(tmp_path: Path, tensors: Tensors, part: str) -> None:
    entry = Format(4).as_config()
    packed, _ = quantized(tensors, lambda path: entry)
    name = f"{EXPERT}.{part}"
    packed[name] = mx.full(packed[name].shape, float("nan"), mx.bfloat16)
    source = write(tmp_path / "source", packed, quantization=entry)
    for recipe in ("q4", "q4-small", "bf16"):
        assert EXPERT in failure(source, None, recipe)


def test_numbers_too_large_for_bf16(tmp_path: Path, tensors: Tensors) -> None:
    whole = {name: tensor.astype(mx.float32) for name, tensor in tensors.items()}
    whole[EXPERT] = mx.full(whole[EXPERT].shape, 3.4e38)  # the largest bfloat16 is 3.39e38
    source = write(tmp_path / "source", whole)
    for recipe in ("q4", "bf16"):
        assert EXPERT in failure(source, None, recipe)


def test_damage_found_late_leaves_nothing(tmp_path: Path, tensors: Tensors) -> None:
    tensors["model.decoder.norm.weight"] = mx.full((128,), float("inf"), mx.bfloat16)
    source = write(tmp_path / "source", tensors)
    plan = prepare(str(source), shard_bytes=20_000)
    assert len(plan.shards) > 3 and "model.decoder.norm" in {t.weight.name for t in list(plan.shards.values())[-1]}
    with pytest.raises(DgemmaError, match=r"model\.decoder\.norm"):
        carry_out(plan)
    assert names_in(tmp_path) == {"source"}


def test_failure_leaves_no_empty_parents(tmp_path: Path, tensors: Tensors) -> None:
    tensors[QUERY] = mx.full(tensors[QUERY].shape, float("inf"), mx.bfloat16)
    failure(write(tmp_path / "source", tensors), tmp_path / "deep" / "er" / "out")


def test_packed_without_quantization(tmp_path: Path, tensors: Tensors) -> None:
    packed, _ = quantized(tensors, lambda path: Format(4).as_config())
    message = failure(write(tmp_path / "source", packed))
    assert "config.json" in message and "model.decoder." in message


@pytest.mark.parametrize("lost", ["weight", "scales", "biases"])
def test_packed_weight_without_one_of_its_parts(tmp_path: Path, tensors: Tensors, lost: str) -> None:
    entry = Format(4).as_config()
    packed, _ = quantized(tensors, lambda path: entry)
    del packed[f"{EXPERT}.{lost}"]
    assert EXPERT in failure(write(tmp_path / "source", packed, quantization=entry))


@pytest.mark.parametrize("change", ODD_QUANTIZATION, ids=str)
def test_quantization_that_does_not_fit(tmp_path: Path, tensors: Tensors, change: dict[str, Any]) -> None:
    entry = Format(4).as_config()
    packed, _ = quantized(some_tensors(), lambda path: entry)
    config = {**flat_config(), "quantization": {**entry, **change}}
    assert "model.decoder." in failure(make_source(tmp_path / "source", config, packed))


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda content: content + b"\0",
    lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 9\n",
    lambda content: b"<!DOCTYPE html><html>Access denied</html>",
    lambda content: b"\0" * len(content),
    lambda content: content.replace(b'"BF16"', b'"F64_"', 1),
    lambda content: content.replace(b'"BF16"', b"[1, 2]", 1),
    lambda content: content.replace(b'"shape":[1]', b'"shape":[2]', 1),
    lambda content: content.replace(b'"shape":[1]', b'"shape":"a"', 1),
    lambda content: content.replace(b'"shape":[128,128]', b'"shape":[null,12]', 1),
    lambda content: content.replace(b'"shape":[128,128]', b'"shape":[12.8,12]', 1),
    lambda content: content.replace(b'"shape":[128,128]', b'"shape":{"":1234}', 1),
    lambda content: content.replace(b'"data_offsets"', b'"data_offzets"', 1),
    lambda content: struct.pack("<Q", 2) + b"{}",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(tmp_path: Path, tensors: Tensors, damage: Callable[[bytes], bytes]) -> None:
    source = write(tmp_path / "source", tensors)
    file = source / "model.safetensors"
    original = file.read_bytes()
    file.write_bytes(damage(original))
    assert file.read_bytes() != original
    message = failure(source)
    assert str(file) in message or "lacks" in message


def test_any_flipped_byte_of_the_header_is_read_or_reported(tmp_path: Path, tensors: Tensors) -> None:
    source = write(tmp_path / "source", tensors)
    for position in flipped_headers(source / "model.safetensors", 300):
        error = reported(prepare, str(source))
        assert error is None or one_line(error), position


def test_any_odd_value_of_the_config_is_planned_or_reported(tmp_path: Path, tensors: Tensors) -> None:
    """A configuration that ``ModelConfig`` accepts must not cause an unexpected exception later."""
    source = write(tmp_path / "source", tensors)
    document = flat_config(**SMALLEST)
    for path in places(document):
        for value in ODD_VALUES[::2]:
            raw = changed(document, path, value)
            if reported(ModelConfig.from_dict, raw) is None:
                (source / "config.json").write_text(json.dumps(raw))
                error = reported(prepare, str(source))
                assert error is None or one_line(error), (path, value)
