"""Write the golden files in this folder: a tiny random checkpoint, and what transformers computes with it.

Run this from the repository's root in the environment of ``make oracle``:

    python -m tests.golden.export

The files were made with transformers 5.23.0 and torch 2.13.0 on a CPU. The tests that read them need neither package.

* ``config.json``, ``model.safetensors``: a text-only checkpoint in the published layout, with random weights.
* ``generation_config.json``: parameters with which the checkpoint's canvases finish after several steps.
* ``numbers.npz``: inputs and outputs, which ``network`` and ``trace`` describe.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.diffusion.replay import draw
from tests.oracle.reference import Array, Generation, Reference, generate, publish, write_checkpoint

FOLDER = Path(__file__).parent
CANVAS, CANVASES = 12, 2
SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_attention_heads": 4, "head_dim": 8, "global_head_dim": 16, "sliding_window": 6,
    "num_experts": 4, "moe_intermediate_size": 16,
}  # fmt: skip
GENERATION: dict[str, Any] = {
    "max_denoising_steps": 16, "t_min": 0.2, "t_max": 0.6, "stability_threshold": 1, "confidence_threshold": 0.6,
}  # fmt: skip
ENTROPY_BOUND = 3.0
MARGIN = 1e-3  # least distance of entropies and logits from a decision
CUMULATIVE_MARGIN = 1e-5  # least distance of a uniform number from a step of the cumulative probability


def network(reference: Reference, left_padding: tuple[int, int]) -> dict[str, Array]:
    """Run the reference on two rows of random ids and return the inputs and outputs by name.

    * ``prompt`` (2, P), longer than the sliding window, and its hidden states ``prompt_hidden``.
    * ``first`` (2, C), a canvas, with its ``logits`` and, conditioned on logits / 0.6, its ``conditioned_logits``.
    * ``first_hidden``, the hidden states of this canvas when it is committed.
    * ``second`` (2, C), the next canvas, and its ``second_logits``.
    """
    rng = np.random.default_rng(0)
    prompt, first, second = (rng.integers(0, reference.vocab_size, (2, length)) for length in (15, CANVAS, CANVAS))
    reference.start(left_padding)
    numbers = {"prompt": prompt, "first": first, "second": second, "prompt_hidden": reference.encode(prompt)}
    numbers["logits"] = reference.decode(first)
    numbers["conditioned_logits"] = reference.decode(first, numbers["logits"] / 0.6)
    numbers["first_hidden"] = reference.encode(first)
    numbers["second_logits"] = reference.decode(second)
    return numbers


def trace(reference: Reference, seed: int) -> tuple[dict[str, Array], Generation]:
    """Generate two canvases with the reference; return the random numbers and what each step computed, and the result.

    The arrays of steps are (S, C), with the S steps of both canvases one after the other.
    """
    prompt = np.random.default_rng(seed).integers(0, reference.vocab_size, (1, 9))
    draws = CANVASES * (GENERATION["max_denoising_steps"] + 1)
    canvases, uniforms = draw(seed, draws, 1, CANVAS, reference.vocab_size)
    generated = generate(
        reference.model, prompt, canvases, uniforms,
        max_new_tokens=CANVASES * CANVAS, entropy_bound=ENTROPY_BOUND, eos_token_id=None, **GENERATION,
    )  # fmt: skip
    steps = [step for canvas in generated.canvases for step in canvas]
    numbers: dict[str, Array] = {
        "prompt": prompt,
        "canvases": canvases[: len(steps) + CANVASES],
        "uniforms": uniforms[: len(steps)],
        "canvas": np.repeat(np.arange(CANVASES), [len(canvas) for canvas in generated.canvases]),
        "argmax_canvas": np.concatenate([step.argmax_canvas for step in steps]),
        "current_canvas": np.concatenate([step.current_canvas for step in steps]),
        "accepted_mask": np.concatenate([step.accepted_mask for step in steps]),
        "entropy": np.concatenate([step.entropy for step in steps]),
        "tokens_per_forward": generated.tokens_per_forward,
    }
    return numbers, generated


def margin(numbers: dict[str, Array], generated: Generation) -> float:
    """Return the distance of a trace's closest decision.

    If it is large enough, the golden numbers also hold with the rounding errors of another machine.
    """
    logits = np.concatenate([step.logits for canvas in generated.canvases for step in canvas])  # (S, C, V)
    cumulative = np.exp(logits - logits.max(axis=-1, keepdims=True)).astype(np.float64).cumsum(axis=-1)
    entropy = np.sort(numbers["entropy"], axis=-1)
    before = np.cumsum(entropy, axis=-1) - entropy
    return float(
        min(
            np.abs(np.diff(np.sort(logits)[..., -2:])).min(),
            np.abs(cumulative / cumulative[..., -1:] - numbers["uniforms"][:, 0, :, None]).min()
            * (MARGIN / CUMULATIVE_MARGIN),
            np.abs(before - ENTROPY_BOUND).min(),
            np.abs(entropy.mean(axis=-1) - GENERATION["confidence_threshold"]).min(),
        )
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), seed=5, branch=0.3, canvas_length=CANVAS, **SHAPE)
        publish(Path(folder), FOLDER)
        reference = Reference(Path(folder))
    sampler = {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": ENTROPY_BOUND}
    config = {**GENERATION, "sampler_config": sampler, "eos_token_id": 1, "pad_token_id": 0}
    (FOLDER / "generation_config.json").write_text(json.dumps(config, indent=1) + "\n")

    for seed in range(1000):
        numbers, generated = trace(reference, seed)
        lengths = [len(canvas) for canvas in generated.canvases]
        settles = all(5 < length < GENERATION["max_denoising_steps"] for length in lengths)
        if settles and margin(numbers, generated) > MARGIN:
            break
    else:
        raise SystemExit("no seed gives a trace that finishes and has no close decision")
    parts = {
        "plain": network(reference, (0, 0)),
        "padded": network(reference, (0, 4)),
        "trace": numbers,
    }
    flat = {f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()}
    small: dict[str, Any] = {
        name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in flat.items()
    }
    np.savez_compressed(FOLDER / "numbers.npz", **small)
    print(f"trace of seed {seed}: {lengths} steps")


if __name__ == "__main__":
    main()
