"""What the first chat on a Mac offers: the published models with their sizes, and whether they fit."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma_mlx.cli.interrupt import ending_at_once
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.settings import config_file
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import size

if TYPE_CHECKING:
    from dgemma_convert.source import Source

VARIABLE = "DGEMMA_OFFER"
PUBLISHED = {
    "4-bit": "mlx-community/diffusiongemma-26B-A4B-it-4bit",
    "8-bit": "mlx-community/diffusiongemma-26B-A4B-it-8bit",
}
_CONVERTED = "q3"


@dataclass(frozen=True)
class _Choice:
    """A model that is offered.

    Attributes:
        title: What it is, in a word.
        name: Its name for ``-m``, or None if `convert` makes it.
        line: Its size and whether it fits.
        fits: Whether it fits this machine.
    """

    title: str
    name: str | None
    line: str
    fits: bool


def choose() -> str | None:
    """Offer the models on a terminal and return the name of the chosen one, or None where nothing is offered.

    That is everywhere but on a Mac, unless DGEMMA_OFFER is 1; 0 switches it off on a Mac. Without the Hub nothing is
    offered either. For a model that must be converted, the commands are printed and the program ends.
    """
    wanted = os.environ.get(VARIABLE) or str(int(sys.platform == "darwin"))
    if wanted != "1" or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    import typer

    print("no model is chosen yet; asking the Hub for the published ones", file=sys.stderr)
    try:
        with ending_at_once():
            choices = _choices()
    except DgemmaError as error:
        print(f"they cannot be offered: {error.message}", file=sys.stderr)
        return None
    for number, choice in enumerate(choices, 1):
        print(f"  {number}  {choice.title:5}  {choice.line}", file=sys.stderr)
    proposed = next((number for number, choice in enumerate(choices, 1) if choice.fits and choice.name), len(choices))
    answer = 0
    while not 1 <= answer <= len(choices):
        answer = typer.prompt(f"Number, 1 to {len(choices)}", default=proposed, type=int, err=True)
    chosen = choices[answer - 1]
    if chosen.name is None:
        _say_how_to_convert()
        raise typer.Exit
    return chosen.name


def remember(name: str) -> None:
    """Write the chosen model to the settings file, so that every later command takes it."""
    from dgemma_mlx.cli.settings_file import change_setting

    file = config_file(os.environ)
    change_setting(file, "model", name)
    print(visible(f"{name} is now the model in {file}"), file=sys.stderr)


def _choices() -> list[_Choice]:
    """Return what is offered. Raises ``DgemmaError`` if the Hub cannot be asked."""
    from dgemma_convert.source import open_source
    from dgemma_mlx.checkpoint.hub import DEMO, remote_files, resolve
    from dgemma_mlx.cli.verdict import judge, loaded_bytes

    choices, source = [], None
    for title, name in PUBLISHED.items():
        checkpoint = resolve(name, weights=False)
        source = open_source(checkpoint)
        verdict = judge(source, loaded_bytes(source))
        here = "on this disk" if checkpoint.has_weights else size(sum(file.size for file in remote_files(name)[1]))
        choices.append(_Choice(title, name, f"{here:>12}  {verdict.outcome()}", verdict.fits))
    assert source is not None
    choices.append(_converted(source))
    choices.append(_Choice(DEMO, DEMO, f"{'built in':>12}  shows what the program does; not a useful model", True))
    return choices


def _converted(source: Source) -> _Choice:
    """Return the offer of a recipe, whose sizes are the same for every source."""
    from dgemma_convert.plan import make_plan
    from dgemma_convert.recipes import RECIPES
    from dgemma_mlx.cli.verdict import judge

    plan = make_plan(source, Path(_CONVERTED), RECIPES[_CONVERTED])
    verdict = judge(source, plan.loaded_bytes)
    line = f"{size(plan.bytes_out):>12}  {verdict.outcome()}; `convert` makes it from the original"
    return _Choice(_CONVERTED, None, line, verdict.fits)


def _say_how_to_convert() -> None:
    """Print the commands that make the converted model."""
    from dgemma_mlx.cli.verdict import ORIGINAL

    print(
        f"dgemma-mlx convert {ORIGINAL} --recipe {_CONVERTED}\n"
        f"dgemma-mlx chat -m {ORIGINAL.rpartition('/')[2]}-{_CONVERTED}"
    )
