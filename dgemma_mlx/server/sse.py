"""Responses that notice when their client has gone: server-sent events, and answers in one piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

COMMENT = b": still here\n\n"  # clients ignore it


def event(data: Any, name: str | None = None) -> bytes:
    """Return a server-sent event whose data is one line of JSON, or a text as it is."""
    text = data.encode() if isinstance(data, str) else msgspec.json.encode(data)
    return (b"" if name is None else b"event: " + name.encode() + b"\n") + b"data: " + text + b"\n\n"


class EventStream(Response):
    """A response of server-sent events. When its client goes away, the events are closed at once.

    ``ping`` is sent after each ``seconds`` of silence.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], seconds: float, ping: Callable[[], bytes] = lambda: COMMENT,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._events, self._seconds, self._ping = events, seconds, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(GoneError):  # nobody is there to be told
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        events = self._events.__aiter__()
        waiting = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                done, _ = await asyncio.wait([waiting], timeout=self._seconds)
                piece = waiting.result() if done else self._ping()
                if piece is None:
                    break
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if done:
                    waiting = asyncio.ensure_future(anext(events, None))
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await self._events.aclose()  # type: ignore[attr-defined]
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of the work. When the client goes away, the work is cancelled, and ``GoneError`` raised."""
    return await while_connected(request.receive, work)


class GoneError(Exception):
    """The client has gone away."""


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Await the work, and cancel it when ``receive`` tells that the client has gone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
