"""A conversation as data: messages, system prompt, changed settings, model. Saved as JSON that people can read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dgemma_mlx.cli.settings import SETTINGS, checked
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import write_whole

_FIXED = ("model", "system", "live", "memory_limit", "cpu_dequantize", "kernels")
CHANGEABLE = tuple(name for name in SETTINGS if name not in _FIXED)
"""The settings that a conversation can change."""

_FORMAT = "dgemma-mlx session 1"
_ROLES = ("user", "assistant")
_HINT = "Saved conversations are made by /save, and by `dgemma-mlx chat` after every turn."


@dataclass
class Session:
    """``messages`` alternate between user and assistant; each has "role" and "content", an assistant's also
    "thinking" where there was some, and "cancelled": true where it was stopped."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """what ``/set`` has changed, by the names of ``dgemma_mlx.cli.settings``"""
    model: str | None = None
    """the model that was chosen; None is the one in force"""

    @property
    def turns(self) -> int:
        return len(self.questions)

    @property
    def questions(self) -> list[int]:
        """Where in ``messages`` the turns begin."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def prompt(self, start: int = 0) -> list[dict[str, str]]:
        """The messages from ``start`` on as the model is to see them: without thinking and marks."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{name: message[name] for name in ("role", "content")} for message in self.messages[start:]]

    def add(self, role: str, content: str, **marks: Any) -> None:
        self.messages.append({"role": role, "content": content, **{k: v for k, v in marks.items() if v}})

    def pop_turn(self) -> str | None:
        """Takes the last turn out, question and answer; returns the question."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return str(message["content"])
        return None

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        record = {"format": _FORMAT, **asdict(self)}
        try:
            write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DgemmaError(f"cannot write {path}: {error.strerror}", "Choose another place: /save FILE.") from None

    @classmethod
    def load(cls, path: Path) -> Session:
        """Reads a saved session; a ``DgemmaError`` says what is wrong with the file."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            json.dumps(record, ensure_ascii=False).encode()  # half a character, which JSON can hold, is no text
        except FileNotFoundError:
            raise DgemmaError(f"there is no file {path}", _HINT) from None
        except OSError as error:
            raise DgemmaError(f"cannot read {path}: {error.strerror}", _HINT) from None
        except (ValueError, RecursionError) as error:
            raise DgemmaError(f"cannot read {path}: {error}", "The file is damaged.") from None
        if not isinstance(record, dict) or record.get("format") != _FORMAT:
            raise DgemmaError(f"{path} is no saved conversation", _HINT)
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
    """User and assistant in turn, an answer to every question."""
    return (
        isinstance(messages, list)
        and len(messages) % 2 == 0
        and all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages)
        and all(message.get("role") == _ROLES[i % 2] for i, message in enumerate(messages))
    )
