"""The line about an answer."""

from __future__ import annotations

from dgemma_mlx.cli.summary import summary
from dgemma_mlx.events import Done, Statistics


def done(tokens: int, peak_memory: int, speed: float = 1234.5) -> Done:
    statistics = Statistics(
        prompt_tokens=9, cached_tokens=0, generated_tokens=tokens, canvases=tokens, denoising_steps=tokens,
        tokens_per_forward=1.0, prefill_seconds=1.5, seconds=2.0, tokens_per_second=speed, peak_memory=peak_memory,
    )  # fmt: skip
    return Done("", "", (), (), "stop", 7, statistics)


def test_the_line_says_what_is_counted_and_names_units_as_they_are() -> None:
    assert summary(done(2, 17_500_000_000)) == (
        "2 tokens in 2 canvases, 2 steps (1.0 tokens per step), 2.00 s, 1,234 tokens/s after the prompt, "
        "peak 17.5 GB, seed 7"
    )
    assert summary(done(1, 31 * 2**20)).startswith("1 token in 1 canvas, 1 step ")
    assert ", 0.3 tokens/s after" in summary(done(1, 1, 0.26))
    assert ", peak 32.5 MB, " in summary(done(1, 31 * 2**20))
