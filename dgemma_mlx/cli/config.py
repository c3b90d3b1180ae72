"""``dgemma-mlx config``: the settings, and where each of them comes from."""

from __future__ import annotations

import json
import os

from dgemma_mlx.cli.parameters import AsJson
from dgemma_mlx.cli.pipe import quiet_when_closed


def config(as_json: AsJson = False) -> None:
    """Show the settings and where each of them comes from.

    An option overrides an environment variable (DGEMMA_MODEL, DGEMMA_MAX_TOKENS, DGEMMA_TEMP, ...), and a variable
    overrides `config.toml`. A line of that file is `name = value`:

        model = "mlx-community/diffusiongemma-26B-A4B-it-4bit"
        max_tokens = 2048

    DGEMMA_CONFIG names another settings file. DGEMMA_STATE names another folder for the history and the last
    conversation of `dgemma-mlx chat`.

    Examples:
        dgemma-mlx config
        DGEMMA_MODEL=demo dgemma-mlx config --json
    """
    from dgemma_mlx.cli.render.visible import visible
    from dgemma_mlx.cli.settings import SETTINGS, Settings, config_file

    settings, file = Settings(), config_file(os.environ)
    with quiet_when_closed():
        if as_json:
            values = {name: {"value": item.value, "from": item.origin} for name, item in settings.items()}
            print(json.dumps({"file": str(file), "settings": values}))
            return
        print(f"file: {file}{'' if file.exists() else ' (does not exist)'}")
        for name, item in settings.items():
            value = json.dumps(item.value, ensure_ascii=False) if item.value is not None else "-"
            print(f"{name:22} {visible(value):12} {item.origin:24} {SETTINGS[name].meaning}")
