"""``dgemma-mlx config``: the settings, where each of them comes from, and changes of the settings file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dgemma_mlx.checks import shown
from dgemma_mlx.cli.complete import setting_names, setting_values
from dgemma_mlx.cli.help import Command, Group
from dgemma_mlx.cli.parameters import AsJson
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.render.visible import print_path, visible
from dgemma_mlx.cli.settings import SETTINGS, Settings, config_file, parse
from dgemma_mlx.errors import DgemmaError

config = typer.Typer(cls=Group, invoke_without_command=True, subcommand_metavar="[COMMAND] [ARGS]...")

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of the setting, such as max_tokens.", autocompletion=setting_names)
]
Value = Annotated[str, typer.Argument(metavar="VALUE", help="The new value.", autocompletion=setting_values)]


@config.callback()
def show(context: typer.Context, as_json: AsJson = False) -> None:
    """Show the settings and where each of them comes from.

    An option overrides an environment variable (DGEMMA_MODEL, DGEMMA_MAX_TOKENS, DGEMMA_TEMP, ...), and a variable
    overrides `config.toml`. A line of that file is `name = value`:

        model = "mlx-community/diffusiongemma-26B-A4B-it-4bit"
        max_tokens = 2048

    DGEMMA_CONFIG names another settings file. DGEMMA_STATE names another folder for the history and the conversations
    of `dgemma-mlx chat`.

    Examples:
        dgemma-mlx config
        dgemma-mlx config set max_tokens 2048
        DGEMMA_MODEL=demo dgemma-mlx config --json
    """
    if context.invoked_subcommand is not None:
        return
    settings, file = Settings(), config_file(os.environ)
    with quiet_when_closed():
        if as_json:
            values = {name: {"value": item.value, "from": item.origin} for name, item in settings.items()}
            print(json.dumps({"file": str(file), "settings": values}))
            return
        print(f"file: {visible(str(file))}{'' if file.exists() else ' (does not exist)'}")
        for name, item in settings.items():
            value = json.dumps(item.value, ensure_ascii=False) if item.value is not None else "-"
            print(visible(f"{name:22} {value:12} {item.origin:24} {SETTINGS[name].meaning}"))


@config.command("set", cls=Command)
def set_(name: Name, value: Value) -> None:
    """Set a setting in `config.toml`.

    The value is checked before the file is written. Comments and the order of the lines stay as they are.

    Examples:
        dgemma-mlx config set model mlx-community/diffusiongemma-26B-A4B-it-4bit
        dgemma-mlx config set temp 0
    """
    from dgemma_mlx.cli.settings_file import change_setting
    from dgemma_mlx.sizes import parse_size

    _check_name(name)
    new, file = parse(name, value, name), config_file(os.environ)
    if name == "memory_limit":
        parse_size(new)
    change_setting(file, name, new)
    print(visible(f"{name} = {json.dumps(new, ensure_ascii=False)} in {file}"), file=sys.stderr)
    _warn_if_overridden(name)


@config.command("unset", cls=Command)
def unset(name: Name) -> None:
    """Remove a setting from `config.toml`, so that its default holds.

    Examples:
        dgemma-mlx config unset temp
        dgemma-mlx config unset model
    """
    from dgemma_mlx.cli.settings_file import change_setting

    _check_name(name)
    file = config_file(os.environ)
    if not file.exists() or not change_setting(file, name, None):
        raise DgemmaError(f"{name} is not set in {file}", "`dgemma-mlx config` shows where each setting comes from.")
    print(visible(f"removed {name} from {file}"), file=sys.stderr)
    _warn_if_overridden(name)


@config.command("edit", cls=Command)
def edit() -> None:
    """Open `config.toml` in a text editor.

    VISUAL or EDITOR names the editor. The settings are checked when the editor is closed; the file is replaced only by
    settings that are valid.

    Examples:
        dgemma-mlx config edit
        EDITOR="code --wait" dgemma-mlx config edit
    """
    import tempfile

    from dgemma_mlx.cli.text_editor import edit_file, require_terminal
    from dgemma_mlx.files import write_whole

    file = config_file(os.environ)
    require_terminal(f"Edit {file}, or use `dgemma-mlx config set NAME VALUE`.")
    before = file.read_bytes() if file.exists() else _TEMPLATE.encode()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        copy.write_bytes(before)
        while True:
            edit_file(copy)
            try:
                Settings({}, copy)
                break
            except DgemmaError as error:
                print(visible(f"dgemma-mlx: {error.message.replace(str(copy), str(file))}"), file=sys.stderr)
            if not typer.confirm("Edit it again?", default=True, err=True):
                raise DgemmaError(f"{file} was not changed", "What was written is not valid.", exit_code=2)
        after = copy.read_bytes()
    if after == before:
        print(visible(f"{file} was not changed"), file=sys.stderr)
        return
    write_whole(file, after.decode())
    print(visible(f"wrote {file}"), file=sys.stderr)


@config.command("path", cls=Command)
def path() -> None:
    """Print the path of `config.toml`.

    Examples:
        dgemma-mlx config path
        cat "$(dgemma-mlx config path)"
    """
    with quiet_when_closed():
        print_path(config_file(os.environ))


_TEMPLATE = "# The settings of dgemma-mlx. Remove the # before a name and write the value that you want.\n" + "".join(
    f"\n# {kind.meaning}\n# {name} = {'' if kind.default is None else json.dumps(kind.default)}\n"
    for name, kind in SETTINGS.items()
)


def _check_name(name: str) -> None:
    """Raise `DgemmaError` (exit code 2) unless there is a setting of this name."""
    if name not in SETTINGS:
        raise DgemmaError(f"unknown setting {shown(name)}", f"Settings: {', '.join(SETTINGS)}.", exit_code=2)


def _warn_if_overridden(name: str) -> None:
    """Say on stderr when an environment variable has priority over the settings file."""
    variable = f"DGEMMA_{name.upper()}"
    if os.environ.get(variable):
        print(f"dgemma-mlx: the environment variable {variable} still overrides it", file=sys.stderr)
