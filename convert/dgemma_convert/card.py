"""The files beside the weights: configuration, tokenizer, report and model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgemma_convert.plan import Plan
from dgemma_convert.verify import Verification
from dgemma_convert.writer import write_bytes, write_text
from dgemma_mlx.checkpoint.config import FULL, SLIDING, ModelConfig
from dgemma_mlx.version import __version__

REPORT = "conversion_report.json"
CARD = "README.md"


def write_small_files(plan: Plan) -> None:
    """Everything but weights, report and card."""
    for path in plan.source.small_files():
        write_bytes(plan.partial / path.name, path.read_bytes())
    _write_json(plan.partial / "config.json", output_config(plan))


def output_config(plan: Plan) -> dict[str, Any]:
    """The source's config.json with the new quantization.

    What ``per_layer_config`` of transformers >= 5.23 says is said in the published keys too, and defaults that it
    leaves out are written: mlx-vlm knows only those.
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
    """``conversion_report.json`` and the model card; nothing in them depends on when or where they were made."""
    whole = plan.as_dict()
    report = {
        "made_by": f"dgemma-mlx {__version__}",
        "source": _public_name(plan),
        **{key: whole[key] for key in ("recipe", "classes", "bytes_in", "bytes_out", "bits_per_weight", "warnings")},
        "shards": dict(shards),
        "mixed": plan.mixed,
        "verification": None if verification is None else verification.as_dict(),
    }
    _write_json(plan.partial / REPORT, report)
    write_text(plan.partial / CARD, model_card(plan, verification))
    ModelConfig.load(plan.partial)  # what we wrote, we read
    return report


def model_card(plan: Plan, verification: Verification | None) -> str:
    """The README of the output, in the Hub's form."""
    name, recipe = _public_name(plan), plan.recipe
    lines = ["---", "library_name: mlx", "pipeline_tag: text-generation", "tags: [mlx, diffusion_gemma, dgemma-mlx]"]
    if repo_id := plan.source.checkpoint.repo_id:
        lines.append(f"base_model: {repo_id}")
    lines += ["---", "", f"# {plan.output.name}", ""]
    lines += [f"Converted from {name} by dgemma-mlx {__version__}, recipe `{recipe.name}`: {recipe.summary}.", ""]
    lines += ["| tensors | count | format | MB | bits per weight |", "|---|--:|---|--:|--:|"]
    lines += [
        f"| {row.tensor_class} | {row.tensors} | {', '.join(row.formats)} | {row.bytes_out / 1e6:,.1f} | "
        f"{row.bits_per_weight:.2f} |"
        for row in plan.classes()
    ]
    total = f"| **all** | {len(plan.targets)} | | {plan.bytes_out / 1e6:,.1f} | {plan.bits_per_weight:.2f} |"
    lines += [total, "", "## Compared with the source", ""]
    if verification is None:
        lines.append("Not compared (`--verify` does).")
    else:
        lines += [
            "On four built-in prompts, the canvas half noise:", "",
            f"* hidden states after the last layer: relative error {verification.decoder_error[-1]:.4f}",
            f"* canvas logits: KL divergence {verification.kl_divergence:.5f} nats",
            f"* canvas positions with the same most probable token: {verification.top1_agreement:.1%}",
        ]  # fmt: skip
    lines += ["", "## Use", "", "```sh", f'dgemma-mlx generate -m {plan.output.name} "Why is the sky blue?"', "```", ""]
    return "\n".join(lines)


def _public_name(plan: Plan) -> str:
    """The Hub id, or a folder's own name: where it lies is nobody's business."""
    checkpoint = plan.source.checkpoint
    return checkpoint.name if checkpoint.repo_id else checkpoint.folder.resolve().name


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
