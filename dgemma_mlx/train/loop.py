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

from dgemma_mlx.checkpoint.names import some_of
from dgemma_mlx.checkpoint.shards import read_header
from dgemma_mlx.checks import is_whole, reason, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import read_json
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


_NEW_RUN = "It may be damaged; start a new run in another folder."
MAX_SEED = 2**32 - 1  # a step's random key has 32 bits of the seed and 32 bits of the step

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
        DgemmaError: If the loss, the gradients or the weights are not finite, or a checkpoint cannot be read or
            written. Nothing that is not finite is saved: the last checkpoint holds the last good state.
    """
    group = mx.distributed.init()
    first = group.rank() == 0
    step = restore(folder, model, optimizer, config.steps)
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
        step += 1
        for name, value in (("loss", losses["loss"]), ("norm of the gradients", norm.item())):
            if not math.isfinite(value):
                raise _diverged(f"the {name} is {value}", step, folder)
        meter.add({**losses, "gradient_norm": norm.item()}, sum(b.ids.size + b.canvas.size for b, _ in parts))
        stopping = stopped()
        if first and (step % config.log_every == 0 or step == config.steps or stopping):
            log(meter.record(step, config.steps))
            meter = _Meter(step)
        is_kept = step in config.mean_of
        if first and (step % config.save_every == 0 or step == config.steps or stopping or is_kept):
            batch, conditioned = parts[0]
            loss, _ = block_diffusion_loss(model, batch, config.objective, pad_id, key, conditioned)
            if fault := _not_finite(model, optimizer, loss):
                raise _diverged(fault, step, folder)
            if is_kept:  # before the checkpoint: a run that goes on from it does not come here again
                _keep(folder, model, step)
            save(folder, model, optimizer, step)
        if first and validate is not None and (_every(step, config.valid_every) or step == config.steps):
            began = time.perf_counter()
            values = validate()
            if not all(map(math.isfinite, values.values())):
                raise _diverged("the validation loss is not finite", step, folder)
            log({"step": step, **values})
            model.train()
            meter.leave_out(time.perf_counter() - began)
        if stopping:
            break
    return step


class _Meter:
    """Means of logged values over the steps since ``step``, with speed and remaining time."""

    def __init__(self, step: int) -> None:
        self._step, self._sums, self._tokens = step, dict[str, float](), 0
        self._began = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Do not count the given time, which a validation has taken, as training time."""
        self._began += seconds

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


def _not_finite(model: DiffusionGemma, optimizer: optim.Optimizer, loss: mx.array) -> str:
    """Return what is not finite among the trained parameters, the optimizer's state and their loss, or ""."""
    state: Any = {**dict(_named(model.trainable_parameters())), **dict(_named(optimizer.state, "optimizer"))}
    finite: Any = mx.stack([mx.isfinite(array).all() for array in state.values()]).tolist()
    bad = next((name for name, good in zip(state, finite, strict=True) if not good), None)
    if bad is not None:
        return f"{bad} holds values that are not finite"
    return "" if math.isfinite(loss.item()) else f"the loss of the new weights is {loss.item()}"  # type: ignore[arg-type]


def _named(tree: Any, prefix: str = "") -> list[tuple[str, mx.array]]:
    """Return the arrays of a tree with their paths."""
    flat: Any = tree_flatten(tree, prefix=prefix and f".{prefix}")
    return flat


def _diverged(fault: str, step: int, folder: Path) -> DgemmaError:
    """Return the error for a run whose values are not finite after a step."""
    last = last_step(folder)
    kept = f"{folder} keeps the state of step {last}. " if last else ""
    return DgemmaError(
        f"training diverged at step {step}: {fault}",
        f"{kept}--resume with a lower --learning-rate continues from {'there' if last else 'the beginning'}.",
    )


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


def _keep(folder: Path, model: DiffusionGemma, step: int) -> None:
    """Write the weights after a step, for ``mean_weights``."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(_kept(folder, step)), dict(tree_flatten(model.parameters())))


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
            f"cannot save to {folder}: {reason(error)}", "The previous checkpoint, if there was one, is kept."
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def last_step(folder: Path) -> int:
    """Return the step of the last checkpoint in ``folder``, or 0 if there is none.

    Raises ``DgemmaError`` if the checkpoint's state cannot be read.
    """
    checkpoint = _last_checkpoint(folder)
    return 0 if checkpoint is None else _step_of(checkpoint)


def restore(folder: Path, model: DiffusionGemma, optimizer: optim.Optimizer, steps: int) -> int:
    """Load the last checkpoint in ``folder`` into model and optimizer and return its step, or 0 if there is none.

    ``steps`` is the length of the run. Raises ``DgemmaError`` if the checkpoint cannot be read, or if its parameters or
    its optimizer's state are not those of the run.
    """
    checkpoint = _last_checkpoint(folder)
    if checkpoint is None:
        return 0
    step = _step_of(checkpoint)
    if step > steps:
        raise DgemmaError(f"{checkpoint} is of step {step}, but the run has {steps} steps", _NEW_RUN)
    weights = _read_like(checkpoint / "model.safetensors", model.trainable_parameters())
    optimizer.init(model.trainable_parameters())
    state = _read_like(checkpoint / "optimizer.safetensors", optimizer.state)
    model.load_weights(list(weights.items()), strict=False)  # without frozen parameters
    optimizer.state = tree_unflatten(list(state.items()))
    return step


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the folder of the last complete checkpoint, or None."""
    candidates = (folder / "checkpoint", folder / "checkpoint.old")
    return next((path for path in candidates if (path / "state.json").exists()), None)


def _step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint. Raises ``DgemmaError`` if its state does not say it."""
    step: Any = read_json(checkpoint / "state.json").get("step")
    if not is_whole(step) or not 0 < step <= MAX_SEED:
        raise DgemmaError(f"{checkpoint / 'state.json'}: step cannot be {shown(step)}", _NEW_RUN)
    return int(step)


def _read_like(path: Path, tree: Any) -> dict[str, mx.array]:
    """Return the tensors of a file, which must have the names and shapes of the arrays of ``tree`` and be finite.

    Raises ``DgemmaError`` otherwise. ``load_weights`` does not check names, and a list that is too long crashes it.
    """
    header, expected = read_header(path), dict(_named(tree))
    if different := sorted(header.keys() ^ expected.keys()):
        verb = "lacks" if different[0] in expected else "has unknown tensors:"
        raise DgemmaError(f"{path} {verb} {some_of(different)}", _NEW_RUN)
    loaded: Any = None
    try:
        loaded = mx.load(str(path), format="safetensors")
        for name, array in expected.items():
            both_floating = all(mx.issubdtype(dtype, mx.floating) for dtype in (loaded[name].dtype, array.dtype))
            if loaded[name].shape != array.shape or not (both_floating or loaded[name].dtype == array.dtype):
                raise ValueError(f"{name} has shape {loaded[name].shape} and dtype {loaded[name].dtype}")
            if not mx.isfinite(loaded[name]).all().item():
                raise ValueError(f"{name} holds values that are not finite")
    except (RuntimeError, ValueError) as error:
        raise DgemmaError(f"{path} cannot be used: {error}", _NEW_RUN) from None
    return dict(loaded)
