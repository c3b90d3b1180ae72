"""The parts of the denoising loop, compared with the reference's classes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.sampler import accept
from dgemma_mlx.diffusion.schedule import temperature
from dgemma_mlx.diffusion.speed import REFERENCE
from dgemma_mlx.diffusion.stopping import TESTS, Stopping
from dgemma_mlx.kernels import CanvasSample, canvas_sampler
from tests.oracle.reference import Array, generation, torch

pytestmark = pytest.mark.oracle

B, C, V = 3, 40, 50


def random_logits(seed: int) -> Array:
    """Return logits (B, C, V) whose positions range from almost certain to almost uniform."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(B, C, V)) * rng.uniform(0, 12, (B, C, 1))).astype(np.float32)


def reference_entropy(logits: Array) -> Array:
    entropy: Array = torch.distributions.Categorical(logits=torch.tensor(logits)).entropy().numpy()
    return entropy


def reference_accept(logits: Array, bound: float) -> Array:
    config = generation.EntropyBoundSamplerConfig(entropy_bound=bound)
    sampler = generation.EntropyBoundSampler(config, canvas_length=C, vocab_size=V, max_denoising_steps=1)
    canvas = torch.zeros(logits.shape[:2], dtype=torch.long)
    sampler.accept_canvas(canvas, canvas, torch.tensor(logits), cur_step=1)
    mask: Array = sampler.accepted_token_mask.numpy()
    return mask


@pytest.mark.parametrize("seed", range(5))
def test_entropy(seed: int) -> None:
    logits = random_logits(seed)
    found = np.array(canvas_sampler(mx.array(logits), mx.zeros((B, C)), None, 1.0).entropy)
    np.testing.assert_allclose(found, reference_entropy(logits), rtol=0, atol=1e-5)


def test_entropy_of_impossible_tokens() -> None:
    logits = random_logits(0)
    logits[np.random.default_rng(1).random(logits.shape) < 0.5] = -np.inf
    found = np.array(canvas_sampler(mx.array(logits), mx.zeros((B, C)), None, 1.0).entropy)
    np.testing.assert_allclose(found, reference_entropy(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bound", [1e-9, 0.01, 0.1, 1.0, 10.0, 1e9])
def test_accepted_positions(bound: float) -> None:
    accepted = []
    for seed in range(20):
        logits = random_logits(seed)
        mask = np.array(accept(mx.array(reference_entropy(logits)), bound))
        np.testing.assert_array_equal(mask, reference_accept(logits, bound))
        accepted.append(mask.mean())
    assert np.mean(accepted) >= 1 / C
    assert (np.mean(accepted) == 1) == (bound == 1e9)


@pytest.mark.parametrize("bound", [1e-9, 1.0, 10.0, 1e9])
def test_accepted_positions_with_ties(bound: float) -> None:
    """The accepted entropies are the same. The positions may differ, because torch sorts ties in any order."""
    few = random_logits(0)[:, :4].repeat(C // 4, axis=1)
    for logits in (np.zeros((B, C, V), np.float32), few):
        entropy = reference_entropy(logits)
        found, expected = np.array(accept(mx.array(entropy), bound)), reference_accept(logits, bound)
        for row in range(B):
            np.testing.assert_array_equal(
                np.sort(entropy[row][found[row]]), np.sort(entropy[row][expected[row]])
            )


@pytest.mark.parametrize(("t_min", "t_max", "steps"), [(0.4, 0.8, 48), (0.0, 1.0, 7), (0.2, 3.0, 1)])
def test_temperature_of_every_step(t_min: float, t_max: float, steps: int) -> None:
    config = GenerationConfig(t_min=t_min, t_max=t_max, max_denoising_steps=steps)
    process = generation.LinearTemperatureScheduleLogitsProcessor(t_min, t_max, steps)
    for remaining in range(steps, 0, -1):
        logits = process(None, torch.tensor([6.0], dtype=torch.float64), cur_step=remaining)
        assert 6.0 / temperature(remaining, config) == pytest.approx(logits.item(), rel=1e-12)


@pytest.mark.parametrize("confidence", [1e-3, 0.5, 100.0])
@pytest.mark.parametrize("stability", [0, 1, 2, 3])
def test_stopping_decisions(stability: int, confidence: float) -> None:
    """Canvases stay the same for a while, change in one position, and change back. Entropies vary around the bound."""
    rng = np.random.default_rng(stability)
    theirs = generation.StableAndConfidentStoppingCriteria(stability, confidence)
    ours = Stopping(
        GenerationConfig(stability_threshold=stability, confidence_threshold=confidence), REFERENCE
    )
    canvas = rng.integers(0, V, (B, C))
    decisions = []
    for _ in range(60):
        changed = rng.random(B) < 0.3
        canvas[changed, rng.integers(0, C)] = rng.integers(0, 2, changed.sum())
        logits = random_logits(int(rng.integers(1000))) * rng.choice([1, 5, 100], (B, 1, 1)).astype(np.float32)
        expected = theirs(torch.tensor(canvas), torch.tensor(logits)).numpy()
        nothing = mx.zeros(canvas.shape, mx.int32)
        sample = CanvasSample(mx.array(reference_entropy(logits)), mx.array(canvas), *[nothing] * 5)
        test, _ = ours(sample)
        np.testing.assert_array_equal(np.array(test) == TESTS.index("stable"), expected)
        assert set(test.tolist()) <= {TESTS.index("stable"), len(TESTS)}
        decisions.append(expected)
    assert 0 < np.mean(decisions) < 1 or (stability == 0 and confidence == 100.0)
