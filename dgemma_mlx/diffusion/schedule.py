"""The temperature of each denoising step."""

from __future__ import annotations

from dgemma_mlx.checkpoint.config import GenerationConfig


def temperature(remaining: int, config: GenerationConfig) -> float:
    """Linear from t_max in the first step (``remaining`` = N) towards t_min, which n = 0 would have.

    Reference: transformers ``LinearTemperatureScheduleLogitsProcessor``.
    """
    return config.t_min + (config.t_max - config.t_min) * remaining / config.max_denoising_steps
