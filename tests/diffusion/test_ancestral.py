"""Ancestral sampling in the loop: pins, greedy canvases, rows of a batch, and what the corrector leaves alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.ancestral import Ancestral, posterior
from dgemma_mlx.diffusion.denoiser import Denoiser
from dgemma_mlx.diffusion.edits import Edits, Pins
from dgemma_mlx.diffusion.sampler import Noise
from dgemma_mlx.diffusion.speed import Speed
from dgemma_mlx.events import Draft
from dgemma_mlx.model.text import DiffusionGemma
from tests.golden.numbers import CONFIG, FOLDER, golden_model

C, V = CONFIG.canvas_length, CONFIG.text.vocab_size
STEPS = 6
SAMPLERS = [Ancestral(STEPS), Ancestral(STEPS, corrector_steps=1, corrector_k=3)]


def run(sampler: Ancestral, seeds: list[int], pins: Pins | None = None) -> list[tuple[Draft, ...]]:
    cache = golden_model().new_cache()
    golden_model().encode(mx.array(np.random.default_rng(3).integers(0, V, (1, 9)).repeat(len(seeds), 0)), cache)
    settings = GenerationConfig.load(FOLDER, CONFIG).override(max_denoising_steps=STEPS, confidence_threshold=0.0)
    denoiser = Denoiser(golden_model(), settings, Speed(sampler=sampler))
    return list(denoiser.denoise(cache, Noise(*seeds), C, Edits(pins=pins)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pinned_positions_hold_their_ids(monkeypatch: pytest.MonkeyPatch, sampler: Ancestral) -> None:
    rng = np.random.default_rng(8)
    ids, free = rng.integers(0, V, (2, C)), rng.random((2, C)) < 0.5
    decoded: list[Any] = []
    decode = DiffusionGemma.decoder_input

    def spy(self: DiffusionGemma, canvas: mx.array, *rest: Any) -> mx.array:
        decoded.append(np.array(canvas))
        return decode(self, canvas, *rest)

    monkeypatch.setattr(DiffusionGemma, "decoder_input", spy)
    steps = run(sampler, [1, 2], Pins(mx.array(ids, mx.int32), mx.array(free)))
    assert len(decoded) == len(steps) == STEPS
    for canvas, drafts in zip(decoded, steps, strict=True):
        np.testing.assert_array_equal(canvas[~free], ids[~free])
        for row, draft in enumerate(drafts):
            assert not np.array(draft.accepted_mask)[~free[row]].any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_goes_the_way_it_goes_alone(sampler: Ancestral) -> None:
    together = run(sampler, [4, 5])
    for row, seed in enumerate([4, 5]):
        assert [draft.tokens for (draft,) in run(sampler, [seed])] == [drafts[row].tokens for drafts in together]


def test_share_of_each_route() -> None:
    """Clean, kept and random ids are as frequent as the posterior has it, where all three differ."""
    alpha_t, alpha_s, n = 0.25, 0.5, 200_000
    u = mx.random.uniform(shape=(1, n), key=mx.random.key(0))
    ids = [mx.full((1, n), number) for number in (1, 2, 3)]
    drawn = np.array(posterior(ids[0], ids[1], alpha_t, alpha_s, 10, u, ids[2]))
    a = alpha_t / alpha_s
    weights = np.array([a * (1 - alpha_s), alpha_s * (1 - a), (1 - a) * (1 - alpha_s)])  # kept, clean, random
    found = [(drawn == number).mean() for number in (1, 2, 3)]
    np.testing.assert_allclose(found, weights / weights.sum(), rtol=0, atol=0.005)
