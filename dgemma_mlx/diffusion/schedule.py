"""The temperature of each denoising step."""

from __future__ import annotations

from dgemma_mlx.checkpoint.config import GenerationConfig


def temperature(remaining: int, config: GenerationConfig) -> float:
    """Return the temperature of the step with ``remaining`` steps left, that step included.

    The schedule is linear: t_max in the first step (``remaining`` = N), falling towards t_min, which the last step
    (``remaining`` = 1) does not quite reach.

    Reference: transformers ``LinearTemperatureScheduleLogitsProcessor``.
    """
    return config.t_min + (config.t_max - config.t_min) * remaining / config.max_denoising_steps
