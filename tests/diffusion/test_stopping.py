"""The stopping tests against the same rules in plain Python."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import GenerationConfig
from dgemma_mlx.diffusion.speed import REFERENCE, SETTLED_END, SPEEDS, UNCERTAIN, ConfidentTest, PlateauTest, Speed
from dgemma_mlx.diffusion.stopping import TESTS, Stopping
from dgemma_mlx.kernels import MAX_KEPT, CanvasSample

END, C = 0, 3  # an end-of-text id; positions of a canvas
Step = tuple[list[int], list[float], list[float]]  # argmax, entropies, gaps of one row


def sampled(argmax: Any, entropy: Any, gap: Any = 0.0) -> CanvasSample:
    """Return a sample in which only these values matter; its two largest weights are ``gap`` apart."""
    argmax = mx.array(argmax, mx.int32)
    gap = mx.broadcast_to(mx.array(gap, mx.float32), argmax.shape)
    weights = mx.stack([mx.zeros(gap.shape), (1 - gap) / 2, (1 + gap) / 2, mx.zeros(gap.shape)], axis=-1)
    nothing = mx.zeros(argmax.shape, mx.int32)
    return CanvasSample(mx.array(entropy, mx.float32), argmax, nothing, nothing + 2, nothing, weights, nothing)


def decide(steps: list[Step], config: GenerationConfig, speed: Speed, free: list[bool]) -> str | None:
    """Return which test the last step of a row passes, given all of its steps."""
    argmax, entropy, gaps = steps[-1]
    counting = [place for place in range(C) if free[place]]
    ends = [place for place in range(C) if argmax[place] == END]
    if speed.ignore_after_end and ends and entropy[ends[0]] < SETTLED_END:
        counting = [place for place in counting if place <= ends[0]]
    mean = sum(entropy[place] for place in counting) / max(1, sum(free))

    def unchanged(count: int) -> bool:
        earlier = [canvas for canvas, _, _ in steps[-1 - count : -1]] if count else []
        return len(earlier) == count and all(canvas[p] == argmax[p] for canvas in earlier for p in counting)

    if unchanged(config.stability_threshold) and mean < config.confidence_threshold:
        return "stable"
    confident, plateau = speed.confident, speed.plateau
    limit = max(0.0 if confident is None else confident.max_entropy, config.confidence_threshold)
    if confident is not None and len(steps) >= confident.first_step and mean < limit:
        return "confident"
    if speed.gap is not None and all(gaps[place] > speed.gap for place in counting):
        return "gap"
    if plateau is not None and unchanged(plateau.steps) and mean < plateau.max_entropy:
        return "plateau"
    return None


MODES = {
    **{f"stable for {n}": (n, REFERENCE) for n in (0, 1, 2, 3)},
    "confident": (1, Speed(confident=ConfidentTest(3, 0.7), ignore_after_end=False)),
    "gap": (1, Speed(gap=0.5)),
    "plateau": (3, Speed(plateau=PlateauTest(2, 0.8))),
    "everything": (2, Speed(gap=0.7, confident=ConfidentTest(5, 0.55), plateau=PlateauTest(1, 0.6))),
}


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
def test_stops_when_a_test_is_passed(mode: str, pinned: bool) -> None:
    """Short canvases over few tokens, so that they often stay and often come back."""
    stability, speed = MODES[mode]
    config = GenerationConfig(stability_threshold=stability, confidence_threshold=0.5, eos_token_ids=(END, 77))
    rng = np.random.default_rng(len(mode) + pinned)
    free = rng.random((3, C)) < 0.6 if pinned else np.ones((3, C), bool)
    rule = Stopping(config, speed, mx.array(free) if pinned else None)
    canvases, entropies = rng.integers(0, 2, (200, 3, C)), rng.choice([0, 0.02, 0.25, 0.5, 0.75, 1], (200, 3, C))
    gaps = rng.choice([0.25, 0.6, 0.75, 0.9], (200, 3, C))
    canvases[30:60] = canvases[30]
    seen: list[list[Step]] = [[], [], []]
    decisions = []
    for now in zip(canvases, entropies, gaps, strict=True):
        test, _ = rule(sampled(*now))
        for row in range(3):
            seen[row].append((now[0][row].tolist(), now[1][row].tolist(), now[2][row].tolist()))
        found = [TESTS[i] if i < len(TESTS) else None for i in test.tolist()]
        assert found == [decide(seen[row], config, speed, free[row].tolist()) for row in range(3)]
        decisions += found
    assert mode.split()[0] in (*decisions, "everything")
    assert None in decisions
    if mode == "everything":
        assert set(decisions) == {*TESTS, None} - {"encoder"}  # that one is the encoder's check


def test_mean_entropy_at_the_threshold_is_not_confident() -> None:
    config = GenerationConfig(stability_threshold=0, confidence_threshold=0.5)
    for entropy, found in (([0.25, 0.75], None), ([0.25, 0.7], "stable")):
        test, _ = Stopping(config, REFERENCE)(sampled([[5, 5]], [entropy]))
        assert test.tolist() == [(*TESTS, None).index(found)]


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_canvas_is_uncertain_above_a_mean_entropy(speed: str) -> None:
    rule = Stopping(GenerationConfig(eos_token_ids=(END,)), SPEEDS[speed])
    canvases = [[5, 5], [5, 5], [END, 5]]
    entropy = [[UNCERTAIN, UNCERTAIN + 0.01], [UNCERTAIN, UNCERTAIN - 0.01], [0.01, 3.0]]
    _, uncertain = rule(sampled(canvases, entropy))
    assert uncertain.tolist() == [True, False, speed == "reference"]  # text after the end is dropped


def test_a_list_that_is_cut_off_says_nothing_about_the_gap() -> None:
    sample = sampled([[5, 5]], [[3.0, 3.0]], 0.95)
    none = len(TESTS)
    for count, found in ((MAX_KEPT, TESTS.index("gap")), (MAX_KEPT + 1, none)):
        test, _ = Stopping(GenerationConfig(), Speed(gap=0.9))(sample._replace(kept_count=mx.array([[2, count]])))
        assert test.tolist() == [found]


def test_where_the_reference_stops_so_do_the_other_modes() -> None:
    rng = np.random.default_rng(0)
    config = GenerationConfig(stability_threshold=1, confidence_threshold=0.1, eos_token_ids=(END,))
    canvas, entropy = rng.integers(0, 2, (2000, C)), rng.choice([0.0, 0.1, 0.3], (2000, C))
    next_canvas = np.where(rng.random((2000, 1)) < 0.5, canvas, 1 - canvas)
    stops = {}
    for name, speed in SPEEDS.items():
        rule = Stopping(config, speed)
        rule(sampled(canvas, entropy))
        stops[name] = np.array(rule(sampled(next_canvas, entropy))[0]) < len(TESTS)
    assert 0 < stops["reference"].mean() < 1
    for name in SPEEDS:
        assert (stops[name] | ~stops["reference"]).all()


@pytest.mark.parametrize("speed", SPEEDS.values(), ids=SPEEDS)
def test_nan_is_uncertain_and_passes_no_test(speed: Speed) -> None:
    stopping = Stopping(GenerationConfig(), speed)
    for _ in range(15):
        test, uncertain = stopping(sampled([[1, 2, 3]], [[float("nan")] * C], float("nan")))
        assert test.item() == len(TESTS)
        assert uncertain.item()
