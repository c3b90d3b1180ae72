"""The measured program for mlx-vlm: ``load`` and ``stream_generate``, with the reference's entropy-bound sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job import Found, Generate, Prompt, main, now


def start(folder: Path, options: dict[str, Any]) -> Generate:
    """Load the model. ``options`` are passed to ``stream_generate``."""
    import mlx.core as mx
    from mlx_vlm import load, stream_generate

    model, processor = load(str(folder))
    decode, calls = model.diffusion_decoder_logits, []

    def timed(*arguments: Any, **named: Any) -> Any:
        calls.append(now())
        return decode(*arguments, **named)

    model.diffusion_decoder_logits = timed

    def generate(prompt: Prompt, steps: int) -> Found:
        calls.clear()
        mx.reset_peak_memory()
        *_, last = stream_generate(
            model, processor, "", input_ids=mx.array([prompt.ids]), max_tokens=model.config.canvas_length, seed=0,
            max_denoising_steps=steps, temperature=1.0, diffusion_sampler="entropy-bound", diffusion_full_canvas=True,
            **options,
        )
        assert len(calls) == steps
        return Found(last.prompt_tokens / last.prompt_tps, list(calls), mx.get_peak_memory())

    return generate


if __name__ == "__main__":
    main(start, ("mlx-vlm", "mlx", "transformers"))
