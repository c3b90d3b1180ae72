"""Fine-tuning: exact resumption, gradients, batches, validation, and the settings that are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dgemma_mlx import Model, load
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.adapter import GROUPS, AdapterConfig, adapted_modules, attach
from dgemma_mlx.model.adapter_file import read_adapter
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.train.batches import Conversation, canvas_batch, parts_at
from dgemma_mlx.train.dataset import Example
from dgemma_mlx.train.estimate import training_memory
from dgemma_mlx.train.finetune import FinetuneConfig, FinetuneRun, Validation, finetune, last_step, prepare, read_log
from dgemma_mlx.train.gradient_checkpointing import checkpointed
from dgemma_mlx.train.objective import Batch, ObjectiveConfig, block_diffusion_loss
from dgemma_mlx.train.optimizer import warmed_up
from tests.train.test_objective import PAD, small_model

RNG = random.Random(0)
CONVERSATIONS: list[Conversation] = [
    ([2, *RNG.choices(range(107, 700), k=6)], [*RNG.choices(range(107, 700), k=RNG.randrange(3, 12)), 106])
    for _ in range(7)
]
ADAPTER = AdapterConfig(rank=2, alpha=4.0, targets=("attention", "experts"), dropout=0.1, canvas_length=8)
CONFIG = FinetuneConfig(
    steps=6, batch_size=2, optimizer="muon", warmup=2, adapter=ADAPTER, log_every=1, save_every=2, valid_every=0,
)  # fmt: skip


def run(out: Path, config: FinetuneConfig = CONFIG, *, stop: int = 99, resume: bool = False) -> Model:
    """Fine-tune the demo model as a new process would; Ctrl-C comes after step ``stop``."""
    model = prepare(load("demo"), config)
    seen = []
    finetune(FinetuneRun(model, config, CONVERSATIONS), out, lambda record: seen.append(record["step"]), resume=resume,
             stopped=lambda: bool(seen) and seen[-1] >= stop)  # fmt: skip
    return model


def logged_losses(out: Path) -> list[Any]:
    return [(record["step"], record["loss"], record["gradient_norm"]) for record in read_log(out / "loss.jsonl")]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_that_was_interrupted_ends_with_the_same_bytes(tmp_path: Path, optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    run(tmp_path / "whole", config)
    run(tmp_path / "parts", config, stop=2)
    assert last_step(tmp_path / "parts") == 3  # the run stops after the step that follows
    assert (tmp_path / "parts" / "adapter_model.safetensors").exists()
    run(tmp_path / "parts", config, resume=True)
    for name in ("adapter_model.safetensors", "adapter_config.json", "run.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    one, two = (dict(mx.load(str(tmp_path / name / "checkpoint/optimizer.safetensors"))) for name in ("whole", "parts"))
    assert one.keys() == two.keys() and all(mx.array_equal(one[key], two[key]).item() for key in one)
    assert logged_losses(tmp_path / "whole") == logged_losses(tmp_path / "parts")
    assert [step for step, *_ in logged_losses(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]


def test_steps_after_the_last_checkpoint_are_logged_once(tmp_path: Path) -> None:
    run(tmp_path, stop=2)
    log = tmp_path / "loss.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 4, "loss": 1.0}) + '\n{"step": 5, "lo')  # killed by step 5
    run(tmp_path, resume=True)
    assert [step for step, *_ in logged_losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_training_continues_from_an_adapter(tmp_path: Path) -> None:
    first = run(tmp_path / "first", replace(CONFIG, steps=2))
    model = load("demo", adapter=tmp_path / "first")
    shape, _ = read_adapter(tmp_path / "first")
    assert model.config.canvas_length == 8 and (shape.rank, shape.dropout) == (2, 0.1)
    config = replace(CONFIG, steps=1, adapter=shape, learning_rate=0.0)
    finetune(FinetuneRun(prepare(model, config), config, CONVERSATIONS), tmp_path / "same", lambda record: None)
    for path, module in adapted_modules(first.network).items():  # with a rate of 0, the adapter stays as it is
        assert mx.array_equal(module.lora_a, adapted_modules(model.network)[path].lora_a).item(), path
    again, _ = read_adapter(tmp_path / "same")
    assert replace(again, targets=()) == replace(ADAPTER, targets=())
    fresh = FinetuneRun(prepare(load("demo"), config), config, CONVERSATIONS)
    with pytest.raises(DgemmaError, match="started with other values of start"):
        finetune(fresh, tmp_path / "same", lambda record: None, resume=True)


@pytest.mark.parametrize(
    ("batch_size", "causal_weight", "checkpoint_layers"),
    [
        (1, 0.0, False), (4, 0.0, False), (5, 0.5, False), (8, 0.0, True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((8, 0.0, False), (8, 0.5, True))),
    ],
)
def test_the_estimate_is_near_the_peak(batch_size: int, causal_weight: float, checkpoint_layers: bool) -> None:
    """For every size of a batch. The answers fit in a canvas, so the lengths do not depend on where it is drawn."""
    C, rng = 32, random.Random(1)
    config = replace(
        CONFIG, batch_size=batch_size, causal_weight=causal_weight, checkpoint_layers=checkpoint_layers,
        adapter=AdapterConfig(canvas_length=C),
    )  # fmt: skip
    ids = range(107, 700)
    conversations = [([2, *rng.choices(ids, k=100)], [*rng.choices(ids, k=25), 106]) for _ in range(batch_size)]
    model = prepare(load("demo"), config)
    network = model.network
    estimate = training_memory(FinetuneRun(model, config, conversations))
    mx.eval(network.parameters())
    network.train()
    network.wrap_layers(checkpointed if checkpoint_layers else None)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for batch, conditioned in parts_at(0, conversations, batch_size, 1, C, PAD, 0, causal=causal_weight > 0):
        mx.eval(nn.value_and_grad(network, lambda: block_diffusion_loss(
            network, batch, config.objective, PAD, mx.random.key(0), conditioned)[0])())  # noqa: B023
    peak = mx.get_peak_memory() - before
    assert estimate.total - estimate.weights == pytest.approx(peak, rel=0.15)


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    with pytest.raises(DgemmaError, match="holds no run to resume"):
        run(tmp_path / "new", resume=True)
    run(tmp_path / "one", replace(CONFIG, steps=1))
    with pytest.raises(DgemmaError, match="already holds a run"):
        run(tmp_path / "one", replace(CONFIG, steps=1))
    with pytest.raises(DgemmaError, match="started with other values of steps, seed"):
        run(tmp_path / "one", replace(CONFIG, steps=2, seed=1), resume=True)


def test_a_run_resumes_with_other_options_about_its_log_and_checkpoints(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=3)
    run(tmp_path / "whole", config)
    run(tmp_path / "parts", config, stop=1)
    assert last_step(tmp_path / "parts") == 2
    run(tmp_path / "parts", replace(config, log_every=9, save_every=9, valid_every=9, valid_answers=1), resume=True)
    whole, parts = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts and last_step(tmp_path / "parts") == 3


def test_every_epoch_has_each_conversation_once_and_half_are_conditioned() -> None:
    conversations: list[Conversation] = [([2], [token]) for token in range(10, 22)]
    orders, conditioned = [], 0
    for epoch in range(3):
        seen: list[int] = []
        for step in range(epoch * 2, epoch * 2 + 2):
            for batch, flag in parts_at(step, conversations, 3, 2, 4, PAD, seed=1, causal=False):
                tokens: Any = batch.canvas[:, 0].tolist()
                seen += tokens
                conditioned += flag * len(tokens)
        assert sorted(seen) == list(range(10, 22))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    assert 12 <= conditioned <= 24  # of 36: one or two of every batch of three


def test_sequences_without_the_causal_loss_end_before_the_canvas() -> None:
    rng = random.Random(1)
    batch = canvas_batch([([5, 6, 7], list(range(10, 20)))], 4, PAD, rng, causal=False)
    (start,), (ids,) = batch.starts.tolist(), batch.ids.tolist()
    assert [id for id in ids if id] == [5, 6, 7, *range(10, 10 + start - 3)]
    whole = Batch(mx.array([[5, 6, 7, *range(10, 20), 0, 0, 0]]), batch.starts, batch.canvas)
    model, config = small_model(), ObjectiveConfig(causal_weight=0, balance_weight=0, min_noise=0.001)
    one, two = (block_diffusion_loss(model, b, config, PAD, mx.random.key(0), True)[0] for b in (batch, whole))
    assert one.item() == pytest.approx(two.item(), rel=1e-5)


def example_batch(vocab: int = 40) -> Batch:
    ids = mx.random.randint(1, vocab, (3, 18), key=mx.random.key(1)).astype(mx.int32)
    canvas = mx.random.randint(1, vocab, (3, 8), key=mx.random.key(2)).astype(mx.int32)
    return Batch(ids, mx.array([4, 9, 10], mx.int32), canvas)


def gradients(model: DiffusionGemma, config: ObjectiveConfig, conditioned: bool = True) -> dict[str, mx.array]:
    def loss() -> mx.array:
        return block_diffusion_loss(model, example_batch(), config, PAD, mx.random.key(3), conditioned)[0]

    return dict(tree_flatten(nn.value_and_grad(model, loss)()[1]))


@pytest.mark.parametrize("balance", [0.0, 0.01])
@pytest.mark.parametrize("adapter", [False, True])
def test_gradients_are_the_same_with_recomputed_layers(adapter: bool, balance: float) -> None:
    model, config = small_model().train(), ObjectiveConfig(balance_weight=balance)
    if adapter:
        attach(model, replace(ADAPTER, dropout=0.0))
        randomize_adapter(model)
    plain = gradients(model, config)
    model.wrap_layers(checkpointed)
    again = gradients(model, config)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        np.testing.assert_allclose(again[name], gradient, atol=1e-5, err_msg=name)


def randomize_adapter(model: DiffusionGemma) -> None:
    mx.random.seed(5)
    for module in adapted_modules(model).values():
        module.lora_b = 0.3 * mx.random.normal(module.lora_b.shape)


@pytest.mark.parametrize(("packed", "dora"), [(False, False), (False, True), (True, False)])
def test_gradients_of_an_adapter_agree_with_finite_differences(packed: bool, dora: bool) -> None:
    model = small_model(top_k=4).train()  # all experts are chosen: a changed choice would make the loss jump
    if packed:
        nn.quantize(model, 32, 8, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] == 32)
    attach(model, AdapterConfig(4, 4.0, targets=tuple(GROUPS), dora=dora))
    randomize_adapter(model)
    config = ObjectiveConfig(balance_weight=0)

    def loss() -> mx.array:
        return block_diffusion_loss(model, example_batch(), config, PAD, mx.random.key(3), False)[0]

    flat, parameters = gradients(model, config, conditioned=False), dict(tree_flatten(model.trainable_parameters()))
    names = ["layers.1.self_attn.k_proj.lora_a", "layers.0.experts.gate_up_proj.lora_b",
             "layers.2.experts.down_proj.lora_a", "layers.1.mlp.up_proj.lora_b"]  # fmt: skip
    if dora:  # the norms are constants for the factors' gradients, but not for differences: only m agrees
        names = ["layers.1.self_attn.q_proj.m", "layers.0.mlp.down_proj.m"]
    for name in names:
        length = mx.sqrt((flat[name] ** 2).sum())
        step = 4e-3 * flat[name] / length
        ends: list[Any] = []
        for sign in (1, -1):
            model.load_weights([(name, parameters[name] + sign * step)], strict=False)
            ends.append(loss().item())
        model.load_weights([(name, parameters[name])], strict=False)
        assert (ends[0] - ends[1]) / 8e-3 == pytest.approx(length.item(), rel=0.05), name


def test_full_noise_and_a_large_minimum_replace_almost_all_ids() -> None:
    batch, model = example_batch(), small_model()
    seen: list[mx.array] = []
    decode = model.decode

    def spy(canvas: mx.array, *arguments: Any) -> mx.array:
        seen.append(canvas)
        return decode(canvas, *arguments)

    model.decode = spy  # type: ignore[method-assign]
    for full, low, share in ((0.0, 0.999999, 1.0), (1.0, 0.0, 1.0)):
        config = ObjectiveConfig(full_noise=full, min_noise=low, balance_weight=0, causal_weight=0)
        block_diffusion_loss(model, batch, config, PAD, mx.random.key(7), False)
        changed = (seen[-1] != batch.canvas).astype(mx.float32).mean().item()
        assert changed > 0.9 * share  # a random id may be the clean one


def test_validation_is_the_same_every_time(tmp_path: Path) -> None:
    still = replace(ADAPTER, dropout=0.0)
    config = replace(CONFIG, steps=2, valid_every=1, valid_answers=2, checkpoint_layers=True, adapter=still)
    asked = [Example(({"role": "user", "content": "Sort 2 1"},), "1 2"), Example((), "Once.")]
    for name in ("one", "two"):
        model = prepare(load("demo"), config)
        validated = FinetuneRun(model, config, CONVERSATIONS, validation=Validation(asked, CONVERSATIONS[:5]))
        finetune(validated, tmp_path / name, lambda record: None)
    one, two = (
        [(record["step"], record["valid_loss"], record["exact_match"]) for record in read_log(path / "loss.jsonl")
         if "valid_loss" in record]
        for path in (tmp_path / "one", tmp_path / "two")
    )  # fmt: skip
    assert one == two and [step for step, *_ in one] == [1, 2]
    assert all(match in (0.0, 1.0) for *_, match in one)  # only one example is a question


def test_all_weights_can_be_trained_into_a_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIG, full=True, steps=2, adapter=AdapterConfig(canvas_length=40))
    model = run(tmp_path, config)
    again = load(tmp_path)
    assert again.config.canvas_length == 40
    own, stored = (dict(tree_flatten(m.network.parameters())) for m in (model, again))
    base = dict(tree_flatten(load("demo").network.parameters()))
    for name, value in own.items():
        assert mx.array_equal(value.astype(mx.bfloat16), stored[name].astype(mx.bfloat16)).item(), name
    assert sum(not mx.array_equal(own[name], base[name]).item() for name in own) > 100


def test_packed_weights_are_not_trained(tmp_path: Path) -> None:
    model = load("demo")
    nn.quantize(model.network, 64, 8, class_predicate=lambda path, _: "mlp" in path)
    with pytest.raises(DgemmaError, match="has packed weights, which cannot be trained"):
        prepare(model, replace(CONFIG, full=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FinetuneConfig(steps=0), lambda: FinetuneConfig(optimizer="sgd"), lambda: FinetuneConfig(schedule="up"),
        lambda: FinetuneConfig(learning_rate=float("nan")), lambda: AdapterConfig(rank=-1),
        lambda: AdapterConfig(dropout=1.0), lambda: AdapterConfig(alpha=float("inf")),
        lambda: FinetuneConfig(checkpoint_layers=True, adapter=AdapterConfig(dropout=0.1)),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(DgemmaError) as error:
        make()
    assert error.value.exit_code == 2


def test_schedules_rise_and_fall() -> None:
    expected = {"constant": (0.2, 1.0, 1.0, 1.0), "linear": (0.2, 1.0, 0.5, 0.0), "cosine": (0.2, 1.0, 0.5, 0.0)}
    for kind, rates in expected.items():
        schedule = warmed_up(kind, 1.0, steps=105, warmup=5)
        assert [schedule(mx.array(step)).item() for step in (0, 5, 55, 105)] == pytest.approx(rates, abs=1e-5)
    assert warmed_up("linear", 1.0, steps=10, warmup=0)(mx.array(5)).item() == pytest.approx(0.5)
