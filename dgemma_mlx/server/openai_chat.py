"""OpenAI's chat completions."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dgemma_mlx.events import Draft
from dgemma_mlx.server.answering import Answering
from dgemma_mlx.server.body import read_body
from dgemma_mlx.server.drafts import Drafts
from dgemma_mlx.server.engine import Engine
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.messages import chat_messages, offered
from dgemma_mlx.server.openai_request import (
    NO_THINKING,
    CommonRequest,
    ask_all,
    begin,
    cancelling,
    finish_reason,
    until_done,
    updates,
    usage,
    whole,
)
from dgemma_mlx.server.question import Ended, Question, Written
from dgemma_mlx.server.sse import EventStream, event, unless_gone
from dgemma_mlx.text.parts import ToolCall


class ChatRequest(CommonRequest, kw_only=True):
    """The body of a request.

    Attributes:
        messages: The conversation. Images are parts of type ``image_url``.
        max_completion_tokens: The new name of ``max_tokens``.
        tools: What the model may call.
        tool_choice: Whether it calls.
        parallel_tool_calls: Whether it may make several calls at a time.
        functions: The old name of ``tools``, which is refused.
        response_format: What the answer must match.
        reasoning_effort: Whether the model thinks first.
        chat_template_kwargs: The same, as ``{"enable_thinking": true}``, the spelling of other servers.
        logprobs: Refused.
        top_logprobs: Refused.
        drafts: This program's own: whether a stream holds each denoising step.
    """

    messages: list[Any]
    max_completion_tokens: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    drafts: bool | None = None

    def thinks(self) -> bool:
        """Return whether the model thinks before it answers."""
        kwargs = self.chat_template_kwargs or {}
        return self.reasoning_effort not in NO_THINKING or kwargs.get("enable_thinking") is True


async def complete(request: Request) -> Response:
    """Answer a conversation."""
    engine: Engine = request.app.state.engine
    body = await read_body(request, ChatRequest)
    _check(body)
    head = begin(request, body, "chatcmpl")
    offer = await engine.read(lambda text: offered(body.tools, body.tool_choice))
    for line in offer.remarks():
        request.app.state.remarks.once(line)
    has_drafts = bool(body.stream and body.drafts)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    sampling = body.sampling(limit)
    messages = await engine.images.messages(engine.text, chat_messages(body.messages))
    questions = [
        Question(
            messages, thinking=body.thinks(), tools=offer.tools, tool_choice=offer.choice,
            single_call=body.parallel_tool_calls is False, response_format=body.response_format, seed=seed,
            drafts=has_drafts, **sampling,
        )
        for seed in body.seeds()
    ]  # fmt: skip
    answerings = await ask_all(engine, questions)
    if body.stream:
        drafts = Drafts(engine.text) if has_drafts else None
        events = _chunks(answerings, {**head, "object": "chat.completion.chunk"}, body.wants_usage, drafts)
        return EventStream(until_done(events), engine.settings.ping_seconds)
    found = await unless_gone(request, whole(answerings))
    return JSONResponse({
        **head, "object": "chat.completion",
        "choices": [choice(index, *each) for index, each in enumerate(found)],
        "usage": _usage([ended for _, ended in found]),
    })  # fmt: skip


def _check(body: ChatRequest) -> None:
    """Raise ``ApiError`` (400) for what cannot be."""
    if not body.messages:
        raise ApiError(400, "there are no messages", param="messages")
    if body.logprobs or body.top_logprobs:
        raise ApiError(400, "there are no log-probabilities: a canvas has none", param="logprobs")
    if body.functions:
        raise ApiError(400, "functions is not read any more; write tools", param="functions")
    if body.drafts and len(body.seeds()) > 1:
        raise ApiError(400, "drafts are sent of one choice only", param="drafts")


def choice(index: int, written: Written, ended: Ended) -> dict[str, Any]:
    """Return a whole answer as one of the choices."""
    calls = [_call(call) for call in written.tool_calls]
    message: dict[str, Any] = {"role": "assistant", "content": written.text or (None if calls else ""), "refusal": None}
    if written.thinking:
        message["reasoning_content"] = written.thinking
    if calls:
        message["tool_calls"] = calls
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish_reason(ended)}


def _call(call: ToolCall, arguments: str | None = None) -> dict[str, Any]:
    """Return a call, with these arguments instead of its own."""
    text = json.dumps(call.arguments, ensure_ascii=False) if arguments is None else arguments
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": text}}


async def _chunks(
    answerings: Sequence[Answering], head: dict[str, Any], wants_usage: bool, drafts: Drafts | None
) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of the answers."""

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, dgemma: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        more = {} if dgemma is None else {"dgemma": dgemma}  # clients ignore a field that they do not know
        return event({**head, "choices": [choice], **({"usage": None} if wants_usage else {}), **more})

    ends: list[Ended] = []
    calls = [0] * len(answerings)
    with cancelling(answerings):
        for index in range(len(answerings)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, update in updates(answerings):
            if isinstance(update, Draft):
                assert drafts is not None, "the question asked for drafts"
                yield chunk(index, {}, dgemma=drafts.draft(update))
            elif isinstance(update, Written):
                if drafts is not None:
                    drafts.wrote(update)
                for delta in _deltas(update, calls[index]):
                    yield chunk(index, delta)
                calls[index] += len(update.tool_calls)
            else:
                ends.append(update)
                yield chunk(index, {}, finish_reason(update), None if drafts is None else drafts.ended(update))
    if wants_usage:
        yield event({**head, "choices": [], "usage": _usage(ends)})


def _usage(ends: Sequence[Ended]) -> dict[str, Any]:
    """Return the counts of a request. Its prompt counts once, however many choices it has."""
    counts = [ended.done.statistics for ended in ends]
    return usage(counts[0].prompt_tokens, counts[0].cached_tokens, sum(each.generated_tokens for each in counts))


def _deltas(written: Written, calls: int) -> list[dict[str, Any]]:
    """Return what is written as deltas. ``calls`` is the number of calls before.

    The first delta of a call has its name, and a second one its arguments: some clients read only such streams.
    """
    deltas: list[dict[str, Any]] = [{"reasoning_content": written.thinking}] if written.thinking else []
    deltas += [{"content": written.text}] if written.text else []
    for index, call in enumerate(written.tool_calls, calls):
        whole = _call(call)
        deltas.append({"tool_calls": [{"index": index, **_call(call, "")}]})
        deltas.append({"tool_calls": [{"index": index, "function": {"arguments": whole["function"]["arguments"]}}]})
    return deltas


ROUTES = [Route("/v1/chat/completions", complete, methods=["POST"])]
