"""Merging: a fused checkpoint computes what base and adapter compute, up to the rounding of the stored weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.shards import open_tensors
from dgemma_mlx.checkpoint.vision_config import VISION_FILE
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.adapter import GROUPS, AdapterConfig, adapted_modules, attach, merged, plain_weight
from dgemma_mlx.model.adapter_file import load_adapter, save_adapter
from dgemma_mlx.train.fuse import fuse
from dgemma_mlx.vision.load import load_tower
from tests.model.checkpoint import Tensors, flat_config, load, logits, quantized, random_tensors, write_checkpoint
from tests.vision.towers import tower_tensors, vision_config

FOUR = {"group_size": 64, "bits": 4, "mode": "affine"}
EIGHT = {"group_size": 64, "bits": 8, "mode": "affine"}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}


def base(folder: Path, dtype: mx.Dtype = mx.float32, choose: Callable[[str], Any] | None = None, **config: Any) -> Path:
    tensors: Tensors = random_tensors(flat_config(), dtype)
    if choose is not None:
        tensors, _ = quantized(tensors, choose)
    return write_checkpoint(folder, {**flat_config(), **config}, tensors, shards=3)


def adapter_for(folder: Path, out: Path, *, dora: bool = False, strength: float = 0.05) -> Path:
    config = AdapterConfig(4, 8.0, targets=tuple(GROUPS), dora=dora, canvas_length=24)
    model, _ = load(folder)
    attach(model, config)
    mx.random.seed(3)
    for module in adapted_modules(model).values():
        module.lora_b = strength * mx.random.normal(module.lora_b.shape)
    save_adapter(model, config, out, "some/model")
    return out


def adapted_logits(folder: Path, adapter: Path) -> Any:
    model, _ = load(folder)
    load_adapter(model, adapter)
    return logits(model)


@pytest.mark.parametrize("dora", [False, True])
def test_plain_weights_are_merged_to_the_last_digits(tmp_path: Path, dora: bool) -> None:
    folder = base(tmp_path / "base")
    adapter = adapter_for(folder, tmp_path / "adapter", dora=dora)
    fuse(str(folder), adapter, tmp_path / "fused")
    expected, plain = adapted_logits(folder, adapter), logits(load(folder)[0])
    np.testing.assert_allclose(logits(load(tmp_path / "fused")[0]), expected, atol=2e-4)
    assert np.abs(expected - plain).max() > 0.1
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["canvas_length"] == 24


def test_bfloat16_weights_change_by_rounding_alone(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", mx.bfloat16)
    adapter = adapter_for(folder, tmp_path / "adapter")
    fuse(str(folder), adapter, tmp_path / "fused")
    stored = open_tensors(tmp_path / "fused")
    assert {tensor.dtype for tensor in stored.values()} == {mx.bfloat16}
    expected, plain = adapted_logits(folder, adapter), logits(load(folder)[0])
    assert np.abs(logits(load(tmp_path / "fused")[0]) - expected).mean() < 0.2 * np.abs(expected - plain).mean()
    model, _ = load(folder)
    load_adapter(model, adapter)
    fused = dict(load(tmp_path / "fused")[0].named_modules())
    for path, module in adapted_modules(model).items():
        wanted = merged(module.linear.weight, module.lora_a, module.lora_b, 2.0)
        bound = mx.abs(wanted) * 2**-8 + 1e-30  # half of the last of bfloat16's eight binary digits
        assert (mx.abs(fused[path].weight - wanted) <= bound).all().item(), path


def mixed(path: str) -> Any:
    return None if "router" in path or "layers.0.mlp" in path else EIGHT if "attn" in path or "embed" in path else FOUR


def test_packed_weights_are_packed_again_as_they_were(tmp_path: Path) -> None:
    overrides = {name: mixed(name) or False for name in (
        f"model.decoder.layers.{i}.{part}" for i in range(3) for part in (
            "router.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj",
            "self_attn.v_proj", "self_attn.o_proj",
        )
    )}  # fmt: skip
    quantization = {**FOUR, "model.decoder.embed_tokens": EIGHT, **{
        name: entry for name, entry in overrides.items() if entry in (EIGHT, False)
    }}  # fmt: skip
    folder = base(tmp_path / "base", choose=mixed, quantization=quantization)
    adapter = adapter_for(folder, tmp_path / "adapter")
    fuse(str(folder), adapter, tmp_path / "fused")
    before, after = open_tensors(folder), open_tensors(tmp_path / "fused")
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {
        name: (t.shape, t.dtype) for name, t in after.items()
    }
    # Weights without an adapter are identical; the others are within one quantization step.
    untouched = "model.decoder.embed_tokens.weight"
    assert mx.array_equal(before[untouched], after[untouched]).item()
    fused, _ = load(tmp_path / "fused")
    model, _ = load(folder)
    load_adapter(model, adapter)
    for path, module in adapted_modules(model).items():
        own: Any = dict(fused.named_modules())[path]
        if "scales" not in own:
            continue
        wanted = merged(plain_weight(module.linear), module.lora_a, module.lora_b, 2.0)
        steps = mx.abs(mx.repeat(own.scales.astype(mx.float32), own.group_size, axis=-1))
        errors = mx.abs(plain_weight(own) - wanted) / steps  # may exceed a step: MLX keeps the ends of a group exact
        assert errors.max().item() < 1.02 and errors.mean().item() < 0.3, path


@pytest.mark.parametrize("scheme", [FOUR, EIGHT, MXFP8])
def test_dequantized_output_computes_what_base_and_adapter_compute(tmp_path: Path, scheme: dict[str, Any]) -> None:
    folder = base(tmp_path / "base", choose=lambda path: None if "router" in path else scheme, quantization=scheme)
    adapter = adapter_for(folder, tmp_path / "adapter")
    fuse(str(folder), adapter, tmp_path / "fused", dequantize=True)
    raw = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert "quantization" not in raw
    expected, plain = adapted_logits(folder, adapter), logits(load(folder)[0])
    assert np.abs(logits(load(tmp_path / "fused")[0]) - expected).mean() < 0.2 * np.abs(expected - plain).mean()


@pytest.mark.parametrize("dequantize", [False, True])
def test_the_vision_tower_stays_readable(tmp_path: Path, dequantize: bool) -> None:
    config = vision_config()
    tower = tower_tensors(config)
    module = "model.encoder.embed_vision.embedding_projection"
    names = [f"{module}.{part}" for part in ("weight", "scales", "biases")]
    projection = dict(zip(names, mx.quantize(tower.pop(names[0]), **EIGHT), strict=True))
    written = {**config, "quantization": {**FOUR, module: EIGHT}}
    folder = write_checkpoint(tmp_path / "base", written, {**random_tensors(flat_config()), **projection})
    (folder / VISION_FILE).parent.mkdir()
    mx.save_safetensors(str(folder / VISION_FILE), tower)
    fuse(str(folder), adapter_for(folder, tmp_path / "adapter"), tmp_path / "fused", dequantize=dequantize)
    before, after = (
        load_tower(place, ModelConfig.load(place), mx.float32) for place in (folder, tmp_path / "fused")
    )
    assert ("scales" in after.embedding_projection) is not dequantize
    patches = np.random.default_rng(0).random((54, 768), np.float32)
    np.testing.assert_allclose(after(patches, (6, 9)), before(patches, (6, 9)), atol=0.03 if dequantize else 0)


def test_a_failed_merge_leaves_no_files(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    adapter = adapter_for(folder, tmp_path / "adapter")
    tensors: Any = mx.load(str(adapter / "adapter_model.safetensors"))
    last = max(name for name in tensors if "encoder" not in name and name.endswith("lora_A.weight"))
    mx.save_safetensors(
        str(adapter / "adapter_model.safetensors"),
        {name: tensor for name, tensor in tensors.items() if "encoder" not in name} | {last: tensors[last][:, :-1]},
    )
    with pytest.raises(DgemmaError, match="does not fit a matrix"):
        fuse(str(folder), adapter, tmp_path / "fused")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    other = write_checkpoint(tmp_path / "other", flat_config(num_hidden_layers=2, layer_types=["full_attention"] * 2), {
        name: tensor for name, tensor in random_tensors(flat_config()).items() if ".layers.0." not in name
    })  # fmt: skip
    with pytest.raises(DgemmaError, match="does not have"):
        fuse(str(other), adapter, tmp_path / "fused")


def test_force_replaces_an_output(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    adapter, output = adapter_for(folder, tmp_path / "adapter"), tmp_path / "fused"
    output.mkdir()
    fuse(str(folder), adapter, output, force=True)  # an empty folder may be replaced
    before = output.stat().st_ino
    with pytest.raises(DgemmaError, match="exists"):
        fuse(str(folder), adapter, output)
    (tmp_path / "link").symlink_to(output)
    (output / ".DS_Store").touch()
    fuse(str(folder), adapter, tmp_path / "link", force=True)
    assert output.stat().st_ino != before and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "fused", "link"]


@pytest.mark.parametrize("place", ["papers", "base", "adapter", ".", "base/inside", "adapter/x", "papers/../base"])
def test_force_never_replaces_what_fuse_has_not_written(tmp_path: Path, place: str) -> None:
    folder = base(tmp_path / "all" / "base")
    adapter = adapter_for(folder, tmp_path / "all" / "adapter")
    (tmp_path / "all" / "papers").mkdir()
    (tmp_path / "all" / "papers" / "thesis.tex").write_text("ten years")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DgemmaError) as caught:
        fuse(str(folder), adapter, tmp_path / "all" / place, force=True)
    assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_appears_during_the_merge_is_kept(tmp_path: Path, force: bool) -> None:
    folder = base(tmp_path / "base")
    adapter, output = adapter_for(folder, tmp_path / "adapter"), tmp_path / "fused"

    def meanwhile(done: int, total: int) -> None:
        output.mkdir(exist_ok=True)
        (output / "notes.md").write_text("mine")

    with pytest.raises(DgemmaError, match="is not replaced"):
        fuse(str(folder), adapter, output, force=force, progress=meanwhile)
    assert (output / "notes.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "fused"]


def test_a_fused_folder_with_a_file_of_the_user_is_kept(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    adapter, output = adapter_for(folder, tmp_path / "adapter"), tmp_path / "fused"
    fuse(str(folder), adapter, output)
    (output / "notes.md").write_text("mine")
    with pytest.raises(DgemmaError, match=r"has not written notes\.md"):
        fuse(str(folder), adapter, output, force=True)
    assert (output / "notes.md").read_text() == "mine"
