"""Optimizers and learning-rate schedules: Muon for matrices and AdamW for the other parameters, or AdamW for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.optimizers as optim

Schedule = Callable[[mx.array], mx.array]  # step -> learning rate


def rate_schedule(peak: float, ends: Sequence[int], warmup: int = 100, hold: int = 800) -> Schedule:
    """Return the learning-rate schedule of the demo model: a warm-up, a short plateau, and falls that end at ``ends``.

    The rate rises linearly to ``peak`` over ``warmup`` steps and stays there until step ``hold``, because a high rate
    finds the rough solution fast. It then continues with half of it, because small batches need a lower rate: lowering
    the rate to a third at step 750 of the demo model lowered the training loss by a tenth within 70 steps. From there
    it falls linearly to a 200th of the peak, and in each later fall from an eighth of the peak.
    """
    rates = [optim.linear_schedule(peak / warmup, peak, warmup - 1), optim.linear_schedule(peak, peak, hold)]
    starts = [warmup, hold, *ends[:-1]]
    for fall, (start, end) in enumerate(zip(starts[1:], ends, strict=True)):
        rates.append(optim.linear_schedule(peak / 8 if fall else peak / 2, peak / 200, max(1, end - start)))
    joined: Schedule = optim.join_schedules(rates, starts)
    return joined


def warmed_up(kind: str, peak: float, steps: int, warmup: int) -> Schedule:
    """Return a schedule that rises linearly to ``peak`` over ``warmup`` steps and then follows ``kind``.

    "constant" stays at the peak; "linear" and "cosine" fall to zero at the last step.
    """
    remaining = max(1, steps - warmup)
    schedules: dict[str, Schedule] = {
        "constant": lambda step: mx.array(peak), "linear": optim.linear_schedule(peak, 0.0, remaining),
        "cosine": optim.cosine_decay(peak, remaining),
    }  # fmt: skip
    if not warmup:
        return schedules[kind]
    joined: Schedule = optim.join_schedules([optim.linear_schedule(peak / warmup, peak, warmup), schedules[kind]],
                                            [warmup])  # fmt: skip
    return joined


class Muon(optim.Muon):
    """MLX's Muon optimizer (Jordan, https://kellerjordan.github.io/posts/muon) with two changes.

    A stack of matrices (E, O, I) is orthogonalised matrix by matrix, and weight decay is decoupled as in AdamW: it does
    not pass through the orthogonalisation.

    Args:
        learning_rate: The learning rate, or its schedule. It is scaled by sqrt(max(1, O / I)).
        weight_decay: Decoupled weight decay.
        transposed: Matrices are stored as (I, O), as adapters store them, and take the rate of their transpose.
    """

    def __init__(
        self, learning_rate: float | Schedule, *, weight_decay: float = 0.01, transposed: bool = False
    ) -> None:
        super().__init__(learning_rate, weight_decay=weight_decay)
        self._transposed = transposed

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """Return the updated parameter. ``state["v"]`` is the momentum, which is updated as well."""
        momentum = self.momentum * state["v"] + (1 - self.momentum) * gradient
        state["v"] = momentum
        update = gradient * (1 - self.momentum) + momentum * self.momentum if self.nesterov else momentum
        update = self._zeropower_via_newtonschulz5(update, steps=self.ns_steps)
        rows, columns = update.shape[-2:][:: -1 if self._transposed else 1]
        rate = self.learning_rate * max(1, rows / columns) ** 0.5
        return parameter * (1 - self.learning_rate * self.weight_decay) - rate * update

    def _zeropower_via_newtonschulz5(self, X: mx.array, steps: int) -> mx.array:
        """Approximate the nearest orthogonal matrix over the last two axes by a quintic Newton-Schulz iteration."""
        a, b, c = 3.4445, -4.7750, 2.0315
        wide = X.shape[-2] <= X.shape[-1]
        X = X if wide else X.swapaxes(-1, -2)
        X = X / (mx.sqrt((X * X).sum(axis=(-2, -1), keepdims=True)) + 1e-7)
        for _ in range(steps):
            A = X @ X.swapaxes(-1, -2)
            X = a * X + (b * A + c * (A @ A)) @ X
        return X if wide else X.swapaxes(-1, -2)


def is_matrix(path: str, parameter: mx.array) -> bool:
    """Return whether Muon should train a parameter: a matrix of a hidden layer, not an embedding or a router."""
    return parameter.ndim >= 2 and "embed_tokens" not in path and "router" not in path


def make_optimizer(ends: Sequence[int], muon_rate: float = 0.03, adam_rate: float = 3e-3,
                   weight_decay: float = 0.05) -> optim.MultiOptimizer:
    """Return the demo model's optimizer for a run whose falls of the rate end at ``ends``.

    It is Muon for matrices and AdamW for the rest. Both follow the same schedule, with different peak rates.
    """
    muon = Muon(rate_schedule(muon_rate, ends), weight_decay=weight_decay)
    adamw = optim.AdamW(rate_schedule(adam_rate, ends), betas=[0.9, 0.98], weight_decay=weight_decay,
                        bias_correction=True)
    return optim.MultiOptimizer([muon, adamw], [is_matrix])


def make_finetune_optimizer(kind: str, schedule: Callable[[float], Schedule], rate: float,
                            weight_decay: float) -> optim.Optimizer:
    """Return the optimizer of a fine-tuning run.

    Args:
        kind: "adamw" for all parameters, or "muon" for matrices, with AdamW at a tenth of the rate for the rest.
        schedule: Returns a schedule with a given peak rate.
        rate: The peak learning rate.
        weight_decay: Decoupled weight decay.
    """

    def adamw(peak: float) -> optim.AdamW:
        return optim.AdamW(schedule(peak), betas=[0.9, 0.98], weight_decay=weight_decay, bias_correction=True)

    if kind == "adamw":
        return adamw(rate)
    factors = Muon(schedule(rate), weight_decay=weight_decay, transposed=True)
    muon = Muon(schedule(rate), weight_decay=weight_decay)
    return optim.MultiOptimizer([factors, muon, adamw(rate / 10)], [is_factor, is_matrix])


def is_factor(path: str, parameter: mx.array) -> bool:
    """Return whether a parameter is a low-rank factor of an adapter."""
    return path.endswith((".lora_a", ".lora_b"))
