"""A conversation of the log as text for people, as Markdown, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from dgemma_mlx.cli.images import image_label
from dgemma_mlx.cli.log.log import Entry, Hit, Log
from dgemma_mlx.cli.log.session import Session

_AROUND = 30  # characters of a message before what a search has found


def local(seconds: float) -> str:
    """Return a time as people read it, to the minute, in the local time zone."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def utc(seconds: float) -> str:
    """Return a time as in ISO 8601, to the second."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def first_line(text: str) -> str:
    """Return the first line of a text that is not blank, without runs of spaces."""
    return next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "")


def title(entry: Entry) -> str:
    """Return what a list calls a conversation: its name and its first message."""
    return (f"[{entry.name}] " if entry.name else "") + first_line(entry.title)


def entry_json(entry: Entry) -> dict[str, Any]:
    """Return what a list says about a conversation, as plain JSON values with times in UTC."""
    return {**asdict(entry), "created": utc(entry.created), "changed": utc(entry.changed)}


def hit_json(hit: Hit) -> dict[str, Any]:
    """Return a message that a search has found, as plain JSON values."""
    return {"conversation": entry_json(hit.entry), "role": hit.role, "content": hit.content, "undone": hit.undone}


def snippet(hit: Hit, word: str) -> str:
    """Return the part of a message around a word, on one line."""
    at = hit.content.casefold().find(word.casefold())
    start = max(0, at - _AROUND)
    return ("…" if start else "") + " ".join(hit.content[start:].split())


def as_json(log: Log, id: str) -> dict[str, Any]:
    """Return all that the log knows about a conversation, as plain JSON values.

    The object is also a file that ``/load`` reads. It has "answers", one for each answer, with the "position" of its
    message, and "undone", the messages that are no longer a part of the conversation.
    """
    session, entry = log.load(id), log.entry(id)
    rows = [{**row, "time": utc(row["time"])} for row in log.answers(id)]
    about = ("position", "time", "model", "seed", "finish_reason", "statistics")
    answers = [{key: row[key] for key in about if key in row} for row in rows if "finish_reason" in row]
    return {
        **session.record(), "id": id, "name": entry.name, "kind": entry.kind, "created": utc(entry.created),
        "changed": utc(entry.changed), "answers": [answer for answer in answers if answer["position"] is not None],
        "undone": [row for row in rows if row["position"] is None],
    }  # fmt: skip


def as_text(session: Session, entry: Entry) -> Iterator[str]:
    """Yield the lines of a conversation for a terminal."""
    yield f"{entry.id}  {local(entry.created)}  {entry.kind}" + (f"  {entry.model}" if entry.model else "")
    if entry.name:
        yield f"name: {entry.name}"
    if session.system:
        yield f"system prompt: {session.system}"
    for message in session.messages:
        mark = " (cancelled)" if message.get("cancelled") else ""
        yield from ("", f"[{message['role']}{mark}]")
        if thinking := message.get("thinking"):
            yield f"thinking: {thinking}"
        if content := _content(message):
            yield content
        for call in message.get("tool_calls") or ():
            yield f"tool call: {_json(call)}"


def as_markdown(session: Session, entry: Entry) -> Iterator[str]:
    """Yield the lines of a conversation as a Markdown document."""
    yield f"# {entry.name or first_line(entry.title) or entry.id}"
    model = f", {entry.model}" if entry.model else ""
    yield from ("", f"dgemma-mlx {entry.kind} {entry.id}, {local(entry.created)}{model}")
    if session.system:
        yield from ("", "## System", "", session.system)
    for message in session.messages:
        yield from ("", f"## {message['role'].capitalize()}{' (cancelled)' if message.get('cancelled') else ''}")
        if thinking := message.get("thinking"):
            yield from ("", *(f"> {line}".rstrip() for line in str(thinking).splitlines()))
        if content := _content(message):
            yield from ("", content)
        for call in message.get("tool_calls") or ():
            yield from ("", "```json", json.dumps(call, ensure_ascii=False, indent=2), "```")


def _content(message: Mapping[str, Any]) -> str:
    """Return the images of a message, each in a line, and its text; a result of a tool that is not a text as JSON."""
    content = message.get("content") or ""
    images = [image_label(image) for image in message.get("images", ())]
    return "\n".join([*images, content if isinstance(content, str) else _json(content)])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
