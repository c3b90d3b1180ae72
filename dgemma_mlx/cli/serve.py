"""``dgemma-mlx serve``: the model behind the HTTP protocols that other programs speak."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dgemma_mlx.checks import shown
from dgemma_mlx.cli.loading import in_bytes, load_options, model_loader, say_if_demo
from dgemma_mlx.cli.machines import TeamOptions, invite, say_lost
from dgemma_mlx.cli.parameters import (
    ApiKey,
    MemoryLimit,
    ModelOptions,
    Quiet,
    SpeedMode,
    api_key,
    decoding_option,
    output_option,
    resource_option,
    section,
)
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.errors import DgemmaError, how_to_install

if TYPE_CHECKING:
    from dgemma_mlx.generation.load import LoadOptions
    from dgemma_mlx.server.machines import Machines
    from dgemma_mlx.server.settings import ServerSettings

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

server_option = section("Server")

Host = Annotated[str, server_option("--host", help="The address to listen on.")]
Port = Annotated[int, server_option("--port", min=0, max=65535, help="The port to listen on; 0 takes a free one.")]
AllowOrigin = Annotated[
    list[str] | None,
    server_option("--allow-origin", metavar="ORIGIN",
                   help="Let web pages of this origin use the server, such as https://example.org. May be repeated."),
]  # fmt: skip
AllowHost = Annotated[
    list[str] | None,
    server_option("--allow-host", metavar="NAME",
                   help="Accept this name of the machine in the Host header. May be repeated."),
]  # fmt: skip
AllowRemoteImages = Annotated[
    bool, server_option("--allow-remote-images", help="Fetch images from the public addresses that requests name.")
]
Open = Annotated[bool, server_option("--open", help="Open the page of the server in the browser.")]
StrictModel = Annotated[
    bool, server_option("--strict-model", help="Answer 404 to requests for a model of another name.")
]
MaxQueue = Annotated[
    int, resource_option("--max-queue", min=1, help="Requests that wait or run at a time; further ones get 503.")
]
MaxBody = Annotated[
    str, resource_option("--max-body", metavar="SIZE", help="Largest body of a request.")
]
KeepAlive = Annotated[
    str,
    resource_option("--keep-alive", metavar="TIME",
                    help="Unload the model after this time without a request, such as 10m; -1 keeps it for ever."),
]  # fmt: skip
PromptCaches = Annotated[
    int, resource_option("--prompt-caches", min=1, help="Conversations whose encoded prompts are kept.")
]
PromptCacheDir = Annotated[
    Path | None,
    resource_option("--prompt-cache-dir", metavar="FOLDER", help="Keep encoded prompts here across restarts."),
]
MaxTokens = Annotated[
    int | None,
    decoding_option("--max-tokens", "-n", min=1, show_default="the rest of the context",
                    help="Maximum length of an answer in tokens where a request names none."),
]  # fmt: skip
LogPrompts = Annotated[bool, output_option("--log-prompts", help="Print the prompts of requests as well.")]


@dataclass(frozen=True)
class AddressOptions:
    """The options that say who may use the server."""

    host: Host = "127.0.0.1"
    port: Port = 8080
    api_key: ApiKey = None
    allow_origin: AllowOrigin = None
    allow_host: AllowHost = None
    strict_model: StrictModel = False
    allow_remote_images: AllowRemoteImages = False


@dataclass(frozen=True)
class LimitOptions:
    """The options about memory and time."""

    memory_limit: MemoryLimit = None
    max_queue: MaxQueue = 64
    max_body: MaxBody = "32MiB"
    keep_alive: KeepAlive = "-1"
    prompt_caches: PromptCaches = 4
    prompt_cache_dir: PromptCacheDir = None


def serve(
    *,
    model: ModelOptions,
    machines: TeamOptions,
    address: AddressOptions,
    open_page: Open = False,
    max_tokens: MaxTokens = None,
    speed: SpeedMode = None,
    limits: LimitOptions,
    quiet: Quiet = False,
    log_prompts: LogPrompts = False,
) -> None:
    """Serve the model to other programs over HTTP.

    The server speaks the protocols of OpenAI, Anthropic and llama.cpp, and shows a page on which the canvas denoises.
    docs/server.md has the settings of many clients.

    Notes:
        - One line on stderr describes each request; it has no prompt unless `--log-prompts` asks for it.
        - Only programs on this machine reach the server. Another `--host`, such as 0.0.0.0 for the network, needs an
          `--api-key`, which clients send as `Authorization: Bearer KEY` or `x-api-key: KEY`. Other users of the machine
          can see the options of a program; the variable DGEMMA_API_KEY is not visible to them.
        - Web pages of other origins are refused unless `--allow-origin` names them: `app://obsidian.md` is the one of
          Obsidian, and `vscode-file://vscode-app` that of VS Code.
        - Images come inside requests, as data URLs. With `--allow-remote-images` the server also fetches them from
          addresses, so whoever may use it can make it connect to any public one; this network is out of reach.
        - With several machines, each loads the whole model, and an answer is written by the one with the fewest
          requests. `/v1/fill`, `/v1/edit` and completions with a suffix are for the first machine. `--split` cuts the
          model over the machines instead (docs/several-macs.md).
        - Ctrl-C or SIGTERM ends the server in order: answers that are being written are cancelled.
        - The extra `serve` has the libraries that the server needs; docs/install.md says how to add them.

    Examples:
        dgemma-mlx serve -m demo --open
        dgemma-mlx serve -m mlx-community/diffusiongemma-26B-A4B-it-4bit --keep-alive 10m
    """
    _require_libraries()
    from dgemma_mlx.server.listen import listen
    from dgemma_mlx.server.security import check_settings

    settings = Settings()
    chosen = _server_settings(settings, model, address, limits, max_tokens, speed, _logger(quiet), log_prompts)
    check_settings(chosen)  # before a model is fetched
    is_whole = machines.check_team(is_spread=True)
    machines.check_prompt_cache(None if is_whole else limits.prompt_cache_dir)
    load = model_loader(settings, model, machines=None if is_whole else machines, quiet=quiet)
    if not quiet:
        say_if_demo(settings, model)

    def ready(port: int) -> None:
        url = f"http://{f'[{chosen.host}]' if ':' in chosen.host else chosen.host}:{port}"
        if not quiet:
            print(f"dgemma-mlx: {chosen.model_name} is served at {url}; Ctrl-C ends it", file=sys.stderr, flush=True)
        if open_page:
            import webbrowser
            from threading import Thread

            page = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
            Thread(target=webbrowser.open, args=(page,), daemon=True).start()  # some browsers are waited for

    listen(load, chosen, ready, _others(machines, load_options(settings, model), chosen, quiet) if is_whole else None)


def _others(machines: TeamOptions, loading: LoadOptions, chosen: ServerSettings, quiet: bool) -> Machines | None:
    """Let the other machines, if there are any, load the whole model, and return them."""
    facts = {"prompt_caches": chosen.prompt_caches, "keep_alive": chosen.keep_alive}
    channel = invite(machines, loading, quiet, "serve", **facts)
    if channel is None:
        return None
    from dgemma_mlx.server.machines import Machines

    return Machines(channel, chosen.max_queue, chosen.prompt_caches, lambda error: say_lost(error, channel))


def _require_libraries() -> None:
    """Raise `DgemmaError` where the libraries of the extra ``serve`` are missing."""
    from importlib.util import find_spec

    missing = [name for name in ("starlette", "uvicorn", "msgspec") if find_spec(name) is None]
    if missing:
        hint = f"Run {how_to_install(' '.join(missing))}."
        raise DgemmaError(f"serve needs {' and '.join(missing)}", hint, 2)


def _server_settings(
    settings: Settings, model: ModelOptions, address: AddressOptions, limits: LimitOptions, max_tokens: int | None,
    speed: str | None, log: Callable[[str], None], log_prompts: bool,
) -> ServerSettings:
    """Return the settings of the server. Raises `DgemmaError` (exit code 2) for options that are no valid values."""
    from dgemma_mlx.server.settings import ServerSettings

    return ServerSettings(
        model_name=_model_name(settings.pick("model", model.model)),
        host=address.host,
        port=address.port,
        api_key=api_key(address.api_key),
        allowed_origins=tuple(address.allow_origin or ()),
        allowed_hosts=tuple(address.allow_host or ()),
        speed=settings.pick_checked("speed", speed),
        memory_limit=in_bytes(settings.pick("memory_limit", limits.memory_limit)),
        max_tokens=max_tokens,
        max_queue=limits.max_queue,
        max_body=in_bytes(limits.max_body) or 0,
        keep_alive=_seconds(limits.keep_alive),
        prompt_caches=limits.prompt_caches,
        prompt_cache_dir=limits.prompt_cache_dir,
        strict_model=address.strict_model,
        remote_images=address.allow_remote_images,
        log_prompts=log_prompts,
        log=log,
    )


def _model_name(name: str | None) -> str:
    """Return the name under which clients see a model: a folder's own name, without the path to it."""
    from dgemma_mlx.checkpoint.hub import DEMO

    if name is None:
        return DEMO
    return Path(name).expanduser().resolve().name if os.path.isdir(os.path.expanduser(name)) else name


def _seconds(text: str) -> float | None:
    """Return a time such as ``10m`` in seconds, and None for a negative one, which has no end.

    Raises `DgemmaError` (exit code 2) for any other text.
    """
    found = re.fullmatch(r"(-?\d{1,9}(?:\.\d{1,3})?)([smhd]?)", text.strip().lower())
    if found is None:
        hint = "Write a number and a unit: 30s, 10m or 2h. -1 keeps the model for ever."
        raise DgemmaError(f"--keep-alive must be a time, not {shown(text)}", hint, exit_code=2)
    seconds = float(found[1]) * _SECONDS[found[2]]
    return None if seconds < 0 else seconds


def _logger(quiet: bool) -> Callable[[str], None]:
    """Return the function that takes the lines of the log."""
    return lambda line: None if quiet else print(line, file=sys.stderr, flush=True)
