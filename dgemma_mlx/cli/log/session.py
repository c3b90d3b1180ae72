"""A conversation as data: messages, system prompt, changed settings and model, saved as readable JSON.

``dgemma_mlx.cli.log`` keeps conversations in a database; a file holds one that the user has saved by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import reason, shown
from dgemma_mlx.cli.images import fault_of, with_text
from dgemma_mlx.cli.settings import SETTINGS, checked
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import write_whole
from dgemma_mlx.json_text import parse_json

_FIXED = ("model", "system", "live", "log", "memory_limit", "dtype", "cpu_dequantize", "image_attention", "kernels")
# The settings that a conversation can change.
CHANGEABLE = tuple(name for name in SETTINGS if name not in _FIXED)

FORMAT = "dgemma-mlx session 1"
# The keys of a message that the model sees. Thinking and marks are not among them.
_SEEN = ("role", "content", "name", "tool_calls", "tool_call_id")
_TURNS = re.compile("(u(at+)*a)*")  # of the first letters of the roles
_HINT = "/save and `dgemma-mlx sessions export --json` write conversations to files."


@dataclass
class Session:
    """A conversation that can be saved.

    Attributes:
        messages: Messages with "role" and "content". A turn begins with a message of the user and ends with one of the
            assistant; between them may be calls and results of tools. The content is a text. A message of the user may
            also have "images" (see ``dgemma_mlx.cli.images``). A message of the assistant also has its
            "tool_calls" and "thinking", if any, and "cancelled": true if it was stopped.
        system: System prompt, or None.
        settings: Settings that ``/set`` has changed, by their names in ``dgemma_mlx.cli.settings``.
        model: The chosen model. None means the model of the settings.
        start: Index in ``messages`` from which on the model sees them. What is before no longer fits.
        id: Its id in the log of conversations, or None when it is not there yet.
        name: The name that the user has given it, or None.
        revision: How often the log had stored it when it was last read or stored here.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    start: int = 0
    id: str | None = None
    name: str | None = None
    revision: int = 0

    @property
    def turns(self) -> int:
        """Number of turns that the model sees: a question and its answer are one turn."""
        return len(self.questions)

    @property
    def questions(self) -> list[int]:
        """Indices in ``messages`` at which the turns that the model sees begin."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user" and i >= self.start]

    def prompt(self, start: int | None = None) -> list[dict[str, Any]]:
        """Return the system prompt and the messages as the model sees them, by default from ``self.start`` on.

        Images stand before the text of their message. Thinking and the cancelled mark are left out.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = self.messages[self.start if start is None else start :]
        return system + [_seen(message, _SEEN) for message in messages]

    def add(self, role: str, content: str, **marks: Any) -> None:
        """Add a message. Marks such as ``cancelled`` are stored when they are true."""
        self.messages.append({"role": role, "content": content, **{k: v for k, v in marks.items() if v}})

    def pop_turn(self) -> dict[str, Any] | None:
        """Remove the last turn, question and answer. Return the question's message, or None when there is no turn."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                self.start = min(self.start, len(self.messages))
                return message
        return None

    def copy(self) -> Session:
        """Return a copy whose messages and settings can change on their own."""
        return replace(self, messages=list(self.messages), settings=dict(self.settings))

    def fresh(self) -> Session:
        """Return a new conversation with the same system prompt, settings and model, and no name."""
        return Session(system=self.system, settings=dict(self.settings), model=self.model)

    def record(self) -> dict[str, Any]:
        """Return what a file holds: the format, messages, system prompt, settings and model, as plain JSON values."""
        kept = ("messages", "system", "settings", "model")
        return {"format": FORMAT, **{name: getattr(self, name) for name in kept}}

    def save(self, path: Path) -> None:
        """Write the file completely or not at all. Raises `DgemmaError` when it cannot be written."""
        try:
            write_whole(path, json.dumps(self.record(), indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DgemmaError(f"cannot write {path}: {error.strerror}", "Write /save FILE with another name.") from None

    @classmethod
    def load(cls, path: Path) -> Session:
        """Read a saved conversation. Raises `DgemmaError` when the file cannot be read or is damaged."""
        try:
            record = parse_json(path.read_bytes())
        except FileNotFoundError:
            raise DgemmaError(f"there is no file {path}", _HINT) from None
        except OSError as error:
            raise DgemmaError(f"cannot read {path}: {error.strerror}", _HINT) from None
        except ValueError as error:
            raise DgemmaError(f"cannot read {path}: {reason(error)}", "The file is damaged. " + _HINT) from None
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise DgemmaError(f"{path} is not a saved conversation", _HINT)
        return cls.of(record, str(path), "The file is damaged. " + _HINT)

    @classmethod
    def of(cls, record: Mapping[str, Any], place: str, hint: str) -> Session:
        """Return the conversation of a record as ``record`` returns it.

        Raises `DgemmaError` for values that do not make a conversation. ``place`` says in the message where the record
        comes from, and ``hint`` what to do.
        """
        messages: Any = record.get("messages")
        settings = record.get("settings", {})
        system, model = record.get("system"), record.get("model")
        names_are_texts = all(value is None or isinstance(value, str) for value in (system, model))
        fault = _fault(messages)
        if not names_are_texts or not isinstance(settings, dict) or fault is not None:
            problem = "its messages do not make a conversation" + (f": {fault}" if fault else "")
            raise DgemmaError(f"{place}: {problem}", hint)
        for name in settings:
            if name not in CHANGEABLE:
                raise DgemmaError(f"{place}: unknown setting {shown(name)}", f"Settings: {', '.join(CHANGEABLE)}.")
        try:
            settings = {name: checked(name, value, f"{place}: {name}") for name, value in settings.items()}
        except DgemmaError as error:
            raise DgemmaError(error.message, hint) from None  # the file is wrong, not its use
        return cls(messages, system, settings, model)


def _seen(message: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return some of a message's keys, with its images in its content."""
    found = {key: message[key] for key in keys if key in message and key != "images"}
    if images := message.get("images"):
        found["content"] = with_text(images, message["content"])
    return found


def _fault(messages: Any) -> str | None:
    """Return why the value is not a list of whole turns, each with an answer to its question; None when it is."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "they are not a list of objects"
    if not messages:
        return None
    from dgemma_mlx.text.messages import conversation

    for number, message in enumerate(messages, 1):
        if "images" in message and message.get("role") != "user":
            return f"message {number}: only a message of the user has images"
        if (fault := fault_of(message.get("images", []))) is not None:
            return f"message {number}: {fault}"
    kept = ("cancelled", "images")
    try:
        conversation([{key: value for key, value in message.items() if key not in kept} for message in messages])
    except DgemmaError as error:
        return error.message
    for number, message in enumerate(messages, 1):
        if message["role"] != "tool" and not isinstance(message.get("content") or "", str):
            return f"message {number}: its content is not a text"
    if _TURNS.fullmatch("".join(message["role"][0] for message in messages)) is None:
        return "a turn is a message of the user, calls and results of tools, and an answer"
    return None
