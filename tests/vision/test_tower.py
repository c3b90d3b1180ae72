"""Tests of the vision tower and of its loading.

``tests/oracle/test_vision_oracle.py`` compares it with transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.vision_config import VISION_FILE, VisionConfig
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.vision.load import load_tower
from dgemma_mlx.vision.pixels import read_picture
from dgemma_mlx.vision.tower import VisionTower, angles, turn
from tests.model.checkpoint import Tensors, flat_config, write_checkpoint
from tests.model.odd_values import one_line
from tests.vision.towers import noise, saved, tower_tensors, vision_config, write_tower

PACKED = {"group_size": 32, "bits": 8, "mode": "affine"}


def features(tower: VisionTower, config: ModelConfig) -> mx.array:
    assert config.vision is not None
    picture = read_picture(saved(noise(60, 90)), config.vision, 70, "noise")
    return tower(picture.patches(), picture.grid)


def failure(folder: Path, config: ModelConfig) -> str:
    with pytest.raises(DgemmaError) as error:
        load_tower(folder, config, mx.float32)
    assert one_line(error.value)
    assert error.value.hint
    return error.value.message


def packed(tensors: Tensors) -> Tensors:
    """Pack every matrix whose width the group size divides, except the table of positions."""
    result: Tensors = {}
    for name, value in tensors.items():
        if value.ndim == 2 and value.shape[-1] % 32 == 0:
            stem = name.removesuffix(".weight")
            result[name], result[f"{stem}.scales"], result[f"{stem}.biases"] = mx.quantize(value, 32, 8)
        else:
            result[name] = value
    return result


def test_soft_tokens_have_the_text_networks_width(tmp_path: Path) -> None:
    config = write_tower(tmp_path, vision_config())
    tokens = features(load_tower(tmp_path, config, mx.float32), config)
    assert tokens.shape == (60, config.text.hidden_size)
    assert tokens.dtype == mx.float32


@pytest.mark.parametrize("change", [{}, {"use_clipped_linears": True}], ids=str)
def test_bfloat16_and_packed_weights_are_near_float32(tmp_path: Path, change: dict[str, Any]) -> None:
    config = vision_config(**change)
    tensors = tower_tensors(config)
    plain = write_tower(tmp_path / "plain", config, tensors)
    expected = features(load_tower(tmp_path / "plain", plain, mx.float32), plain)
    half = features(load_tower(tmp_path / "plain", plain, mx.bfloat16), plain)
    assert half.dtype == mx.bfloat16
    small = write_tower(tmp_path / "packed", {**config, "quantization": PACKED}, packed(tensors))
    tower = load_tower(tmp_path / "packed", small, mx.float32)
    assert tower.encoder.layers[0].mlp.down_proj.linear.bits == 8
    spread = float(expected.std())
    for other in (half.astype(mx.float32), features(tower, small)):
        assert float(mx.abs(other - expected).mean()) < 0.05 * spread


def test_a_module_is_packed_as_its_scales_say(tmp_path: Path) -> None:
    tensors = tower_tensors(vision_config())
    name = "model.encoder.vision_tower.encoder.layers.0.mlp.down_proj.linear"
    values = mx.quantize(tensors[f"{name}.weight"], 32, 4)
    tensors |= dict(zip((f"{name}.weight", f"{name}.scales", f"{name}.biases"), values, strict=True))
    own = {name: {"group_size": 32, "bits": 4, "mode": "affine"}}
    config = write_tower(tmp_path, {**vision_config(), "quantization": {**PACKED, **own}}, tensors)
    layers = load_tower(tmp_path, config, mx.float32).encoder.layers
    assert layers[0].mlp.down_proj.linear.bits == 4
    assert "scales" not in layers[1].mlp.down_proj.linear


def test_a_tower_of_a_float16_network_is_float32(tmp_path: Path) -> None:
    config = write_tower(tmp_path, vision_config())
    assert features(load_tower(tmp_path, config, mx.float16), config).dtype == mx.float32


def test_limits_without_clipped_linears_are_ignored(tmp_path: Path) -> None:
    tensors = tower_tensors(vision_config(use_clipped_linears=True))
    config = write_tower(tmp_path, vision_config(), tensors)
    load_tower(tmp_path, config, mx.float32)


@pytest.mark.parametrize("prefix", ["", "model.encoder."])
def test_the_file_of_optiq(tmp_path: Path, prefix: str) -> None:
    tensors = tower_tensors(vision_config())
    expected_config = write_tower(tmp_path / "one", vision_config(), tensors)
    expected = features(load_tower(tmp_path / "one", expected_config, mx.float32), expected_config)
    own = {name: tensor for name, tensor in tensors.items() if "embed_vision" in name}
    config = write_tower(tmp_path / "two", vision_config(), own)
    (tmp_path / "two" / VISION_FILE).parent.mkdir()
    others = {name.replace("model.encoder.", prefix): value for name, value in tensors.items() if name not in own}
    mx.save_safetensors(str(tmp_path / "two" / VISION_FILE), others)
    assert mx.array_equal(features(load_tower(tmp_path / "two", config, mx.float32), config), expected)


def test_checkpoints_that_do_not_match_are_refused(tmp_path: Path) -> None:
    config = vision_config()
    tensors = tower_tensors(config)
    norm = "model.encoder.vision_tower.encoder.layers.1.self_attn.q_norm.weight"

    def message(change: Tensors) -> str:
        parsed = write_tower(tmp_path, config, {**tensors, **change})
        return failure(tmp_path, parsed)

    assert message({norm: mx.ones((5,))}) == f"{norm} has shape (5,), but config.json asks for (32,)"
    assert message({norm: mx.ones((32,), mx.int32)}) == f"{norm} has dtype mlx.core.int32, not mlx.core.float32"
    assert message({f"{norm}.x": mx.ones((5,))}) == f"the checkpoint has unknown tensors: {norm}.x"
    assert failure(tmp_path, write_tower(tmp_path, config, {"model.decoder.norm.weight": mx.ones(3)})) == (
        f"{tmp_path} reads no images: the checkpoint has no vision tower"
    )
    less = {name: tensor for name, tensor in tensors.items() if name != norm}
    assert failure(tmp_path, write_tower(tmp_path, config, less)) == f"the checkpoint lacks {norm}"
    write_checkpoint(tmp_path, flat_config(), tensors)
    assert "no vision tower" in failure(tmp_path, ModelConfig.load(tmp_path))


def test_an_unsupported_tower_is_refused_when_it_is_used(tmp_path: Path) -> None:
    config = write_tower(tmp_path, vision_config(hidden_activation="relu"), tower_tensors(vision_config()))
    assert failure(tmp_path, config) == (
        "the checkpoint's pictures are not supported: unsupported hidden_activation 'relu'"
    )


def test_heads_of_72_reach_the_fused_attention_without_mask_and_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    attention = mx.fast.scaled_dot_product_attention

    def counted(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None) -> mx.array:
        calls.append((q.shape, k.shape, v.shape, scale, mask))
        return attention(q, k, v, scale=scale, mask=mask)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    config = VisionConfig(hidden_size=1152, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16,
                          head_dim=72, position_embedding_size=64)  # fmt: skip
    tower = VisionTower(config, 32)
    tower(np.zeros((6 * 9, 768), np.float32), (6, 9))
    heads = (1, 16, 54, 72)
    assert calls == [(heads, heads, heads, 1.0, None)] * 2


def test_the_two_halves_of_a_head_turn_by_column_and_row() -> None:
    config = VisionConfig(head_dim=8)
    cos, sin = angles((2, 3), config)
    heads = mx.ones((6, 1, 8))
    turned = np.array(turn(heads, cos, sin))[:, 0]
    for patch in range(6):
        row, column = divmod(patch, 3)
        for half, position in ((0, column), (1, row)):
            for pair in range(2):
                angle = position * 100.0 ** (-pair / 2)
                first, second = turned[patch, 4 * half + pair], turned[patch, 4 * half + pair + 2]
                assert first == pytest.approx(np.cos(angle) - np.sin(angle), abs=1e-6)
                assert second == pytest.approx(np.cos(angle) + np.sin(angle), abs=1e-6)
