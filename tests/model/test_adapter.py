"""Tests of adapters against mlx_lm's layers and against merged weights, and of adapter folders."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.optimizers import SGD
from mlx.utils import tree_flatten

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.adapter import (
    GROUPS,
    AdapterConfig,
    DoRALinear,
    LoRAExpertLinear,
    LoRALinear,
    adapted_modules,
    attach,
    matching,
    merged,
    plain_weight,
)
from dgemma_mlx.model.adapter_file import load_adapter, save_adapter
from dgemma_mlx.model.experts import ExpertLinear
from dgemma_mlx.model.text import DiffusionGemma
from tests.model.checkpoint import flat_config, load, logits, quantized, random_tensors, write_checkpoint

ALL = AdapterConfig(rank=4, alpha=6.0, targets=tuple(GROUPS))
FOUR = {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = random_tensors(flat_config())
    return write_checkpoint(tmp_path_factory.mktemp("plain"), flat_config(), tensors)


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors, _ = quantized(random_tensors(flat_config()), lambda path: FOUR if "router" not in path else None)
    config = {**flat_config(), "quantization": FOUR}
    return write_checkpoint(tmp_path_factory.mktemp("packed"), config, tensors)


def learned(model: DiffusionGemma, seed: int = 0) -> None:
    """Fill the adapter's second factors with random values, so that it changes the results."""
    mx.random.seed(seed)
    for module in adapted_modules(model).values():
        module.lora_b = 0.05 * mx.random.normal(module.lora_b.shape)
        if "m" in module:
            module.m = module.m * mx.random.uniform(0.8, 1.2, module.m.shape)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_adds_nothing(folder: Path, rank: int, dora: bool) -> None:
    plain = logits(load(folder)[0])
    model = load(folder)[0]
    attach(model, AdapterConfig(rank=rank, dora=dora, targets=("attention", "mlp", "experts")))
    assert len(adapted_modules(model)) == 3 * (4 + 3 + 2) - 1  # a full-attention layer has no v_proj
    np.testing.assert_allclose(logits(model), plain, atol=1e-5 if dora else 0)


def test_only_the_additions_are_trained(folder: Path) -> None:
    model = load(folder)[0]
    attach(model, replace(ALL, dora=True))
    names = {name.rpartition(".")[2] for name, _ in tree_flatten(model.trainable_parameters())}
    assert names == {"lora_a", "lora_b", "m"}
    assert not any("router" in path or "norm" in path for path in adapted_modules(model))


@pytest.mark.parametrize("packed", [False, True])
def test_each_expert_uses_its_own_factors(packed: bool) -> None:
    mx.random.seed(0)
    base: Any = ExpertLinear(3, 64, 8)
    if packed:
        base = base.to_quantized(**FOUR)
    layer = LoRAExpertLinear(base, ALL, 4)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    x, indices = mx.random.normal((5, 1, 64)), mx.array([0, 0, 1, 2, 2], mx.uint32)
    y = layer(x, indices, sorted_indices=True)
    for row, expert in enumerate(indices.tolist()):
        weight = np.array(plain_weight(base)[expert], np.float64)
        addition = 1.5 * np.array(layer.lora_a[expert], np.float64) @ np.array(layer.lora_b[expert], np.float64)
        np.testing.assert_allclose(y[row, 0], np.array(x[row, 0], np.float64) @ (weight.T + addition), atol=1e-4)
    assert layer.is_plain != packed


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_weight_gives_the_same_results(dora: bool) -> None:
    mx.random.seed(1)
    layer = (DoRALinear if dora else LoRALinear)(nn.Linear(64, 8, bias=False), ALL, 4)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    x = mx.random.normal((5, 64))
    m = layer.get("m")
    if dora:
        m = layer.m = layer.m * mx.random.uniform(0.5, 2, layer.m.shape)
    weight = merged(layer.linear.weight, layer.lora_a, layer.lora_b, ALL.scale, m)
    np.testing.assert_allclose(layer(x), x @ weight.T, atol=1e-4)


def dora_layer(packed: bool) -> DoRALinear:
    """Return a DoRA layer with random factors and lengths."""
    mx.random.seed(4)
    base: Any = nn.Linear(64, 32, bias=False)
    layer = DoRALinear(nn.QuantizedLinear.from_linear(base, **FOUR) if packed else base, ALL, 4)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    layer.m = layer.m * mx.random.uniform(0.5, 2, layer.m.shape)
    return layer


def primitives(y: mx.array) -> str:
    """Return the graph from which an array will be computed, as text."""
    graph = io.StringIO()
    mx.export_to_dot(graph, y)
    return graph.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_dora_computes_the_lengths_of_rows_once_for_evaluation(packed: bool) -> None:
    layer, x = dora_layer(packed), mx.random.normal((5, 64))
    trained = layer(x)
    assert "Sqrt" in primitives(trained)
    layer.eval()
    assert np.array_equal(layer(x), trained)
    later = layer(x)
    assert not any(name in primitives(later) for name in ("Sqrt", "Dequantize"))
    assert np.array_equal(later, trained)


CHANGES: dict[str, Callable[[DoRALinear], Any]] = {
    "second factor": lambda layer: setattr(layer, "lora_b", 2 * layer.lora_b),
    "length": lambda layer: layer.update({"m": 2 * layer.m}),
    "base weight": lambda layer: layer.load_weights([("linear.weight", layer.linear.weight + 1)], strict=False),
    "base layer": lambda layer: setattr(layer, "linear", nn.Linear(64, 32, bias=False)),
    "optimizer": lambda layer: SGD(1.0).update(layer, {"lora_a": mx.ones(layer.lora_a.shape)}),
    "in training": lambda layer: layer.train().update({"lora_b": layer.lora_b + 1}).eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_length_of_earlier_weights_is_never_used(change: str) -> None:
    layer, x = dora_layer(packed=False).eval(), mx.random.normal((5, 64))
    before = layer(x)
    CHANGES[change](layer)
    after, expected = layer(x), layer.train()(x)
    assert np.array_equal(after, expected)
    assert not np.array_equal(after, before)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_a_loaded_dora_adapter_unpacks_nothing_in_a_step(packed_folder: Path, tmp_path: Path, dtype: mx.Dtype) -> None:
    model = load(packed_folder)[0]
    attach(model, replace(ALL, dora=True))
    learned(model)
    save_adapter(model, replace(ALL, dora=True), tmp_path, "some/model")
    again = load(packed_folder, dtype)[0]
    load_adapter(again, tmp_path)
    attention = again.layers[0].self_attn
    assert "Sqrt" not in primitives(attention.q_proj(mx.zeros((1, 4, again.config.hidden_size), dtype)))


@pytest.mark.kernels
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_linear_layers_equal_those_of_mlx_lm(kind: str, packed: bool) -> None:
    """Results and gradients are the same."""
    pytest.importorskip("mlx_lm")
    from mlx_lm.tuner.dora import DoRALinear as TheirDoRA
    from mlx_lm.tuner.lora import LoRALinear as TheirLoRA

    ours, theirs = (DoRALinear, TheirDoRA) if kind == "dora" else (LoRALinear, TheirLoRA)
    mx.random.seed(2)
    base: Any = nn.Linear(64, 8, bias=False)
    base = nn.QuantizedLinear.from_linear(base, **FOUR) if packed else base
    own, other = ours(base, ALL, 4), theirs.from_base(base, r=4, scale=ALL.scale)
    own.lora_b = mx.random.normal(own.lora_b.shape)
    other.update({"lora_a": own.lora_a, "lora_b": own.lora_b})
    x = mx.random.normal((5, 64))

    def value(layer: nn.Module) -> Any:
        layer.freeze()
        layer.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)

        def loss() -> mx.array:
            return (layer(x) ** 2).sum()

        return nn.value_and_grad(layer, loss)()

    (one, grads), (two, their_grads) = value(own), value(other)
    assert one.item() == pytest.approx(two.item(), rel=1e-5)
    gradients, others = dict(tree_flatten(grads)), dict(tree_flatten(their_grads))
    assert gradients.keys() == others.keys() == {"lora_a", "lora_b", *(["m"] if kind == "dora" else [])}
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, others[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_comes_back_from_its_file(folder: Path, packed_folder: Path, tmp_path: Path, dora: bool) -> None:
    config = replace(ALL, dora=dora, canvas_length=24, dropout=0.1)
    for number, base in enumerate((folder, packed_folder)):
        model = load(base)[0]
        attach(model, config)
        learned(model)
        out = tmp_path / str(number)
        save_adapter(model.eval(), config, out, "some/model")
        again = load(base)[0]
        loaded = load_adapter(again, out)
        assert (loaded.rank, loaded.alpha, loaded.dora, loaded.canvas_length) == (4, 6.0, dora, 24)
        assert np.array_equal(logits(again), logits(model))
        assert not tree_flatten(again.trainable_parameters())


def test_the_files_have_the_format_of_peft(folder: Path, tmp_path: Path) -> None:
    """Names, shapes and settings are PEFT's. The encoder has copies, because transformers has modules for it."""
    config = AdapterConfig(rank=4, alpha=6.0, targets=("q_proj", "self_conditioning"), dora=True)
    model = load(folder)[0]
    attach(model, config)
    learned(model)
    save_adapter(model, config, tmp_path, "some/model")
    tensors: Any = mx.load(str(tmp_path / "adapter_model.safetensors"))
    decoder, encoder = "base_model.model.model.decoder.", "base_model.model.model.encoder.language_model."
    q_proj, gate = "layers.2.self_attn.q_proj.", "self_conditioning.gate_proj."
    assert tensors[f"{decoder}{q_proj}lora_A.weight"].shape == (4, 128)
    assert tensors[f"{encoder}{q_proj}lora_B.weight"].shape == (4 * 64, 4)
    assert tensors[f"{decoder}{gate}lora_magnitude_vector"].shape == (128,)
    assert f"{encoder}{gate}lora_A.weight" not in tensors
    stored = model.layers[2].self_attn.q_proj.lora_a.T
    assert mx.array_equal(tensors[f"{encoder}{q_proj}lora_A.weight"], stored).item()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 6.0, "use_dora": True}
    assert {name: settings[name] for name in expected} == expected
    assert "model.decoder.layers.0.self_attn.q_proj" in settings["target_modules"]


def rewritten(folder: Path, out: Path, change: Any = None, **settings: Any) -> Path:
    """Copy a saved adapter with changed tensors or settings and return the folder."""
    out.mkdir()
    tensors: Any = mx.load(str(folder / "adapter_model.safetensors"))
    tensors = tensors if change is None else change(dict(tensors))
    mx.save_safetensors(str(out / "adapter_model.safetensors"), tensors)
    raw = json.loads((folder / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**raw, **settings}))
    return out


@pytest.fixture
def saved(folder: Path, tmp_path: Path) -> Path:
    config = AdapterConfig(rank=4, alpha=6.0, targets=("q_proj",))
    model = load(folder)[0]
    attach(model, config)
    learned(model)
    save_adapter(model, config, tmp_path / "saved", "some/model")
    return tmp_path / "saved"


def test_an_adapter_of_the_decoder_alone_applies_to_both(folder: Path, saved: Path, tmp_path: Path) -> None:
    whole, half = load(folder)[0], load(folder)[0]
    load_adapter(whole, saved)
    load_adapter(half, rewritten(saved, tmp_path / "half", lambda tensors: {
        name: tensor for name, tensor in tensors.items() if ".decoder." in name
    }))  # fmt: skip
    assert np.array_equal(logits(whole), logits(half))


def test_rank_stabilised_adapters_have_their_own_scale(folder: Path, saved: Path, tmp_path: Path) -> None:
    out = rewritten(saved, tmp_path / "rs", use_rslora=True)
    assert load_adapter(load(folder)[0], out).scale == 6.0 / 4**0.5


def test_adapters_of_mlx_lm_are_read(folder: Path, saved: Path, tmp_path: Path) -> None:
    model = load(folder)[0]
    load_adapter(model, saved)
    tensors = {
        f"model.decoder.{path}.{name}": module[name]
        for path, module in adapted_modules(model).items() for name in ("lora_a", "lora_b")
    }
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    settings = {"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": {"rank": 4, "scale": 1.5, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    other = load(folder)[0]
    load_adapter(other, tmp_path)
    assert np.array_equal(logits(model), logits(other))


def cut(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name: tensor[:, :-1] for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        (cut, {}, "does not fit"),
        (lambda t: {n: a + (".encoder." in n) for n, a in t.items()}, {}, "encoder and decoder differently"),
        (lambda t: {n: a for n, a in t.items() if "lora_A" in n}, {}, "only one of two factors"),
        (lambda t: {n.replace("q_proj", "r_proj"): a for n, a in t.items()}, {}, "does not have"),
        (lambda t: {n.replace(".self_attn.q_proj", ".router.proj"): a for n, a in t.items()}, {}, "cannot be adapted"),
        (lambda t: {**t, "base_model.model.odd": mx.zeros(1)}, {}, "odd, which is not part"),
        (None, {"peft_type": "IA3"}, "not supported"), (None, {"rank_pattern": {"a": 2}}, "rank_pattern"),
        (None, {"r": "four"}, "not a valid adapter configuration"), (None, {"lora_alpha": -1}, "alpha must be above 0"),
        (None, {"use_dora": True}, "lacks parts"),
        (None, {"r": 2}, "does not fit the rank 2"), (None, {"r": True}, "r cannot be True"),
        (None, {"r": 2**63}, "r cannot be"), (None, {"r": None}, "r is missing"),
        (None, {"lora_alpha": float("nan")}, "alpha must be above 0"), (None, {"lora_alpha": [1]}, "cannot be"),
        (None, {"lora_dropout": "0"}, "cannot be '0'"), (None, {"use_dora": "no"}, "use_dora cannot be 'no'"),
        (None, {"peft_type": ["LORA"] * 9999}, "adapters are not supported"),
        (lambda t: {n: a.flatten() for n, a in t.items()}, {}, "has shape"),
        (lambda t: {n: a.astype(mx.int32) for n, a in t.items()}, {}, "has dtype I32"),
        (lambda t: {n.replace("model.decoder", "model.encoder.vision_tower"): a for n, a in t.items()}, {},
         "adapts the vision tower"),
        (lambda t: {**t, **{n.replace("lora_A.", "lora_magnitude_vector.").removesuffix(".weight"): a[:, 0]
                            for n, a in t.items() if "lora_A" in n}}, {},
         "has parts of DoRA"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(
    folder: Path, saved: Path, tmp_path: Path, change: Any, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(DgemmaError, match=words):
        load_adapter(load(folder)[0], rewritten(saved, tmp_path / "odd", change, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_16"}, {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"}, {"init_lora_weights": "loftq"}, {"init_lora_weights": ["gaussian"]},
        {"alora_invocation_tokens": [1, 2]}, {"layer_replication": [[0, 2], [1, 3]]}, {"use_qalora": True},
        {"alpha_pattern": {"q_proj": 2}}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"},
        {"fan_in_fan_out": True}, {"trainable_token_indices": [5]}, {"target_parameters": ["w"]},
        {"use_bdlora": {"nblocks": 2}}, {"kasa_config": {"beta": 1}}, {"a_setting_of_next_year": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_settings_that_change_the_mathematics_are_refused_by_name(
    folder: Path, saved: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(DgemmaError, match=f"{next(iter(settings))} .* is not supported"):
        load_adapter(load(folder)[0], rewritten(saved, tmp_path / "odd", **settings))


def test_the_settings_that_peft_writes_for_a_plain_adapter_are_accepted(
    folder: Path, saved: Path, tmp_path: Path
) -> None:
    written = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "corda_config": None, "ensure_weight_tying": False, "eva_config": {"rho": 2.0}, "exclude_modules": None,
        "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": [0],
        "loftq_config": {}, "lora_bias": False, "megatron_config": None, "megatron_core": "megatron.core",
        "modules_to_save": [], "peft_version": "0.21.2", "qalora_group_size": 16, "rank_pattern": {},
        "revision": None, "target_parameters": None, "trainable_token_indices": None, "use_qalora": False,
        "use_rslora": False,
    }  # fmt: skip
    plain, other = load(folder)[0], load(folder)[0]
    load_adapter(plain, saved)
    load_adapter(other, rewritten(saved, tmp_path / "other", **written))
    assert np.array_equal(logits(plain), logits(other))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fine_tune_type": "full", "lora_parameters": {"rank": 4, "scale": 1.5}}, "fine_tune_type 'full'"),
        ({"lora_parameters": {"rank": 4, "alpha": 16}}, "'alpha' of lora_parameters"),
        ({"lora_parameters": {"rank": 4}}, "scale is missing"), ({"lora_parameters": [4]}, "neither peft_type"),
        ({}, "neither peft_type"), ({"lora_parameters": {"rank": 4, "scale": "20"}}, "scale cannot be '20'"),
    ],
)  # fmt: skip
def test_settings_of_mlx_lm_that_are_not_supported_are_refused(
    folder: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(DgemmaError, match=words):
        load_adapter(load(folder)[0], tmp_path)


def with_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a safetensors file; the data stays as it is."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one, other: one.update(data_offsets=other["data_offsets"]), "place or size"),
        (lambda one, other: one.update(shape=[4, 127]), "place or size"),
        (lambda one, other: one.update(shape=[2**62, 8]), "not a safetensors file"),
        (lambda one, other: one.update(shape=[-4, -128]), "not a safetensors file"),
        (lambda one, other: one.update(shape="4"), "not a safetensors file"),
        (lambda one, other: one.update(data_offsets=[0.0, 64.0]), "not a safetensors file"),
        (lambda one, other: one.update(dtype="F64", shape=[4, 64]), "has dtype F64"),
        (lambda one, other: one.update(dtype=None), "place or size"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(saved: Path, folder: Path, change: Any, words: str) -> None:
    def changed(header: dict[str, Any]) -> None:
        first, second, *_ = [entry for name, entry in header.items() if "lora_A" in name]
        change(first, second)

    with_header(saved / "adapter_model.safetensors", changed)
    with pytest.raises(DgemmaError, match=words):
        load_adapter(load(folder)[0], saved)


def test_a_canvas_length_of_nonsense_is_refused(saved: Path, folder: Path) -> None:
    for length in ("0", "-8", "9" * 5000, "eight"):
        with_header(
            saved / "adapter_model.safetensors",
            lambda header: header.update(__metadata__={"dgemma_mlx.canvas_length": length}),  # noqa: B023
        )
        with pytest.raises(DgemmaError, match="canvas length cannot be"):
            load_adapter(load(folder)[0], saved)


def test_a_folder_that_is_not_an_adapter_is_refused(folder: Path, saved: Path, tmp_path: Path) -> None:
    model = load(folder)[0]
    with pytest.raises(DgemmaError, match="no adapter folder"):
        load_adapter(model, tmp_path / "absent")
    with pytest.raises(DgemmaError, match=r"has no adapter_config\.json"):
        load_adapter(model, folder)
    (saved / "adapter_model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(DgemmaError, match="Git LFS pointer"):
        load_adapter(model, saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(DgemmaError, match=r"has no adapter_model\.safetensors"):
        load_adapter(model, saved)


def test_a_target_that_names_nothing_is_refused(folder: Path) -> None:
    model = load(folder)[0]
    assert matching(model, ["mlp.down_proj"]) == [f"layers.{i}.mlp.down_proj" for i in range(3)]
    for target in ("router", "norm", "v_projection"):
        with pytest.raises(DgemmaError, match="names nothing that can be adapted") as error:
            matching(model, [target])
        assert error.value.exit_code == 2
