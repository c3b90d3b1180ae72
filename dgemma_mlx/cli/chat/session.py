"""A conversation as data: messages, system prompt, changed settings and model, saved as readable JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dgemma_mlx.cli.settings import SETTINGS, checked
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import write_whole

_FIXED = ("model", "system", "live", "memory_limit", "dtype", "cpu_dequantize", "kernels")
# The settings that a conversation can change.
CHANGEABLE = tuple(name for name in SETTINGS if name not in _FIXED)

_FORMAT = "dgemma-mlx session 1"
_ROLES = ("user", "assistant")
_HINT = "/save writes a conversation to a file, and `dgemma-mlx chat` does so after every turn."


@dataclass
class Session:
    """A conversation that can be saved.

    Attributes:
        messages: Messages of the user and the assistant in turn. Each has "role" and "content". A message of the
            assistant also has its "thinking", if any, and "cancelled": true if it was stopped.
        system: System prompt, or None.
        settings: Settings that ``/set`` has changed, by their names in ``dgemma_mlx.cli.settings``.
        model: The chosen model. None means the model of the settings.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    model: str | None = None

    @property
    def turns(self) -> int:
        """Number of turns: a question and its answer are one turn."""
        return len(self.questions)

    @property
    def questions(self) -> list[int]:
        """Indices in ``messages`` at which the turns begin."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def prompt(self, start: int = 0) -> list[dict[str, str]]:
        """Return the system prompt and the messages from ``start`` on as the model sees them.

        Thinking and the cancelled mark are left out.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{name: message[name] for name in ("role", "content")} for message in self.messages[start:]]

    def add(self, role: str, content: str, **marks: Any) -> None:
        """Add a message. Marks such as ``cancelled`` are stored when they are true."""
        self.messages.append({"role": role, "content": content, **{k: v for k, v in marks.items() if v}})

    def pop_turn(self) -> str | None:
        """Remove the last turn, question and answer. Return the question, or None when there is no turn."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return str(message["content"])
        return None

    def save(self, path: Path) -> None:
        """Write the file completely or not at all. Raises `DgemmaError` when it cannot be written."""
        record = {"format": _FORMAT, **asdict(self)}
        try:
            write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DgemmaError(f"cannot write {path}: {error.strerror}", "Write /save FILE with another name.") from None

    @classmethod
    def load(cls, path: Path) -> Session:
        """Read a saved conversation. Raises `DgemmaError` when the file cannot be read or is damaged."""
        try:
            record = json.loads(path.read_text(encoding="utf-8-sig"))
            json.dumps(record, ensure_ascii=False).encode()  # JSON can hold lone surrogates, which are not text
        except FileNotFoundError:
            raise DgemmaError(f"there is no file {path}", _HINT) from None
        except OSError as error:
            raise DgemmaError(f"cannot read {path}: {error.strerror}", _HINT) from None
        except (ValueError, RecursionError) as error:
            raise DgemmaError(f"cannot read {path}: {error}", "The file is damaged.") from None
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise DgemmaError(f"{path} is not a saved conversation", _HINT)
        messages: Any = record.get("messages")
        settings = record.get("settings", {})
        system, model = record.get("system"), record.get("model")
        names_are_texts = all(value is None or isinstance(value, str) for value in (system, model))
        if not names_are_texts or not isinstance(settings, dict) or not _is_conversation(messages):
            raise DgemmaError(f"{path}: its messages do not make a conversation", "The file is damaged.")
        for name in settings:
            if name not in CHANGEABLE:
                raise DgemmaError(f"{path}: unknown setting {name!r}", f"Settings: {', '.join(CHANGEABLE)}.")
        settings = {name: checked(name, value, f"{path}: {name}") for name, value in settings.items()}
        return cls(messages, system, settings, model)


def _is_conversation(messages: Any) -> bool:
    """Return whether the value is a list of messages of user and assistant in turn, with an answer to each question."""
    return (
        isinstance(messages, list)
        and len(messages) % 2 == 0
        and all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages)
        and all(message.get("role") == _ROLES[i % 2] for i, message in enumerate(messages))
    )
