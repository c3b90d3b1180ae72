"""Conversations from outside, checked and brought into the one form that chat templates read.

Programs write the same conversation in many ways: the arguments of a call as an object or as JSON text, a result as a
text, a number or an object, a call in OpenAI's form or as a ``ToolCall``. ``conversation`` returns one form for all of
them, and refuses what a template would leave out, such as a sound.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from math import isfinite
from typing import Any

from dgemma_mlx.checkpoint.vision_config import BUDGETS
from dgemma_mlx.checks import is_text, is_whole, shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import parse_json
from dgemma_mlx.text.parts import ToolCall

# {"role": ..., "content": ...}, and the keys of _KEYS.
Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
THINKING_KEYS = ("reasoning_content", "thinking", "reasoning")  # names that clients use for a message's thinking
_KEYS = {
    "assistant": ("role", "content", "tool_calls", "tool_responses", *THINKING_KEYS),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_OTHER_KEYS = ("role", "content")
_NAME = re.compile(r"[^\s{}]+")  # of a tool that was called: what ``text.parts`` reads as a name
_MEDIA = ("image", "audio", "video", "file", "document")
_SOURCES = ("path", "bytes", "base64")  # of an image
_IMAGE = 'Write an image as {"type": "image", "path": "..."}, or with "bytes" or "base64" in place of the path.'
_RESPONSE = 'A response is {"name": "...", "response": ...}.'
_EXAMPLE = 'Write a message as {"role": "user", "content": "..."}.'


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages of a conversation in one form, as plain JSON values, apart from the bytes of images.

    * The roles are system, developer, user, assistant (or model) and tool. The content is a text or a list of parts.
      That of an assistant that calls tools may be missing, and that of a tool is any JSON value.
    * A part is a text, ``{"type": "text", "text"}``; an image, ``{"type": "image"}`` with its file's "path", its
      "bytes", or these as text in "base64", and if wished the "budget" of soft tokens that it takes (70, 140, 280, 560
      or 1120); or a video, ``{"type": "video", "path"}``.
    * A call is ``{"id", "type": "function", "function": {"name", "arguments"}}``, a ``ToolCall``, or an object with the
      keys of one. ``arguments`` is an object or its JSON text. Calls without an id get one.
    * A tool's message names its call with ``tool_call_id``, or else with ``name``, or neither if only one call is open.
      A list as a result becomes ``{"value": [...]}``, because templates read a list as text parts. Gemma's template
      shows objects only as the ``tool_responses`` of the assistant's message, which therefore holds them as well.
    * Thinking is in ``thinking`` and ``reasoning_content``, whichever of the three usual names it had.

    Keys whose value is None or an empty list count as absent. Raises ``DgemmaError`` (exit code 2), which names the
    message, for every other key, unknown roles, other media, results of calls that nobody made, and values that are not
    JSON. Files are not opened.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise DgemmaError(f"a conversation is a list of messages, not {shown(messages)}", _EXAMPLE, exit_code=2)
    if not messages:
        raise DgemmaError("the conversation is empty", "Give at least one message.", exit_code=2)
    calls, found = _OpenCalls(), []
    for number, message in enumerate(messages, 1):
        try:
            found.append(_message(message, calls, f"message {number}"))
        except RecursionError:
            raise _wrong(f"message {number}", "it is nested too deeply", "Write the inner part as text.") from None
    for index, message in enumerate(found):
        results = list(takewhile(lambda follow: follow["role"] == "tool", found[index + 1 :]))
        if message["role"] == "assistant" and results:
            _attach(message, results, f"message {index + 1}")
    return found


def json_data(value: Any, place: str) -> Any:
    """Return a value in plain JSON types. Keys become texts as in JSON.

    Raises ``DgemmaError`` (exit code 2), which begins with ``place``, for values that JSON cannot represent.
    """
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, item in value.items():
            if not (key is None or isinstance(key, (str, int, float))):
                raise _wrong(place, f"the key {shown(key)} is not a JSON key", "Use texts as keys.")
            data = json_data(key, place)
            name = data if isinstance(data, str) else json.dumps(data)
            if name in found:
                raise _wrong(place, f"two keys are written {shown(name)}", "Use texts as keys.")
            found[name] = json_data(item, place)
        return found
    if isinstance(value, (list, tuple)):
        return [json_data(item, place) for item in value]
    if isinstance(value, str) and is_text(value):
        return str.__str__(value)
    if isinstance(value, float) and isfinite(value):
        return float.__float__(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int.__int__(value)
    raise _wrong(place, f"{shown(value)} is not a JSON value", "Use texts, numbers, true, false, null, lists, objects.")


class _OpenCalls:
    """The calls of the last assistant's message that no result has answered yet: names by id, in order."""

    def __init__(self) -> None:
        self._open: dict[str, str] = {}
        self._known: set[str] = set()  # ids of all calls so far

    def begin(self, calls: Sequence[dict[str, Any]]) -> None:
        """Open the calls of an assistant's message, and close those before."""
        self._open = {call["id"]: call["function"]["name"] for call in calls}
        self._known |= self._open.keys()

    def answer(self, id: str | None, name: str | None, place: str) -> tuple[str | None, str]:
        """Close the call that a result belongs to. Return its id, and its tool's name."""
        names = ", ".join(self._open.values()) or "none"
        if id is None and name is not None:
            if not self._open:
                return None, name  # a call that the assistant's text holds
            id = next((id for id, called in self._open.items() if called == name), None)
            if id is None:
                raise _wrong(place, f"no open call of {shown(name)}", f"Open calls: {names}.")
        elif id is None:
            if len(self._open) != 1:
                raise _wrong(place, "it is not clear which call it answers",
                             f'Give it "tool_call_id", or "name". Open calls: {names}.')  # fmt: skip
            id = next(iter(self._open))
        if id not in self._open:
            known = id in self._known
            raise _wrong(
                place, f"the call {shown(id)} is not open" if known else f"no earlier call has the id {shown(id)}",
                "A call has one result, among the messages right after it." if known
                else '"tool_call_id" is the "id" of a call in the assistant\'s message before it.',
            )  # fmt: skip
        if name not in (None, self._open[id]):
            raise _wrong(place, f"{shown(id)} calls {shown(self._open[id])}, not {shown(name)}", "Leave out the name.")
        return id, self._open.pop(id)


def _message(message: Any, calls: _OpenCalls, place: str) -> dict[str, Any]:
    """Return one message in the form of ``conversation``, and note the calls that it opens and answers."""
    if not isinstance(message, Mapping):
        raise DgemmaError(
            f"a chat message must be an object with a role, not {shown(message)}", _EXAMPLE, exit_code=2
        )
    role = message.get("role")
    if role not in ROLES:
        problem = "has no role" if role is None else f"has the unknown role {shown(role)}"
        raise DgemmaError(f"{place} {problem}", f"The roles are {', '.join(ROLES)}.", exit_code=2)
    role = "assistant" if role == "model" else str(role)
    values = {name: value for name, value in message.items() if value is not None and value != []}
    if "content" in message and (role == "tool" or message["content"] == []):
        values["content"] = message["content"]
    allowed = _KEYS.get(role, _OTHER_KEYS)
    if unread := [name for name in values if name not in allowed]:
        raise _wrong(place, f"{shown(unread[0])} is not read", f"The keys of such a message are {', '.join(allowed)}.")
    if role == "tool":
        return _result(values, calls, place)
    found: dict[str, Any] = {"role": role}
    if "content" in values:
        found["content"] = _content(values["content"], place)
    elif not set(values) - {"role"}:
        raise _wrong(place, "it has no content", _EXAMPLE)
    thinking = next((values[name] for name in THINKING_KEYS if name in values), None)
    if thinking is not None:
        found |= {"thinking": _text(thinking, "thinking", place), "reasoning_content": thinking}
        found |= {name: _text(values[name], name, place) for name in THINKING_KEYS[1:] if name in values}
    if "tool_calls" in values:
        found["tool_calls"] = _calls(values["tool_calls"], place)
    if "tool_responses" in values:
        found["tool_responses"] = _responses(values["tool_responses"], place)
    calls.begin(found.get("tool_calls", []))
    return found


def _result(values: dict[str, Any], calls: _OpenCalls, place: str) -> dict[str, Any]:
    """Return the message of a tool."""
    given = {name: _text(values[name], name, place) for name in ("tool_call_id", "name") if name in values}
    id, name = calls.answer(given.get("tool_call_id"), given.get("name"), place)
    if _NAME.fullmatch(name) is None:
        raise _wrong(place, f"{shown(name)} cannot be the name of a tool", "A name has no spaces and no braces.")
    if "content" not in values:
        raise _wrong(place, "it has no content", "The content is the result: any JSON value.")
    content = values["content"]
    if isinstance(content, (list, tuple)) and not (content and all(map(_is_part, content))):
        content = {"value": content}
    is_parts = isinstance(content, (list, tuple))
    value = _content(content, place) if is_parts else json_data(content, place)
    return {"role": "tool", "name": name, **({} if id is None else {"tool_call_id": id}), "content": value}


def _attach(message: dict[str, Any], results: Sequence[dict[str, Any]], place: str) -> None:
    """Add ``tool_responses`` to the message of an assistant when one of the results that follow it is an object."""
    if "tool_responses" in message:
        raise _wrong(place, "it has tool_responses, and messages of tools follow it", "Give the results only once.")
    if "tool_calls" in message and any(isinstance(result["content"], dict) for result in results):
        message["tool_responses"] = [
            {"name": result["name"], "response": _joined(result["content"], place)} for result in results
        ]


def _responses(responses: Any, place: str) -> list[dict[str, Any]]:
    """Return the ``tool_responses`` of a message. Templates show others as a tool without a name or result."""
    if not isinstance(responses, (list, tuple)):
        raise _wrong(place, f"tool_responses must be a list, not {shown(responses)}", _RESPONSE)
    for response in responses:
        if not isinstance(response, Mapping) or response.keys() != {"name", "response"}:
            raise _wrong(place, f"{shown(response)} is not a response", _RESPONSE)
        if not isinstance(response["name"], str) or _NAME.fullmatch(response["name"]) is None:
            raise _wrong(place, f"{shown(response)} is not a response", "The name of a tool has no spaces, no braces.")
    return [json_data(response, place) for response in responses]


def _joined(content: Any, place: str) -> Any:
    """Return the text of text parts, and any other value unchanged."""
    if not isinstance(content, list):
        return content
    if any(part["type"] != "text" for part in content):
        raise _wrong(place, "one of its calls has an image as a result, and another one an object", "Send the image "
                     "in a message of the user.")  # fmt: skip
    return "".join(part["text"] for part in content)


def _is_part(value: Any) -> bool:
    """Return whether the value is a part of a content, and not an element of a result."""
    kind = value.get("type") if isinstance(value, Mapping) else None
    return kind == "text" or _is_media(kind)


def _is_media(kind: Any) -> bool:
    return isinstance(kind, str) and any(name in kind for name in _MEDIA)


def _content(content: Any, place: str) -> str | list[dict[str, Any]]:
    """Return a content that is a text or a list of parts."""
    if isinstance(content, (list, tuple)):
        return [_part(part, place) for part in content]
    return _text(content, "content", place)


def _part(part: Any, place: str) -> dict[str, Any]:
    """Return a part that is a text, an image or a video. All other parts are refused."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "image", "video"):
        if _is_media(kind):
            raise _wrong(place, f"a part of type {shown(kind)} cannot be read", f"Parts are texts and images. {_IMAGE}")
        raise _wrong(place, f"{shown(part)} is not a text part", 'Write a part as {"type": "text", "text": "..."}.')
    keys = {"text": ("text",), "image": (*_SOURCES, "budget"), "video": ("path",)}[kind]
    values = {name: value for name, value in part.items() if name != "type" and value is not None and value != []}
    if unread := [name for name in values if name not in keys]:
        article = "an" if kind == "image" else "a"
        raise _wrong(place, f"{shown(unread[0])} is not read in {article} {kind} part",
                     f"Its keys are type and {', '.join(keys)}.")  # fmt: skip
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), "text", place)}
    return {"type": kind, **_file(values, kind, place)}


def _file(values: Mapping[str, Any], kind: str, place: str) -> dict[str, Any]:
    """Return the path or the bytes of an image or video, and the budget of an image if it has one."""
    given = [name for name in _SOURCES if name in values]
    if len(given) != 1:
        problem = f"it has {' and '.join(given)}" if given else "it has no file"
        hint = _IMAGE if kind == "image" else 'Write a video as {"type": "video", "path": "..."}.'
        raise _wrong(place, f"an {kind}: {problem}" if kind == "image" else f"a {kind}: {problem}", hint)
    found: dict[str, Any] = {}
    [source], value = given, values[given[0]]
    if source == "path":
        path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
        if not isinstance(path, str) or not path or "\0" in path:
            raise _wrong(place, f"{shown(value)} is not the path of a file", _IMAGE)
        found["path"] = path
    elif source == "bytes":
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise _wrong(place, f"the bytes of an image must be bytes, not {shown(value)}", _IMAGE)
        found["bytes"] = bytes(value)
    else:
        try:
            found["bytes"] = base64.b64decode(_text(value, "base64", place), validate=True)
        except (binascii.Error, ValueError):
            raise _wrong(place, "the base64 text of an image is malformed", "Encode the bytes of its file.") from None
    if "budget" in values:
        if not is_whole(values["budget"]) or values["budget"] not in BUDGETS:
            raise _wrong(place, f"{shown(values['budget'])} is not the budget of an image",
                         f"It is one of {', '.join(map(str, BUDGETS))} soft tokens.")  # fmt: skip
        found["budget"] = values["budget"]
    return found


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """Return the calls of a message in OpenAI's form, each with an id that no other call of the message has."""
    if not isinstance(calls, (list, tuple)):
        raise _wrong(place, f"tool_calls must be a list, not {shown(calls)}", "A message may have several calls.")
    found = [_call(call, place) for call in calls]
    ids = [call["id"] for call in found if call["id"] is not None]
    if len(set(ids)) < len(ids):
        raise _wrong(place, "two of its calls have the same id", "Every call of a message has an id of its own.")
    free = (id for id in map("call_{}".format, count()) if id not in ids)
    return [{**call, "id": next(free)} if call["id"] is None else call for call in found]


def _call(call: Any, place: str) -> dict[str, Any]:
    """Return one call in OpenAI's form. Its id may be None."""
    if isinstance(call, ToolCall):
        call = vars(call)
    if not isinstance(call, Mapping):
        raise _wrong(place, f"{shown(call)} is not a call", 'A call is {"id", "function": {"name", "arguments"}}.')
    function = call.get("function", call)
    outer = ("id", "type", "function", "index") if "function" in call else ("id", "type", "name", "arguments")
    inner = ("name", "arguments") if "function" in call else outer
    for mapping, keys in ((call, outer), (function, inner)):
        if not isinstance(mapping, Mapping):
            raise _wrong(place, f"the function of a call is {shown(mapping)}", "It has a name and arguments.")
        if unread := [name for name, value in mapping.items() if name not in keys and value is not None]:
            raise _wrong(place, f"{shown(unread[0])} is not read in a call", f"The keys are {', '.join(keys)}.")
    id, kind, name = call.get("id"), call.get("type", "function"), function.get("name")
    if kind != "function":
        raise _wrong(place, f"a call has the type {shown(kind)}", "Only functions can be called.")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise _wrong(place, f"a call has the name {shown(name)}", "The name of a tool has no spaces and no braces.")
    arguments = _arguments(function.get("arguments"), f"{place}, call of {shown(name)}")
    return {
        "id": None if id is None else _text(id, "the id of a call", place), "type": "function",
        "function": {"name": json_data(name, place), "arguments": arguments},
    }  # fmt: skip


def _arguments(arguments: Any, place: str) -> dict[str, Any]:
    """Return the arguments of a call as an object. A text is read as JSON, and an empty one has no arguments."""
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else None
        except ValueError as error:
            raise _wrong(place, f"its arguments are not JSON: {error}", "Give an object, or its JSON text.") from None
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise _wrong(place, f"its arguments are {shown(arguments)}", "They must be an object, by name.")
    values: dict[str, Any] = json_data(arguments, place)
    return values


def _text(value: Any, name: str, place: str) -> str:
    """Return a value after checking that it is a text."""
    if not is_text(value):
        raise _wrong(place, f"{name} must be a text, not {shown(value)}", _EXAMPLE)
    return str.__str__(value)


def _wrong(place: str, problem: str, hint: str) -> DgemmaError:
    return DgemmaError(f"{place}: {problem}", hint, exit_code=2)
