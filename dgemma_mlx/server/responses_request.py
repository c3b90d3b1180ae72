"""Bodies of OpenAI's responses, and what they ask of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from dgemma_mlx.checks import shown
from dgemma_mlx.server.body import converted
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.text.messages import Message

Count = Annotated[int, msgspec.Meta(ge=1)]


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
    """A picture."""


class InputFile(msgspec.Struct, tag="input_file"):
    """A file."""


Part = InputText | OutputText | Refusal | InputImage | InputFile


class MessageItem(msgspec.Struct, tag="message"):
    """A message."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


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
    output: str | list[Part]


class CustomToolCallOutput(msgspec.Struct, tag="custom_tool_call_output"):
    """The result of a tool that takes a text."""

    call_id: str
    output: str | list[Part]


class Reasoning(msgspec.Struct, tag="reasoning"):
    """What the model thought."""

    summary: list[SummaryText] = []
    content: list[ReasoningText] | None = None


class WebSearchCall(msgspec.Struct, tag="web_search_call"):
    """A search by another model, whose answer says what it found."""


class ItemReference(msgspec.Struct, tag="item_reference"):
    """An item that the server is asked to remember."""


Item = (
    MessageItem | FunctionCall | CustomToolCall | FunctionCallOutput | CustomToolCallOutput | Reasoning | WebSearchCall
    | ItemReference
)  # fmt: skip


class Tool(msgspec.Struct, omit_defaults=True):
    """A tool. One of another type than "function", "custom" and "namespace" runs on OpenAI's machines."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class ToolChoice(msgspec.Struct, omit_defaults=True):
    """Which tool is called."""

    type: str
    name: str | None = None
    namespace: str | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: list[ToolChoice] | None = None


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
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningChoice | None = None
    text: TextConfig | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
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


class Called(NamedTuple):
    """What a tool's name stands for.

    Attributes:
        name: The client's name of the tool.
        namespace: The namespace that the tool is in, or None.
        is_custom: Whether the tool takes a text instead of arguments.
    """

    name: str
    namespace: str | None = None
    is_custom: bool = False

    @property
    def full_name(self) -> str:
        """The name under which the model calls the tool."""
        return self.name if self.namespace is None else f"{self.namespace}.{self.name}"


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
    """Return the messages of a request in the form of ``text.messages.conversation``.

    Reasoning, text and calls of the model that follow each other are one message.
    """
    found: list[dict[str, Any]] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    for item, place in _items(body.input):
        if isinstance(item, (FunctionCallOutput, CustomToolCallOutput)):
            found.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, place)})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            found.append({"role": item.role, "content": _text(item.content, place)})
        elif isinstance(item, ItemReference):
            raise ApiError(400, "nothing is stored here. Send the item itself", param=place)
        elif not isinstance(item, WebSearchCall):
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": "", "thinking": "", "tool_calls": []})
            _add(found[-1], item, place)
    return [{name: value for name, value in message.items() if value or name != "thinking"} for message in found]


def tools(body: ResponsesRequest) -> tuple[list[dict[str, Any]], dict[str, Called]]:
    """Return the tools that are offered, and what their names stand for.

    A tool in a namespace is a tool of a longer name. One that takes a text has a single argument. Tools that OpenAI's
    machines would run are left out.
    """
    found, names = [], {}
    for tool, called in _functions(body.tools or (), None):
        description, parameters = tool.description or "", tool.parameters
        if called.is_custom:
            description, parameters = _custom(tool)
        found.append(
            {"name": called.full_name, "description": description, "parameters": parameters, "strict": tool.strict}
        )
        names[called.full_name] = called
    choice = body.tool_choice
    if isinstance(choice, ToolChoice) and choice.type == "allowed_tools":
        allowed = {Called(each.name or "", each.namespace).full_name for each in choice.tools or ()}
        found = [tool for tool in found if tool["name"] in allowed]
    return found, names


def tool_choice(body: ResponsesRequest) -> str | dict[str, Any] | None:
    """Return the choice among the tools in the form of ``text.tools.chosen``."""
    choice = body.tool_choice
    if not isinstance(choice, ToolChoice):
        return choice
    if choice.type == "allowed_tools":
        return choice.mode
    if choice.type not in ("function", "custom") or choice.name is None:
        raise ApiError(400, f"a tool of type {shown(choice.type)} cannot be called here", param="tool_choice")
    return {"type": "function", "function": {"name": Called(choice.name, choice.namespace).full_name}}


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


def _functions(given: Sequence[Tool], namespace: str | None) -> Iterator[tuple[Tool, Called]]:
    """Yield the tools that the model may call, with what their names stand for."""
    for tool in given:
        if tool.type == "namespace":
            yield from _functions(tool.tools or (), tool.name)
        elif tool.type in ("function", "custom"):
            yield tool, Called(tool.name or "", namespace, tool.type == "custom")


def _custom(tool: Tool) -> tuple[str, dict[str, Any]]:
    """Return the description and the parameters of a tool that takes a text."""
    description, format = tool.description or "", tool.format or {}
    if format.get("type") == "grammar":
        description += f"\nThe input follows this {format.get('syntax')} grammar:\n{format.get('definition')}"
    return description, {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}


def _add(message: dict[str, Any], item: Any, place: str) -> None:
    """Add an item of the model to its message."""
    if isinstance(item, Reasoning):
        message["thinking"] += "".join(part.text for part in item.content or item.summary)
    elif isinstance(item, MessageItem):
        message["content"] = "\n\n".join(text for text in (message["content"], _text(item.content, place)) if text)
    else:
        arguments = {"input": item.input} if isinstance(item, CustomToolCall) else item.arguments
        name = Called(item.name, item.namespace).full_name
        message["tool_calls"].append({"id": item.call_id, "name": name, "arguments": arguments})


def _text(content: str | list[Any], place: str) -> str:
    """Return the texts of a content, as paragraphs."""
    if isinstance(content, str):
        return content
    if any(isinstance(part, (InputImage, InputFile)) for part in content):
        raise ApiError(400, "pictures and files cannot be read here. Only text is read so far", param=place)
    return "\n\n".join(part.refusal if isinstance(part, Refusal) else part.text for part in content)
