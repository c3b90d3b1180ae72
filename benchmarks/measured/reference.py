"""The measured program for transformers: ``generate`` on the CPU, with the weights before packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from job import Found, Generate, Moment, Prompt, main, now


def start(folder: Path, options: dict[str, Any]) -> Generate:
    """Load the model. ``options`` are passed to ``generate``."""
    import torch
    from transformers import DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    denoise = model._denoising_step
    begins: list[Moment] = []

    def timed(**arguments: Any) -> Any:
        begins.append(now())
        return denoise(**arguments)

    model._denoising_step = timed

    def generate(prompt: Prompt, steps: int) -> Found:
        begins.clear()
        torch.manual_seed(0)
        began, _ = now()
        model.generate(
            torch.tensor([prompt.ids]), max_new_tokens=model.config.canvas_length, max_denoising_steps=steps, **options
        )
        assert len(begins) == steps
        return Found(begins[0][0] - began, list(begins))

    return generate


if __name__ == "__main__":
    main(start, ("transformers", "torch"))
