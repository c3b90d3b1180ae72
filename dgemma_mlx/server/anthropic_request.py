"""Bodies of Anthropic's messages, and what they ask of the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec

from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.images import ImageReference, url_reference
from dgemma_mlx.server.messages import chat_messages, text_of
from dgemma_mlx.text.messages import Message

Count = Annotated[int, msgspec.Meta(ge=1)]


class Text(msgspec.Struct, tag="text"):
    """A text of a message."""

    text: str


class Thinking(msgspec.Struct, tag="thinking"):
    """What the model thought."""

    thinking: str


class RedactedThinking(msgspec.Struct, tag="redacted_thinking"):
    """What another model thought, which nobody can read."""


class ToolUse(msgspec.Struct, tag="tool_use"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


class ToolReference(msgspec.Struct, tag="tool_reference"):
    """The name of a tool that is offered from here on."""

    tool_name: str


class Source(msgspec.Struct):
    """Where an image or a document comes from."""

    type: str
    data: str | None = None
    media_type: str | None = None
    url: str | None = None


class Image(msgspec.Struct, tag="image"):
    """An image, which is read from base64, or from an address."""

    source: Source


class Document(msgspec.Struct, tag="document"):
    """A document, which is read when it is plain text."""

    source: Source
    title: str | None = None


class ToolResult(msgspec.Struct, tag="tool_result"):
    """The result of a call."""

    tool_use_id: str
    content: str | list[Text | ToolReference | Image | Document] | None = None
    is_error: bool | None = None


class Tool(msgspec.Struct, omit_defaults=True):
    """A tool. One whose type is another than "custom" runs on Anthropic's machines, or is known to its models only."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None


class ChangedTool(msgspec.Struct):
    """The tool of a change: a definition, or the name of one that exists."""

    name: str = ""
    definition: Tool | None = None


class ToolAddition(msgspec.Struct, tag="tool_addition"):
    """A tool that is offered from here on."""

    tool: ChangedTool


class ToolRemoval(msgspec.Struct, tag="tool_removal"):
    """A tool that is no longer offered."""

    tool: ChangedTool


Block = (
    Text | Thinking | RedactedThinking | ToolUse | ToolResult | ToolAddition | ToolRemoval | Image | Document
)  # fmt: skip


class Turn(msgspec.Struct):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block] | None = None


class ToolChoice(msgspec.Struct):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingChoice(msgspec.Struct):
    """Whether the model thinks."""

    type: Literal["enabled", "adaptive", "disabled"]


class Format(msgspec.Struct):
    """What an answer must match."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct):
    """How an answer is written."""

    format: Format | None = None


class CountRequest(msgspec.Struct):
    """The body of a request that counts the tokens of a prompt."""

    messages: list[Turn]
    system: str | list[Text] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingChoice | None = None
    model: str | None = None


class MessagesRequest(CountRequest):
    """The body of a request for an answer. ``seed`` is this program's own."""

    max_tokens: Count | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None


def conversation(body: CountRequest) -> list[Message]:
    """Return the messages of a request, the system prompt first."""
    if not body.messages or body.messages[-1].role == "assistant":
        raise ApiError(400, "the conversation must end with a message of the user", param="messages")
    found: list[Message] = []
    found += [{"role": "system", "content": block.text} for block in _blocks(body.system)]
    for number, turn in enumerate(body.messages):
        blocks, place = _blocks(turn.content), f"messages.{number}"
        if turn.role == "assistant":
            found.append(_answer(blocks, place))
        elif turn.role == "user":
            results = [block for block in blocks if isinstance(block, ToolResult)]
            found += [_result(block, place) for block in results]
            rest = [block for block in blocks if not isinstance(block, ToolResult)]
            if rest or not results:
                found.append({"role": "user", "content": _parts(rest, place)})
        elif rest := [block for block in blocks if not isinstance(block, (ToolAddition, ToolRemoval))]:
            found.append({"role": "system", "content": _text(rest, place)})
    return chat_messages(found)


def tools(body: CountRequest) -> list[dict[str, Any]]:
    """Return the tools that are offered after the last message.

    Those whose loading is deferred are offered once a message refers to them.
    """
    offered = {tool.name: tool for tool in body.tools or () if not tool.defer_loading}
    deferred = {tool.name: tool for tool in body.tools or () if tool.defer_loading}
    for block in _all_blocks(body.messages):
        if isinstance(block, ToolReference) and block.tool_name in deferred:
            offered[block.tool_name] = deferred[block.tool_name]
        elif isinstance(block, ToolAddition):
            tool = block.tool.definition or deferred.get(block.tool.name)
            if tool is not None:
                offered[tool.name] = tool
        elif isinstance(block, ToolRemoval):
            offered.pop(block.tool.name, None)
    return [msgspec.to_builtins(tool) for tool in offered.values()]


def _blocks(content: str | Sequence[Any] | None) -> Sequence[Any]:
    """Return a content as blocks."""
    return [Text(content)] if isinstance(content, str) else content or ()


def _all_blocks(turns: Iterable[Turn]) -> Iterator[Any]:
    """Yield the blocks of all messages, and those of the results in them."""
    for turn in turns:
        for block in _blocks(turn.content):
            yield block
            if isinstance(block, ToolResult):
                yield from _blocks(block.content)


def _answer(blocks: Sequence[Any], place: str) -> Message:
    """Return the message of an assistant."""
    calls = [
        {"id": block.id, "function": {"name": block.name, "arguments": block.input}}
        for block in blocks if isinstance(block, ToolUse)
    ]  # fmt: skip
    thinking = "".join(block.thinking for block in blocks if isinstance(block, Thinking))
    rest = [block for block in blocks if not isinstance(block, (ToolUse, Thinking, RedactedThinking))]
    return {"role": "assistant", "content": _text(rest, place), "thinking": thinking, "tool_calls": calls}


def _result(block: ToolResult, place: str) -> Message:
    """Return the message of a tool. A failure is told from a result."""
    blocks = _blocks(block.content)
    content = {"error": _text(blocks, place)} if block.is_error else _parts(blocks, place)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _text(blocks: Sequence[Any], place: str) -> str:
    """Return the texts of blocks, each on a line of its own."""
    return text_of(_parts(blocks, place), place)


def _parts(blocks: Sequence[Any], place: str) -> list[str | ImageReference]:
    """Return the texts and the images of blocks, for ``chat_messages``."""
    return [_part(block, place) for block in blocks]


def _part(block: Any, place: str) -> str | ImageReference:
    if isinstance(block, Image):
        return _image(block.source, place)
    if isinstance(block, Text):
        return block.text
    if isinstance(block, ToolReference):
        return f"The tool {block.tool_name} can be called from now on."
    if isinstance(block, Document) and block.source.type == "text" and block.source.data is not None:
        return block.source.data if block.title is None else f"{block.title}\n{block.source.data}"
    name = type(block).__struct_config__.tag
    raise ApiError(400, f"{place}: a block of type {name} cannot be read here. Only text and images are", param=place)


def _image(source: Source, place: str) -> ImageReference:
    """Return the image of a block."""
    if source.type == "url" and source.url is not None:
        return url_reference(source.url, None, place)
    if source.type == "base64" and source.data is not None and source.media_type is not None:
        return ImageReference(f"data:{source.media_type};base64,{source.data}", place)
    message = "an image has a source of type base64, with media_type and data, or of type url; no files are kept here"
    raise ApiError(400, f"{place}: {message}", param=place)
