"""The output of a response, as items, and as the events that tell of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

from dgemma_mlx.server.question import Written
from dgemma_mlx.text.parts import ToolCall

# How the events of a text are called, by the type of its part.
_TEXTS = {"output_text": "response.output_text", "reasoning_text": "response.reasoning_text"}


def new_id(kind: str) -> str:
    """Return an id such as ``msg_...``."""
    return f"{kind}_{uuid4().hex}"


class Output:
    """The output of a response while it is written.

    Attributes:
        items: The items so far.
    """

    def __init__(self, namespaces: Mapping[str, tuple[str, str]], custom: frozenset[str]) -> None:
        """Begin. ``namespaces`` are those of ``messages.Offer``; the tools in ``custom`` take a text."""
        self.items: list[dict[str, Any]] = []
        self._namespaces, self._custom = namespaces, custom
        self._is_open = False

    def add(self, written: Written) -> Iterator[dict[str, Any]]:
        """Add what is written, and yield its events."""
        for kind, text in (("reasoning_text", written.thinking), ("output_text", written.text)):
            if text:
                if not self._is_open or self.items[-1]["content"][0]["type"] != kind:
                    yield from self.close()
                    yield from self._begin_text(kind)
                self.items[-1]["content"][0]["text"] += text
                more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
                yield self._event(f"{_TEXTS[kind]}.delta", content_index=0, delta=text, **more)
        for call in written.tool_calls:
            yield from self.close()
            yield from self._call(call)

    def close(self, *, is_cut: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the end of the last item, unless it has ended. ``is_cut`` says that it is incomplete."""
        if self._is_open:
            self._is_open = False
            item = self.items[-1]
            part = item["content"][0]
            item["status"] = "incomplete" if is_cut else "completed"
            more: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            yield self._event(f"{_TEXTS[part['type']]}.done", content_index=0, text=part["text"], **more)
            yield self._event("response.content_part.done", content_index=0, part=part)
            yield self._item_event("done")

    def _begin_text(self, kind: str) -> Iterator[dict[str, Any]]:
        """Begin an item with one part of text."""
        part: dict[str, Any] = {"type": kind, "text": ""}
        item: dict[str, Any]
        if kind == "output_text":
            item = {"type": "message", "id": new_id("msg"), "role": "assistant", "status": "in_progress", "content": []}
            part |= {"annotations": [], "logprobs": []}
        else:
            item = {"type": "reasoning", "id": new_id("rs"), "summary": [], "status": "in_progress", "content": []}
        self.items.append(item)
        self._is_open = True
        yield self._item_event("added")
        yield self._event("response.content_part.added", content_index=0, part=dict(part))
        item["content"] = [part]

    def _call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        """Add an item that is a call."""
        space, name = self._namespaces.get(call.name, (None, call.name))
        is_custom = call.name in self._custom
        if is_custom:
            kind, field, value = "custom_tool_call", "input", str(call.arguments.get("input", ""))
        else:
            kind, field, value = "function_call", "arguments", json.dumps(call.arguments, ensure_ascii=False)
        item: dict[str, Any] = {
            "type": kind, "id": new_id("ctc" if is_custom else "fc"), "call_id": call.id, "name": name,
            field: "", "status": "in_progress",
        }  # fmt: skip
        if space is not None:
            item["namespace"] = space
        self.items.append(item)
        yield self._item_event("added")
        yield self._event(f"response.{kind}_{field}.delta", delta=value)
        item |= {field: value, "status": "completed"}
        yield self._event(f"response.{kind}_{field}.done", **{field: value}, **({} if is_custom else {"name": name}))
        yield self._item_event("done")

    def _item_event(self, what: str) -> dict[str, Any]:
        """Return an event about the last item as a whole."""
        item = dict(self.items[-1])
        return {"type": f"response.output_item.{what}", "output_index": len(self.items) - 1, "item": item}

    def _event(self, type: str, **fields: Any) -> dict[str, Any]:
        """Return an event about a part of the last item."""
        return {"type": type, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}
