"""Tests of the vision tower's configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.vision_config import VisionConfig
from dgemma_mlx.errors import DgemmaError
from tests.model.checkpoint import flat_config
from tests.model.odd_values import ODD_VALUES, changed, places

PUBLISHED: dict[str, Any] = {
    "model_type": "gemma4_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72, "standardize": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
}  # fmt: skip
PROCESSOR: dict[str, Any] = {
    "do_resize": True, "do_rescale": True, "do_normalize": False, "resample": 3, "rescale_factor": 1 / 255,
    "patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": 280, "image_mean": [0.0, 0.0, 0.0],
}  # fmt: skip


def read(vision: Any = PUBLISHED, processor: Any = PROCESSOR, **config: Any) -> VisionConfig:
    found = VisionConfig.read({"vision_config": vision, **config}, {"image_processor": processor})
    assert found is not None
    return found


def test_the_published_values() -> None:
    assert read() == VisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, head_dim=72,
        standardize=True,
    )
    assert read({**PUBLISHED, "rope_parameters": {"rope_type": "axial", "rope_theta": 50}}).rope_theta == 50.0


def test_the_budget_is_the_processors_then_the_checkpoints_then_280() -> None:
    assert read(processor={**PROCESSOR, "max_soft_tokens": 560}, vision_soft_tokens_per_image=70).default_budget == 560
    assert read(processor={}, vision_soft_tokens_per_image=70).default_budget == 70
    assert read(processor=None).default_budget == 280


@pytest.mark.parametrize(
    ("vision", "processor", "problem"),
    [
        ({"rope_parameters": {"rope_type": "linear"}}, {}, "unsupported rope_type 'linear'"),
        ({"hidden_activation": "relu"}, {}, "unsupported hidden_activation 'relu'"),
        ({"attention_bias": True}, {}, "attention_bias is not supported"),
        ({"num_key_value_heads": 4}, {}, "unsupported num_key_value_heads 4"),
        ({"head_dim": 30}, {}, "the head dimension is not a multiple of 4: 30"),
        ({"standardize": "yes"}, {}, "standardize must be true or false, not 'yes'"),
        ({}, {"do_normalize": True}, "processor_config.json: unsupported do_normalize True"),
        ({}, {"do_resize": False}, "processor_config.json: unsupported do_resize False"),
        ({}, {"do_rescale": False}, "processor_config.json: unsupported do_rescale False"),
        ({}, {"resample": 2}, "processor_config.json: unsupported resample 2"),
        ({}, {"rescale_factor": 1.0}, "processor_config.json: unsupported rescale_factor 1.0"),
        ({}, {"patch_size": 14}, "processor_config.json: patch_size is 14, but config.json says 16"),
        ({}, {"max_soft_tokens": 256}, "unsupported number of soft tokens per picture: 256"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_reported_when_the_tower_is_used(
    vision: dict[str, Any], processor: dict[str, Any], problem: str
) -> None:
    config = read({**PUBLISHED, **vision}, {**PROCESSOR, **processor})
    assert config.problem == problem
    with pytest.raises(DgemmaError, match="the checkpoint's pictures are not supported: "):
        config.require_supported()


def test_any_odd_value_is_read_or_becomes_the_problem() -> None:
    document = {"vision_config": PUBLISHED, "image_processor": PROCESSOR}
    for path in places(document):
        for value in ODD_VALUES:
            odd = changed(document, path, value)
            try:
                found = VisionConfig.read(odd, odd)
            except DgemmaError as error:
                assert "vision_config must be an object" in error.message
            else:
                assert found is None or isinstance(found.problem, str | None)


def test_a_damaged_processor_config_leaves_text_readable(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**flat_config(), "vision_config": PUBLISHED}))
    assert ModelConfig.load(tmp_path).vision == read()
    processor = tmp_path / "processor_config.json"
    processor.write_text(json.dumps({"image_processor": {**PROCESSOR, "max_soft_tokens": 70}}))
    assert ModelConfig.load(tmp_path).vision == read(vision_soft_tokens_per_image=70, processor=None)
    processor.write_text("{")
    config = ModelConfig.load(tmp_path)
    assert config.text.vocab_size == 96
    assert config.vision is not None
    assert config.vision.problem is not None and str(processor) in config.vision.problem


def test_the_ids_around_an_image() -> None:
    def ids(config: ModelConfig) -> tuple[int | None, ...]:
        return config.image_token_id, config.boi_token_id, config.eoi_token_id

    large = flat_config(vocab_size=262_144)
    del large["image_token_id"]
    assert ids(ModelConfig.from_dict(large)) == (258_880, 255_999, 258_882)
    assert ids(ModelConfig.from_dict({**large, "boi_token_id": None, "eoi_token_id": 7})) == (258_880, None, 7)
    assert ids(ModelConfig.from_dict(flat_config())) == (90, None, None)
