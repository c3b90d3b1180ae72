"""``dgemma-mlx choose``: a question and some answers in, their probabilities out."""

from __future__ import annotations

import csv
from dataclasses import asdict
from typing import Annotated

import typer

from dgemma_mlx.cli.fill import System
from dgemma_mlx.cli.generate import Adapter, Dequantize, MemoryLimit, ModelName, NoKernels, Prompt, Quiet, Raw, Seed
from dgemma_mlx.cli.infill import prepared
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.prompt import read_prompt
from dgemma_mlx.cli.render.visible import json_line, visible

From = Annotated[str, typer.Option("--from", metavar="A,B,C", help="The answers; one with a comma in double quotes.")]
Listed = Annotated[bool, typer.Option("--list", help="Name the answers in the question.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def choose(
    choices: From,
    question: Prompt = None,
    listed: Listed = False,
    as_json: AsJson = False,
    model: ModelName = None,
    adapter: Adapter = None,
    seed: Seed = None,
    system: System = None,
    raw: Raw = False,
    memory_limit: MemoryLimit = None,
    cpu_dequantize: Dequantize = None,
    no_kernels: NoKernels = False,
    quiet: Quiet = False,
) -> None:
    """Say how probable each of some answers is, by one pass over one canvas: a fast classifier."""
    asked = read_prompt(question)
    answers = [answer for row in csv.reader([choices], skipinitialspace=True) for answer in row]
    with quiet_when_closed():
        with prepared(
            model=model, adapter=adapter, seed=seed, system=system, raw=raw, speed=None, temp=None,
            max_denoising_steps=None, memory_limit=memory_limit, cpu_dequantize=cpu_dequantize,
            no_kernels=no_kernels, quiet=quiet,
        ) as (loaded, options):  # fmt: skip
            from dgemma_mlx.infill.choose import choose as choose_among

            found = choose_among(loaded, asked, answers, listed=listed, raw=raw, **options)
        if as_json:
            print(json_line({"model": loaded.name, "choices": [asdict(choice) for choice in found]}))
        else:
            for choice in found:
                print(f"{choice.probability:.4f}  {visible(choice.text)}")
