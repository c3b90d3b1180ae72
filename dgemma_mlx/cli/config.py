"""``dgemma-mlx config``: the settings in force, and where each is from."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from dgemma_mlx.cli.pipe import quiet_when_closed

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def config(as_json: AsJson = False) -> None:
    """Show the settings in force and where each is from.

    A flag goes before an environment variable (DGEMMA_MODEL, DGEMMA_MAX_TOKENS, ...), that before config.toml.
    """
    from dgemma_mlx.cli.render.visible import visible
    from dgemma_mlx.cli.settings import SETTINGS, Settings, config_file

    settings, file = Settings(), config_file(os.environ)
    with quiet_when_closed():
        if as_json:
            values = {name: {"value": item.value, "from": item.origin} for name, item in settings.items()}
            print(json.dumps({"file": str(file), "settings": values}))
            return
        print(f"file: {file}{'' if file.exists() else ' (not there)'}")
        for name, item in settings.items():
            value = json.dumps(item.value, ensure_ascii=False) if item.value is not None else "-"
            print(f"{name:22} {visible(value):12} {item.origin:24} {SETTINGS[name].meaning}")
