"""The training loop: steps, log lines, checkpoints that resume."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.train.data import Part
from dgemma_mlx.train.objective import ObjectiveConfig, block_diffusion_loss


@dataclass(frozen=True)
class TrainConfig:
    """How long, how often to log and save, and the seed of everything random."""

    steps: int
    seed: int = 0
    clip_norm: float = 1.0
    log_every: int = 20
    save_every: int = 250
    valid_every: int = 0
    """0: only at the end"""
    mean_of: tuple[int, ...] = ()
    """steps whose weights are kept, for ``mean_weights``"""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


Record = dict[str, Any]
Log = Callable[[Record], None]


def train(
    model: DiffusionGemma, optimizer: optim.Optimizer, parts_at: Callable[[int], Sequence[Part]], pad_id: int,
    config: TrainConfig, run: Path, log: Log, *, validate: Callable[[], Record] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Trains what is not frozen, in place, until ``config.steps``; saves to and resumes from the folder ``run``.

    ``parts_at`` gives a step's batch in parts, whose gradients are summed one after the other. ``validate`` makes a
    record of its own for the log. ``stopped`` is asked after every step: then the state is saved, and the number of
    steps done is returned. Started by ``mlx.launch``, every process takes batches of its own and the gradients are
    averaged; only the first one logs and saves.
    """
    group = mx.distributed.init()
    first = group.rank() == 0
    step = restore(run, model, optimizer)
    step_and_grad = nn.value_and_grad(model, partial(block_diffusion_loss, model, config=config.objective,
                                                     pad_id=pad_id))  # fmt: skip
    model.train()
    streams = _streams(group.size())
    meter = _Meter(step)
    while step < config.steps:
        number = step * group.size() + group.rank()
        parts = parts_at(number)
        key = mx.random.key((config.seed << 32) + number)
        mx.random.seed((config.seed << 32) + number)  # for dropout
        losses, gradients = _mean_gradients(step_and_grad, parts, key, streams)
        gradients = nn.average_gradients(gradients, group)
        gradients, norm = optim.clip_grad_norm(gradients, config.clip_norm)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state, norm)
        if not math.isfinite(losses["loss"]):
            raise DgemmaError(f"the loss is {losses['loss']} at step {step}", f"The last good state is in {run}.")
        step += 1
        meter.add({**losses, "gradient_norm": norm.item()}, sum(b.ids.size + b.canvas.size for b, _ in parts))
        stopping = stopped()
        if first and (step % config.log_every == 0 or step == config.steps or stopping):
            log(meter.record(step, config.steps))
            meter = _Meter(step)
        if first and (step % config.save_every == 0 or step == config.steps or stopping):
            save(run, model, optimizer, step)
        if first and validate is not None and (_every(step, config.valid_every) or step == config.steps):
            log({"step": step, **validate()})
            model.train()
            meter.resume()
        if first and step in config.mean_of:
            mx.save_safetensors(str(_kept(run, step)), dict(tree_flatten(model.parameters())))
        if stopping:
            break
    return step


class _Meter:
    """Means over the steps since ``step``."""

    def __init__(self, step: int) -> None:
        self._step, self._sums, self._tokens = step, dict[str, float](), 0
        self.resume()

    def resume(self) -> None:
        self._began = time.perf_counter()

    def add(self, values: Mapping[str, float], tokens: int) -> None:
        self._tokens += tokens
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def record(self, step: int, steps: int) -> Record:
        passed, seconds = step - self._step, time.perf_counter() - self._began
        return {
            "step": step, **{name: round(total / passed, 4) for name, total in self._sums.items()},
            "seconds_per_step": round(seconds / passed, 3), "tokens_per_second": round(self._tokens / seconds),
            "seconds_left": round((steps - step) * seconds / passed), "peak_memory": mx.get_peak_memory(),
        }  # fmt: skip


def _every(step: int, number: int) -> bool:
    return number > 0 and step % number == 0


def _mean_gradients(
    step_and_grad: Callable[..., Any], parts: Sequence[Part], key: mx.array, streams: Sequence[Any]
) -> tuple[dict[str, float], Any]:
    """Means over the parts, each weighing as many rows as it has; one part for each stream is in memory at a time."""
    rows = sum(batch.canvas.shape[0] for batch, _ in parts)
    gradients: Any = None
    means: dict[str, float] = {}
    keyed = list(zip(parts, mx.random.split(key, len(parts)), strict=True))
    for start in range(0, len(keyed), len(streams)):
        found = []
        for ((batch, conditioned), own), stream in zip(keyed[start:], streams, strict=False):
            with mx.stream(stream):
                values, own_gradients = step_and_grad(batch=batch, key=own, self_condition=conditioned)
            found.append((batch.canvas.shape[0] / rows, values, own_gradients))
        mx.eval(found)
        for share, (loss, losses), own_gradients in found:
            scaled = tree_map(lambda g: g * share, own_gradients)  # noqa: B023
            gradients = scaled if gradients is None else tree_map(mx.add, gradients, scaled)
            for name, value in {"loss": loss, **losses}.items():
                means[name] = means.get(name, 0.0) + share * value.item()
        mx.eval(gradients)
    return means, gradients


def _streams(processes: int) -> list[Any]:
    """Where parts of a batch are worked on: on the CPU, where MLX uses one core a stream, on two at once."""
    default = mx.default_stream(mx.default_device())
    alone = processes > 1 or mx.default_device() != mx.Device(mx.cpu)
    return [default] if alone else [default, mx.new_stream(mx.cpu)]


def mean_weights(run: Path, steps: Sequence[int]) -> dict[str, mx.array]:
    """The mean of the weights that were kept at those steps: stochastic weight averaging (arXiv 1803.05407)."""
    kept: Any = [mx.load(str(_kept(run, step))) for step in steps]
    return {name: sum(weights[name] for weights in kept) / len(kept) for name in kept[0]}


def _kept(run: Path, step: int) -> Path:
    return run / f"weights-{step}.safetensors"


def save(run: Path, model: DiffusionGemma, optimizer: optim.Optimizer, step: int) -> None:
    """Writes ``run/checkpoint``: complete or not at all; the one before is replaced last."""
    fresh, final, old = run / "checkpoint.new", run / "checkpoint", run / "checkpoint.old"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        mx.save_safetensors(str(fresh / "model.safetensors"), dict(tree_flatten(model.trainable_parameters())))
        mx.save_safetensors(str(fresh / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
        (fresh / "state.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        fresh.rename(final)
    except (OSError, RuntimeError) as error:
        raise DgemmaError(f"cannot save to {run}: {error}", "The checkpoint before is still there.") from None
    shutil.rmtree(old, ignore_errors=True)


def restore(run: Path, model: DiffusionGemma, optimizer: optim.Optimizer) -> int:
    """Loads the last checkpoint of ``run`` into model and optimizer; returns its step, 0 when there is none."""
    folder = next((f for f in (run / "checkpoint", run / "checkpoint.old") if (f / "state.json").exists()), None)
    if folder is None:
        return 0
    try:
        model.load_weights(str(folder / "model.safetensors"), strict=False)  # a frozen base is not in it
        optimizer.init(model.trainable_parameters())
        state = mx.load(str(folder / "optimizer.safetensors"))
        assert isinstance(state, dict)
        optimizer.state = tree_unflatten(list(state.items()))
        step: int = json.loads((folder / "state.json").read_text())["step"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DgemmaError(f"{folder} cannot be read: {error}", "It may be damaged; begin in another folder.") from None
    return step
