"""The samplers, compared with the schedulers of diffusers, which are given the same random numbers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.ancestral import Ancestral, leave_one_out
from dgemma_mlx.diffusion.sampler import EntropyBound, Proposal, Sampler
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
        self.uniforms = rng.random((2, B, C), np.float32)
        self.fresh = rng.integers(0, V, (1, B, C))

    def step(self, sampler: Sampler, number: int, config: GenerationConfig = CONFIG) -> tuple[Array, Array]:
        """Return the canvas and the accepted positions of a sampler of ours."""
        T = temperature(config.max_denoising_steps + 1 - number, config)
        noise, raw = Replay(self.fresh, self.uniforms), mx.array(self.logits)
        sample = canvas_sampler(raw, mx.array(self.uniforms[-1]), None, T)
        canvas, mask = sampler(
            Proposal(mx.array(self.canvas, mx.int32), sample.sample, sample, None, number, raw, None), noise, config
        )
        return np.array(canvas), np.array(mask)

    def inject(self, monkeypatch: pytest.MonkeyPatch, uniforms: Array) -> None:
        """Let torch draw by inverting the CDF at ``uniforms``, and take ``fresh`` as random ids."""
        def multinomial(probs: Any, num_samples: int, generator: Any = None) -> Any:
            cumulative = probs.double().cumsum(-1)
            target = torch.tensor(uniforms).flatten()[:, None] * cumulative[:, -1:]
            return (cumulative <= target).sum(-1, keepdim=True)

        monkeypatch.setattr(torch, "multinomial", multinomial)
        monkeypatch.setattr(torch, "randint", lambda **_: torch.tensor(self.fresh[0]))
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(self.uniforms[0]))


@pytest.mark.parametrize("bound", [1e-9, 0.1, 1.0, 10.0, 1e9])
def test_entropy_bound(monkeypatch: pytest.MonkeyPatch, bound: float) -> None:
    theirs = diffusers.EntropyBoundScheduler(bound, CONFIG.t_max, CONFIG.t_min, CONFIG.max_denoising_steps)
    for seed in range(12):
        numbers, number = Numbers(seed), seed + 1
        numbers.inject(monkeypatch, numbers.uniforms[1])
        expected = theirs.step(torch.tensor(numbers.logits), number - 1, torch.tensor(numbers.canvas))
        canvas, mask = numbers.step(EntropyBound(), number, CONFIG.override(entropy_bound=bound))
        np.testing.assert_array_equal(mask, expected.accepted_index.numpy())
        np.testing.assert_array_equal(canvas, expected.prev_sample.numpy())


@pytest.mark.parametrize("steps", [1, 4, 12])
def test_ancestral_step(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    theirs = diffusers.DiscreteDDIMScheduler(steps)
    for number in range(1, steps + 1):
        numbers = Numbers(number)
        numbers.inject(monkeypatch, numbers.uniforms[0])
        expected = theirs.step(torch.tensor(numbers.logits), number - 1, torch.tensor(numbers.canvas))
        canvas, _ = numbers.step(Ancestral(steps), number)
        np.testing.assert_array_equal(canvas, expected.prev_sample.numpy())
    np.testing.assert_array_equal(canvas, numbers.logits.argmax(-1))  # the last step leaves no noise


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.99])
def test_leave_one_out(alpha: float) -> None:
    numbers = Numbers(0)
    logits, canvas = torch.tensor(numbers.logits).double(), torch.tensor(numbers.canvas)
    expected = diffusers.DiscreteDDIMScheduler._to_loo_logits(logits, canvas, alpha).numpy()
    found = leave_one_out(mx.array(numbers.logits), mx.array(numbers.canvas), alpha)
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, C])
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_corrector_sweep(monkeypatch: pytest.MonkeyPatch, k: int, tau: float) -> None:
    sampler = Ancestral(23, corrector_steps=1, corrector_k=k, tau=tau)
    _, predictor_steps, _ = sampler.plan(1)
    theirs = diffusers.DiscreteDDIMScheduler(
        predictor_steps, corrector_steps=1, corrector_k=k, corrector_selection_tau=tau
    )
    for number in range(2, 23, 2):
        numbers = Numbers(number)
        index, _, corrects = sampler.plan(number)
        assert corrects
        chosen = theirs._select_positions

        def select(*arguments: Any, numbers: Numbers = numbers, chosen: Any = chosen) -> Any:
            positions = chosen(*arguments)
            numbers.inject(monkeypatch, np.take_along_axis(numbers.uniforms[1], positions.numpy(), -1))
            return positions

        numbers.inject(monkeypatch, numbers.uniforms[0])
        with monkeypatch.context() as patch:
            patch.setattr(theirs, "_select_positions", select)
            expected = theirs.step_correct(torch.tensor(numbers.logits), index, torch.tensor(numbers.canvas))
        canvas, mask = numbers.step(sampler, number)
        assert (mask.sum(axis=-1) == k).all()
        np.testing.assert_array_equal(canvas, expected.prev_sample.numpy())


@pytest.mark.parametrize(("steps", "sweeps"), [(16, 1), (16, 3), (5, 1), (1, 2), (48, 0)])
def test_budget_is_split_as_in_their_pipeline(steps: int, sweeps: int) -> None:
    """As ``DiffusionGemmaPipeline.__call__`` has it: the first predictor steps are followed by sweeps."""
    corrected = (steps - 1) // (1 + sweeps) if sweeps else 0
    predictor_steps = steps - corrected * sweeps
    expected = []
    for index in range(predictor_steps):
        expected += [(index, predictor_steps, False)]
        expected += [(index, predictor_steps, True)] * (sweeps if index < corrected else 0)
    sampler = Ancestral(steps, corrector_steps=sweeps)
    assert [sampler.plan(number) for number in range(1, steps + 1)] == expected
    assert sampler.plan(steps + 5) == (predictor_steps - 1, predictor_steps, False)
