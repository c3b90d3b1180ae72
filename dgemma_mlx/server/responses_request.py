"""Bodies of OpenAI's responses, and what they ask of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from dgemma_mlx.server.body import converted
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.images import ImageReference, part_reference
from dgemma_mlx.server.messages import chat_messages, flat_name, text_of
from dgemma_mlx.text.messages import Message

Count = Annotated[int, msgspec.Meta(ge=1)]
# The parameters of a function that takes a text.
_TEXT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


class InputText(msgspec.Struct, tag="input_text"):
    """A text of a message that is not the model's."""

    text: str


class OutputText(msgspec.Struct, tag="output_text"):
    """A text of the model."""

    text: str


class SummaryText(msgspec.Struct, tag="summary_text"):
    """A text about what the model thought."""

    text: str


class ReasoningText(msgspec.Struct, tag="reasoning_text"):
    """What the model thought."""

    text: str


class Refusal(msgspec.Struct, tag="refusal"):
    """An answer that says no."""

    refusal: str


class InputImage(msgspec.Struct, tag="input_image"):
    """An image: a data URL, or the address of a file."""

    image_url: str | None = None
    file_id: str | None = None
    detail: str | None = None


class InputFile(msgspec.Struct, tag="input_file"):
    """A file."""


Part = InputText | OutputText | Refusal | InputImage | InputFile


class MessageItem(msgspec.Struct, tag="message"):
    """A message."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part] | None = None


class FunctionCall(msgspec.Struct, tag="function_call"):
    """A call of a function."""

    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class CustomToolCall(msgspec.Struct, tag="custom_tool_call"):
    """A call of a tool that takes a text."""

    call_id: str
    name: str
    input: str
    namespace: str | None = None


class FunctionCallOutput(msgspec.Struct, tag="function_call_output"):
    """The result of a function."""

    call_id: str
    output: str | list[Part] | None = None


class CustomToolCallOutput(msgspec.Struct, tag="custom_tool_call_output"):
    """The result of a tool that takes a text."""

    call_id: str
    output: str | list[Part] | None = None


class Reasoning(msgspec.Struct, tag="reasoning"):
    """What the model thought."""

    summary: list[SummaryText] | None = None
    content: list[ReasoningText] | None = None


class WebSearchCall(msgspec.Struct, tag="web_search_call"):
    """A search by another model, whose answer says what it found."""


class ItemReference(msgspec.Struct, tag="item_reference"):
    """An item that the server is asked to remember."""


Item = (
    MessageItem | FunctionCall | CustomToolCall | FunctionCallOutput | CustomToolCallOutput | Reasoning | WebSearchCall
    | ItemReference
)  # fmt: skip


class ReasoningChoice(msgspec.Struct):
    """Whether the model thinks."""

    effort: str | None = None


class Format(msgspec.Struct, omit_defaults=True):
    """What an answer must match."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None


class TextConfig(msgspec.Struct):
    """How an answer is written."""

    format: Format | None = None


class ResponsesRequest(msgspec.Struct):
    """The body of a request. ``seed`` is this program's own."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningChoice | None = None
    text: TextConfig | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tool_calls: int | None = None
    truncation: str | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    stream: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    metadata: dict[str, Any] | None = None
    model: str | None = None
    seed: int | None = None


def check(body: ResponsesRequest) -> None:
    """Raise ``ApiError`` (400) for what this server does not have."""
    stored = "nothing is stored here. Send the whole conversation as input"
    for name, value, problem in (
        ("previous_response_id", body.previous_response_id, stored),
        ("conversation", body.conversation, stored),
        ("prompt", body.prompt, stored),
        ("background", body.background, "there is no work in the background. Stream the response"),
        ("top_logprobs", body.top_logprobs, "there are no log probabilities here"),
        ("include", [each for each in body.include or () if "logprobs" in each], "there are no log probabilities here"),
    ):
        if value:
            raise ApiError(400, f"{name}: {problem}", param=name)


def conversation(body: ResponsesRequest) -> list[Message]:
    """Return the messages of a request. Reasoning, text and calls of the model that follow each other are one."""
    found: list[dict[str, Any]] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    for item, place in _items(body.input):
        if isinstance(item, (FunctionCallOutput, CustomToolCallOutput)):
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output, place)})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            found.append({"role": item.role, "content": _content(item.content, place)})
        elif isinstance(item, ItemReference):
            raise ApiError(400, "nothing is stored here. Send the item itself", param=place)
        elif not isinstance(item, WebSearchCall):
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": "", "thinking": "", "tool_calls": []})
            _add(found[-1], item, place)
    return chat_messages(found)


def functions(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return tools for ``messages.offered``. One that takes a text becomes a function with a single argument."""
    found: list[Mapping[str, Any]] = []
    for tool in tools:
        if tool.get("type") == "custom":
            found.append({**tool, "type": "function", "description": _custom_description(tool), "parameters": _TEXT})
        elif tool.get("type") == "namespace" and isinstance(tool.get("tools"), list):
            found.append({**tool, "tools": functions(converted(tool["tools"], list[dict[str, Any]], "tools"))})
        else:
            found.append(tool)
    return found


def custom_names(tools: Sequence[Mapping[str, Any]], space: str | None = None) -> Iterator[str]:
    """Yield the names under which the model sees the tools that take a text. ``functions`` has read the tools."""
    for tool in tools:
        if tool.get("type") == "custom":
            yield flat_name(space, str(tool.get("name")))
        elif tool.get("type") == "namespace":
            yield from custom_names(tool.get("tools") or (), str(tool.get("name")))


def tool_choice(choice: Any) -> Any:
    """Return a choice among the tools for ``messages.offered``."""
    if not isinstance(choice, Mapping):
        return choice
    if isinstance(choice.get("tools"), list):
        return {**choice, "tools": [tool_choice(each) for each in choice["tools"]]}
    if choice.get("type") not in ("function", "custom"):
        return choice
    return {"type": "function", "name": flat_name(choice.get("namespace"), str(choice.get("name")))}


def response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    """Return what the answer must match in the form of chat completions."""
    format = None if body.text is None else body.text.format
    if format is None:
        return None
    if format.type != "json_schema":
        return {"type": format.type}
    return {"type": "json_schema", "json_schema": {"name": format.name or "answer", "schema": format.schema}}


def _items(given: str | Sequence[Mapping[str, Any]]) -> Iterator[tuple[Any, str]]:
    """Yield the items of an input, each with its place. What has a role and no type is a message."""
    if isinstance(given, str):
        yield MessageItem("user", given), "input"
        return
    for number, item in enumerate(given):
        place = f"input[{number}]"
        typed = {"type": "message", **item} if "role" in item else item
        yield converted(typed, Item, place), place


def _custom_description(tool: Mapping[str, Any]) -> str:
    """Return the description of a tool that takes a text, with the grammar of the text."""
    description, format = tool.get("description") or "", tool.get("format")
    if isinstance(format, Mapping) and format.get("type") == "grammar":
        description = f"{description}\nThe input follows a {format.get('syntax')} grammar:\n{format.get('definition')}"
    return str(description)


def _add(message: dict[str, Any], item: Any, place: str) -> None:
    """Add an item of the model to its message."""
    if isinstance(item, Reasoning):
        message["thinking"] += "".join(part.text for part in item.content or item.summary or ())
    elif isinstance(item, MessageItem):
        text = text_of(_content(item.content, place), place)
        message["content"] = "\n".join(filter(None, (message["content"], text)))
    else:
        arguments = {"input": item.input} if isinstance(item, CustomToolCall) else item.arguments
        function = {"name": flat_name(item.namespace, item.name), "arguments": arguments}
        message["tool_calls"].append({"id": item.call_id, "function": function})


def _content(content: str | list[Part] | None, place: str) -> str | list[Any]:
    """Return a content for ``chat_messages``."""
    if content is None or isinstance(content, str):
        return content or ""
    return [_part(part, place) for part in content]


def _part(part: Part, place: str) -> str | ImageReference:
    """Return the text of a part, or its image."""
    if isinstance(part, InputImage):
        return part_reference(msgspec.to_builtins(part), place)
    if isinstance(part, InputFile):
        raise ApiError(400, f"{place}: files cannot be read here. Only text and images are read", param=place)
    return part.refusal if isinstance(part, Refusal) else part.text
