"""Tests of reading config.json and generation_config.json: layouts, absent keys, and invalid values in any place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.checkpoint.config import FULL, SLIDING, GenerationConfig, ModelConfig, TextConfig
from dgemma_mlx.checkpoint.vision_config import VisionConfig
from dgemma_mlx.errors import DgemmaError
from tests.model.checkpoint import flat_config, layered_config
from tests.model.odd_values import ABSENT, ODD_VALUES, changed, one_line, places, reported

QUANTIZATION = {
    "group_size": 64, "bits": 4, "mode": "affine", "model.decoder.embed_tokens": {"group_size": 64, "bits": 8}
}


def generation(folder: Path, content: Any, config: ModelConfig | None = None) -> GenerationConfig:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return GenerationConfig.load(folder, config or ModelConfig.from_dict(flat_config()))


def test_both_layouts_give_the_same_configuration() -> None:
    assert ModelConfig.from_dict(flat_config()) == ModelConfig.from_dict(layered_config())


def test_values_are_those_of_the_file() -> None:
    config = ModelConfig.from_dict(flat_config(final_logit_softcapping=20, rms_norm_eps=1e-5))
    text = config.text
    assert (text.vocab_size, text.hidden_size, text.num_hidden_layers) == (96, 128, 3)
    assert (text.layer_head_dim(SLIDING), text.layer_head_dim(FULL)) == (32, 64)
    assert (text.kv_heads(SLIDING), text.kv_heads(FULL)) == (2, 1)
    assert (text.final_logit_softcapping, text.rms_norm_eps) == (20, 1e-5)
    assert (config.canvas_length, config.image_token_id, config.eos_token_ids) == (16, 90, (1, 50))


def test_absent_keys_take_the_default_of_the_reference() -> None:
    experts = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
    raw = {"model_type": "diffusion_gemma", "text_config": experts}
    config = ModelConfig.from_dict(raw)
    assert config == ModelConfig.from_dict({**raw, "text_config": {**experts, "head_dim": None}})
    assert config.text.layer_types == (*[SLIDING] * 5, FULL) * 5
    assert (config.text.hidden_size, config.text.layer_head_dim(FULL), config.text.kv_heads(FULL)) == (2304, 512, 4)
    assert (config.canvas_length, config.pad_token_id, config.bos_token_id, config.eos_token_ids) == (256, 0, 2, (1,))


def test_full_layers_have_the_sliding_layers_kv_heads_by_default() -> None:
    assert TextConfig.from_dict(flat_config(num_global_key_value_heads=None)["text_config"]).kv_heads(FULL) == 2


def test_an_empty_per_layer_config_makes_all_layers_alike() -> None:
    raw = layered_config()  # save_pretrained writes this when both head sizes are the same
    raw["text_config"]["per_layer_config"] = {}
    text = ModelConfig.from_dict(raw).text
    assert (text.layer_head_dim(FULL), text.kv_heads(FULL)) == (32, 2)


@pytest.mark.parametrize("width", [1, 2, 4])  # transformers 5.23 writes "5", transformers 5.24 writes "05"
def test_layer_numbers_of_per_layer_config_may_have_leading_zeros(width: int) -> None:
    types = [FULL if i in (5, 11) else SLIDING for i in range(12)]
    changes = {f"{i:0{width}d}": {"head_dim": 64, "num_key_value_heads": 1} for i in (5, 11)}
    raw = flat_config(num_hidden_layers=12, layer_types=types, per_layer_config=changes)
    text = ModelConfig.from_dict(raw).text
    assert (text.layer_head_dim(FULL), text.kv_heads(FULL)) == (64, 1)
    assert (text.layer_head_dim(SLIDING), text.kv_heads(SLIDING)) == (32, 2)


def test_the_last_layer_is_always_a_full_one() -> None:
    config = TextConfig.from_dict(flat_config(layer_types=[FULL, SLIDING, SLIDING])["text_config"])
    assert config.layer_types == (FULL, SLIDING, FULL)


@pytest.mark.parametrize("vision", [ABSENT, None, {}])
def test_text_only_checkpoint(vision: Any) -> None:
    assert ModelConfig.from_dict(changed(flat_config(), ("vision_config",), vision)).vision is None


def test_vision_config_takes_the_defaults_of_transformers() -> None:
    vision = {"model_type": "gemma4_vision", "hidden_size": 8}
    assert ModelConfig.from_dict({**flat_config(), "vision_config": vision}).vision == VisionConfig(hidden_size=8)


@pytest.mark.parametrize("name", ["quantization", "quantization_config"])
def test_quantization_under_either_name(name: str) -> None:
    assert ModelConfig.from_dict({**flat_config(), name: QUANTIZATION}).quantization == QUANTIZATION


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"num_experts": None}, "text_config has no 'num_experts'"),
        ({"hidden_size": "128"}, "hidden_size must be a positive integer, not '128'"),
        ({"hidden_size": -128}, "hidden_size must be a positive integer, not -128"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, not True"),
        ({"intermediate_size": 128.0}, "intermediate_size must be a positive integer, not 128.0"),
        ({"moe_intermediate_size": 2**40}, "moe_intermediate_size must be a positive integer, not 1099511627776"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a positive integer, not 1000000000"),
        ({"num_hidden_layers": 2000}, "num_hidden_layers is 2000, more than 1024"),
        ({"num_attention_heads": 2**23}, "8388608 heads of 64 are too many"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number from 1e-12 to 0.01, not 0"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping must be a number from 0.1 to 10000, not"),
        ({"rms_norm_eps": 1}, "rms_norm_eps must be a number from 1e-12 to 0.01, not 1"),
        ({"final_logit_softcapping": 10**19}, "final_logit_softcapping must be a number from 0.1 to 10000, not 1"),
        ({"num_attention_heads": 3}, "3 query heads are not a multiple of 2 key/value heads"),
        ({"global_head_dim": 63}, "the head dimension of full_attention is odd: 63"),
        ({"top_k_experts": 5}, "top_k_experts is larger than num_experts"),
        ({"layer_types": [FULL]}, "1 layer_types for 3 layers"),
        ({"layer_types": []}, "0 layer_types for 3 layers"),
        ({"layer_types": [FULL, "linear_attention", FULL]}, "layer_types must be a list of 'full_attention' and"),
        ({"layer_types": FULL}, "layer_types must be a list of 'full_attention' and"),
        ({"rope_parameters": {FULL: {"rope_theta": 1.0}}}, "rope_parameters of sliding_attention are missing"),
        ({"rope_parameters": {FULL: {"rope_theta": 1.0}, SLIDING: 3}}, "rope_parameters of sliding_attention are"),
        ({"rope_parameters": {FULL: {}}}, "rope_parameters of full_attention: rope_theta must be a number"),
        ({"per_layer_config": []}, "per_layer_config must be an object of objects"),
        ({"per_layer_config": {"2": 64}}, "per_layer_config must be an object of objects"),
        ({"per_layer_config": {"3": {"head_dim": 64}}}, "per_layer_config has unknown layers"),
        ({"per_layer_config": {"²": {"head_dim": 64}}}, "per_layer_config has unknown layers"),
        ({"per_layer_config": {"-1": {"head_dim": 64}}}, "per_layer_config has unknown layers"),
        ({"per_layer_config": {"1000000000002": {"head_dim": 64}}}, "per_layer_config has unknown layers"),
        ({"per_layer_config": {"9" * 5000: {"head_dim": 64}}}, "per_layer_config has unknown layers"),
        ({"per_layer_config": {"": {"head_dim": 64}}}, "per_layer_config has unknown layers"),
        ({"per_layer_config": {"2": {"head_dim": 64}, "02": {}}}, "per_layer_config names layer 2 twice"),
        ({"per_layer_config": {"2": {"sliding_window": 4}}}, "per_layer_config changes more than head_dim, num_key"),
        ({"per_layer_config": {"1": {"head_dim": 64}}}, "per_layer_config: layer 1 differs"),
        ({"per_layer_config": {"2": {"head_dim": "64"}}}, "global_head_dim must be a positive integer, not '64'"),
        ({"hidden_activation": "silu"}, "unsupported hidden_activation 'silu'"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"use_bidirectional_attention": "all"}, "unsupported use_bidirectional_attention 'all'"),
        ({"tie_word_embeddings": False}, "untied word embeddings are not supported"),
        ({"pad_token_id": 96}, "pad_token_id 96 is not in the vocabulary"),
    ],
)  # fmt: skip
def test_message_names_the_value(tmp_path: Path, text: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(flat_config(**text)))
    with pytest.raises(DgemmaError) as error:
        ModelConfig.load(tmp_path)
    assert error.value.message.startswith(f"{tmp_path / 'config.json'}: {message}")
    assert one_line(error.value)


@pytest.mark.parametrize("rope", [
    {"rope_type": "yarn"}, {"rope_type": []}, {"rope_theta": 0}, {"rope_theta": "1e6"}, {"factor": 2.0},
    {"partial_rotary_factor": 1.5}, {"partial_rotary_factor": None},
])  # fmt: skip
def test_rope_that_is_not_supported(rope: dict[str, Any]) -> None:
    raw = flat_config()
    raw["text_config"]["rope_parameters"][FULL].update(rope)
    with pytest.raises(DgemmaError, match="rope_parameters of full_attention"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma4"}, "model_type is 'gemma4', not 'diffusion_gemma'"),
        ({"model_type": None}, "model_type is None, not 'diffusion_gemma'"),
        ({"text_config": None}, "text_config is missing or not an object"),
        ({"text_config": []}, "text_config is missing or not an object"),
        ({"canvas_length": True}, "canvas_length must be a positive integer, not True"),
        ({"image_token_id": "90"}, "image_token_id must be a token id, not '90'"),
        ({"eos_token_id": [1, "50"]}, "eos_token_id must be a token id, not '50'"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id, not -1"),
        ({"tie_word_embeddings": False}, "untied word embeddings are not supported"),
        ({"quantization": [4, 64]}, "quantization must be an object, not [4, 64]"),
        ({"vision_config": "none"}, "vision_config must be an object, not 'none'"),
    ],
)
def test_message_names_the_outer_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DgemmaError) as error:
        ModelConfig.from_dict({**flat_config(), **change})
    assert error.value.message == message
    assert one_line(error.value)


@pytest.mark.parametrize(
    "document", [{**flat_config(), "quantization": QUANTIZATION}, layered_config()], ids=["flat", "layered"]
)
def test_any_odd_value_anywhere_is_read_or_reported(document: dict[str, Any]) -> None:
    assert reported(ModelConfig.from_dict, document) is None
    for path in places(document):
        for value in ODD_VALUES:
            error = reported(ModelConfig.from_dict, changed(document, path, value))
            assert error is None or one_line(error), (path, value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"model_type": "diffusion_ge', b"[]", b"3", b"null", b"\xff\xfe{}", b"[" * 100_000,
                b'{"a": 1' + b"0" * 5000 + b"}"]
)  # fmt: skip
def test_a_file_that_is_not_a_json_object(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(flat_config()))
    config = ModelConfig.load(tmp_path)
    (tmp_path / name).write_bytes(content)
    error = reported(ModelConfig.load, tmp_path) or reported(GenerationConfig.load, tmp_path, config)
    assert error
    assert str(tmp_path / name) in error.message
    assert one_line(error)


def test_config_cut_off_anywhere(tmp_path: Path) -> None:
    content = json.dumps(flat_config())
    for length in range(0, len(content), 13):
        (tmp_path / "config.json").write_text(content[:length])
        with pytest.raises(DgemmaError, match=r"config\.json"):
            ModelConfig.load(tmp_path)


@pytest.mark.parametrize("make", ["folder", "nothing"])
def test_no_config(tmp_path: Path, make: str) -> None:
    if make == "folder":
        (tmp_path / "config.json").mkdir()
    with pytest.raises(DgemmaError, match=r"config\.json") as error:
        ModelConfig.load(tmp_path)
    assert one_line(error.value)


def test_generation_config_absent(tmp_path: Path) -> None:
    read = GenerationConfig.load(tmp_path, ModelConfig.from_dict(flat_config()))
    assert read == GenerationConfig(eos_token_ids=(1, 50))


def test_generation_config_with_nulls(tmp_path: Path) -> None:
    names = ["max_denoising_steps", "sampler_config", "t_min", "t_max", "stability_threshold", "entropy_bound",
             "confidence_threshold", "eos_token_id", "pad_token_id"]  # fmt: skip
    config = ModelConfig.from_dict(flat_config(pad_token_id=7))
    read = generation(tmp_path, dict.fromkeys(names), config)
    assert read == GenerationConfig(eos_token_ids=(1, 50), pad_token_id=7)


def test_generation_config_as_published(tmp_path: Path) -> None:
    read = generation(tmp_path, {
        "eos_token_id": [1, 106, 50], "pad_token_id": 3, "max_denoising_steps": 24, "t_min": 0.3, "t_max": 0.9,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.2},
        "stability_threshold": 2, "confidence_threshold": 0.01, "transformers_version": "5.24.0",
    })  # fmt: skip
    assert read == GenerationConfig(24, 0.2, 0.3, 0.9, 2, 0.01, (1, 106, 50), 3)


@pytest.mark.parametrize(("eos", "ids"), [(106, (106,)), ([106, 1], (106, 1)), (None, (1, 50))])
def test_end_of_text_ids(tmp_path: Path, eos: Any, ids: tuple[int, ...]) -> None:
    assert generation(tmp_path, {"eos_token_id": eos}).eos_token_ids == ids


def test_any_odd_generation_value_is_read_or_reported(tmp_path: Path) -> None:
    document = {
        "eos_token_id": [1, 106], "pad_token_id": 0, "max_denoising_steps": 48, "t_min": 0.4, "t_max": 0.8,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "stability_threshold": 1, "confidence_threshold": 0.005,
    }  # fmt: skip
    for path in places(document):
        for value in ODD_VALUES:
            error = reported(generation, tmp_path, changed(document, path, value))
            if error is not None:
                assert one_line(error), (path, value)
                assert "generation_config.json" in error.message
                assert error.exit_code == 1


@pytest.mark.parametrize("change", [
    {"max_denoising_steps": 0}, {"max_denoising_steps": 1.5}, {"t_min": -0.1}, {"t_max": 0}, {"t_min": 0.9},
    {"entropy_bound": "a lot"}, {"confidence_threshold": float("nan")}, {"stability_threshold": True},
])  # fmt: skip
def test_override_with_an_invalid_value_is_wrong_usage(change: dict[str, Any]) -> None:
    with pytest.raises(DgemmaError) as error:
        GenerationConfig().override(**change)
    assert error.value.exit_code == 2
    assert one_line(error.value)


def test_override_ignores_none() -> None:
    config = GenerationConfig(entropy_bound=0.3)
    assert config.override(entropy_bound=None, t_max=1.0) == GenerationConfig(entropy_bound=0.3, t_max=1.0)


def test_numbers_without_a_decimal_point_become_floats(tmp_path: Path) -> None:
    """MLX cannot convert integers of 2^63 or more."""
    text = ModelConfig.from_dict(flat_config(final_logit_softcapping=20)).text
    assert isinstance(text.final_logit_softcapping, float)
    found = generation(tmp_path, {"entropy_bound": 10**19, "confidence_threshold": 0, "t_min": 1, "t_max": 10**19})
    values = (found.entropy_bound, found.confidence_threshold, found.t_min, found.t_max)
    assert values == (1e19, 0.0, 1.0, 1e19)
    assert all(isinstance(value, float) for value in values)
