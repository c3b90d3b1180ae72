"""The sampler, compared with a scheduler of diffusers, which is given the same random numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.sampler import EntropyBound, Proposal
from dgemma_mlx.diffusion.schedule import temperature
from dgemma_mlx.kernels import canvas_sampler
from tests.diffusion.replay import Replay
from tests.oracle.reference import Array, torch

diffusers: Any = pytest.importorskip("diffusers", reason="diffusers is not installed")

pytestmark = pytest.mark.oracle

B, C, V = 3, 40, 50
CONFIG = GenerationConfig(max_denoising_steps=12, t_min=0.4, t_max=0.8)


class Numbers:
    """Random numbers of one step, for us and, in place of torch's functions, for a scheduler."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.logits = (rng.normal(size=(B, C, V)) * rng.uniform(0, 12, (B, C, 1))).astype(np.float32)
        # About half of the ids are those that the network would write, as in a canvas that is half clean.
        self.canvas = np.where(rng.random((B, C)) < 0.5, self.logits.argmax(-1), rng.integers(0, V, (B, C)))
        self.uniforms = rng.random((B, C), np.float32)
        self.fresh = rng.integers(0, V, (1, B, C))

    def step(self, number: int, config: GenerationConfig) -> tuple[Array, Array]:
        """Return the canvas and the accepted positions of our sampler."""
        T = temperature(config.max_denoising_steps + 1 - number, config)
        sample = canvas_sampler(mx.array(self.logits), mx.array(self.uniforms), None, T)
        proposal = Proposal(sample.sample, sample, None, V)
        canvas, mask = EntropyBound()(proposal, Replay(self.fresh, self.uniforms[None]), config)
        return np.array(canvas), np.array(mask)

    def inject(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch draw by inverting the CDF at ``uniforms``, and take ``fresh`` as random ids."""

        def multinomial(probs: Any, num_samples: int, generator: Any = None) -> Any:
            cumulative = probs.double().cumsum(-1)
            target = torch.tensor(self.uniforms).flatten()[:, None] * cumulative[:, -1:]
            return (cumulative <= target).sum(-1, keepdim=True)

        monkeypatch.setattr(torch, "multinomial", multinomial)
        monkeypatch.setattr(torch, "randint", lambda **_: torch.tensor(self.fresh[0]))


@pytest.mark.parametrize("bound", [1e-9, 0.1, 1.0, 10.0, 1e9])
def test_entropy_bound(monkeypatch: pytest.MonkeyPatch, bound: float) -> None:
    theirs = diffusers.EntropyBoundScheduler(bound, CONFIG.t_max, CONFIG.t_min, CONFIG.max_denoising_steps)
    for seed in range(12):
        numbers, number = Numbers(seed), seed + 1
        numbers.inject(monkeypatch)
        expected = theirs.step(torch.tensor(numbers.logits), number - 1, torch.tensor(numbers.canvas))
        canvas, mask = numbers.step(number, CONFIG.override(entropy_bound=bound))
        np.testing.assert_array_equal(mask, expected.accepted_index.numpy())
        np.testing.assert_array_equal(canvas, expected.prev_sample.numpy())
