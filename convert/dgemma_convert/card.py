"""The files of an output other than its weights: configuration, tokenizer, report and model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgemma_convert.plan import Plan
from dgemma_convert.verify import Verification
from dgemma_convert.writer import write_bytes, write_text
from dgemma_mlx.checkpoint.config import FULL, SLIDING, ModelConfig
from dgemma_mlx.checkpoint.output import CARD, CONVERT_REPORT
from dgemma_mlx.checkpoint.shards import INDEX
from dgemma_mlx.sizes import size
from dgemma_mlx.version import __version__


def write_small_files(plan: Plan) -> None:
    """Write config.json and copy the tokenizer and the other small files of the source."""
    for path in plan.source.small_files():
        write_bytes(plan.partial / path.name, path.read_bytes())
    _write_json(plan.partial / "config.json", output_config(plan))


def output_config(plan: Plan) -> dict[str, Any]:
    """Return the source's config.json with the quantization of the output.

    transformers >= 5.23 writes ``per_layer_config`` and leaves out defaults. mlx-vlm reads only the keys of the
    published checkpoint, so these are written as well.
    """
    config, text = dict(plan.source.raw_config), plan.source.config.text
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    config.setdefault("vision_config", None)
    config["dtype"] = "bfloat16"
    config["text_config"] = {
        **config["text_config"],
        "head_dim": text.layer_head_dim(SLIDING),
        "global_head_dim": text.layer_head_dim(FULL),
        "num_key_value_heads": text.kv_heads(SLIDING),
        "num_global_key_value_heads": text.kv_heads(FULL),
        "final_logit_softcapping": text.final_logit_softcapping,
        "layer_types": list(text.layer_types),
    }
    if quantization := plan.quantization():
        config["quantization"] = config["quantization_config"] = quantization
    return config


def write_report(plan: Plan, shards: Mapping[str, str], verification: Verification | None) -> dict[str, Any]:
    """Write ``conversion_report.json`` and the model card, and return the content of the report.

    Neither depends on the time or the place of the conversion. ``shards`` are the sha256 digests by file name. Raises
    ``DgemmaError`` if the written config.json cannot be read.
    """
    fields = ("recipe", "classes", "bytes_in", "bytes_out", "bits_per_weight", "warnings")
    planned, small = plan.as_dict(), plan.source.small_files()
    report = {
        "made_by": f"dgemma-mlx {__version__}",
        "source": _public_name(plan),
        **{key: planned[key] for key in fields},
        "files": sorted({"config.json", INDEX, CONVERT_REPORT, CARD, *shards, *(path.name for path in small)}),
        "shards": dict(shards),
        "mixed": plan.mixed,
        "verification": None if verification is None else verification.as_dict(),
    }
    _write_json(plan.partial / CONVERT_REPORT, report)
    write_text(plan.partial / CARD, model_card(plan, verification))
    ModelConfig.load(plan.partial)  # check that the output can be read
    return report


def model_card(plan: Plan, verification: Verification | None) -> str:
    """Return the model card of the output: a README.md with the metadata that the Hub reads."""
    name, recipe = _public_name(plan), plan.recipe
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags: [mlx, diffusion_gemma, dgemma-mlx]"]
    if repo_id := plan.source.checkpoint.repo_id:
        lines.append(f"base_model: {repo_id}")
    lines += ["---", "", f"# {plan.output.name}", ""]
    made_by = f"dgemma-mlx {__version__} with the recipe `{recipe.name}`"
    lines += [f"Converted from {name} by {made_by}: {recipe.summary}.", ""]
    lines += ["| tensors | count | format | size | bits per weight |", "|---|--:|---|--:|--:|"]
    lines += [
        f"| {row.tensor_class} | {row.tensors} | {', '.join(row.formats)} | {size(row.bytes_out)} | "
        f"{row.bits_per_weight:.2f} |"
        for row in plan.classes()
    ]
    total = f"| **all** | {len(plan.targets)} | | {size(plan.bytes_out)} | {plan.bits_per_weight:.2f} |"
    lines += [total, "", "## Comparison with the source", ""]
    if verification is None:
        lines.append("The output was not compared with its source. `dgemma-mlx convert --verify` does that.")
    else:
        lines += [
            "Measured on four built-in prompts, with half of the canvas replaced by noise:", "",
            f"* Hidden states after the last layer: relative error {verification.decoder_error[-1]:.4f}",
            f"* Canvas logits: KL divergence {verification.kl_divergence:.5f} nats",
            f"* Canvas positions with the same most probable token: {verification.top1_agreement:.1%}",
        ]  # fmt: skip
    lines += ["", "## Use", "", "```sh", f'dgemma-mlx generate -m {plan.output.name} "Why is the sky blue?"', "```", ""]
    return "\n".join(lines)


def _public_name(plan: Plan) -> str:
    """Return the source's Hub id, or the name of its folder without the private path to it."""
    checkpoint = plan.source.checkpoint
    return checkpoint.name if checkpoint.repo_id else checkpoint.folder.resolve().name


def _write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
