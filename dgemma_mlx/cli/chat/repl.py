"""The loop of a conversation: a line from the user, an answer from the model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma_mlx.cli.image_options import ImageBudget, check_budget
from dgemma_mlx.cli.loading import load_model, model_loader
from dgemma_mlx.cli.log.keep import Keeper, about
from dgemma_mlx.cli.log.options import ConversationOptions
from dgemma_mlx.cli.machines import MachineOptions
from dgemma_mlx.cli.parameters import (
    ApiKey,
    MaxTokens,
    ModelOptions,
    NoLive,
    Seed,
    SpeedMode,
    System,
    Thinking,
    VerifyMode,
    api_key,
    section,
)
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.cli.prompt_cache import PromptCacheFile, kept_prompt_cache
from dgemma_mlx.cli.render.region import can_draw
from dgemma_mlx.cli.render.visible import visible
from dgemma_mlx.cli.settings import SETTINGS, Settings
from dgemma_mlx.cli.state import history_file
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.sizes import counted

if TYPE_CHECKING:
    from dgemma_mlx.cli.chat.answer import Chat
    from dgemma_mlx.cli.log.session import Session
    from dgemma_mlx.generation.model import Model

# Asks for a line, starting with the given text. Returns None when the user leaves.
Ask = Callable[[str], str | None]

Url = Annotated[
    str | None,
    section("Server")("--url", metavar="URL", help="Talk to a running server instead of loading a model, such as "
                      "http://127.0.0.1:8080."),
]  # fmt: skip


def chat(
    system: System = None,
    thinking: Thinking = None,
    *,
    conversation: ConversationOptions,
    url: Url = None,
    key: ApiKey = None,
    model: ModelOptions,
    machines: MachineOptions,
    no_live: NoLive = False,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    speed: SpeedMode = None,
    verify: VerifyMode = None,
    prompt_cache: PromptCacheFile = None,
    image_budget: ImageBudget = None,
) -> None:
    """Talk with the model in the terminal.

    `/help` lists the commands of the conversation, and Ctrl-D leaves. The conversation is kept after every turn.
    Without a terminal, every line of standard input is a message and the answers go to stdout.

    Notes:
        - Alt-Enter starts a new line, and `\"\"\"` begins and ends a message of several lines. The arrow keys bring
          back earlier messages.
        - The commands are `/help`, `/model`, `/system`, `/set`, `/show`, `/stats`, `/clear`, `/regen`, `/undo`,
          `/edit`, `/read FILE...`, `/files`, `/drop`, `/save FILE`, `/load FILE`, `/image FILE...`, `/video FILE...`,
          `/copy`, `/sessions`, `/rename NAME` and `/bye`. A line that begins with a slash never reaches the model,
          except within `\"\"\"`. `/system none` removes the system prompt.
        - `/image FILE` shows the model a picture with your next message; so does a picture that is dragged into the
          window. `/drop` takes it back. `--image-budget` is about the pictures that are added after the start.
        - Ctrl-X Ctrl-E opens the message in an editor. The line below the prompt shows how much of the model's context
          is used; the setting `stats` prints a line about each answer.
        - Ctrl-C stops an answer after the current step. Committed canvases stay, marked as cancelled. Ctrl-C twice at
          an empty prompt leaves.
        - A new turn encodes only what is new; `/stats` shows the number of cached tokens. A conversation that no longer
          fits loses its oldest turns, and a line on stderr says so.
        - `--continue` (or `--resume`) goes on with the last conversation, and `--session` with the one of that name or
          id, or begins it. Both take its model, system prompt and settings, unless options override them.
          `dgemma-mlx sessions` lists and searches all conversations.
        - With `--url` the model of `dgemma-mlx serve`, or of another server that speaks OpenAI's chat completions,
          answers. The server's owner chooses how it is computed; `/set` changes max_tokens, seed, temp (only 0 has an
          effect), thinking and speed.
        - What you type and the conversations are kept in the platform's folder for state, or in the folder that
          DGEMMA_STATE names. With the setting `log` off (DGEMMA_LOG=off), nothing is kept.

    Examples:
        dgemma-mlx chat -m demo
        dgemma-mlx chat -m mlx-community/diffusiongemma-26B-A4B-it-4bit --system "Be brief."
        dgemma-mlx chat --url http://127.0.0.1:8080
    """
    from dgemma_mlx.cli.log.session import Session

    check_budget(image_budget)
    machines.check_prompt_cache(prompt_cache)
    if url is not None:
        _check_remote(model, machines, verify, prompt_cache, image_budget)
    settings = Settings()
    continued = conversation.open(settings)
    flags = {
        "max_tokens": max_tokens, "seed": seed, "system": system, "thinking": thinking, "speed": speed,
        "verify": verify,
    }  # fmt: skip
    defaults = {name: settings.pick_checked(name, flags.get(name)) for name in SETTINGS}
    session = continued or Session(model=defaults["model"], name=conversation.session)
    for name, flag in flags.items():
        if flag is not None:
            session.settings.pop(name, None)  # an option overrides what /set has chosen
    if system is not None or continued is None:
        session.system = defaults["system"]
    draw = defaults["live"] and not no_live and can_draw()
    with quiet_when_closed(), _conversation(url, key, session, defaults, draw, model, machines, prompt_cache) as opened:
        opened.image_budget = image_budget
        opened.check()  # refuse contradictory settings before anything is written
        if continued is not None:
            title = f"{session.id} ({session.name})" if session.name else str(session.id)
            turns = counted(session.turns, "turn")
            print(f"continuing {visible(title)} after {turns}; /show shows them", file=sys.stderr)
        _talk(opened, history_file() if defaults["log"] else None, Keeper(settings))


@contextmanager
def _conversation(
    url: str | None, key: str | None, session: Session, defaults: dict[str, Any], draw: bool, model: ModelOptions,
    machines: MachineOptions, prompt_cache: Path | None,
) -> Iterator[Chat]:
    """Yield the conversation with the model of a server, or with one that is loaded."""
    if url is not None:
        from dgemma_mlx.cli.chat.connection import Server
        from dgemma_mlx.cli.chat.remote import RemoteChat

        yield RemoteChat(Server(url, api_key(key)), session, defaults, draw=draw)
        return
    from dgemma_mlx.checkpoint.hub import full_name
    from dgemma_mlx.cli import offer
    from dgemma_mlx.cli.chat.local import LocalChat

    settings = Settings()
    name = settings.pick("model", session.model if model.model is None else model.model)
    offered = offer.choose() if name is None else None
    name = offered or name
    first = session.model = full_name(name)

    def open_model(other: str | None) -> Callable[[], Model]:
        adapter = model.adapter if other == first else None  # it fits only the model that it was trained for
        return model_loader(settings, replace(model, model=other, adapter=adapter), machines=machines)

    def load() -> Model:
        loaded = load_model(settings, replace(model, model=name), machines=machines)
        if offered is not None:
            offer.remember(offered)
        return loaded

    if prompt_cache is None:  # nothing here may refer to the model, whose memory /model frees
        yield LocalChat(load(), session, defaults, draw=draw, opener=open_model)
        return
    loaded = load()
    with kept_prompt_cache(prompt_cache, loaded) as cache:
        yield LocalChat(loaded, session, defaults, draw=draw, cache=cache)


def _check_remote(
    model: ModelOptions, machines: MachineOptions, verify: str | None, prompt_cache: Path | None,
    image_budget: int | None,
) -> None:
    """Raise `DgemmaError` (exit code 2) for options that only a loaded model has."""
    given = {"--verify": verify, "--prompt-cache": prompt_cache, "--image-budget": image_budget} | {
        f"--{name.replace('_', '-')}": value for name, value in (asdict(model) | asdict(machines)).items() if value
    }
    if names := [name for name, value in given.items() if value is not None]:
        own = {"--verify": "A server does not verify.", "--image-budget": "The server's checkpoint chooses it."}
        hint = own.get(names[0], f"Give {names[0]} to `dgemma-mlx serve`.")
        raise DgemmaError(f"--url cannot be combined with {names[0]}", hint, exit_code=2)


def _talk(chat: Chat, history: Path | None, keeper: Keeper) -> None:
    """Take messages until there are no more, and keep the conversation after each that changes it."""
    from dgemma_mlx.cli.chat.command import at_terminal
    from dgemma_mlx.cli.chat.commands import take

    person = at_terminal()
    if person:
        print(_banner(chat), file=sys.stderr)
    ask = _asker(chat, history, person)
    failed, start, kept = False, "", chat.session.copy()
    while (line := ask(start)) is not None:
        edited, start, answered = bool(start), "", False
        before = list(chat.session.messages), chat.attachments
        try:
            outcome = take(chat, line, edited=edited)
            if outcome.leave:
                break
            start = outcome.text
            answered = outcome.ask and chat.answer(again=outcome.again)
            if outcome.ask and not answered:
                chat.session.messages, chat.attachments = before
        except DgemmaError as error:
            (chat.session.messages, chat.attachments), failed = before, True
            _complain(error)
        except KeyboardInterrupt:
            if not person:
                raise
            chat.session.messages, chat.attachments = before
            print("interrupted", file=sys.stderr)
        if chat.session != kept and (chat.session.messages or chat.session.id is not None):
            answer = about(chat.last, chat.model_name) if answered and chat.last is not None else None
            keeper.keep(chat.session, "chat", answer)
            kept = chat.session.copy()
        if not person and chat.last is not None and chat.last.finish_reason == "cancelled":
            raise KeyboardInterrupt
    if failed and not person:
        raise typer.Exit(1)


def _banner(chat: Chat) -> str:
    """Return the line that begins a conversation: the model, the length of its context, and where help is."""
    named = ", ".join(part for part in (_short_name(chat), chat.context) if part)
    return f"{named}; /help lists the commands, Ctrl-D leaves"


def _status(chat: Chat) -> str:
    """Return the line below the prompt: the model, the context that is used, and the files that wait."""
    files = f"{counted(len(chat.attachments), 'file')} to send" if chat.attachments else ""
    return "  ".join(part for part in (_short_name(chat), chat.context, files) if part)


def _short_name(chat: Chat) -> str:
    """Return the name of the model; of a folder, the last part."""
    name = chat.model_name
    return visible(os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name)


def _asker(chat: Chat, history: Path | None, person: bool) -> Ask:
    """Return a function that asks for a line as well as stdin and stdout allow."""
    from dgemma_mlx.cli.chat.command import can_edit
    from dgemma_mlx.cli.chat.lines import piped_lines, typed_lines

    if not can_edit():
        return typed_lines() if person else piped_lines()
    from dgemma_mlx.cli.chat.editor import editor

    return editor(history, partial(_status, chat), lambda: dict(chat.models()))


def _complain(error: DgemmaError) -> None:
    """Print an error and its hint to stderr."""
    print(visible(error.message), file=sys.stderr)
    if error.hint:
        print(f"hint: {visible(error.hint)}", file=sys.stderr)
