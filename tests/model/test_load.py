"""Tests of loading a checkpoint folder: names, layouts, shards, dtypes, laziness, and errors in a folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.text import DiffusionGemma
from tests.model.checkpoint import Tensors, flat_config, layered_config, load, random_tensors, write_checkpoint
from tests.model.odd_values import ODD_VALUES, changed, flipped_headers, one_line, places, reported

INDEX = "model.safetensors.index.json"


def loaded(folder: Path, config: dict[str, Any], tensors: Tensors, **options: Any) -> DiffusionGemma:
    return load(write_checkpoint(folder, config, tensors, **options))[0]


def parameters(model: DiffusionGemma) -> Tensors:
    return dict(tree_flatten(model.parameters()))


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(bool(mx.array_equal(one[name], other[name])) for name in one)


def failure(folder: Path) -> str:
    error = reported(load, folder)
    assert error
    assert one_line(error)
    return error.message


def test_every_tensor_reaches_its_parameter(folder: Path, tensors: Tensors) -> None:
    bound = parameters(load(folder)[0])
    assert len(bound) == len(tensors)
    for name, tensor in tensors.items():
        path = name.replace("model.decoder.", "")
        if "encoder" in path:
            path = path.replace("model.encoder.language_model.", "").replace("layer_scalar", "encoder_layer_scalar")
        if path.endswith(("experts.gate_up_proj", "experts.down_proj")):
            path += ".weight"
        assert mx.array_equal(bound[path], tensor), name


@pytest.mark.parametrize("config", [flat_config(), layered_config()], ids=["flat", "layered"])
@pytest.mark.parametrize("shards", [1, 3])
def test_layouts_and_shards(tmp_path: Path, folder: Path, tensors: Tensors, config: Any, shards: int) -> None:
    model = loaded(tmp_path / "other", config, tensors, shards=shards)
    assert same(parameters(model), parameters(load(folder)[0]))


def test_an_index_with_a_single_file(folder: Path, tensors: Tensors) -> None:
    weight_map = dict.fromkeys(tensors, "model.safetensors")  # as mlx-vlm writes it
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    load(folder)


def test_vision_tensors_are_kept_separately(tmp_path: Path, tensors: Tensors) -> None:
    vision = {
        "model.encoder.vision_tower.patch_embedder.input_proj.weight": mx.ones((2, 3)),
        "model.encoder.embed_vision.embedding_projection.weight": mx.zeros((4, 2)),
    }
    model, weights = load(write_checkpoint(tmp_path, flat_config(), {**vision, **tensors}))
    assert same(weights.vision, vision)
    assert not any("vision" in name for name in parameters(model))


def test_tied_copies_are_dropped(tmp_path: Path, folder: Path, tensors: Tensors) -> None:
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("model.decoder.")}
    copies = {
        name.replace("model.decoder.", "model.encoder.language_model."): mx.zeros_like(tensor)
        for name, tensor in text.items()
        if "layer_scalar" not in name and "self_conditioning" not in name
    }
    copies["lm_head.weight"] = mx.zeros((96, 128))
    model = loaded(tmp_path / "other", flat_config(), {**copies, **tensors})
    assert same(parameters(model), parameters(load(folder)[0]))


@pytest.mark.parametrize(
    ("missing", "copy"),
    [
        ("model.decoder.embed_tokens.weight", "lm_head.weight"),
        ("model.decoder.embed_tokens.weight", "model.encoder.language_model.embed_tokens.weight"),
        ("model.decoder.layers.0.mlp.up_proj.weight", "model.encoder.language_model.layers.0.mlp.up_proj.weight"),
        ("model.decoder.layers.2.experts.down_proj", "model.encoder.language_model.layers.2.experts.down_proj"),
    ],
)
def test_a_tied_copy_replaces_a_missing_tensor(
    tmp_path: Path, folder: Path, tensors: Tensors, missing: str, copy: str
) -> None:
    renamed = {copy if name == missing else name: tensor for name, tensor in tensors.items()}
    assert same(parameters(loaded(tmp_path / "other", flat_config(), renamed)), parameters(load(folder)[0]))


# Memory and dtypes


def test_loading_reads_nothing(tmp_path: Path) -> None:
    config = flat_config(vocab_size=30_000, hidden_size=256)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors)
    size = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    before = mx.get_active_memory()
    model, weights = load(tmp_path, mx.float32)
    assert mx.get_active_memory() - before < 0.01 * size
    mx.eval(model.parameters())
    assert size <= mx.get_active_memory() - before < 1.01 * size
    assert weights.text


@pytest.mark.parametrize("stored", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("asked", [None, mx.float32, mx.bfloat16])
def test_dtype(tmp_path: Path, stored: mx.Dtype, asked: mx.Dtype | None) -> None:
    model, _ = load(write_checkpoint(tmp_path, flat_config(), random_tensors(flat_config(), stored)), asked)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    expected = asked or (mx.float32 if on_cpu else stored)
    assert {tensor.dtype for tensor in parameters(model).values()} == {expected} == {model.dtype}
    decoded = model.decode(mx.zeros((1, 4), mx.int32), model.new_cache())
    assert decoded.dtype == mx.float32
    assert mx.isfinite(decoded).all()


# Errors in a folder


@pytest.mark.parametrize("name", [
    "model.decoder.embed_tokens.weight", "model.decoder.layers.1.layer_scalar",
    "model.decoder.layers.0.experts.gate_up_proj", "model.encoder.language_model.layers.2.layer_scalar",
    "model.decoder.self_conditioning.pre_norm.weight",
])  # fmt: skip
def test_a_missing_tensor_a_wrong_shape_and_a_wrong_dtype(tmp_path: Path, tensors: Tensors, name: str) -> None:
    without = {other: tensor for other, tensor in tensors.items() if other != name}
    assert failure(write_checkpoint(tmp_path / "0", flat_config(), without)) == f"the checkpoint lacks {name}"
    larger = mx.zeros((*tensors[name].shape[:-1], tensors[name].shape[-1] + 1))
    assert failure(write_checkpoint(tmp_path / "1", flat_config(), {**tensors, name: larger})).startswith(
        f"{name} has shape {larger.shape}, but config.json asks for {tensors[name].shape}"
    )
    for dtype in (mx.int32, mx.uint32, mx.uint8, mx.bool_):
        other = {**tensors, name: tensors[name].astype(dtype)}
        message = failure(write_checkpoint(tmp_path / str(dtype), flat_config(), other))
        assert message == f"{name} has dtype {dtype}, not mlx.core.float32"


@pytest.mark.parametrize("name", [
    "model.decoder.layers.3.layer_scalar", "model.decoder.layers.0.mlp.bias", "lm_head.bias", "step",
    "model.encoder.language_model.layers.0.mlp.bias", "model.decoder.layers.2.self_attn.v_proj.weight",
])  # fmt: skip
def test_unexpected_tensor(tmp_path: Path, tensors: Tensors, name: str) -> None:
    write_checkpoint(tmp_path, flat_config(), {**tensors, name: mx.zeros(1)})
    assert failure(tmp_path) == f"the checkpoint has unknown tensors: {name}"


def test_many_missing_tensors_make_a_short_message(tmp_path: Path, tensors: Tensors) -> None:
    few = {name: tensor for name, tensor in tensors.items() if "layers" not in name}
    message = failure(write_checkpoint(tmp_path, flat_config(), few))
    assert message.startswith("the checkpoint lacks model.encoder.language_model.layers.0.layer_scalar, model.dec")
    assert message.endswith(f" and {len(tensors) - len(few) - 3} more")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"a": "model-00009-of-00009.safetensors"}}, "names model-00009-of-00009.safetensors, which"),
        ({"weight_map": {"a": "x" * 5000}}, "which is not in"),
        ({"weight_map": {"a": "model\0.safetensors"}}, "which is not in"),
        ({"weight_map": {"a": "../model/model.safetensors"}}, "names a shard outside the folder: '../model/model"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names a shard outside the folder: '/etc/passwd'"),
        ({"weight_map": {"a": ".."}}, "which is not in"),
        ({"weight_map": {"a": ""}}, "which is not in"),
        ({"weight_map": {"a": 3, "b": "model.safetensors"}}, "names a shard outside the folder: 3"),
        ({"weight_map": {"a": ["model.safetensors"]}}, "names a shard outside the folder: ["),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["model.safetensors"]}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "does not contain a JSON object"),
        ('{"weight_map": {"a": "model.saf', "cannot read"),
        ("", "cannot read"),
    ],
)
def test_index(folder: Path, content: Any, message: str) -> None:
    (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
    found = failure(folder)
    assert message in found
    assert INDEX in found


def test_tensor_in_two_shards(tmp_path: Path, tensors: Tensors) -> None:
    folder = write_checkpoint(tmp_path, flat_config(), tensors, shards=2)
    name = "model.decoder.norm.weight"
    first, second = sorted(folder.glob("*.safetensors"))
    for file in (first, second):
        held = mx.load(str(file))
        assert isinstance(held, dict)
        mx.save_safetensors(str(file), {**held, name: tensors[name]})
    assert failure(folder) == f"{second} holds {name}, which another shard holds as well"


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert failure(folder) == f"{folder} has no model.safetensors"
    (folder / "model.safetensors").mkdir()
    assert str(folder / "model.safetensors") in failure(folder)


@pytest.mark.parametrize("shards", [1, 2])
def test_file_cut_off_anywhere(tmp_path: Path, tensors: Tensors, shards: int) -> None:
    folder = write_checkpoint(tmp_path, flat_config(), tensors, shards=shards)
    file = max(folder.glob("*.safetensors"))
    size = file.stat().st_size
    header = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    data = {size - 1, size - 2, size // 2, header + 1, header, header - 1}
    with file.open("r+b") as handle:
        for length in sorted({*data, *range(9), *range(9, header, 61)}, reverse=True):
            handle.truncate(length)
            assert str(file) in failure(folder), length


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content + b"\0", "bytes, but its header promises"),
        (lambda content: content + content, "bytes, but its header promises"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 9\n", "Git LFS pointer"),
        (lambda content: b"<!DOCTYPE html><html>Access denied</html>", "is not a safetensors file"),
        (lambda content: b"PK\3\4" + content, "is not a safetensors file"),
        (lambda content: b"\0" * len(content), "is not a safetensors file"),
        (lambda content: b"\xff" * len(content), "is not a safetensors file"),
        (lambda content: content.replace(b'"F32"', b'"F64"', 1), "the place or size of"),
        (lambda content: content.replace(b'"F32"', b'"XYZ"', 1), "the place or size of"),
        (lambda content: content.replace(b'"shape":[96', b'"shape":[97', 1), "the place or size of"),
        (lambda content: content.replace(b'"data_offsets"', b'"data_offzets"', 1), "is not a safetensors file"),
        (lambda content: struct.pack("<Q", 2) + b"[]", "is not a safetensors file"),
        (lambda content: struct.pack("<Q", 90_000) + b"[" * 90_000, "is not a safetensors file"),
        (lambda content: struct.pack("<Q", 2) + b"{}", "the checkpoint lacks"),
    ],
)
def test_damaged_file(folder: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = folder / "model.safetensors"
    original = file.read_bytes()
    file.write_bytes(damage(original))
    found = failure(folder)
    assert file.read_bytes() != original
    assert message in found
    assert "lacks" in found or str(file) in found


def test_any_flipped_byte_of_the_header_is_read_or_reported(folder: Path) -> None:
    for position in flipped_headers(folder / "model.safetensors", 150):
        error = reported(load, folder)
        assert error is None or one_line(error), position


def test_any_odd_value_of_the_config_is_loaded_or_reported(folder: Path) -> None:
    """A value that ``ModelConfig`` accepts must not cause an unexpected error later."""
    document = flat_config()
    for path in places(document):
        for value in ODD_VALUES:
            raw = changed(document, path, value)
            if reported(ModelConfig.from_dict, raw) is None:
                error = reported(load_model, folder, ModelConfig.from_dict(raw))
                assert error is None or one_line(error), (path, value)
