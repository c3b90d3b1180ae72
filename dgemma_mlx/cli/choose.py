"""``dgemma-mlx choose``: a question and some answers in, their probabilities out."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dgemma_mlx.cli.image_options import ImageOptions, show_images
from dgemma_mlx.cli.interrupt import interruptible
from dgemma_mlx.cli.loading import answer_arguments, load_model
from dgemma_mlx.cli.log.keep import Keeper
from dgemma_mlx.cli.machines import MachineOptions
from dgemma_mlx.cli.parameters import AnswerOptions, AsJson, ModelOptions, Raw, prompt_option
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.prompt import Files, read_prompt
from dgemma_mlx.cli.render.visible import json_line, visible
from dgemma_mlx.cli.settings import Settings

Question = Annotated[
    str | None, typer.Argument(help="The question. With `-` or without a question, it is read from standard input.")
]
From = Annotated[
    str,
    prompt_option(
        "--from", metavar="A,B,C", help="The answers to choose from. Write an answer with a comma in double quotes."
    ),
]
Listed = Annotated[bool, prompt_option("--list", help="Name the answers in the question.")]


def choose(
    choices: From,
    question: Question = None,
    file: Files = None,
    listed: Listed = False,
    raw: Raw = False,
    as_json: AsJson = False,
    *,
    pictures: ImageOptions,
    answer: AnswerOptions,
    model: ModelOptions,
    machines: MachineOptions,
) -> None:
    """Print how probable each of the given answers is.

    The probabilities come from one pass over one canvas, which makes a fast classifier. Answers of one or two tokens
    are judged best (docs/fill.md).

    Examples:
        dgemma-mlx choose -m demo "What is 27 + 45?" --from 71,72,82
        dgemma-mlx choose "What is it?" --from invoice,letter,photo --image scan.png
        cat mail.txt | dgemma-mlx choose "Which department?" --from sales,support,billing --list --json
    """
    takes_stdin = question in (None, "-") or Path("-") in (file or ())
    pictures.check(prompt_on_stdin=takes_stdin, raw=raw)
    images = pictures.read()
    asked = read_prompt(question, file, quiet=answer.quiet, stdin_is_taken=pictures.takes_stdin)
    answers = [text for row in csv.reader([choices], skipinitialspace=True) for text in row]
    with quiet_when_closed():
        from dgemma_mlx.infill.choose import choose as choose_among

        settings = Settings()
        loaded = load_model(settings, model, answer.quiet, images=bool(images), machines=machines)
        arguments = answer_arguments(settings, answer, raw)
        if not (answer.quiet or as_json):
            show_images(images)
        with interruptible() as cancelled:
            found = choose_among(
                loaded, asked, answers, listed=listed, raw=raw, cancelled=cancelled, images=images, **arguments
            )
        lines = [f"{choice.probability:.4f}  {choice.text}" for choice in found]
        if as_json:
            print(json_line({"model": loaded.name, "choices": [asdict(choice) for choice in found]}))
        else:
            for line in lines:
                print(visible(line))
        about = {"model": loaded.name, "seed": arguments["seed"], "finish_reason": "stop", "statistics": None}
        Keeper(settings).keep_turn(
            "choose", f"{asked}\n\n{choices}", "\n".join(lines), arguments["system"], about, images
        )
