"""``dgemma-mlx info``: describe a checkpoint and the memory it needs, from its headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.cli.complete import models
from dgemma_mlx.cli.interrupt import ending_at_once
from dgemma_mlx.cli.loading import fetch
from dgemma_mlx.cli.parameters import AsJson, CpuDequantize, resource_option
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_convert.source import Source

_CONTEXTS = (1024, 8192, 32_768, 131_072)

ModelName = Annotated[
    str | None,
    typer.Argument(
        show_default="the settings' model, else demo", help="A folder, a Hub id `owner/name[@revision]`, or `demo`.",
        autocompletion=models,
    ),
]

BatchSize = Annotated[
    int, resource_option("--batch-size", min=1, help="Number of prompts at a time, for the estimate of the memory.")
]


def info(
    model: ModelName = None, as_json: AsJson = False, batch_size: BatchSize = 1, cpu_dequantize: CpuDequantize = None
) -> None:
    """Show a checkpoint's architecture, size and memory needs.

    The output has the parameters, the bits per weight, the size on disk, and an estimate of the memory that several
    lengths of context take. No weights are read, and those of a Hub model are not downloaded.

    Examples:
        dgemma-mlx info demo
        dgemma-mlx info mlx-community/diffusiongemma-26B-A4B-it-4bit --json
    """
    from dgemma_convert.source import open_source
    from dgemma_mlx.cli.settings import Settings

    settings = Settings()
    checkpoint = fetch(settings.pick("model", model), weights=False)
    with ending_at_once():
        source = open_source(checkpoint)
    facts = describe(source, settings.pick("cpu_dequantize", cpu_dequantize), batch_size)
    with quiet_when_closed():
        print(json.dumps(facts) if as_json else visible(_as_text(facts)))


def describe(source: Source, cpu_dequantize: str = "auto", batch_size: int = 1) -> dict[str, Any]:
    """Return the facts about a checkpoint, with sizes in bytes.

    ``memory`` maps lengths of context to the memory that ``batch_size`` prompts of this length and their answers take
    on this machine, ``fits`` says whether it is there, and ``fitting_recipe`` names the recipe of a conversion that
    would fit if this checkpoint does not. ``unpacked`` says whether packed weights are unpacked in it, as ``load`` does
    with this ``cpu_dequantize``.
    """
    from dgemma_convert.recipes import EXPERTS, class_of
    from dgemma_mlx.cli.verdict import judge, loaded_bytes, unpacks
    from dgemma_mlx.generation.memory import Work, cache_memory, run_memory

    config, text = source.config, source.config.text
    weights = [*source.text.values(), *source.vision]
    parameters, size = sum(weight.size for weight in weights), sum(weight.nbytes for weight in weights)
    experts = sum(weight.size for path, weight in source.text.items() if class_of(path + weight.suffix) == EXPERTS)
    in_text = sum(weight.size for weight in source.text.values())
    loaded = loaded_bytes(source, cpu_dequantize)
    positions = text.max_position_embeddings
    verdict = judge(source, loaded, batch_size)
    contexts = [*(n for n in _CONTEXTS if n < positions), positions]
    return {
        "model": source.checkpoint.name,
        "folder": str(source.folder),
        "architecture": "DiffusionGemma",
        "parameters": parameters,
        "active_parameters": in_text - experts + experts * text.top_k_experts // text.num_experts,
        "layers": text.num_hidden_layers,
        "full_attention_layers": text.layer_types.count("full_attention"),
        "sliding_window": text.sliding_window,
        "experts": text.num_experts,
        "experts_per_token": text.top_k_experts,
        "vocabulary": text.vocab_size,
        "canvas_length": config.canvas_length,
        "positions": positions,
        "vision": bool(source.vision),
        "bytes": size,
        "bits_per_weight": round(8 * size / parameters, 2),
        "formats": sorted({str(weight.format) if weight.format else weight.stored[0].dtype for weight in weights}),
        "recipe": _recipe(source.folder),
        "unpacked": unpacks(source, cpu_dequantize),
        "batch_size": batch_size,
        "memory": {
            str(n): {
                "cache": batch_size * cache_memory(config, n),
                "total": run_memory(config, loaded, n, work=Work(batch_size)),
            }
            for n in contexts
        },
        "memory_available": verdict.available,
        "fits": verdict.fits,
        "fitting_recipe": verdict.recipe,
        "verdict": verdict.sentence(),
    }


def _recipe(folder: Path) -> str | None:
    """Return the recipe of a checkpoint that this program has converted, or None."""
    from dgemma_mlx.json_text import read_json

    try:
        recipe = read_json(folder / "conversion_report.json").get("recipe")
    except DgemmaError:
        return None
    return recipe if isinstance(recipe, str) else None


def _as_text(facts: dict[str, Any]) -> str:
    """Return the facts as rows of names and values."""
    from dgemma_mlx.sizes import amount, size

    recipe = f", recipe {facts['recipe']}" if facts["recipe"] else ""
    full, window = facts["full_attention_layers"], facts["sliding_window"]
    rows = {
        "parameters": f"{amount(facts['parameters'])}, {amount(facts['active_parameters'])} active per token",
        "attention": f"full in {full} of {facts['layers']} layers, a window of {window} tokens in the others",
        "experts": f"{facts['experts_per_token']} of {facts['experts']}",
        "canvas": f"{facts['canvas_length']} tokens from a vocabulary of {facts['vocabulary']:,}",
        "positions": f"{facts['positions']:,}",
        "vision": "yes" if facts["vision"] else "no",
        "on disk": f"{size(facts['bytes'])}, {facts['bits_per_weight']} bits per weight",
        "formats": ", ".join(facts["formats"]) + recipe,
        "folder": facts["folder"],
    }
    lines = [f"{facts['model']}: {facts['architecture']}", *(f"  {name:11} {text}" for name, text in rows.items())]
    unpacked = ", with packed weights unpacked (--cpu-dequantize off leaves them packed)" if facts["unpacked"] else ""
    batch = f" with {facts['batch_size']} prompts at a time" if facts["batch_size"] > 1 else ""
    lines.append(f"  estimated memory to run it{batch}{unpacked}:")
    lines += [
        f"    {int(context):>7,} tokens of context  {size(memory['total']):>9} (cache {size(memory['cache'])})"
        for context, memory in facts["memory"].items()
    ]
    lines.append(f"  {facts['verdict']}")
    return "\n".join(lines)
