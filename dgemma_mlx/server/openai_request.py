"""What OpenAI's protocols for chats and for completions have in common."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Annotated, Any

import msgspec
from starlette.requests import Request

from dgemma_mlx.checks import shown
from dgemma_mlx.server.answering import Answering
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.question import Ended, Question, Update, Written
from dgemma_mlx.server.sse import event
from dgemma_mlx.server.stops import stop_texts

NO_THINKING = (None, "none", "minimal")  # efforts that ask for none
_MOST_CHOICES = 16


class StreamOptions(msgspec.Struct):
    """Options of a stream.

    Attributes:
        include_usage: Whether the counts are sent after the last piece.
    """

    include_usage: bool | None = None


class WithoutEffect(msgspec.Struct, kw_only=True):
    """Fields that ask for a way of sampling that a canvas does not have. They are accepted, and have no effect."""

    top_p: Any = None
    top_k: Any = None
    min_p: Any = None
    typical_p: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    repeat_penalty: Any = None
    logit_bias: Any = None
    best_of: Any = None
    min_tokens: Any = None
    web_search_options: Any = None


class CommonRequest(WithoutEffect, kw_only=True):
    """The fields that all requests have.

    Attributes:
        model: The name of the model, which is served by the loaded one.
        stream: Whether the answer comes in pieces.
        stream_options: Options of the stream.
        max_tokens: Largest number of tokens to write; null or -1 is the rest of the context.
        seed: Seed of the random numbers. Choice i has seed + i.
        stop: Texts before which an answer ends.
        temperature: 0 takes the most probable tokens. Other values have no effect.
        n: Number of choices.
        speed: This program's own: what it takes to commit a canvas.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=_MOST_CHOICES)] | None = None
    speed: str | None = None

    def sampling(self, max_tokens: int | None) -> dict[str, Any]:
        """Return the arguments of a ``Question`` that are the same for chats and completions."""
        if max_tokens == 0:
            raise ApiError(400, "max_tokens must be at least 1", param="max_tokens")
        return {
            "max_tokens": None if max_tokens == -1 else max_tokens, "temp": 0.0 if self.temperature == 0 else None,
            "stop": stop_texts(self.stop), "speed": self.speed,
        }  # fmt: skip

    def seeds(self) -> list[int | None]:
        """Return a seed for each choice. Clients may send negative ones."""
        return [None if self.seed is None else (self.seed + at) % 2**64 for at in range(self.n or 1)]

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def begin(request: Request, body: CommonRequest, prefix: str) -> dict[str, Any]:
    """Check the model's name, note fields without effect, and return the head of all objects of the answer.

    Raises ``ApiError`` (404) for another model's name, if the server's owner wants that.
    """
    engine: Engine = request.app.state.engine
    check_model(engine, body.model)
    request.app.state.remarks.without_effect(request.url.path, body, WithoutEffect.__struct_fields__)
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.settings.model_name}


def check_model(engine: Engine, name: str | None) -> None:
    """Raise ``ApiError`` (404) for another model's name, if the server's owner wants that."""
    settings = engine.settings
    if settings.strict_model and name not in (None, settings.model_name):
        message = f"the model {shown(name)} does not exist; this server has {settings.model_name}"
        raise ApiError(404, message, param="model", code="model_not_found")


async def ask_all(engine: Engine, questions: Sequence[Question]) -> list[Answering]:
    """Ask several questions. When one is refused, the others are cancelled."""
    most = engine.settings.max_queue
    if len(questions) > most:
        raise ApiError(400, f"this server takes at most {most} requests at a time, and each choice is one", param="n")
    answerings: list[Answering] = []
    for question in questions:
        try:
            answerings.append(await engine.ask(question))
        except BaseException:
            with cancelling(answerings):
                raise
    return answerings


def usage(prompt: int, cached: int, written: int) -> dict[str, Any]:
    """Return counts of tokens: those of the prompt, those of them that were encoded before, and those of the answer."""
    return {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip


def finish_reason(ended: Ended) -> str:
    """Return why an answer ended, in OpenAI's words. One that the server cut off while closing is too short."""
    return "length" if ended.finish_reason == "cancelled" else ended.finish_reason


@contextmanager
def cancelling(answerings: Sequence[Answering]) -> Iterator[None]:
    """Cancel what is not written of the answers when the block is left."""
    try:
        yield
    finally:
        for answering in answerings:
            answering.cancel()


async def updates(answerings: Sequence[Answering]) -> AsyncIterator[tuple[int, Update]]:
    """Yield what is written of several answers, in the order in which it comes, with the index of the answer."""
    iterators = [aiter(answering) for answering in answerings]
    waiting = {asyncio.ensure_future(anext(iterator, None)): at for at, iterator in enumerate(iterators)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, update = waiting.pop(task), task.result()
                if update is not None:
                    waiting[asyncio.ensure_future(anext(iterators[index], None))] = index
                    yield index, update
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def whole(answerings: Sequence[Answering]) -> list[tuple[Written, Ended]]:
    """Wait for the ends of several answers, and return them."""
    with cancelling(answerings):
        return await asyncio.gather(*(answering.whole() for answering in answerings))


async def until_done(events: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """Yield the events of a stream, and its end. An error ends it, too."""
    try:
        async with aclosing(events):
            async for each in events:
                yield each
        yield event("[DONE]")
    except ApiError as error:
        yield event(error.openai())
