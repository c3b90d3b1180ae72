"""The training loop: steps, log records, and checkpoints from which a run resumes exactly."""

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
from dgemma_mlx.sizes import rate
from dgemma_mlx.train.batches import Part
from dgemma_mlx.train.objective import ObjectiveConfig, block_diffusion_loss


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop.

    Attributes:
        steps: Number of updates of the weights.
        seed: Seed of the noise and the dropout.
        clip_norm: Maximum norm of the gradients; larger gradients are scaled down.
        log_every: Number of steps between two log records.
        save_every: Number of steps between two checkpoints.
        valid_every: Number of steps between two validations; 0 validates only after the last step.
        mean_of: Steps after which the weights are kept, for ``mean_weights``.
        objective: Settings of the loss.
    """

    steps: int
    seed: int = 0
    clip_norm: float = 1.0
    log_every: int = 20
    save_every: int = 250
    valid_every: int = 0
    mean_of: tuple[int, ...] = ()
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


Record = dict[str, Any]  # one record of the log; it has a "step"
Log = Callable[[Record], None]


def train(
    model: DiffusionGemma, optimizer: optim.Optimizer, parts_at: Callable[[int], Sequence[Part]], pad_id: int,
    config: TrainConfig, folder: Path, log: Log, *, validate: Callable[[], Record] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Train the parameters of a model that are not frozen, in place.

    Training starts from the last checkpoint in ``folder``, if there is one. If ``mlx.launch`` has started several
    processes, each of them takes batches of its own, the gradients are averaged, and only the first one logs and saves.

    Args:
        model: The network to train.
        optimizer: The optimizer. A resumed run restores its state.
        parts_at: Returns the parts of a batch by its number. Their gradients are averaged.
        pad_id: The id of padding.
        config: Settings of the loop.
        folder: Where checkpoints are saved.
        log: Called with every log record.
        validate: Returns a record of its own, which is logged with its step.
        stopped: Asked after every step. If it returns True, the state is saved and training ends.

    Returns:
        The number of steps that are done, counting those before a resumption.

    Raises:
        DgemmaError: If the loss is not finite, or a checkpoint cannot be read or written.
    """
    group = mx.distributed.init()
    first = group.rank() == 0
    step = restore(folder, model, optimizer)
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
            raise DgemmaError(
                f"the loss is {losses['loss']} at step {step}",
                f"Lower the learning rate; {folder} keeps the last checkpoint before this step, if there is one.",
            )
        step += 1
        meter.add({**losses, "gradient_norm": norm.item()}, sum(b.ids.size + b.canvas.size for b, _ in parts))
        stopping = stopped()
        if first and (step % config.log_every == 0 or step == config.steps or stopping):
            log(meter.record(step, config.steps))
            meter = _Meter(step)
        if first and (step % config.save_every == 0 or step == config.steps or stopping):
            save(folder, model, optimizer, step)
        if first and validate is not None and (_every(step, config.valid_every) or step == config.steps):
            log({"step": step, **validate()})
            model.train()
            meter.restart_clock()
        if first and step in config.mean_of:
            mx.save_safetensors(str(_kept(folder, step)), dict(tree_flatten(model.parameters())))
        if stopping:
            break
    return step


class _Meter:
    """Means of logged values over the steps since ``step``, with speed and remaining time."""

    def __init__(self, step: int) -> None:
        self._step, self._sums, self._tokens = step, dict[str, float](), 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure time from now on; called after a validation, whose time is not training time."""
        self._began = time.perf_counter()

    def add(self, values: Mapping[str, float], tokens: int) -> None:
        """Add the values of one step, which has trained on ``tokens`` tokens."""
        self._tokens += tokens
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def record(self, step: int, steps: int) -> Record:
        """Return the log record after step number ``step`` of a run of ``steps`` steps."""
        passed, seconds = step - self._step, time.perf_counter() - self._began
        return {
            "step": step, **{name: round(total / passed, 4) for name, total in self._sums.items()},
            "seconds_per_step": round(seconds / passed, 3), "tokens_per_second": round(rate(self._tokens, seconds)),
            "seconds_left": round((steps - step) * seconds / passed), "peak_memory": mx.get_peak_memory(),
        }  # fmt: skip


def _every(step: int, number: int) -> bool:
    """Return whether ``step`` is a multiple of ``number``; 0 has no multiples."""
    return number > 0 and step % number == 0


def _mean_gradients(
    step_and_grad: Callable[..., Any], parts: Sequence[Part], key: mx.array, streams: Sequence[Any]
) -> tuple[dict[str, float], Any]:
    """Return the means of losses and gradients over the rows of all parts.

    Each stream computes one part at a time, so memory holds the intermediate results of one part for each stream.
    """
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
    """Return the streams that compute the parts of a batch.

    A single process on the CPU gets two, because MLX uses one core for each stream there.
    """
    default = mx.default_stream(mx.default_device())
    one_stream = processes > 1 or mx.default_device() != mx.Device(mx.cpu)
    return [default] if one_stream else [default, mx.new_stream(mx.cpu)]


def mean_weights(folder: Path, steps: Sequence[int]) -> dict[str, mx.array]:
    """Return the mean of the weights that were kept after the given steps, by parameter path.

    This is stochastic weight averaging (Izmailov et al., arXiv 1803.05407).
    """
    kept: Any = [mx.load(str(_kept(folder, step))) for step in steps]
    return {name: sum(weights[name] for weights in kept) / len(kept) for name in kept[0]}


def _kept(folder: Path, step: int) -> Path:
    """Return the file of the weights that are kept after a step."""
    return folder / f"weights-{step}.safetensors"


def save(folder: Path, model: DiffusionGemma, optimizer: optim.Optimizer, step: int) -> None:
    """Write ``folder/checkpoint`` with the trained parameters, the optimizer's state and the step.

    The new checkpoint is written in full before it replaces the previous one, so a crash leaves one of them. Raises
    ``DgemmaError`` if it cannot be written.
    """
    fresh, final, old = folder / "checkpoint.new", folder / "checkpoint", folder / "checkpoint.old"
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
        raise DgemmaError(
            f"cannot save to {folder}: {error}", "The previous checkpoint, if there was one, is kept."
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path, model: DiffusionGemma, optimizer: optim.Optimizer) -> int:
    """Load the last checkpoint in ``folder`` into model and optimizer and return its step, or 0 if there is none.

    Raises ``DgemmaError`` if the checkpoint cannot be read.
    """
    candidates = (folder / "checkpoint", folder / "checkpoint.old")
    checkpoint = next((path for path in candidates if (path / "state.json").exists()), None)
    if checkpoint is None:
        return 0
    try:
        model.load_weights(str(checkpoint / "model.safetensors"), strict=False)  # without frozen parameters
        optimizer.init(model.trainable_parameters())
        state = mx.load(str(checkpoint / "optimizer.safetensors"))
        assert isinstance(state, dict)
        optimizer.state = tree_unflatten(list(state.items()))
        step: int = json.loads((checkpoint / "state.json").read_text())["step"]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DgemmaError(
            f"{checkpoint} cannot be read: {error}", "It may be damaged; start a new run in another folder."
        ) from None
    return step
