"""The line about an answer that commands print to stderr after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dgemma_mlx.sizes import counted, size

if TYPE_CHECKING:
    from dgemma_mlx.events import Done


def summary(done: Done) -> str:
    """Return tokens, canvases, steps, seconds, speed, memory and seed of an answer in one line.

    The speed counts the tokens of the answer, with its thinking and without padding, over the time after the prompt was
    encoded. The seconds are those of the prompt and the answer.
    """
    s = done.statistics
    speed = f"{s.tokens_per_second:,.{0 if s.tokens_per_second >= 10 else 1}f}"
    return (
        f"{counted(s.generated_tokens, 'token')} in {counted(s.canvases, 'canvas', 'canvases')}, "
        f"{counted(s.denoising_steps, 'step')} ({s.tokens_per_forward:.1f} tokens per step), "
        f"{s.seconds:.2f} s, {speed} tokens/s after the prompt, peak {size(s.peak_memory)}, "
        f"seed {done.seed}"
    )
