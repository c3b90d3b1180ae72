"""A conversation with a model behind a server: its answers over HTTP, its drafts drawn as those of a loaded model."""

from __future__ import annotations

import base64
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import is_whole
from dgemma_mlx.cli.chat.answer import Chat
from dgemma_mlx.cli.chat.connection import CONTEXT_EXCEEDED, Server, ServerError
from dgemma_mlx.cli.images import media_type, read_image
from dgemma_mlx.cli.log.session import Session
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Committed, Done, Draft, Event, Statistics
from dgemma_mlx.json_text import parse_json
from dgemma_mlx.text.parts import ToolCall

SENT = ("max_tokens", "seed", "temp", "thinking", "speed")  # the settings that a request can name
_OWN = ("stats",)  # those that concern this program and no server
_OPEN, _CLOSE, _END, _CONTROL = range(4)
_REASONS = ("stop", "length", "tool_calls")


class RemoteTokens:
    """Ids for the texts of tokens that a server sends, so that they are drawn like those of a tokenizer.

    Attributes:
        special_ids: Ids of the tokens that open and close thinking.
    """

    special_ids = {"<|channel>": _OPEN, "<channel|>": _CLOSE}  # noqa: RUF012 - as in a tokenizer

    def __init__(self) -> None:
        self._texts: list[bytes] = [b""] * 4
        self._ids: dict[str, int] = {}

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of a token."""
        return self._texts[id]

    def ids(self, texts: Sequence[str], kinds: str) -> tuple[int, ...]:
        """Return ids for a canvas, whose kinds are those of ``dgemma_mlx.server.drafts``."""
        found = []
        for at, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
            if kind == "c":
                before, after = kinds[at - 1 : at], kinds[at + 1 : at + 2]
                opens, closes = after == "h" != before, before == "h" and after == "t"
                found.append(_END if after == "e" else _OPEN if opens else _CLOSE if closes else _CONTROL)
            else:
                if text not in self._ids:
                    self._ids[text] = len(self._texts)
                    self._texts.append(text.encode("utf-8", "replace"))
                found.append(self._ids[text])
        return tuple(found)


class RemoteChat(Chat):
    """A conversation with the model of a server."""

    def __init__(self, server: Server, session: Session, defaults: dict[str, Any], *, draw: bool) -> None:
        """``defaults`` are the settings that ``/set`` has not changed."""
        super().__init__(session, defaults, draw=draw)
        self._server = server
        self._known = {model["id"]: model for model in server.models()}
        self._chosen: str | None = None

    @property
    def model_name(self) -> str:
        """Name of the model that was chosen, otherwise the first that the server names, otherwise the address."""
        return self._chosen or next(iter(self._known), self._server.url)

    @property
    def positions(self) -> int | None:
        """Number of positions that the model supports, where the server tells it."""
        model = self._known.get(self.model_name, {})
        found = model.get("context_length", model.get("max_model_len"))
        return found if is_whole(found) else None

    @property
    def used(self) -> int | None:
        """Number of positions that the last answer and its prompt took, while that answer is the last message."""
        if not self.session.messages:
            return 0
        if self.last is None or self.session.messages[-1].get("content") != self.last.text:
            return None
        return self.last.statistics.prompt_tokens + self.last.statistics.generated_tokens or None

    def models(self) -> list[tuple[str, str]]:
        """Return the models that the server names."""
        self._known = {model["id"]: model for model in self._server.models()}
        return [(name, f"at {self._server.url}") for name in self._known]

    def switch(self, name: str) -> None:
        """Ask the server for this model from now on. Raises `DgemmaError` for one that the server does not name."""
        if name not in dict(self.models()):
            raise DgemmaError(f"{self._server.url} names no model {name}", "/model lists those that it names.")
        self._chosen = name

    def check(self) -> None:
        """Raise `DgemmaError` when ``/set`` has changed what only the server's owner can."""
        if others := [name for name in self.session.settings if name not in (*SENT, *_OWN)]:
            names = ", ".join((*SENT, *_OWN))
            hint = f"With --url, these can be changed: {names}. `/set {others[0]}` restores the server's."
            raise DgemmaError(f"{others[0]} is chosen by the server", hint)

    def value_in_force(self, name: str) -> Any:
        """Return the value of a setting; None where the server chooses it."""
        return self.setting(name) if name in (*SENT, *_OWN) else None

    def tokens_of(self, text: str) -> None:
        """Return None: the tokenizer is the server's."""

    @property
    def reads_images(self) -> bool:
        """True: whether its model does is what the server says when it gets one."""
        return True

    def look(self, part: Mapping[str, Any]) -> None:
        """Return None: the server counts the tokens. Raises `DgemmaError` for what its protocol has no place for."""
        if part["type"] == "video":
            raise DgemmaError("a video cannot be sent to a server", "Load a model with -m, or send single pictures.")
        if media_type(read_image(Path(part["path"]))) is None:
            hint = "It may be a PNG, JPEG, GIF, WebP, BMP, TIFF or AVIF file."
            raise DgemmaError(f"{part['path']} is not a picture", hint)

    def _run(self, seed: int | None, cancelled: Callable[[], bool]) -> Done:
        """Ask the server, without the oldest turns where the conversation is too long for it, and show the answer."""
        while True:
            answer = RemoteAnswer(0 if seed is None else seed)
            chunks = self._server.events("/v1/chat/completions", self._body(seed), cancelled)
            try:
                return self._show(answer.events(chunks), self._view(answer.tokens, {_END}))
            except ServerError as error:
                if error.code != CONTEXT_EXCEEDED or self.session.turns < 2:
                    raise
                self._forget(1)

    def _body(self, seed: int | None) -> dict[str, Any]:
        """Return the request. A temperature other than 0 has no effect on a server."""
        body: dict[str, Any] = {
            "model": self._chosen, "messages": list(map(_sent, self.session.prompt())), "stream": True,
            "drafts": True, "seed": seed, "max_tokens": self.setting("max_tokens"),
            "temperature": self.setting("temp"), "speed": self.setting("speed"),
            "stream_options": {"include_usage": True},
            "reasoning_effort": "medium" if self.setting("thinking") else "none",
        }  # fmt: skip
        return {name: value for name, value in body.items() if value is not None}


def _sent(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message in OpenAI's form: its images are data URLs."""
    content = message.get("content")
    if message["role"] != "user" or not isinstance(content, list):
        return message
    return {**message, "content": list(map(_sent_part, content))}


def _sent_part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "video":  # of a conversation with a loaded model
        raise DgemmaError("the conversation has a video, which cannot be sent to a server", "/clear begins a new one.")
    if part["type"] != "image":
        return part
    kind = media_type(base64.b64decode(part["base64"])) or "application/octet-stream"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{part['base64']}"}}


class RemoteAnswer:
    """The events of one answer, read from the chunks of a server, which need not be one of this program.

    Attributes:
        tokens: Texts of the tokens of its drafts.
    """

    def __init__(self, seed: int) -> None:
        """``seed`` is reported where the server reports none."""
        self.tokens = RemoteTokens()
        self._done: dict[str, Any] = {"seed": seed, "statistics": {}}
        self._cells: list[list[Any]] = []  # token, entropy, accepted, kind of each position
        self._ids: tuple[int, ...] = ()  # of the canvas that is about to be committed
        self._canvas, self._reason = 0, "cancelled"
        self._text, self._thinking = "", ""
        self._calls: list[dict[str, str]] = []

    def events(self, chunks: Generator[dict[str, Any], None, None]) -> Generator[Event, None, None]:
        """Yield the events, the last of which is ``Done``. Raises `DgemmaError` for chunks that cannot be read."""
        try:
            for chunk in chunks:
                yield from self._read(chunk)
            yield self._end()
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise DgemmaError("the server's answer cannot be read", "Is its version the one of this program?") from None
        finally:
            chunks.close()

    def _read(self, chunk: dict[str, Any]) -> Generator[Event, None, None]:
        """Yield what a chunk tells."""
        more = chunk.get("dgemma") or {}
        if "statistics" in more:
            self._done = more
        elif "tokens" in more:
            yield self._draft(more)
        if (usage := chunk.get("usage")) and not self._done["statistics"]:
            self._done["statistics"] = {
                "prompt_tokens": usage["prompt_tokens"], "generated_tokens": usage["completion_tokens"]
            }
        for choice in chunk.get("choices", ())[:1]:
            delta = choice.get("delta") or {}
            for call in delta.get("tool_calls") or ():
                self._call(call)
            text, thinking = delta.get("content") or "", delta.get("reasoning_content") or ""
            if text or thinking:
                self._text, self._thinking = self._text + text, self._thinking + thinking
                ids, self._ids = self._ids, ()
                yield Committed(self._canvas, ids, text, thinking, (), 0)
            self._reason = choice.get("finish_reason") or self._reason

    def _draft(self, more: dict[str, Any]) -> Draft:
        """Return the draft of a field ``dgemma``, which lists all positions, or those that have changed."""
        columns = (more["tokens"], more["entropy"], more["accepted"], more["kinds"])
        cells = [list(cell) for cell in zip(*columns, strict=True)]
        if "at" in more:
            for at, cell in zip(more["at"], cells, strict=True):
                self._cells[at] = cell
        else:
            self._cells = cells
        texts, entropy, accepted, kinds = zip(*self._cells, strict=True)
        ids = self.tokens.ids(texts, "".join(kinds))
        self._ids, self._canvas = ids, more["canvas"]
        place = more["canvas"], more["step"], more["max_steps"]
        end = more["finished"], more["settled_by"], more["attempt"]
        return Draft(*place, ids, tuple(map(bool, accepted)), tuple(map(float, entropy)), *end)

    def _call(self, part: dict[str, Any]) -> None:
        """Take a part of a tool call."""
        while len(self._calls) <= part["index"] < 1000:
            self._calls.append({"id": "", "name": "", "arguments": ""})
        call, function = self._calls[part["index"]], part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""

    def _end(self) -> Done:
        """Return the end of the answer."""
        calls = tuple(
            ToolCall(name=call["name"], arguments=parse_json(call["arguments"] or "{}", 40), id=call["id"])
            for call in self._calls
        )
        reason: Any = self._reason if self._reason in _REASONS else "cancelled"
        return Done(
            self._text, self._thinking, calls, (), reason, self._done["seed"], _statistics(self._done["statistics"])
        )


def _statistics(found: dict[str, Any]) -> Statistics:
    """Return the counts and times that the server tells, and 0 for what it does not tell."""
    values = {field.name: found.get(field.name, 0) for field in fields(Statistics)}
    if not all(is_whole(value) or isinstance(value, float) for value in values.values()):
        raise ValueError("a count is not a number")
    return Statistics(**values)
