"""OpenAI's chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dgemma_mlx.events import Draft
from dgemma_mlx.server.body import read_body
from dgemma_mlx.server.drafts import Drafts
from dgemma_mlx.server.engine import Answering, Engine
from dgemma_mlx.server.question import Question, Written
from dgemma_mlx.server.sse import EventStream, event, unless_gone


class ChatRequest(msgspec.Struct):
    """The body of a request."""

    messages: list[dict[str, Any]]
    stream: bool = False
    max_tokens: int | None = None
    seed: int | None = None
    drafts: bool = False


async def complete(request: Request) -> Response:
    """Answer a conversation."""
    engine: Engine = request.app.state.engine
    body = await read_body(request, ChatRequest)
    answering = await engine.ask(
        Question(
            body.messages, max_tokens=body.max_tokens, seed=body.seed, drafts=body.drafts and body.stream
        )
    )
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.settings.model_name,
    }  # fmt: skip
    if body.stream:
        drafts = Drafts(engine.text) if body.drafts else None
        return EventStream(_chunks(answering, head, drafts), engine.settings.ping_seconds)
    async with answering:
        written, ended = await unless_gone(request, answering.whole())
    message = {"role": "assistant", "content": written.text}
    choice = {"index": 0, "message": message, "finish_reason": ended.finish_reason}
    return JSONResponse({**head, "object": "chat.completion", "choices": [choice]})


async def _chunks(answering: Answering, head: dict[str, Any], drafts: Drafts | None) -> AsyncIterator[bytes]:
    def chunk(delta: dict[str, Any], finish_reason: str | None = None, dgemma: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        more = {} if dgemma is None else {"dgemma": dgemma}  # clients ignore a field that they do not know
        return event({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    async with answering:
        yield chunk({"role": "assistant", "content": ""})
        async for update in answering:
            if isinstance(update, Draft):
                assert drafts is not None, "the question asked for drafts"
                yield chunk({}, dgemma=drafts.draft(update))
            elif isinstance(update, Written):
                if drafts is not None:
                    drafts.wrote(update)
                if update.text:
                    yield chunk({"content": update.text})
            else:
                yield chunk({}, update.finish_reason, None if drafts is None else drafts.ended(update))
    yield event("[DONE]")


ROUTES = [Route("/v1/chat/completions", complete, methods=["POST"])]
