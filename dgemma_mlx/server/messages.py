"""Messages and tools as clients write them -> the form that ``text.messages`` and ``text.tools`` read.

Clients add keys of their own, leave out contents, and send tools that only OpenAI can run. The form here is that of
OpenAI's chat completions; other protocols write their messages and tools in it first. Images are left as references,
which ``images.ImageReader`` reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain.turns import Turn, calls_of, of_turn
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json
from dgemma_mlx.server.errors import ApiError
from dgemma_mlx.server.images import ImageReference, part_reference
from dgemma_mlx.text.messages import THINKING_KEYS, Message
from dgemma_mlx.text.tools import Tool, ToolChoice, declarations

_BILLING = "x-anthropic-billing-header:"  # begins a line that changes with every request
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # part -> its key
_IMAGES = ("image_url", "input_image")  # types of parts
_SYSTEM = ("system", "developer")


def chat_messages(messages: Sequence[Any]) -> list[Message]:
    """Return the messages of a conversation without what only other programs read.

    Contents become texts: null is empty, and text parts are joined by line feeds. In messages of the user and of tools,
    a content with images is a list of texts and ``ImageReference`` objects. The role developer is system. System
    messages at the beginning become one, without the line by which a client of Anthropic's has itself billed, because
    it would hide a prompt that is already encoded. Raises ``ApiError`` (400), which names the message, for parts that
    cannot be read. What else is wrong, ``text.messages.conversation`` says.
    """
    found = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    first = next((number for number, message in enumerate(found) if message.get("role") != "system"), len(found))
    system = "\n\n".join(filter(None, (without_billing(message["content"]) for message in found[:first])))
    return [*([{"role": "system", "content": system}] if system else []), *found[first:]]


def without_billing(system: str) -> str:
    """Return a system prompt without the line that names a client's version and a digest of the request."""
    line, _, rest = system.partition("\n")
    return rest.lstrip("\n") if line.startswith(_BILLING) else system


def text_of(content: Any, place: str) -> str:
    """Return a content, which is null, a text, or a list of text parts, as one text.

    Raises ``ApiError`` (400), which names the place, for anything else, such as images.
    """
    found = content_of(content, place)
    if isinstance(found, str):
        return found
    where = next(part.place for part in found if isinstance(part, ImageReference))
    raise ApiError(400, f"{where}: an image can only stand in a message of the user or of a tool", param=where)


def content_of(content: Any, place: str) -> str | list[Any]:
    """Return a content, which is null, a text, or a list of parts, as one text where it has no images.

    Otherwise it is a list of text parts and ``ImageReference`` objects; texts that follow each other are joined by line
    feeds. Raises ``ApiError`` (400), which names the place, for anything else.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise ApiError(400, f"the content is a text or a list of parts, not {shown(content)}", param=place)
    parts = [_part(part, f"{place}[{number}]") for number, part in enumerate(content)]
    found: list[Any] = []
    for part in parts:
        if isinstance(part, ImageReference):
            found.append(part)
        elif found and isinstance(found[-1], dict):
            found[-1]["text"] += f"\n{part}"
        else:
            found.append({"type": "text", "text": part})
    if any(isinstance(part, ImageReference) for part in found):
        return found
    return str(found[0]["text"]) if found else ""


def _part(part: Any, place: str) -> str | ImageReference:
    """Return the text of a part, or its image."""
    if isinstance(part, (str, ImageReference)):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in _IMAGES:
        return part_reference(part, place)
    text = part.get(_TEXTS[kind]) if isinstance(kind, str) and kind in _TEXTS else None
    if not isinstance(text, str):
        raise ApiError(400, f"a part of type {shown(kind)} cannot be read; only text and images can", param=place)
    return text


def _message(message: Any, place: str) -> dict[str, Any]:
    """Return one message with the keys that its role has here."""
    if not isinstance(message, Mapping):
        raise ApiError(400, f"a message is an object with a role, not {shown(message)}", param=place)
    role, content = message.get("role"), message.get("content")
    if role in _SYSTEM:
        return {"role": "system", "content": text_of(content, f"{place}.content")}
    if role == "tool":
        key = "name" if message.get("tool_call_id") is None else "tool_call_id"
        found = {"role": role, "content": content}
        if content is None or isinstance(content, (str, list)):
            found["content"] = content_of(content, f"{place}.content")
        return {**found, key: message.get(key)}
    if role == "user":
        return {"role": role, "content": content_of(content, f"{place}.content")}
    found = {"role": role, "content": text_of(content, f"{place}.content")}
    if role in ("assistant", "model"):
        if message.get("function_call"):
            raise ApiError(400, "function_call is not read any more; write tool_calls", param=place)
        thinking = next((message[key] for key in THINKING_KEYS if isinstance(message.get(key), str)), "")
        found |= {"reasoning_content": thinking} if thinking else {}
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise ApiError(400, f"tool_calls is a list, not {shown(calls)}", param=f"{place}.tool_calls")
        found |= {"tool_calls": [_call(call, f"{place}.tool_calls[{at}]") for at, call in enumerate(calls)]}
    return found


def _call(call: Any, place: str) -> dict[str, Any]:
    """Return a call of an earlier answer."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ApiError(400, f"{shown(call)} is not a call of a function", param=place)
    return {
        "id": call.get("id"), "type": "function",
        "function": {"name": function.get("name"), "arguments": function.get("arguments")},
    }  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """The tools that a model may call.

    Attributes:
        tools: Their declarations; None when there is none.
        choice: Which of them is called.
        namespaces: For tools that came in a namespace, the namespace and their name there, by the name that the model
            sees.
        skipped: The types of tools that are left out, because only their makers can run them, such as "web_search".
        free: Why arguments are not held to the parameters of a tool, by its name.
    """

    tools: Sequence[Tool] | None = None
    choice: ToolChoice | None = None
    namespaces: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    free: Mapping[str, str] = field(default_factory=dict)

    def remarks(self) -> list[str]:
        """Return lines for the log about what of the client's list has no effect."""
        return [
            *(f"tools of type {shown(kind)} are left out" for kind in self.skipped),
            *(f"the arguments of {shown(name)} are not held to its parameters: {why}"
              for name, why in self.free.items()),
        ]  # fmt: skip


def offered(tools: Sequence[Any] | None, choice: Any = None) -> Offer:
    """Return what a client's tools and its choice among them mean. It may compile schemas: run it by ``Engine.read``.

    A tool is a function in the form of chat completions, of Responses or of Anthropic. Namespaces are flattened. The
    calls of a tool are held to its parameters also where the client does not ask for it, unless these are not
    supported; only with ``strict`` true is that an error.

    Raises ``DgemmaError`` (exit code 2) or ``ApiError`` (400) for what is malformed.
    """
    found: list[dict[str, Any]] = []
    namespaces: dict[str, tuple[str, str]] = {}
    skipped: dict[str, None] = {}
    for tool in tools or ():
        kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
        if kind == "namespace":
            space = str(tool.get("name"))
            for inner in _listed(tool.get("tools")):
                flat = _function(inner)
                name = flat["name"]
                flat["name"] = flat_name(space, name)
                namespaces[flat["name"]] = (space, name)
                found.append(flat)
        elif kind in ("function", None) or (kind == "custom" and "input_schema" in tool):
            found.append(_function(tool))
        else:
            skipped[str(kind)] = None
    allowed, chosen = _choice(choice)
    if allowed is not None:
        found = [tool for tool in found if tool["name"] in allowed]
    declarations(found)  # raises when they are malformed
    free = {}
    for tool in found:
        if tool.get("strict") is not True:
            tool["strict"] = True
            why = _unsupported(json.dumps(tool))
            if why is not None:
                tool["strict"], free[tool["name"]] = False, why
    if not found and chosen in ("auto", "none"):
        chosen = None
    return Offer(found or None, chosen, namespaces, tuple(skipped), free)


def flat_name(space: str | None, name: str) -> str:
    """Return the name that the model sees of a tool in a namespace, or in none."""
    return name if space is None else f"{space}__{name}"


def _listed(tools: Any) -> list[Any]:
    """Return the tools of a namespace or of a choice."""
    if not isinstance(tools, list):
        raise ApiError(400, f"tools is a list, not {shown(tools)}", param="tools")
    return tools


def _function(tool: Any) -> dict[str, Any]:
    """Return the declaration of a function: its inner object, with the keys that are read."""
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise ApiError(400, f"{shown(tool)} is not a tool with a name", param="tools")
    keys = ("name", "description", "parameters", "input_schema", "strict")
    return {key: inner[key] for key in keys if inner.get(key) is not None}


@lru_cache(maxsize=256)
def _unsupported(tool: str) -> str | None:
    """Return why the parameters of a tool, given as JSON, cannot be held to; None when they can."""
    declared = parse_json(tool, most_digits=40)
    try:
        of_turn(Turn(calls=calls_of([declared], [declared["name"]])))
    except DgemmaError as error:
        return error.message
    return None


def _choice(choice: Any) -> tuple[set[str] | None, ToolChoice | None]:
    """Return the names of the tools that a choice allows, None for all, and the choice in this program's form."""
    if not isinstance(choice, Mapping):
        return None, "required" if choice == "any" else choice
    kind = choice.get("type")
    if kind in ("auto", "none", "required", "any"):
        return None, "required" if kind == "any" else kind
    inner = choice.get(kind, choice) if isinstance(kind, str) else choice
    if kind == "allowed_tools" and isinstance(inner, Mapping):
        return {_function(tool)["name"] for tool in _listed(inner.get("tools"))}, inner.get("mode", "auto")
    if kind in ("function", "tool") and isinstance(inner, Mapping):
        return None, {"type": "function", "function": {"name": inner.get("name")}}
    raise ApiError(400, f"not a tool_choice: {shown(choice)}", param="tool_choice")
