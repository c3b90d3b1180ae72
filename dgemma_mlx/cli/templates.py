"""``dgemma-mlx templates``: list, show and edit the templates of ``generate --template``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dgemma_mlx.cli import complete
from dgemma_mlx.cli.help import Command, Group
from dgemma_mlx.cli.parameters import output_option
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.render.visible import print_path, visible

templates = typer.Typer(cls=Group, invoke_without_command=True, subcommand_metavar="[COMMAND] [ARGS]...")

AsJsonArray = Annotated[bool, output_option("--json", help="Print the list as one JSON array.")]
Name = Annotated[
    str,
    typer.Argument(help="The template's name, or a path that ends with `.toml`.", autocompletion=complete.templates),
]

_NEW = '''# A template for `dgemma-mlx generate --template {name} "..."`. Lines that begin with # are comments.

# The prompt. {{input}} is what follows the command and what is piped in; other gaps are filled by --param NAME=VALUE.
prompt = """
Explain this {{language}} code to a beginner:

{{input}}
"""

# Any setting of `dgemma-mlx config`, in place of yours:
# system = "You are a patient teacher."
# max_tokens = 512

# Values of gaps that --param does not give:
[params]
language = "Python"
'''


@templates.callback()
def summary(context: typer.Context) -> None:
    """List, show and edit templates of prompts.

    A template is a TOML file with a `prompt`, any settings, and values of its gaps in a table `[params]`:

        prompt = "Translate into {language}: {input}"
        system = "You are a translator."
        temp = 0.2

        [params]
        language = "French"

    `dgemma-mlx generate --template NAME "..."` puts the input into the gap `{input}`, or after a prompt without that
    gap. `--param language=German` fills another gap. `{{input}}` stands for the text `{input}`; other braces are text.
    The files lie beside `config.toml`. Without a command, the templates are listed.

    Examples:
        dgemma-mlx templates edit translate
        dgemma-mlx generate -m demo --template translate --param language=German "Good morning."
        dgemma-mlx templates show translate
    """
    if context.invoked_subcommand is None:
        show_list()


@templates.command("list", cls=Command)
def show_list(as_json: AsJsonArray = False) -> None:
    """List the templates.

    Examples:
        dgemma-mlx templates list
        dgemma-mlx templates list --json
    """
    import json

    from dgemma_mlx.cli.template import template_names, templates_folder

    names = template_names()
    with quiet_when_closed():
        if as_json:
            print(json.dumps(names))
            return
        for name in names:
            print(name)
        if not names:
            problem = f"there is no template in {templates_folder()}"
            print(f"{visible(problem)}; `dgemma-mlx templates edit NAME` writes one", file=sys.stderr)


@templates.command("show", cls=Command)
def show(name: Name) -> None:
    """Print a template.

    Examples:
        dgemma-mlx templates show translate
        dgemma-mlx templates show translate > translate.toml
    """
    from dgemma_mlx.cli.template import no_template, template_file
    from dgemma_mlx.cli.texts import print_exact, read_text

    file = template_file(name)
    if not file.exists():
        raise no_template(file)
    with quiet_when_closed():
        print_exact(read_text(file))


@templates.command("path", cls=Command)
def path() -> None:
    """Print the folder of the templates.

    Examples:
        dgemma-mlx templates path
        cp summary.toml "$(dgemma-mlx templates path)"
    """
    from dgemma_mlx.cli.template import templates_folder

    with quiet_when_closed():
        print_path(templates_folder())


@templates.command("edit", cls=Command)
def edit(name: Name) -> None:
    """Open a template in an editor, and write it first if there is none.

    VISUAL or EDITOR names the editor. The template is checked when the editor is closed.

    Examples:
        dgemma-mlx templates edit translate
        EDITOR="code --wait" dgemma-mlx templates edit translate
    """
    from dgemma_mlx.cli.template import read_template, template_file
    from dgemma_mlx.cli.text_editor import edit_file, require_terminal
    from dgemma_mlx.cli.texts import read_text
    from dgemma_mlx.files import write_whole

    file, new = template_file(name), _NEW.format(name=name)
    require_terminal(f"Write {file}.")
    is_new = not file.exists()
    if is_new:
        write_whole(file, new)
    try:
        edit_file(file)
    finally:
        if unchanged := is_new and file.exists() and read_text(file) == new:
            file.unlink()
    if unchanged:
        print("nothing was changed, so no template was written", file=sys.stderr)
        return
    read_template(file)
    print(f"saved {visible(str(file))}", file=sys.stderr)
