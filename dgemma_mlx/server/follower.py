"""Another machine behind the server: it answers what rank 0 hands out (``server.machines``), and has no HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from dgemma_mlx.distributed.channel import Channel, MachineLostError, Message
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Committed, Done, Draft, Encoded, Event
from dgemma_mlx.generation.cancellation import Cancelled
from dgemma_mlx.generation.memory import device_limit
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.options import GenerationOptions
from dgemma_mlx.generation.prompt_caches import PromptCaches
from dgemma_mlx.generation.request import ask, begin
from dgemma_mlx.generation.team import accept
from dgemma_mlx.generation.worker import End, Worker

_KINDS = {Draft: "draft", Committed: "committed", Done: "done"}


def follow_server(channel: Channel, message: Message) -> Message:
    """Load the whole model and answer questions, until rank 0 asks for other work, which is returned.

    ``message`` is what rank 0 asks for. Raises ``DgemmaError`` when the model cannot be loaded, and
    ``MachineLostError`` when rank 0 has ended.
    """
    return _Follower(channel, accept(channel, message), message["prompt_caches"], message["keep_alive"]).follow()


class _Follower:
    """The model, its prompt caches, and the answers that are being written."""

    def __init__(
        self, channel: Channel, load: Callable[[], Model], prompt_caches: int, keep_alive: float | None
    ) -> None:
        self._channel, self._load = channel, load
        self._weights = 0
        self._need = 0  # bytes of all answers, as rank 0 knows them
        self._caches = PromptCaches(prompt_caches, lambda: device_limit() - self._weights - self._need)
        self._worker = Worker(self._loaded, keep_alive=keep_alive, unload=self._caches.clear)
        self._cancels: dict[int, Callable[[], None]] = {}

    def follow(self) -> Message:
        """Answer until there is other work."""
        with self._worker:
            self._text = self._worker.model.without_network()
            self._channel.send({"room": device_limit() - self._weights})
            while True:
                message = self._channel.receive()
                if "ask" in message:
                    self._ask(message)
                elif "cancel" in message:
                    self._cancels.get(message["cancel"], lambda: None)()
                else:
                    return message

    def _loaded(self) -> Model:
        """Load the model, on the worker's thread."""
        model = self._load()
        self._weights = model.weight_bytes()
        return model

    def _ask(self, question: Message) -> None:
        """Begin to answer a question."""
        number, self._need = question["ask"], question["need"]
        has_ended = threading.Event()

        def receive(item: Event | Encoded | End) -> None:
            if isinstance(item, Encoded) or (isinstance(item, Draft) and not question["drafts"]):
                return
            if isinstance(item, End):
                has_ended.set()
                self._cancels.pop(number, None)
            with suppress(MachineLostError):  # the main thread ends this process
                self._channel.send({"number": number, **event_message(item)})

        try:
            options = GenerationOptions(
                speed=question["speed"], temp=question["temp"], memory_limit=question["memory_limit"],
                response_format=question["response_format"],
            )  # fmt: skip
            asked = ask(
                self._text, question["prompt"], options, None, question["thinking"], question["raw"],
                question["tools"], question["tool_choice"],
            )
        except DgemmaError as error:
            receive(End(error))
            return

        def request(model: Model, cancelled: Callable[[], bool]) -> Iterator[Event | Encoded]:
            chosen = replace(options, cancelled=cancelled)
            with self._caches.lease(asked.ids) as prompt_cache:
                limits = [question["max_tokens"]]
                for _, event in begin(model, [asked], [question["seed"]], limits, chosen, prompt_cache).events():
                    yield event

        self._cancels[number] = self._worker.submit_to(receive, request)
        if has_ended.is_set():  # before it could be noted
            self._cancels.pop(number, None)


def event_message(item: Event | End) -> Message:
    """Return an event as JSON."""
    if not isinstance(item, End):
        return {"kind": _KINDS[type(item)], "event": asdict(item)}
    if isinstance(item.error, Cancelled):
        return {"kind": "cancelled", "event": None}
    return {"kind": "end", "event": None if item.error is None else _told(item.error)}


def _told(error: BaseException) -> list[Any]:
    """Return the arguments of a ``DgemmaError`` that tells of an error."""
    if isinstance(error, DgemmaError):
        return [error.message, error.hint, error.exit_code]
    return [f"unexpected {type(error).__name__}: {error}", "This is a bug in dgemma-mlx."]
