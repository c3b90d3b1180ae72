"""The ends of the temperature schedule and what lies between."""

from __future__ import annotations

import pytest

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.schedule import temperature


@pytest.mark.parametrize("steps", [1, 2, 48])
def test_temperature_falls_evenly_from_t_max(steps: int) -> None:
    """The first step has t_max; t_min would come one step after the last."""
    config = GenerationConfig(t_min=0.4, t_max=0.8, max_denoising_steps=steps)
    temperatures = [temperature(remaining, config) for remaining in range(steps, 0, -1)]
    assert temperatures[0] == pytest.approx(0.8)
    assert temperatures[-1] - 0.4 / steps == pytest.approx(0.4)
    assert temperatures == pytest.approx([0.8 - 0.4 * done / steps for done in range(steps)])


def test_equal_ends_make_it_constant() -> None:
    config = GenerationConfig(t_min=0.7, t_max=0.7, max_denoising_steps=5)
    assert [temperature(remaining, config) for remaining in range(1, 6)] == pytest.approx([0.7] * 5)
