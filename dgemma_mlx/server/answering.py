"""An answer on its way from the model's thread to a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from dgemma_mlx.events import Committed, Done, Draft, Encoded, Event, FinishReason
from dgemma_mlx.generation.cancellation import Cancelled
from dgemma_mlx.generation.worker import End
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.question import Ended, Question, Update, Written
from dgemma_mlx.server.stops import StopTexts
from dgemma_mlx.text.parts import ToolCall


class Answering:
    """An answer while it is written: an asynchronous iterator of updates, the last of which is ``Ended``.

    A reader that is slower than the model gets the latest draft only; nothing else is left out. Leaving the ``async
    with`` block cancels what is not written yet, and so does dropping the last reference to the object. An answer that
    the server cancels, because it ends, raises ``ApiError`` (503).

    Attributes:
        prompt_tokens: Number of tokens of the prompt.
        cancel: Cancels the answer. For the event loop only.
    """

    def __init__(self, prompt_tokens: int, inbox: Inbox, cancel: Callable[[], None]) -> None:
        self.prompt_tokens, self.cancel = prompt_tokens, cancel
        self._inbox = inbox

    async def __aenter__(self) -> Answering:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        call_soon(self._inbox.loop, self.cancel)

    async def __aiter__(self) -> AsyncIterator[Update]:
        while True:
            for update in await self._inbox.take():
                if isinstance(update, End):
                    if update.error is not None:
                        raise failure(update.error)
                    return
                yield update

    async def whole(self) -> tuple[Written, Ended]:
        """Wait for the end, and return all that was written, and the end."""
        text, thinking, ended = "", "", None
        calls: list[ToolCall] = []
        async for update in self:
            if isinstance(update, Written):
                text, thinking = text + update.text, thinking + update.thinking
                calls += update.tool_calls
            elif isinstance(update, Ended):
                ended = update
        assert ended is not None, "the last update is Ended"
        return Written(text, thinking, tuple(calls)), ended


class Inbox:
    """What the worker has sent of an answer and the client has not read. Of drafts, it keeps the latest only.

    Attributes:
        loop: The event loop of the reader.
        cancel: Cancels the answer.
    """

    cancel: Callable[[], None]

    def __init__(self, question: Question) -> None:
        self.loop = asyncio.get_running_loop()
        self._has_drafts, self._single_call = question.drafts, question.single_call
        self._stops = StopTexts(question.stop)
        self._cut: FinishReason | None = None  # why the answer ends before the model ends it
        self._updates: list[Update | End] = []
        self._news = asyncio.Event()

    def receive(self, item: Event | Encoded | End) -> None:
        """Take an event of the worker, on its thread."""
        if not isinstance(item, Encoded) and (self._has_drafts or not isinstance(item, Draft)):
            call_soon(self.loop, self._add, item)

    async def take(self) -> list[Update | End]:
        """Wait for updates, and return them."""
        await self._news.wait()
        self._news.clear()
        updates, self._updates = self._updates, []
        return updates

    def _add(self, item: Event | End) -> None:
        """Queue an event as an update."""
        if isinstance(item, Draft):
            self._updates = [*(each for each in self._updates if not isinstance(each, Draft)), item]
        elif isinstance(item, Committed):
            self._updates.append(self._written(item))
        elif isinstance(item, Done):
            self._updates += self._end(item)
        else:
            self._updates.append(item)
        self._news.set()

    def _written(self, committed: Committed) -> Written:
        """Return what a canvas adds. A stop text, or a call where only one may be made, cuts off all after it."""
        if self._cut is not None:
            return Written()
        text, calls = self._stops.feed(committed.text), committed.tool_calls
        if self._stops.found is not None:
            self._cut, calls = "stop", ()  # calls come after the text
        elif calls:
            text += self._stops.finish()
            if self._single_call:
                self._cut, calls = "tool_calls", calls[:1]
        if self._cut is not None:
            self.cancel()
        return Written(text, committed.thinking, calls)

    def _end(self, done: Done) -> list[Update | End]:
        """Return the last updates. An answer that is cancelled, and was not cut, was cancelled by the server."""
        if done.finish_reason == "cancelled" and self._cut is None:
            return [End(Cancelled())]
        return [Written(self._stops.finish()), Ended(self._cut or done.finish_reason, self._stops.found, done)]


def failure(error: BaseException) -> ApiError:
    """Return what a client is told of an error of the worker."""
    if isinstance(error, Cancelled):
        return ApiError(503, "the server is shutting down", "server_error", code="shutting_down")
    return ApiError.failed(error)


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    """Call a function on the event loop, from any thread, unless the loop is closed: then nobody waits for it."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)
