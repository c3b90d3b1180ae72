"""``dgemma-mlx sessions``: what the log keeps, listed, shown, renamed, removed, exported and searched."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.cli.help import Command, Group
from dgemma_mlx.cli.log.options import session_names
from dgemma_mlx.cli.parameters import output_option
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import counted

if TYPE_CHECKING:
    from dgemma_mlx.cli.log.log import Entry

sessions = typer.Typer(cls=Group, invoke_without_command=True, subcommand_metavar="[COMMAND] [ARGS]...")

_WHICH = "Name or id of a conversation, or the beginning of its id."
Which = Annotated[str, typer.Argument(metavar="NAME", help=_WHICH, autocompletion=session_names)]
WhichOrLast = Annotated[
    str | None, typer.Argument(metavar="NAME", help=f"{_WHICH} Without it, the last one.", autocompletion=session_names)
]
Several = Annotated[list[str] | None, typer.Argument(metavar="NAME", help=_WHICH, autocompletion=session_names)]
Words = Annotated[list[str], typer.Argument(metavar="WORD", help="What a message must hold, in any case.")]
NewName = Annotated[str, typer.Argument(metavar="NEW", help="The new name.")]
All = Annotated[bool, typer.Option("--all", "-a", help="Also list what fill, edit, choose and others have written.")]
Every = Annotated[bool, typer.Option("--all", "-a", help="All conversations and answers.")]
Limit = Annotated[
    int, typer.Option("--limit", "-n", metavar="INT", min=1, max=2**31 - 1, help="Show at most so many.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")]
AsJson = Annotated[bool, output_option("--json", help="Print one JSON object per line.")]
AsJsonArray = Annotated[bool, output_option("--json", help="Print the list as one JSON array.")]


@sessions.callback()
def show_all(context: typer.Context) -> None:
    """List, show, search and export conversations.

    Every answer of chat, generate, fill, edit and choose is kept, in a file that only you can read. A server keeps
    nothing. Without a command, the last conversations are listed.

    Notes:
        - `chat --session NAME` and `generate --session NAME` go on with a conversation, `chat --continue` and
          `generate --continue` with the last one.
        - The setting `log` switches it off: `DGEMMA_LOG=off` for one run, `log = false` in `config.toml` for all.
        - DGEMMA_STATE names another folder for the file, `conversations.db`.

    Examples:
        dgemma-mlx sessions
        dgemma-mlx sessions search budget
        dgemma-mlx sessions export --all --json > conversations.jsonl
    """
    if context.invoked_subcommand is None:
        list_sessions()


@sessions.command("list", cls=Command)
def list_sessions(every: All = False, limit: Limit = 20, as_json: AsJsonArray = False) -> None:
    """List conversations, the last one first.

    A line has the id, the time of the last change, the command, the number of turns, and the name and first message.

    Examples:
        dgemma-mlx sessions list
        dgemma-mlx sessions list --all -n 100 --json
    """
    from dgemma_mlx.cli.log.export import entry_json
    from dgemma_mlx.cli.log.log import CONTINUABLE, Log
    from dgemma_mlx.cli.render.visible import json_line

    found = Log().entries(() if every else CONTINUABLE, limit)
    with quiet_when_closed():
        if as_json:
            print(json_line([entry_json(entry) for entry in found]))
            return
        for entry in found:
            print(line_of(entry))
        if not found:
            print("no conversation is kept yet", file=sys.stderr)


@sessions.command("show", cls=Command)
def show(name: WhichOrLast = None, as_json: AsJson = False) -> None:
    """Show a conversation.

    With `--json`, all that is known about it: settings, and the seed and statistics of each answer.

    Examples:
        dgemma-mlx sessions show
        dgemma-mlx sessions show trip --json
    """
    from dgemma_mlx.cli.log.export import as_json as whole
    from dgemma_mlx.cli.log.export import as_text
    from dgemma_mlx.cli.log.log import Log
    from dgemma_mlx.cli.render.visible import json_line

    log = Log()
    id = log.last() if name is None else log.find(name)
    if id is None:
        raise DgemmaError("no conversation is kept yet", "`dgemma-mlx chat` begins one.")
    with quiet_when_closed():
        if as_json:
            print(json_line(whole(log, id)))
        else:
            _print(as_text(log.load(id), log.entry(id)))


@sessions.command("rename", cls=Command)
def rename(name: Which, new: NewName) -> None:
    """Give a conversation a name.

    Examples:
        dgemma-mlx sessions rename 3f2a91bc trip
        dgemma-mlx sessions rename trip "Lisbon in May"
    """
    from dgemma_mlx.cli.log.log import Log

    log = Log()
    id = log.find(name)
    log.rename(id, new)
    print(f"{id} is now {new}", file=sys.stderr)


@sessions.command("rm", cls=Command)
def remove(names: Several = None, every: Every = False, yes: Yes = False) -> None:
    """Remove conversations, with the answers in them that were undone.

    Examples:
        dgemma-mlx sessions rm trip
        dgemma-mlx sessions rm -y 3f2a91bc 07d1
    """
    from dgemma_mlx.cli.log.log import Log

    log = Log()
    ids = _chosen(log, names, every)
    shown = ", ".join(ids) if len(ids) < 6 else counted(len(ids), "conversation")
    if not yes and ids:
        if not sys.stdin.isatty():
            hint = "Add -y to remove without asking."
            raise DgemmaError("cannot ask for confirmation, because stdin is not a terminal", hint, exit_code=2)
        if not typer.confirm(f"Remove {shown}?", err=True):
            return
    log.remove(ids)
    print(f"removed {shown}" if ids else "no conversation is kept", file=sys.stderr)


@sessions.command("export", cls=Command)
def export(names: Several = None, every: Every = False, as_json: AsJson = False) -> None:
    """Print conversations as Markdown or JSON.

    A line of `--json`, in a file of its own, is a file that `/load` of a chat reads. With `--all`, conversations that
    are damaged are left out and named at the end.

    Examples:
        dgemma-mlx sessions export trip > trip.md
        dgemma-mlx sessions export --all --json > conversations.jsonl
    """
    from dgemma_mlx.cli.log.export import as_json as whole
    from dgemma_mlx.cli.log.export import as_markdown
    from dgemma_mlx.cli.log.log import Log
    from dgemma_mlx.cli.render.visible import json_line

    log, problems, printed = Log(), list[DgemmaError](), False
    with quiet_when_closed():
        for id in _chosen(log, names, every):
            try:
                found = [json_line(whole(log, id))] if as_json else list(as_markdown(log.load(id), log.entry(id)))
            except DgemmaError as error:
                problems.append(error)
                if not every:
                    break
                continue
            if printed and not as_json:
                print()
            printed = True
            _print(found)
    if len(problems) > 1:
        damaged = "; ".join(error.message for error in problems)
        raise DgemmaError(f"{len(problems)} conversations were left out: {damaged}", problems[0].hint)
    if problems:
        raise problems[0]


@sessions.command("search", cls=Command)
def search(words: Words, limit: Limit = 20, as_json: AsJsonArray = False) -> None:
    """Find messages that hold all the words.

    The last message comes first. Case does not matter, and a word may be a part of a longer one.

    Examples:
        dgemma-mlx sessions search lisbon hotel
        dgemma-mlx sessions search "two words" --json
    """
    from dgemma_mlx.cli.log.export import hit_json, local, snippet
    from dgemma_mlx.cli.log.log import Log
    from dgemma_mlx.cli.render.visible import json_line, visible

    found = Log().search(words, limit)
    with quiet_when_closed():
        if as_json:
            print(json_line([hit_json(hit) for hit in found]))
            return
        for hit in found:
            name = f"[{hit.entry.name}] " if hit.entry.name else ""
            undone = " (undone)" if hit.undone else ""
            line = f"{hit.entry.id}  {local(hit.entry.changed)}  {name}{hit.role}{undone}: {snippet(hit, words[0])}"
            print(visible(_cut(line)))
        if not found:
            print("no message holds that", file=sys.stderr)


def line_of(entry: Entry) -> str:
    """Return the line of a conversation in a list, which fits into the terminal."""
    from dgemma_mlx.cli.log.export import local, title
    from dgemma_mlx.cli.render.visible import visible

    turns = counted(entry.turns, "turn")
    return visible(_cut(f"{entry.id}  {local(entry.changed)}  {entry.kind:8}  {turns:>8}  {title(entry)}"))


def _cut(line: str) -> str:
    """Cut a line to the width of the terminal, or to 120 characters elsewhere."""
    width = shutil.get_terminal_size((120, 24)).columns
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _chosen(log: Any, names: list[str] | None, every: bool) -> list[str]:
    """Return the ids of the named conversations, or of all of them. Raises `DgemmaError` for neither or both."""
    if bool(names) == every:
        hint = "`dgemma-mlx sessions` lists them; --all takes all."
        raise DgemmaError("which conversations?", hint, exit_code=2)
    ids = log.ids() if every else map(log.find, names or ())
    return list(dict.fromkeys(ids))


def _print(lines: Any) -> None:
    """Print the lines of a conversation: made safe on a terminal, unchanged to a pipe."""
    from dgemma_mlx.cli.render.visible import visible

    for line in lines:
        print(visible(line) if sys.stdout.isatty() else line)
