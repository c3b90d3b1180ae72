"""One line of the log for each request, and its counts in the metrics: a middleware around all protocols."""

from __future__ import annotations

import json
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma_mlx.server.metrics import Metrics
from dgemma_mlx.server.settings import ServerSettings
from dgemma_mlx.server.tally import Tally, begin_tally
from dgemma_mlx.sizes import counted

_QUIET = ("/health", "/metrics")  # programs ask for these all the time
_GONE = 499  # the status that nginx gives to a client that went away
_LONGEST_PATH = 200  # characters of the log


class Accounting:
    """Counts each request, and writes its line of the log when it has ended."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        tally, began = begin_tally(), time.perf_counter()
        status, has_ended, has_gone = 500, False, False

        async def received() -> Message:
            nonlocal has_gone
            message = await receive()
            has_gone = has_gone or (message["type"] == "http.disconnect" and not has_ended)
            return message

        async def sent(message: Message) -> None:
            nonlocal status, has_ended
            if message["type"] == "http.response.start":
                status = message["status"]
            has_ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, received, sent)
        finally:
            status, seconds = _GONE if has_gone else status, time.perf_counter() - began
            self._metrics.add_request(_pattern(scope), status, seconds)
            if status != 200 or scope["path"] not in _QUIET:
                self._settings.log(self._line(scope, status, seconds, tally))

    def _line(self, scope: Scope, status: int, seconds: float, tally: Tally) -> str:
        """Return the line of the log. Text of the client is escaped in it."""
        path = scope["raw_path"].decode("ascii", "replace")[:_LONGEST_PATH]
        parts = [f"{seconds:.2f} s"]
        if uses := tally.uses:
            tokens, steps = sum(use.tokens for use in uses), sum(use.steps for use in uses)
            cached, prompt = sum(use.cached_tokens for use in uses), sum(use.prompt_tokens for use in uses)
            parts += [counted(tokens, "token"), counted(steps, "step"), f"{cached} of {prompt} prompt tokens cached"]
        if self._settings.log_prompts:
            parts += [json.dumps(prompt, default=_shortened) for prompt in tally.prompts]
        return f"{time.strftime('%H:%M:%S')} {scope['method']} {path} {status} {', '.join(parts)}"


def _shortened(value: Any) -> str:
    """Return what the log says of a value that JSON does not have: of the bytes of an image, how many they are."""
    return f"{len(value):,} bytes" if isinstance(value, bytes) else str(value)


def _pattern(scope: Scope) -> str:
    """Return the path as the application spells it, so that clients cannot add as many series as they like."""
    routes = scope["app"].routes if "endpoint" in scope else ()
    return next((route.path for route in routes if route.endpoint is scope["endpoint"]), "other")
