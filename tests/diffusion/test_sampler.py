"""Acceptance and random numbers against plain Python and against what they are defined to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.sampler import EntropyBound, Noise, Proposal, accept
from dgemma_mlx.kernels import canvas_sampler


def accept_one_by_one(entropy: Sequence[float], bound: float) -> list[bool]:
    """The definition: go through the positions from the most certain, while what is taken fits the bound."""
    accepted, total = [False] * len(entropy), 0.0
    for position in sorted(range(len(entropy)), key=entropy.__getitem__):
        if total > bound:
            break
        accepted[position] = True
        total += entropy[position]
    return accepted


@pytest.mark.parametrize("bound", [0.0, 1e-6, 0.1, 1.0, 30.0, 1e9])
def test_accepted_are_the_most_certain_that_fit(bound: float) -> None:
    """Entropies are multiples of 1/64, some of them equal: their sums are exact, at the bound too."""
    rng = np.random.default_rng(1)
    for length in (1, 2, 7, 60):
        entropy = rng.integers(0, 128, (20, length)) / 64
        found = accept(mx.array(entropy, mx.float32), bound).tolist()
        assert found == [accept_one_by_one(row, bound) for row in entropy.tolist()]


def test_the_most_certain_position_is_always_accepted() -> None:
    assert accept(mx.array([[3.0, 2.0, 4.0], [5.0, 5.0, 5.0]]), 0.0).sum(axis=-1).tolist() == [1, 1]


def test_one_seed_gives_one_sequence_of_numbers() -> None:
    def numbers(seed: int) -> list[Any]:
        noise = Noise(seed, 100 + seed)
        drawn = [noise.canvas(3, 50), noise.uniform(3), noise.canvas(3, 50), noise.uniform(3)]
        return [array.flatten().tolist() for array in drawn]

    first = numbers(7)
    mx.random.seed(99)
    assert numbers(7) == first
    assert numbers(8) != first
    assert first[0] != first[2]
    assert first[1] != first[3]


def test_a_row_draws_what_it_would_alone() -> None:
    together, alone = Noise(1, 2, 3), Noise(2)
    canvas, one = together.fork().canvas(5, 50), alone.fork().canvas(5, 50)
    assert canvas[1].tolist() == one[0].tolist() != canvas[2].tolist()
    together.keep([1])
    assert together.uniform(5).tolist() == alone.uniform(5).tolist()


def test_what_a_fork_draws_does_not_depend_on_what_others_draw() -> None:
    one, other = Noise(4), Noise(4)
    one.fork().canvas(3, 50)
    other.fork()
    assert one.fork().canvas(9, 50).tolist() == other.fork().canvas(9, 50).tolist() != Noise(4).canvas(9, 50).tolist()


def test_a_fork_of_some_rows_leaves_the_others_as_they_were() -> None:
    """A row that is denoised again must not change what another row draws after it."""
    together, alone = Noise(1, 2, 3), [Noise(1), Noise(2), Noise(3)]
    for rows in ([0, 2], [1, 2], [2], [0, 1, 2]):
        drawn = together.fork(rows).canvas(7, 50).tolist()
        assert drawn == [alone[row].fork().canvas(7, 50)[0].tolist() for row in rows]


def test_random_canvases_are_uniform_over_the_whole_vocabulary() -> None:
    canvas = np.array(Noise(*range(40)).canvas(500, 10))
    assert canvas.shape == (40, 500)
    assert chi_square(canvas.flatten(), np.full(10, 0.1)) < 27.9  # 9 degrees of freedom: 1 in 1,000


def test_uniform_numbers_are_uniform() -> None:
    numbers = np.array(Noise(*range(40)).uniform(500))
    assert numbers.shape == (40, 500)
    assert numbers.min() >= 0
    assert chi_square((numbers * 10).astype(int).flatten(), np.full(10, 0.1)) < 27.9


def chi_square(samples: NDArray[Any], p: NDArray[Any]) -> float:
    """Of the samples' counts against probabilities p."""
    expected = p * samples.size
    return float(((np.bincount(samples, minlength=p.size) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("number", "share"), [(1, 0.25), (2, 0.5), (4, 1.0), (9, 1.0)])
def test_a_ramp_accepts_a_growing_share_of_what_the_bound_allows(number: int, share: float) -> None:
    C, V, config = 5000, 10, GenerationConfig(entropy_bound=1.0)
    raw = mx.random.normal((2, C, V), key=mx.random.key(0)) * 9
    sample = canvas_sampler(raw, mx.zeros((2, C)), None, 1.0)
    free = mx.arange(C)[None] % 5 > 0
    canvas = mx.zeros((2, C), mx.int32)
    proposal = Proposal(canvas, sample.sample, sample, mx.concatenate([free, free]), number, raw, None)
    _, every = EntropyBound()(proposal, Noise(1, 2), config)
    canvas, some = EntropyBound(ramp=4)(proposal, Noise(1, 2), config)
    assert 0.1 < every.mean().item() < 0.9
    assert not (some & ~every).any()
    assert ((canvas == sample.sample) | ~some).all()
    assert some.sum().item() / every.sum().item() == pytest.approx(share, abs=0.03)
