"""``dgemma-mlx info``: describe a checkpoint and the memory it needs, from its headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.cli.complete import models
from dgemma_mlx.cli.interrupt import ending_at_once
from dgemma_mlx.cli.loading import fetch
from dgemma_mlx.cli.machines import machine_option
from dgemma_mlx.cli.parameters import AsJson, CpuDequantize, resource_option
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dgemma_convert.source import Source, Weight

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

Ranks = Annotated[
    int | None,
    machine_option("--ranks", min=2, help="Show what each of this many machines would hold (docs/several-macs.md)."),
]


def info(
    model: ModelName = None, as_json: AsJson = False, batch_size: BatchSize = 1, cpu_dequantize: CpuDequantize = None,
    ranks: Ranks = None,
) -> None:
    """Show a checkpoint's architecture, size and memory needs.

    The output has the parameters, the bits per weight, the size on disk, and an estimate of the memory that several
    lengths of context take. No weights are read, and those of a Hub model are not downloaded.

    Examples:
        dgemma-mlx info demo
        dgemma-mlx info mlx-community/diffusiongemma-26B-A4B-it-4bit --json
        dgemma-mlx info --ranks 2 google/diffusiongemma-26B-A4B-it
    """
    from dgemma_convert.source import open_source
    from dgemma_mlx.cli.settings import Settings

    settings = Settings()
    checkpoint = fetch(settings.pick("model", model), weights=False)
    with ending_at_once():
        source = open_source(checkpoint)
    facts = describe(source, settings.pick("cpu_dequantize", cpu_dequantize), batch_size, ranks)
    with quiet_when_closed():
        print(json.dumps(facts) if as_json else visible(_as_text(facts)))


def describe(
    source: Source, cpu_dequantize: str = "auto", batch_size: int = 1, ranks: int | None = None
) -> dict[str, Any]:
    """Return the facts about a checkpoint, with sizes in bytes.

    ``memory`` maps lengths of context to the memory that ``batch_size`` prompts of this length and their answers take
    on this machine, ``fits`` says whether it is there, and ``fitting_recipe`` names the recipe of a conversion that
    would fit if this checkpoint does not. ``unpacked`` says whether packed weights are unpacked in it, as ``load`` does
    with this ``cpu_dequantize``. ``cut`` is what ``cut_facts`` says of this number of ``ranks``, or None.
    """
    from dgemma_convert.recipes import EXPERTS, class_of
    from dgemma_mlx.cli.ranks import cut_facts
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
        "vision_tower": _tower(source),
        "bytes": size,
        "bits_per_weight": round(8 * size / parameters, 2),
        "formats": _formats(weights),
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
        "cut": None if ranks is None else cut_facts(source, ranks, contexts, cpu_dequantize, batch_size),
    }


def _tower(source: Source) -> dict[str, Any] | None:
    """Return the facts about the vision tower; None if the checkpoint has neither its weights nor its configuration.

    ``soft_tokens`` is the number of tokens that an image aims at by default, and ``file`` the name of the tower's own
    file, if it has one. ``problem`` says why images cannot be read, and is None if they can.
    """
    from dgemma_mlx.checkpoint.vision_config import VISION_FILE

    config, weights = source.config.vision, source.vision
    if config is None and not weights:
        return None
    if config is None:
        problem: str | None = "config.json does not describe it"
    else:
        problem = config.problem if weights else "its weights are not in the checkpoint"
    apart = any(str(tensor.path).endswith(VISION_FILE) for weight in weights for tensor in weight.stored)
    described = config is not None and config.problem is None
    return {
        "layers": config.num_hidden_layers if config is not None and described else None,
        "soft_tokens": config.default_budget if config is not None and described else None,
        "parameters": sum(weight.size for weight in weights),
        "bytes": sum(weight.nbytes for weight in weights),
        "formats": _formats(weights),
        "file": VISION_FILE if apart else None,
        "problem": problem,
    }


def _formats(weights: Iterable[Weight]) -> list[str]:
    """Return the names of all formats and dtypes of weights, sorted."""
    return sorted({str(weight.format) if weight.format else weight.stored[0].dtype for weight in weights})


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
    from dgemma_mlx.cli.ranks import cut_lines
    from dgemma_mlx.sizes import amount, size

    recipe = f", recipe {facts['recipe']}" if facts["recipe"] else ""
    full, window = facts["full_attention_layers"], facts["sliding_window"]
    rows = {
        "parameters": f"{amount(facts['parameters'])}, {amount(facts['active_parameters'])} active per token",
        "attention": f"full in {full} of {facts['layers']} layers, a window of {window} tokens in the others",
        "experts": f"{facts['experts_per_token']} of {facts['experts']}",
        "canvas": f"{facts['canvas_length']} tokens from a vocabulary of {facts['vocabulary']:,}",
        "positions": f"{facts['positions']:,}",
        "vision": _vision(facts["vision_tower"]),
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
    if facts["cut"] is not None:
        lines += [f"  {line}" for line in cut_lines(facts["cut"])]
    return "\n".join(lines)


def _vision(tower: dict[str, Any] | None) -> str:
    """Return the facts about the vision tower as one line."""
    from dgemma_mlx.sizes import amount, size

    if tower is None:
        return "no"
    if tower["problem"]:
        return f"no: {tower['problem']}"
    apart = f" in {tower['file']}" if tower["file"] else ""
    return (
        f"{amount(tower['parameters'])} in {tower['layers']} layers, {size(tower['bytes'])} "
        f"({', '.join(tower['formats'])}){apart}, {tower['soft_tokens']} tokens per image"
    )
