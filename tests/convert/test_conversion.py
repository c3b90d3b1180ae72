"""The weights of an output: the values of the source, packed as MLX packs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from safetensors import safe_open

from dgemma_convert import RECIPES, carry_out, convert, prepare
from dgemma_convert.formats import Format
from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.vision_config import VISION_FILE, VisionConfig
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.vision.load import load_tower
from dgemma_mlx.vision.pixels import read_picture
from tests.convert.checkpoints import (
    SMALLEST,
    TOWER,
    check_output,
    digests,
    identical,
    make_source,
    read,
    some_tensors,
    stored,
    unpacked,
    vision_tensors,
)
from tests.model.checkpoint import (
    Tensors,
    flat_config,
    load,
    logits,
    quantized,
    random_tensors,
    write_checkpoint,
)
from tests.vision.towers import noise, saved, tower_tensors, vision_config

FIXED = [name for name in RECIPES if name != "mixed"]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def deep() -> tuple[dict[str, Any], Tensors]:
    """Configuration and tensors of a network with a layer that is not among the first and last three."""
    config = flat_config(num_hidden_layers=7, layer_types=["sliding_attention"] * 6 + ["full_attention"])
    return config, random_tensors(config, mx.bfloat16)


# Weights


@pytest.mark.parametrize("recipe", FIXED)
def test_output_is_what_packing_whole_tensors_gives(
    tmp_path: Path, deep: tuple[dict[str, Any], Tensors], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = deep if recipe == "q3" else (flat_config(), some_tensors())
    source = make_source(tmp_path / "source", config, tensors)
    monkeypatch.setattr("dgemma_convert.source.BLOCK_BYTES", 5000)  # many blocks, with a remainder
    done: list[tuple[int, int]] = []
    report = convert(str(source), tmp_path / "out", recipe, progress=lambda stage, *counts: done.append(counts))
    check_output(report, tensors)
    assert [count for count, _ in done] == sorted(count for count, _ in done)
    assert done[-1][0] == done[-1][1] == report.plan.bytes_in
    file = tmp_path / "out" / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + report.plan.bytes_out
    with safe_open(file, "numpy") as opened:
        names = opened.keys()
    assert set(names) == stored(tmp_path / "out").keys()


@pytest.mark.parametrize("recipe", ["q4", "q3", "mxfp8", "nvfp4"])
def test_output_gives_the_logits_of_its_unpacked_weights(
    tmp_path: Path, deep: tuple[dict[str, Any], Tensors], recipe: str
) -> None:
    """The loader follows config.json: the logits are those of the same weights, unpacked by hand."""
    config, tensors = deep if recipe == "q3" else (flat_config(), some_tensors())
    report = convert(str(make_source(tmp_path / "source", config, tensors)), tmp_path / "out", recipe)
    formats = {target.weight.name: target.format for target in report.plan.targets}
    entries = {name: packing.as_config() for name, packing in formats.items() if packing}
    _, whole = quantized(tensors, entries.get)
    expected = logits(load(write_checkpoint(tmp_path / "whole", config, whole))[0])
    model = load(tmp_path / "out")[0]
    np.testing.assert_allclose(logits(model), expected, atol=5e-4)
    packed = {f"model.decoder.{path}": m for path, m in model.named_modules() if "scales" in m}
    assert {name: (m.bits, m.group_size, m.mode) for name, m in packed.items()} == {
        name: (entry["bits"], entry["group_size"], entry["mode"]) for name, entry in entries.items()
    }


@pytest.mark.parametrize("shards", [1, 3])
def test_bf16_gives_exactly_the_source(tmp_path: Path, shards: int) -> None:
    source = make_source(tmp_path / "source", shards=shards)
    convert(str(source), tmp_path / "out", "bf16")
    assert np.array_equal(logits(load(tmp_path / "out")[0]), logits(load(source)[0]))
    assert "quantization" not in read(tmp_path / "out" / "config.json")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
@pytest.mark.parametrize("recipe", ["nvfp4", "bf16"])
def test_other_dtypes_are_rounded_to_bf16_first(tmp_path: Path, dtype: mx.Dtype, recipe: str) -> None:
    tensors = {**some_tensors(dtype), **vision_tensors(dtype)}
    source = make_source(tmp_path / "source", tensors=tensors)
    check_output(convert(str(source), tmp_path / "out", recipe), tensors)


def test_sources_in_shards_and_in_one_file_give_the_same_weights(tmp_path: Path) -> None:
    outputs = []
    for shards in (1, 2, 5):
        source = make_source(tmp_path / str(shards) / "source", shards=shards)
        outputs.append(digests(convert(str(source)).output))
    assert outputs[0] == outputs[1] == outputs[2]


def test_odd_offsets_can_be_read(tmp_path: Path) -> None:
    """An odd number of one-byte scales puts the next tensor at an odd offset."""
    config = flat_config(**SMALLEST, hidden_size=96, num_experts=3)
    tensors = random_tensors(config, mx.bfloat16)
    report = convert(str(make_source(tmp_path / "source", config, tensors)), None, "mxfp8")
    assert any(part.nbytes % 2 for target in report.plan.targets for part in target.parts)
    check_output(report, tensors)
    for name, tensor in safetensors.deserialize((report.output / "model.safetensors").read_bytes()):
        ours = stored(report.output)[name]
        raw = np.array(ours.view(mx.uint16) if ours.dtype == mx.bfloat16 else ours).tobytes()
        assert (tensor["shape"], bytes(tensor["data"])) == (list(ours.shape), raw), name
    assert np.isfinite(logits(load(report.output)[0])).all()


def test_both_layer_scalars_are_kept(tmp_path: Path, source: Path) -> None:
    convert(str(source), tmp_path / "out")
    model, _ = load(tmp_path / "out", mx.bfloat16)
    for i, layer in enumerate(model.layers):
        scalars = some_tensors()
        assert identical(layer.layer_scalar, scalars[f"model.decoder.layers.{i}.layer_scalar"])
        assert identical(layer.encoder_layer_scalar, scalars[f"model.encoder.language_model.layers.{i}.layer_scalar"])
        assert not mx.array_equal(layer.layer_scalar, layer.encoder_layer_scalar)


def test_tied_copies_are_dropped(tmp_path: Path) -> None:
    tensors = some_tensors()
    copies = {
        name.replace("model.decoder.", "model.encoder.language_model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.decoder.") and "layer_scalar" not in name and "self_conditioning" not in name
    }
    copies["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    report = convert(str(make_source(tmp_path / "source", tensors={**copies, **tensors})))
    check_output(report, tensors)
    assert report.plan.warnings == ()


def test_tied_copy_stands_in_for_a_tensor(tmp_path: Path) -> None:
    name = "model.decoder.layers.1.experts.down_proj"
    renamed = {n.replace("decoder", "encoder.language_model") if n == name else n: t for n, t in some_tensors().items()}
    check_output(convert(str(make_source(tmp_path / "source", tensors=renamed))), some_tensors())


UNKNOWN = ("step", "model.decoder.layers.0.self_attn.q_proj.bias", "model.decoder.layers.7.layer_scalar")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.int64, mx.bool_], ids=str)
def test_unknown_tensors_are_reported_and_left_out(tmp_path: Path, dtype: mx.Dtype) -> None:
    extended = {**some_tensors(), **dict.fromkeys(UNKNOWN, mx.ones((4, 4), dtype))}
    report = convert(str(make_source(tmp_path / "source", tensors=extended)))
    check_output(report, some_tensors())
    (warning,) = report.plan.warnings
    assert all(name in warning for name in UNKNOWN)
    assert report.data["warnings"] == [warning]


def test_source_with_unknown_tensors_can_be_compared_and_calibrated(tmp_path: Path) -> None:
    extended = {**some_tensors(vocab_size=768), **dict.fromkeys(UNKNOWN, mx.ones(1, mx.bfloat16))}
    source = make_source(tmp_path / "source", tensors=extended, tokenizer=True)
    texts = tmp_path / "texts"
    texts.write_text("sort 2 1\n")
    assert convert(str(source), None, "bf16", check=True).verification is not None
    convert(str(source), None, "mixed", target_bpw=5, calibration=texts)


TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.exists(), reason="threads of the system are counted on Linux")
def test_no_threads_are_left_behind(source: Path, tmp_path: Path) -> None:
    """MLX keeps a stream, with a thread of its own, for every Python thread that has used it."""

    def threads_after(name: str) -> int:
        plan = prepare(str(source), tmp_path / name, shard_bytes=50_000)
        assert len(plan.shards) > 5
        carry_out(plan)
        return len(list(TASKS.iterdir()))

    assert threads_after("one") == threads_after("two") == threads_after("three")


# Vision


@pytest.mark.parametrize("vision_config", ["absent", None, {"model_type": "gemma4_vision"}], ids=str)
def test_vision_tensors_are_copied(tmp_path: Path, vision_config: Any) -> None:
    config = {**flat_config(), "vision_config": vision_config}
    if vision_config == "absent":
        del config["vision_config"]
    tensors = {**some_tensors(), **vision_tensors()}
    report = convert(str(make_source(tmp_path / "source", config, tensors)))
    check_output(report, tensors)
    assert all(target.format is None for target in report.plan.targets if target.tensor_class == "vision")
    written = read(report.output / "config.json")
    assert written["vision_config"] == (None if vision_config == "absent" else vision_config)
    assert len(load(report.output)[1].vision) == len(vision_tensors())


@pytest.mark.parametrize("dtype", [mx.uint8, mx.uint32], ids=str)
def test_integers_of_the_vision_tower_stay_integers(tmp_path: Path, dtype: mx.Dtype) -> None:
    vision = vision_tensors()
    name = min(vision)
    vision[name] = (mx.arange(vision[name].size) % 255).astype(dtype).reshape(vision[name].shape)
    source = make_source(tmp_path / "source", flat_config(), {**some_tensors(), **vision})
    (found,) = (array for path, array in stored(convert(str(source)).output).items() if path.endswith(name))
    assert found.dtype == dtype and mx.array_equal(found, vision[name])


@pytest.mark.parametrize("recipe", ["q4", "bf16"])
def test_packed_vision_modules_are_copied(tmp_path: Path, recipe: str) -> None:
    path, packing = f"{TOWER}.self_attn.q_proj.linear", Format(5, 32)
    vision = vision_tensors()
    packed, scales, biases = packing.pack(vision.pop(f"{path}.weight"))
    parts = {f"{path}.weight": packed, f"{path}.scales": scales, f"{path}.biases": biases}
    entry = {"group_size": 64, "bits": 4, "mode": "affine", path: {"group_size": 32, "bits": 5}}
    config = {**flat_config(), "quantization": entry}
    source = make_source(tmp_path / "source", config, {**some_tensors(), **vision, **parts})
    output = convert(str(source), None, recipe).output
    kept = load(output)[1].vision
    assert kept.keys() == {*vision, *parts}
    for name, tensor in {**vision, **parts}.items():
        assert identical(kept[name], tensor), name
    quantization = read(output / "config.json")["quantization"]
    assert Format.from_config(quantization.get(path, quantization)) == packing


def test_bias_of_a_packed_vision_module_is_copied(tmp_path: Path) -> None:
    path, packing = "model.encoder.embed_vision.embedding_projection", Format(4)
    parts = packing.pack(vision_tensors()[f"{path}.weight"])
    vision = {path + part.suffix: array for part, array in zip(packing.parts((128, 64)), parts, strict=True)}
    vision[f"{path}.bias"] = mx.ones(128, mx.bfloat16)
    config = {**flat_config(), "quantization": packing.as_config()}
    source = make_source(tmp_path / "source", config, {**some_tensors(), **vision})
    kept = load(convert(str(source)).output)[1].vision
    assert kept.keys() == vision.keys()
    assert all(identical(kept[name], tensor) for name, tensor in vision.items())


def test_vision_bits_pack_the_matrices_whose_rows_divide_into_groups(tmp_path: Path) -> None:
    config = vision_config(intermediate_size=80)  # no multiple of 64, as the 4,304 of the published tower
    tower = tower_tensors(config)
    source = make_source(tmp_path / "source", config, {**some_tensors(), **tower})
    plain, small = convert(str(source), tmp_path / "plain"), convert(str(source), tmp_path / "small", vision_bits=8)
    kept = load(small.output)[1].vision
    packed = {name.removesuffix(".scales") for name in kept if name.endswith(".scales")}
    layer = "model.encoder.vision_tower.encoder.layers.0"
    assert f"{layer}.self_attn.q_proj.linear" in packed and f"{layer}.mlp.gate_proj.linear" in packed
    assert "model.encoder.vision_tower.patch_embedder.input_proj" in packed
    assert "model.encoder.embed_vision.embedding_projection" in packed
    assert f"{layer}.mlp.down_proj.linear" not in packed
    assert all(len(tower[f"{name}.weight"].shape) == 2 for name in packed)
    assert any("mlp.down_proj.linear.weight" in warning for warning in small.plan.warnings)
    assert small.plan.fingerprint() != plain.plan.fingerprint()
    picture = read_picture(saved(noise(60, 90)), VisionConfig(), 70, "noise")
    one, other = (
        load_tower(report.output, ModelConfig.load(report.output), mx.float32)(picture.patches(), picture.grid)
        for report in (plain, small)
    )
    assert 0 < float(mx.abs(one - other).mean()) < 0.05 * float(one.std())
    again = convert(str(small.output), tmp_path / "again", vision_bits=8).output
    assert all(identical(load(again)[1].vision[name], tensor) for name, tensor in kept.items())


def test_bits_of_a_tower_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    source = str(make_source(tmp_path / "source"))
    with pytest.raises(DgemmaError, match=r"the vision tower cannot have 4 bits"):
        convert(source, vision_bits=4)
    with pytest.raises(DgemmaError, match=r"source has no vision tower to pack"):
        convert(source, vision_bits=8)


def test_the_file_of_optiq_becomes_part_of_the_shards(tmp_path: Path) -> None:
    config = vision_config()
    source = make_source(tmp_path / "source", config)
    tower = {name: tensor.astype(mx.bfloat16) for name, tensor in tower_tensors(config).items()}
    (source / VISION_FILE).parent.mkdir()
    mx.save_safetensors(str(source / VISION_FILE), {name.split(".", 2)[2]: value for name, value in tower.items()})
    kept = load(convert(str(source)).output)[1].vision
    assert kept.keys() == tower.keys()
    assert all(identical(kept[name], tensor) for name, tensor in tower.items())


# Sources that are conversions themselves


@pytest.fixture(scope="module")
def packed_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    return convert(str(make_source(folder / "source")), folder / "q4").output


def test_packed_source_unpacked(tmp_path: Path, packed_source: Path) -> None:
    report = convert(str(packed_source), tmp_path / "out", "bf16")
    found, parts = stored(report.output), stored(packed_source)
    packed = [name.removesuffix(".scales") for name in parts if name.endswith(".scales")]
    expected = {name: array for name, array in parts.items() if not name.endswith((".scales", ".biases"))}
    for name in packed:
        bits = 4 if "experts" in name or "self_conditioning" in name else 8
        arrays = [parts[name + suffix] for suffix in (".weight", ".scales", ".biases")]
        expected[f"{name}.weight"] = unpacked(arrays, Format(bits))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert identical(found[name], array), name
    assert "quantization" not in read(report.output / "config.json")
    (warning,) = report.plan.warnings
    assert "already packed" in warning
    load(report.output)


def test_packed_source_in_its_own_format_is_copied(tmp_path: Path, packed_source: Path) -> None:
    output = convert(str(packed_source), tmp_path / "out", "q4").output
    ours, theirs = digests(output), digests(packed_source)
    for name in ("model.safetensors", "config.json", INDEX):
        assert ours[name] == theirs[name]


def test_packed_source_packed_again(tmp_path: Path, packed_source: Path) -> None:
    report = convert(str(packed_source), tmp_path / "out", "q8")
    before, after = stored(packed_source), stored(report.output)
    name = "model.decoder.layers.0.experts.gate_up_proj"
    values = unpacked([before[name + suffix] for suffix in (".weight", ".scales", ".biases")], Format(4))
    for suffix, array in zip((".weight", ".scales", ".biases"), mx.quantize(values, 64, 8), strict=True):
        assert identical(after[name + suffix], array)
    for name in ("model.decoder.embed_tokens.weight", "model.decoder.layers.1.self_attn.q_proj.scales"):
        assert identical(after[name], before[name])  # 8-bit before and after
    (warning,) = report.plan.warnings
    assert "rounded a second time" in warning and warning in report.data["warnings"]


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("recipe", ["q4-small", "bf16"])
def test_packed_source_with_other_scales(tmp_path: Path, dtype: mx.Dtype, recipe: str) -> None:
    """Conversions of float16 and float32 checkpoints have scales and biases of that dtype."""
    entry = Format(4).as_config()
    packed, whole = quantized(some_tensors(dtype), lambda path: entry)
    source = make_source(tmp_path / "source", {**flat_config(), "quantization": entry}, packed)
    report = convert(str(source), None, recipe)
    load(report.output)
    found = stored(report.output)
    for target in report.plan.targets:
        name, packing = target.weight.name, target.format
        values = found.get(f"{name}.weight", found.get(name))
        if packing is not None:
            arrays = [found[name + part.suffix].astype(mx.float32) for part in packing.parts(target.weight.shape)[1:]]
            values = mx.dequantize(values, *arrays, group_size=packing.group_size, bits=packing.bits)
        expected = whole.get(f"{name}.weight", whole.get(name))
        assert values is not None and expected is not None
        wrong = mx.abs(values.astype(mx.float32) - expected).max()
        assert wrong <= 0.02 * mx.abs(expected).max(), name  # bfloat16 has 8 bits
