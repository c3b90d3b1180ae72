"""The training loop: steps, log lines, checkpoints that resume."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.train.objective import Batch, ObjectiveConfig, block_diffusion_loss


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often to log and save, and the seed of everything random."""

    steps: int
    seed: int = 0
    clip_norm: float = 1.0
    log_every: int = 20
    save_every: int = 250
    mean_of: tuple[int, ...] = ()
    """steps whose weights are kept, for ``mean_weights``"""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


Log = Callable[[dict[str, Any]], None]
BatchPair = tuple[Batch, Batch]
"""The half of a batch that is trained with self-conditioning, and the half without."""


def train(
    model: DiffusionGemma, optimizer: optim.Optimizer, batch_pair: Callable[[int], BatchPair], pad_id: int,
    config: TrainConfig, run: Path, log: Log,
) -> None:
    """Trains in place until ``config.steps``; saves to and resumes from the folder ``run``.

    Started by ``mlx.launch``, every process takes batches of its own and the gradients are averaged; only the
    first one logs and saves.
    """
    group = mx.distributed.init()
    first = group.rank() == 0
    step = restore(run, model, optimizer)
    step_and_grad = nn.value_and_grad(model, partial(_loss, config=config.objective, pad_id=pad_id))
    model.train()
    sums: dict[str, float] = {}
    began, began_step = time.perf_counter(), step
    while step < config.steps:
        number = step * group.size() + group.rank()
        with_conditioning, without = batch_pair(number)
        key = mx.random.key((config.seed << 32) + number)
        (loss, parts), gradients = step_and_grad(model, with_conditioning, without, key)
        gradients = nn.average_gradients(gradients, group)
        gradients, norm = optim.clip_grad_norm(gradients, config.clip_norm)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, loss, parts, norm)
        if not mx.isfinite(loss).item():
            raise DgemmaError(f"the loss is {loss.item()} at step {step}", f"The last good state is in {run}.")
        step += 1
        for name, value in {**parts, "loss": loss, "gradient_norm": norm}.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if first and (step % config.log_every == 0 or step == config.steps):
            passed = step - began_step
            log({"step": step, **{name: round(total / passed, 4) for name, total in sums.items()},
                 "seconds_per_step": round((time.perf_counter() - began) / passed, 3)})
            sums, began, began_step = {}, time.perf_counter(), step
        if first and (step % config.save_every == 0 or step == config.steps):
            save(run, model, optimizer, step)
        if first and step in config.mean_of:
            mx.save_safetensors(str(_kept(run, step)), dict(tree_flatten(model.parameters())))


def mean_weights(run: Path, steps: Sequence[int]) -> dict[str, mx.array]:
    """The mean of the weights that were kept at those steps: stochastic weight averaging (arXiv 1803.05407)."""
    kept: Any = [mx.load(str(_kept(run, step))) for step in steps]
    return {name: sum(weights[name] for weights in kept) / len(kept) for name in kept[0]}


def _kept(run: Path, step: int) -> Path:
    return run / f"weights-{step}.safetensors"


def _loss(
    model: DiffusionGemma, with_conditioning: Batch, without: Batch, key: mx.array, *, config: ObjectiveConfig,
    pad_id: int,
) -> tuple[mx.array, dict[str, mx.array]]:
    """Mean loss of the two halves and its parts."""
    keys = mx.random.split(key)
    one, parts = block_diffusion_loss(model, with_conditioning, config, pad_id, keys[0], self_condition=True)
    two, more = block_diffusion_loss(model, without, config, pad_id, keys[1], self_condition=False)
    return (one + two) / 2, {name: (parts[name] + more[name]) / 2 for name in parts}


def save(run: Path, model: DiffusionGemma, optimizer: optim.Optimizer, step: int) -> None:
    """Writes ``run/checkpoint``: complete or not at all; the one before is replaced last."""
    fresh, final, old = run / "checkpoint.new", run / "checkpoint", run / "checkpoint.old"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    mx.save_safetensors(str(fresh / "model.safetensors"), dict(tree_flatten(model.parameters())))
    mx.save_safetensors(str(fresh / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
    (fresh / "state.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def restore(run: Path, model: DiffusionGemma, optimizer: optim.Optimizer) -> int:
    """Loads the last checkpoint of ``run`` into model and optimizer; returns its step, 0 when there is none."""
    folder = next((f for f in (run / "checkpoint", run / "checkpoint.old") if (f / "state.json").exists()), None)
    if folder is None:
        return 0
    model.load_weights(str(folder / "model.safetensors"))
    optimizer.init(model.trainable_parameters())
    state = mx.load(str(folder / "optimizer.safetensors"))
    assert isinstance(state, dict)
    optimizer.state = tree_unflatten(list(state.items()))
    step: int = json.loads((folder / "state.json").read_text())["step"]
    return step
