"""The measured program for dgemma-mlx: ``load`` and ``stream``, in speed mode ``reference``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job import Found, Generate, Prompt, main, now


def start(folder: Path, options: dict[str, Any]) -> Generate:
    """Load the model. ``options`` are passed to ``load``."""
    import mlx.core as mx

    from dgemma_mlx import Done, Draft, load, stream

    model = load(folder, **options)

    def generate(prompt: Prompt, steps: int) -> Found:
        # One more step than is measured: while a step's draft is yielded, the next one has begun. A single step, whose
        # end is the end of the start, has no next one.
        done = steps + (steps > 1)
        loop = model.generation.override(max_denoising_steps=done)
        ends = []
        for event in stream(
            model, prompt.text, raw=True, seed=0, max_tokens=model.config.canvas_length, speed="reference",
            generation=loop,
        ):
            if isinstance(event, Draft):
                ends.append(now())
            elif isinstance(event, Done):
                seconds, tokens = event.statistics.prefill_seconds, event.statistics.prompt_tokens
        assert (tokens, len(ends)) == (len(prompt.ids), done)
        return Found(seconds, ends[:steps], mx.get_peak_memory())

    return generate


if __name__ == "__main__":
    main(start, ("dgemma-mlx", "mlx"))
