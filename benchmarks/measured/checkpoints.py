"""Write the checkpoints and prompts that all measured programs read.

    python benchmarks/measured/checkpoints.py CASE FOLDER LENGTHS DTYPE

The script writes the same weights twice. ``FOLDER/packed`` is for the MLX programs: it uses the recipe q4 of
``dgemma-mlx convert``, except that the demo model is not packed. ``FOLDER/plain`` is for transformers, which cannot
read packed weights. Both folders have ``prompts.json``. The script prints the lengths of the prompts. ``DTYPE``
(float32 or bfloat16) is the dtype of all tensors that are not packed. On the CPU, MLX can multiply unpacked experts in
float32 only.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_convert import convert
from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.checkpoint.names import source_name
from dgemma_mlx.checkpoint.shards import open_tensors
from dgemma_mlx.cli.bench import text_of
from dgemma_mlx.json_text import read_json
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.text import load_tokenizer

SMALL_FILES = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
COLD_TOKENS = 16  # length of the prompt for the first step
NEVER_CONFIDENT = 1e-30  # no canvas has a mean entropy below this, so each one takes all denoising steps

# About 15 million parameters without the embedding. Two heads, because the attention scores of 32,768 tokens at once
# take 4 GB per head.
SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_global_key_value_heads": 1, "head_dim": 64, "global_head_dim": 128,
    "num_experts": 32, "top_k_experts": 8, "moe_intermediate_size": 192,
}
# About 2.2 billion parameters without the embedding's 0.5 billion. Heads and experts have the published widths.
LARGE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 2112, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
    "num_experts": 32, "top_k_experts": 8, "moe_intermediate_size": 704,
}
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_global_key_value_heads": 1, "head_dim": 64, "global_head_dim": 64,
    "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64,
}


@dataclass(frozen=True)
class Case:
    """A random model.

    Attributes:
        vocab_size: Vocabulary size.
        shape: Values of ``text_config`` in config.json.
        canvas_length: Canvas length in tokens.
        settled: Whether one token has nearly all the probability, as in the last steps of a canvas. Otherwise the
            predictions are nearly flat, as in the first steps.
    """

    vocab_size: int
    shape: dict[str, Any] = field(default_factory=lambda: SMALL)
    canvas_length: int = 256
    settled: bool = False


SHARPNESS = 30.0  # standard deviation of the logits of a settled case
SOFTCAP = 3000.0  # softcap of a settled case; the usual one would squeeze its logits together

CASES = {
    "small-32k": Case(32_768),
    "small-262k": Case(262_144),
    "small-262k-settled": Case(262_144, settled=True),
    "large": Case(262_144, LARGE),
    "tiny-262k": Case(262_144, TINY, canvas_length=32),
    "tiny": Case(1024, TINY, canvas_length=32),
}


def write(name: str, folder: Path, lengths: list[int], dtype: mx.Dtype) -> list[int]:
    """Write both folders of a case, or of "demo". Return the prompt lengths that leave room for a canvas."""
    packed, plain = folder / "packed", folder / "plain"
    if name == "demo":
        shutil.copytree(DEMO_FOLDER, plain)
        shutil.copytree(DEMO_FOLDER, packed)
    else:
        _write_random(plain, CASES[name])
        convert(str(plain), packed, "q4")
    _rewrite(packed, dtype)
    _rewrite(plain, dtype, for_transformers=True)
    config = ModelConfig.load(packed)
    most = config.text.max_position_embeddings - config.canvas_length
    fitting = [length for length in lengths if length <= most] or [most]
    for checkpoint in (packed, plain):
        _write_prompts(checkpoint, fitting)
        generation = read_json(checkpoint / "generation_config.json")
        generation["confidence_threshold"] = NEVER_CONFIDENT
        (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    return fitting


def _write_random(folder: Path, case: Case) -> None:
    """Write a checkpoint in the published layout, with random bfloat16 weights."""
    folder.mkdir(parents=True)
    for file in SMALL_FILES:
        shutil.copy(DEMO_FOLDER / file, folder)
    _write_tokenizer(folder, case.vocab_size)
    config = read_json(DEMO_FOLDER / "config.json")
    config["vision_config"] = None
    config["canvas_length"] = case.canvas_length
    config["text_config"].update(
        case.shape, vocab_size=case.vocab_size, sliding_window=1024, max_position_embeddings=262_144
    )
    config["text_config"].pop("layer_types")
    if case.settled:
        config["text_config"]["final_logit_softcapping"] = SOFTCAP
    (folder / "config.json").write_text(json.dumps(config))
    model = DiffusionGemma(ModelConfig.from_dict(config).text)
    sharpness = SHARPNESS if case.settled else 1.0
    tensors = {}
    for number, (path, array) in enumerate(tree_flatten(model.parameters())):
        tensors[source_name(path)] = _random(path, array.shape, mx.random.key(number), sharpness)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write the demo model's tokenizer, extended to ``vocab_size`` by pieces that no text encodes to."""
    tokenizer = read_json(DEMO_FOLDER / "tokenizer.json")
    known: dict[str, int] = tokenizer["model"]["vocab"]
    known.update({f"piece {id}": id for id in range(len(known), vocab_size)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _random(path: str, shape: tuple[int, ...], key: mx.array, sharpness: float) -> mx.array:
    """Return a random bfloat16 tensor: a matrix that preserves the scale of its input, or norm weights near one."""
    if len(shape) > 1:
        return (mx.random.normal(shape, key=key) * shape[-1] ** -0.5).astype(mx.bfloat16)
    factor = sharpness if path == "norm.weight" else shape[0] ** -0.5 if "q_norm" in path else 1.0
    return (factor * (1 + 0.1 * mx.random.normal(shape, key=key))).astype(mx.bfloat16)


def _rewrite(folder: Path, dtype: mx.Dtype, for_transformers: bool = False) -> None:
    """Convert all floating-point tensors of a checkpoint to ``dtype`` and write them to one file.

    For transformers, also remove ``.weight`` from the names of experts and, where there is no vision tower, add the
    smallest possible one to the configuration, because transformers always creates one.
    """
    tensors = {
        name.replace("_proj.weight", "_proj") if for_transformers and ".experts." in name else name:
        tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor
        for name, tensor in open_tensors(folder).items()
    }  # fmt: skip
    mx.eval(tensors)
    for old in folder.glob("model*"):
        old.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    config["dtype"] = str(dtype).removeprefix("mlx.core.")
    if for_transformers and not config["vision_config"]:
        config["vision_config"] = {
            "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def _write_prompts(folder: Path, lengths: list[int]) -> None:
    """Write ``prompts.json``: a prompt of each length, and the prompt "cold" for the first step."""
    tokenizer = load_tokenizer(folder)
    prompts = {}
    for name, length in {"cold": COLD_TOKENS, **{str(length): length for length in lengths}}.items():
        text = text_of(tokenizer, length)
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        prompts[name] = {"text": text, "ids": bos + tokenizer.encode(text)}
    (folder / "prompts.json").write_text(json.dumps(prompts))


if __name__ == "__main__":
    name, folder, lengths, dtype = sys.argv[1:]
    if name not in (*CASES, "demo"):
        sys.exit(f"unknown case {name!r}; the cases are {', '.join(CASES)} and demo")
    fitting = write(name, Path(folder), [int(length) for length in lengths.split(",")], getattr(mx, dtype))
    print(json.dumps(fitting))
