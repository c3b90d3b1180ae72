"""The training loop: the loss falls, a run resumes bit for bit, and batches depend only on seed and step."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.train.batches import Conversation, Part, batch_pair_at
from dgemma_mlx.train.demo import CONFIG, GENERATION
from dgemma_mlx.train.export import export
from dgemma_mlx.train.loop import TrainConfig, _Meter, mean_weights, train
from dgemma_mlx.train.optimizer import Muon, make_optimizer, rate_schedule
from tests.train.test_objective import PAD, small_model


def sample(rng: random.Random) -> Conversation:
    prompt = [rng.randrange(1, 5) for _ in range(rng.randrange(3, 9))]
    return prompt, [*prompt[::-1], 1]


def pair(step: int) -> list[Part]:
    return batch_pair_at(step, sample, batch_size=8, canvas_length=4, pad_id=PAD, seed=7)


def trained(
    run: Path, *stops: int, schedule: int | None = None, mean_of: tuple[int, ...] = ()
) -> tuple[DiffusionGemma, list[float]]:
    """Train a model up to each of ``stops`` steps in turn, as one process after the other; also return the losses."""
    losses: list[float] = []
    for steps in stops:
        model, optimizer = small_model(), make_optimizer([schedule or max(stops)])
        config = TrainConfig(steps=steps, log_every=1, save_every=2, mean_of=mean_of)
        train(model, optimizer, pair, PAD, config, run, lambda record: losses.append(record["loss"]))
    return model, losses


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, losses = trained(tmp_path / "whole", 6)
    parts, resumed = trained(tmp_path / "parts", 2, 3, 6)
    assert resumed == losses
    for (name, one), (_, two) in zip(tree_flatten(whole.parameters()), tree_flatten(parts.parameters()), strict=True):
        assert mx.array_equal(one, two).item(), name


@pytest.mark.slow
def test_the_loss_falls(tmp_path: Path) -> None:
    _, losses = trained(tmp_path, 60)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])


def test_mean_weights_is_the_mean_over_the_given_steps(tmp_path: Path) -> None:
    (two, _), (four, _) = trained(tmp_path / "a", 2, schedule=4), trained(tmp_path / "b", 4)
    trained(tmp_path / "c", 3, 4, mean_of=(2, 4))  # resumed in between
    mean = mean_weights(tmp_path / "c", (2, 4))
    ends = [dict(tree_flatten(model.parameters())) for model in (two, four)]
    assert mean.keys() == ends[0].keys()
    for name, value in mean.items():
        np.testing.assert_allclose(np.array(value), (np.array(ends[0][name]) + np.array(ends[1][name])) / 2, rtol=1e-6)


def test_a_checkpoint_survives_a_crash_while_the_next_is_written(tmp_path: Path) -> None:
    trained(tmp_path, 2)
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")  # killed between the two renames
    (tmp_path / "checkpoint.new").mkdir()
    _, losses = trained(tmp_path, 4)
    assert len(losses) == 2


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    for (one, _), (two, _) in zip(pair(3), pair(3), strict=True):
        assert mx.array_equal(one.ids, two.ids).item() and mx.array_equal(one.canvas, two.canvas).item()
    assert pair(3)[0][0].ids.tolist() != pair(4)[0][0].ids.tolist()


def test_the_canvas_is_the_part_of_the_sequence_it_says() -> None:
    seen = set()
    for step in range(30):
        for batch, _ in pair(step):
            for ids, start, canvas in zip(
                batch.ids.tolist(), batch.starts.tolist(), batch.canvas.tolist(), strict=True
            ):
                text = [token for token in canvas if token != PAD]
                assert ids[start : start + len(text)] == text
                assert not any(ids[start + len(text) :])
                seen.add(len(text))
    assert seen == {1, 2, 3, 4}  # full canvases, and last canvases of every length


def test_muon_moves_a_matrix_along_the_nearest_orthogonal_one() -> None:
    muon = Muon(learning_rate=1.0, weight_decay=0.0)
    stack = mx.random.normal((3, 16, 8), key=mx.random.key(0))
    moved = -muon.apply_single(stack, mx.zeros_like(stack), {"v": mx.zeros_like(stack)}) / 2**0.5
    for gradient, update in zip(stack, moved, strict=True):
        u, _, vt = np.linalg.svd(np.array(gradient), full_matrices=False)
        cosine = float((np.array(update) * (u @ vt)).sum() / np.linalg.norm(update) / np.linalg.norm(u @ vt))
        assert cosine > 0.97  # five steps are an approximation


def test_weight_decay_is_decoupled_from_the_gradient() -> None:
    muon = Muon(learning_rate=0.5, weight_decay=0.1)
    weight = mx.ones((4, 4))
    decayed = muon.apply_single(mx.zeros((4, 4)), weight, {"v": mx.zeros((4, 4))})
    np.testing.assert_allclose(decayed, 0.95 * np.ones((4, 4)), rtol=1e-6)


def test_the_learning_rate_falls_from_half_the_peak_and_then_from_an_eighth() -> None:
    schedule = rate_schedule(2.0, ends=(9000, 10_000, 12_000), warmup=100, hold=1000)
    steps = (0, 49, 99, 999, 1000, 5000, 8999, 9000, 9500, 9999, 10_000, 11_000, 12_000, 13_000)
    rates = [schedule(mx.array(step)).item() for step in steps]
    half, eighth = (1 + 0.01) / 2, (0.25 + 0.01) / 2
    assert rates == pytest.approx(
        [0.02, 1.0, 2.0, 2.0, 1.0, half, 0.01, 0.25, eighth, 0.01, 0.25, eighth, 0.01, 0.01], rel=1e-5, abs=3e-4
    )


def test_an_exported_model_loads_as_a_checkpoint(tmp_path: Path) -> None:
    mx.random.seed(1)
    config = ModelConfig.from_dict(CONFIG)
    model = DiffusionGemma(config.text)
    export(model, CONFIG, GENERATION, tmp_path, dtype=mx.float32)
    again, weights = load_model(tmp_path, ModelConfig.load(tmp_path))
    for (name, one), (_, two) in zip(tree_flatten(model.parameters()), tree_flatten(again.parameters()), strict=True):
        assert mx.array_equal(one, two).item(), name
    assert not weights.vision


def test_the_time_of_a_validation_is_no_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it lies between two records of the log."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = _Meter(0)
    meter.add({"loss": 2.0}, tokens=30)
    now[0] = 3.0
    meter.leave_out(1.0)
    meter.add({"loss": 2.0}, tokens=30)
    now[0] = 7.0
    record = meter.record(2, 4)
    assert (record["tokens_per_second"], record["seconds_per_step"], record["seconds_left"]) == (10, 3.0, 6)


def test_a_clock_that_does_not_move_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 1.0)
    meter = _Meter(0)
    meter.add({"loss": 2.0}, tokens=30)
    record = meter.record(1, 3)
    assert (record["tokens_per_second"], record["seconds_per_step"], record["seconds_left"]) == (0, 0.0, 0)
