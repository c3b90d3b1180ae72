"""Compare the speed modes with the samplers of mlx-vlm and diffusers: right answers and work, on the demo model.

    PEERS/bin/python benchmarks/sampler_peers.py [--prompts 100] [--ways ...] [--tasks ...] [--processes 2]
                     [--output FILE] [--plots FOLDER]

``PEERS`` is an environment that has mlx-vlm, transformers and diffusers, such as .venv-oracle. All programs read the
demo checkpoint in float32, answer the same held-out prompts with the same numbers as seeds, and are judged by the same
checkers. Work is counted as by ``answers.py``, which explains the table, the files and the plot: positions that pass
through the layers in decoder passes, and in encoder passes over canvases; never the prompt's prefill. The counts come
from the models themselves, at the calls of decoder and encoder.

The ways are this project's speed modes and those of ``measured/vlm_ways.py`` and ``measured/diffusers_ways.py``.
Without ``--ways``, those that switch off a peer's adaptive stopping are left out, because they take 48 steps for every
canvas; ``--ways all`` runs everything.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
from answers import parser_of, part, run
from measured import diffusers_ways, own_ways, vlm_ways
from measured.checkpoints import COLD_TOKENS, write
from measured.questions import TASKS, questions
from measured.records import Answerer, Record, ask, share

from dgemma_mlx import load
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.diffusion.stopping import text_ids

OURS = ["reference", "balanced", "fast"]
WAYS = [*OURS, *vlm_ways.WAYS, *diffusers_ways.ADAPTIVE]
END_OF_TURN = "<turn|>"


def answerers(ways: list[str], folder: Path) -> dict[str, Answerer]:
    """Load the programs that the ways need, from checkpoints that are written into ``folder``."""
    write("demo", folder, [COLD_TOKENS], mx.float32)
    for name in ("packed", "plain"):  # with the stopping thresholds of the demo
        shutil.copy(DEMO_FOLDER / "generation_config.json", folder / name)
    model = load("demo")

    def encode(messages: list[Any]) -> list[int]:
        return list(model.encode_prompt(messages))

    def decode(ids: list[int]) -> str:
        return model.tokenizer.decode(text_ids(ids, model.generation.eos_token_ids))

    found = {way: own_ways.answerer(model, way) for way in ways if own_ways.is_way(way)}
    if any(way in vlm_ways.WAYS for way in ways):
        found |= vlm_ways.answerers(folder / "packed", encode, decode)
    if any(way in (*diffusers_ways.ADAPTIVE, *diffusers_ways.FIXED) for way in ways):
        end = model.tokenizer.special_ids[END_OF_TURN]
        found |= diffusers_ways.answerers(folder / "plain", encode, decode, end)
    return found


def answered(arguments: argparse.Namespace) -> Iterable[Record]:
    """Answer this process's questions in all ways."""
    asked = share(questions(arguments.tasks, arguments.prompts, arguments.seed), *part(arguments.share))
    with tempfile.TemporaryDirectory() as folder:
        known = answerers(arguments.ways, Path(folder))
        for way in arguments.ways:
            yield from ask(way, known[way], asked)


def main() -> None:
    """Parse the command line, measure and print the tables."""
    parser = parser_of(__doc__, "the modes, and the peers with adaptive stopping")
    arguments = parser.parse_args()
    everything = [*WAYS, *diffusers_ways.FIXED]
    arguments.ways = everything if arguments.ways == ["all"] else arguments.ways or WAYS
    arguments.tasks = arguments.tasks or list(TASKS)
    if unknown := [way for way in arguments.ways if not own_ways.is_way(way) and way not in everything]:
        parser.error(f"not a way: {', '.join(unknown)}; the ways are {', '.join(everything)}")
    if unknown := [task for task in arguments.tasks if task not in TASKS]:
        parser.error(f"not a task of the demo model: {', '.join(unknown)}")
    for program, module in (("mlx-vlm", "mlx_vlm"), ("diffusers", "diffusers")):
        if any(way.startswith(program) for way in arguments.ways) and find_spec(module) is None:
            parser.error(f"{program} is not installed in the environment of {sys.executable}")
    run(__file__, arguments, answered(arguments))


if __name__ == "__main__":
    main()
