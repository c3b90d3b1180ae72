"""Anthropic's messages, and the count of their tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dgemma_mlx.server.answering import Answering
from dgemma_mlx.server.anthropic_request import MessagesRequest, conversation, tools
from dgemma_mlx.server.body import read_body
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.messages import offered
from dgemma_mlx.server.openai_request import check_model
from dgemma_mlx.server.question import Ended, Question, Written
from dgemma_mlx.server.sse import EventStream, event, unless_gone
from dgemma_mlx.server.stops import stop_texts

_SIGNATURE = "unsigned"  # some clients take thoughts with an empty signature for text
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "cancelled": "max_tokens"}


async def create(request: Request) -> Response:
    """Answer a conversation."""
    engine: Engine = request.app.state.engine
    body = await read_body(request, MessagesRequest)
    check_model(engine, body.model)
    request.app.state.remarks.without_effect(request.url.path, body, ("top_p", "top_k"))
    answering = await engine.ask(await _question(request, body))
    id = uuid4().hex
    headers = {"request-id": f"req_{id}"}
    message: dict[str, Any] = {
        "id": f"msg_{id}", "type": "message", "role": "assistant", "model": engine.settings.model_name,
        "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(answering.prompt_tokens, 0, 0),
    }  # fmt: skip
    if body.stream:
        return EventStream(_events(answering, message), engine.settings.ping_seconds, _ping, headers)
    async with answering:
        written, ended = await unless_gone(request, answering.whole())
    content = Content()
    for _ in content.add(written):
        pass
    return JSONResponse({**message, "content": content.blocks, **_end(ended)}, headers=headers)


async def count_tokens(request: Request) -> Response:
    """Count the tokens of a prompt, without the network."""
    engine: Engine = request.app.state.engine
    question = await _question(request, await read_body(request, MessagesRequest))
    ids = await engine.read(
        lambda text: text.encode_prompt(
            question.prompt, thinking=question.thinking, tools=question.tools, tool_choice=question.tool_choice
        )
    )
    return JSONResponse({"input_tokens": len(ids)})


class Content:
    """The content of an answer, as blocks, and as the events that tell of them.

    Attributes:
        blocks: The blocks so far.
    """

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._is_open = False

    def add(self, written: Written) -> Iterator[dict[str, Any]]:
        """Add what is written, and yield its events."""
        for kind, text in (("thinking", written.thinking), ("text", written.text)):
            if text:
                if not self._is_open or self.blocks[-1]["type"] != kind:
                    signature = {"signature": _SIGNATURE} if kind == "thinking" else {}
                    yield from self.close()
                    yield self._begin({"type": kind, kind: "", **signature})
                self.blocks[-1][kind] += text
                yield self._delta({"type": f"{kind}_delta", kind: text})
        for call in written.tool_calls:
            yield from self.close()
            yield self._begin({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            self.blocks[-1]["input"] = call.arguments
            arguments = json.dumps(call.arguments, ensure_ascii=False)
            yield self._delta({"type": "input_json_delta", "partial_json": arguments})
            yield from self.close()

    def close(self) -> Iterator[dict[str, Any]]:
        """Yield the end of the last block, unless it has ended."""
        if self._is_open:
            self._is_open = False
            if self.blocks[-1]["type"] == "thinking":
                yield self._delta({"type": "signature_delta", "signature": self.blocks[-1]["signature"]})
            yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _begin(self, block: dict[str, Any]) -> dict[str, Any]:
        self.blocks.append(block)
        self._is_open = True
        return {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


async def _events(answering: Answering, message: dict[str, Any]) -> AsyncIterator[bytes]:
    """Yield the events of an answer."""
    content = Content()
    try:
        async with answering:
            yield _event({"type": "message_start", "message": message})
            async for update in answering:
                if isinstance(update, Written):
                    for each in content.add(update):
                        yield _event(each)
                elif isinstance(update, Ended):
                    for each in content.close():
                        yield _event(each)
                    end = _end(update)
                    usage = end.pop("usage")
                    yield _event({"type": "message_delta", "delta": end, "usage": usage})
                    yield _event({"type": "message_stop"})
    except ApiError as error:
        yield _event(error.anthropic())


def _event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])


def _ping() -> bytes:
    return _event({"type": "ping"})


async def _question(request: Request, body: MessagesRequest) -> Question:
    """Return what a request asks."""
    choice, format = body.tool_choice, body.output_format
    if body.output_config is not None:
        format = body.output_config.format or format
    wanted = None if choice is None else {"type": choice.type, "name": choice.name}
    engine: Engine = request.app.state.engine
    offer = await engine.read(lambda text: offered(tools(body), wanted))
    for line in offer.remarks():
        request.app.state.remarks.once(line)
    messages = await engine.images.messages(engine.text, conversation(body))
    return Question(
        messages, thinking=body.thinking is not None and body.thinking.type != "disabled", tools=offer.tools,
        tool_choice=offer.choice, single_call=choice is not None and choice.disable_parallel_tool_use is True,
        response_format=None if format is None else
            {"type": "json_schema", "json_schema": {"name": "answer", "schema": format.schema}},
        max_tokens=body.max_tokens, seed=body.seed, temp=0 if body.temperature == 0 else None,
        stop=stop_texts(body.stop_sequences, "stop_sequences"),
    )  # fmt: skip


def _end(ended: Ended) -> dict[str, Any]:
    """Return what a message says of its end."""
    statistics = ended.done.statistics
    reason = "stop_sequence" if ended.stop_text is not None else _STOP_REASONS[ended.finish_reason]
    usage = _usage(statistics.prompt_tokens, statistics.cached_tokens, statistics.generated_tokens)
    return {"stop_reason": reason, "stop_sequence": ended.stop_text, "usage": usage}


def _usage(prompt: int, cached: int, generated: int) -> dict[str, int]:
    """Return counts of tokens. Those of the prompt are split, as Anthropic counts them."""
    return {
        "input_tokens": prompt - cached, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached,
        "output_tokens": generated,
    }  # fmt: skip


ROUTES = [
    Route("/v1/messages", create, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
]
