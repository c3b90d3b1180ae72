"""A program that two processes run: rank 0 prints what it has put into the collective operations at each draft.

    python -m tests.distributed.step_counts
"""

from __future__ import annotations

from typing import Any

from dgemma_mlx import Draft, stream
from dgemma_mlx.distributed.network import CutNetwork
from dgemma_mlx.generation.load import LoadOptions
from dgemma_mlx.generation.model import Model
from tests.distributed.machines import on_all_ranks


def counted(model: Model) -> list[Any]:
    """Answer a prompt, and return for each draft its canvas and attempt, the messages and the bytes so far."""
    assert isinstance(model.network, CutNetwork)
    counts = model.network.collective
    steps = model.generation.override(max_denoising_steps=4, confidence_threshold=0.0)  # none ends before the fourth
    return [
        [[event.canvas, event.attempt], counts.messages, counts.nbytes]
        for event in stream(model, "Sort 7 3 5", seed=1, speed="reference", generation=steps)
        if isinstance(event, Draft)
    ]


if __name__ == "__main__":
    on_all_ranks(LoadOptions("demo"), counted)
