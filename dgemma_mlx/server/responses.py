"""OpenAI's responses, without a memory: every request holds the whole conversation."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dgemma_mlx.constrain.turns import THOUGHT
from dgemma_mlx.generation.model import ModelText
from dgemma_mlx.server.answering import Answering
from dgemma_mlx.server.body import read_body
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.messages import offered
from dgemma_mlx.server.openai_request import NO_THINKING, check_model
from dgemma_mlx.server.question import Ended, Question, Written
from dgemma_mlx.server.responses_output import Output, new_id
from dgemma_mlx.server.responses_request import (
    Format,
    ResponsesRequest,
    check,
    conversation,
    custom_names,
    functions,
    response_format,
    tool_choice,
)
from dgemma_mlx.server.sse import EventStream, event, unless_gone


async def create(request: Request) -> Response:
    """Answer a conversation."""
    engine: Engine = request.app.state.engine
    body = await read_body(request, ResponsesRequest)
    check(body)
    check_model(engine, body.model)
    remarks, tools = request.app.state.remarks, body.tools or []
    remarks.without_effect(request.url.path, body, ("top_p", "max_tool_calls", "truncation"))
    offer = await engine.read(lambda text: offered(functions(tools), tool_choice(body.tool_choice)))
    for line in offer.remarks():
        remarks.once(line)
    messages = await engine.images.messages(engine.text, conversation(body))
    answering = await engine.ask(
        Question(
            messages, thinking=body.reasoning is not None and body.reasoning.effort not in NO_THINKING,
            tools=offer.tools, tool_choice=offer.choice, single_call=body.parallel_tool_calls is False,
            response_format=response_format(body),
            max_tokens=body.max_output_tokens, seed=body.seed, temp=0 if body.temperature == 0 else None,
        )
    )  # fmt: skip
    output = Output(offer.namespaces, frozenset(custom_names(tools)))
    stream = ResponseStream(_head(body, engine.settings.model_name), output, engine.text)
    if body.stream:
        return EventStream(stream.events(answering), engine.settings.ping_seconds, stream.in_progress)
    async with answering:
        written, ended = await unless_gone(request, answering.whole())
    return JSONResponse(stream.whole(written, ended))


class ResponseStream:
    """A response, and the events that tell how it is written."""

    def __init__(self, head: dict[str, Any], output: Output, text: ModelText) -> None:
        """Begin a response of the model that ``text`` belongs to."""
        self._response, self._output = head, output
        self._thought = [text.tokenizer.special_ids.get(mark) for mark in THOUGHT]
        self._number = 0

    async def events(self, answering: Answering) -> AsyncIterator[bytes]:
        """Yield the events of an answer."""
        yield self._event({"type": "response.created", "response": self._response})
        yield self.in_progress()
        try:
            async with answering:
                async for update in answering:
                    if isinstance(update, Written):
                        for each in self._output.add(update):
                            yield self._event(each)
                    elif isinstance(update, Ended):
                        for each in self._output.close(is_cut=_is_cut(update)):
                            yield self._event(each)
                        self._end(update)
                        yield self._event({"type": f"response.{self._response['status']}", "response": self._response})
        except ApiError as error:
            self._response |= {
                "status": "failed", "output": self._output.items,
                "error": {"code": error.code or error.type, "message": error.message},
            }  # fmt: skip
            yield self._event({"type": "response.failed", "response": self._response})

    def in_progress(self) -> bytes:
        """Return a sign of life. Clients of this protocol ignore comments, but not this event."""
        return self._event({"type": "response.in_progress", "response": self._response})

    def whole(self, written: Written, ended: Ended) -> dict[str, Any]:
        """Return the response to an answer in one piece."""
        for events in (self._output.add(written), self._output.close(is_cut=_is_cut(ended))):
            for _ in events:
                pass
        self._end(ended)
        return self._response

    def _end(self, ended: Ended) -> None:
        """Complete the response."""
        is_cut, statistics = _is_cut(ended), ended.done.statistics
        self._response |= {
            "status": "incomplete" if is_cut else "completed", "output": self._output.items,
            "completed_at": None if is_cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": statistics.prompt_tokens,
                "input_tokens_details": {"cached_tokens": statistics.cached_tokens},
                "output_tokens": statistics.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": self._thought_tokens(ended)},
                "total_tokens": statistics.prompt_tokens + statistics.generated_tokens,
            },
        }  # fmt: skip

    def _thought_tokens(self, ended: Ended) -> int:
        """Return how many tokens of an answer are thoughts, with the marks around them."""
        opening, closing = self._thought
        count, is_inside = 0, False
        for token in ended.done.tokens:
            is_inside = is_inside or token == opening
            count += is_inside
            is_inside = is_inside and token != closing
        return count

    def _event(self, data: dict[str, Any]) -> bytes:
        """Return an event with the next number."""
        data = {**data, "sequence_number": self._number}
        self._number += 1
        return event(data, data["type"])


def _is_cut(ended: Ended) -> bool:
    """Return whether an answer is incomplete."""
    return ended.finish_reason in ("length", "cancelled")


def _head(body: ResponsesRequest, model: str) -> dict[str, Any]:
    """Return a response before anything of it is written."""
    format = Format("text") if body.text is None or body.text.format is None else body.text.format
    return {
        "id": new_id("resp"), "object": "response", "created_at": int(time.time()), "completed_at": None,
        "status": "in_progress", "background": False, "error": None, "incomplete_details": None,
        "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {}, "model": model, "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "store": False, "temperature": body.temperature, "text": {"format": msgspec.to_builtins(format)},
        "tool_choice": body.tool_choice or "auto", "tools": body.tools or [], "top_p": body.top_p,
        "truncation": "disabled", "usage": None,
    }  # fmt: skip


ROUTES = [Route("/v1/responses", create, methods=["POST"])]
