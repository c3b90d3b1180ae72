"""Examples from JSONL files in the formats of mlx_lm: messages, prompt and completion, or plain text.

A whole file is checked before any of its examples is used. An error names the file and the line of a bad example.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.train.batches import Conversation

TRAIN, VALID = "train.jsonl", "valid.jsonl"
ROLES = ("system", "developer", "user", "assistant", "model", "tool")
_ANSWERING = ("assistant", "model")
_HINT = (
    'A line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"prompt": "...", "completion": "..."}, or {"text": "..."}.'
)


@dataclass(frozen=True)
class Example:
    """One answer to learn or to compare with, and the conversation that it answers.

    Attributes:
        messages: The messages before the answer, each with "role" and "content". Empty for a plain text.
        answer: The text of the answer, or the whole plain text.
    """

    messages: tuple[Mapping[str, str], ...]
    answer: str


def read_data(paths: Iterable[Path], valid: Path | None = None) -> tuple[list[Example], list[Example]]:
    """Read training and validation examples from files and folders.

    Args:
        paths: JSONL files with training examples, or folders that hold ``train.jsonl`` and optionally ``valid.jsonl``.
        valid: A JSONL file with validation examples. If given, the folders' own ``valid.jsonl`` files are ignored.

    Returns:
        The training examples and the validation examples; the latter may be empty.

    Raises:
        DgemmaError: If a file cannot be read, has no examples, or has a bad line (exit code 2).
    """
    examples: list[Example] = []
    held_out: list[Example] = []
    for path in paths:
        examples += read_examples(path / TRAIN if path.is_dir() else path)
        if valid is None and (path / VALID).exists():
            held_out += read_examples(path / VALID)
    return examples, held_out if valid is None else read_examples(valid)


def read_examples(path: Path) -> list[Example]:
    """Read the examples of one JSONL file.

    A conversation gives one example for each assistant message, with all messages before it. Raises ``DgemmaError``
    (exit code 2) if the file cannot be read, has no examples, or has a bad line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DgemmaError(
            f"cannot read {path}: {error.strerror}",
            f"Give a JSONL file. For training, a folder with {TRAIN} and optionally {VALID} works as well.",
            exit_code=2,
        ) from None
    except UnicodeDecodeError as error:
        raise DgemmaError(
            f"{path} is not UTF-8 text (byte {error.start})", "Convert the file to UTF-8.", exit_code=2
        ) from None
    examples: list[Example] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            examples += _examples(line, f"{path}, line {number}")
    if not examples:
        raise DgemmaError(f"{path} contains no examples", _HINT, exit_code=2)
    return examples


def encode_example(model: Model, example: Example) -> Conversation:
    """Tokenize an example for a model.

    Returns the prompt ids up to the position where the answer begins, and the answer ids with the id that ends the
    answer: the end of the turn in a chat, or the end of the text for a plain text.
    """
    tokenizer = model.tokenizer
    answer = tokenizer.encode(example.answer)
    if not example.messages:
        start = model.config.bos_token_id if tokenizer.bos_id is None else tokenizer.bos_id
        end = tokenizer.eos_id
        return [start], [*answer, model.generation.eos_token_ids[0] if end is None else end]
    return model.encode_prompt(example.messages), [*answer, turn_end(model)]


def turn_end(model: Model) -> int:
    """Return the id that ends an assistant's turn in the checkpoint's chat template.

    If the template ends the turn with none of the checkpoint's end-of-text ids, return the first of these ids.
    """
    from dgemma_mlx.text.chat import encode_chat

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    ids = encode_chat(model.tokenizer, model.template, turns, add_generation_prompt=False)
    ends = model.generation.eos_token_ids
    return next((id for id in reversed(ids) if id in ends), ends[0])


def encode_all(model: Model, examples: Iterable[Example], max_length: int) -> tuple[list[Conversation], int]:
    """Tokenize examples and limit each of them to ``max_length`` tokens.

    An answer that is too long is cut to the whole canvases that fit. An example is left out if not even one canvas fits
    after its prompt. Returns the conversations and the number of examples left out. Raises ``DgemmaError`` (exit code
    2) if all examples are left out.
    """
    canvas, kept, left_out = model.config.canvas_length, [], 0
    for example in examples:
        prompt, answer = encode_example(model, example)
        fitting = (max_length - len(prompt)) // canvas * canvas
        if fitting > 0:
            kept.append((prompt, answer[:fitting]))
        else:
            left_out += 1
    if not kept:
        raise DgemmaError(
            f"no example leaves room for a canvas of {canvas} tokens within {max_length} tokens",
            "Raise --max-length, or shorten the prompts.", exit_code=2,
        )
    return kept, left_out


def _examples(line: str, place: str) -> list[Example]:
    """Parse one line. ``place`` names its file and number in errors."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise DgemmaError(f"{place} is not JSON", _HINT, exit_code=2) from None
    if not isinstance(value, dict):
        raise DgemmaError(f"{place} is not a JSON object", _HINT, exit_code=2)
    if "messages" in value:
        return _turns(value["messages"], place)
    if "prompt" in value or "completion" in value:
        prompt, completion = (_text(value.get(name), name, place) for name in ("prompt", "completion"))
        return [Example(({"role": "user", "content": prompt},), completion)]
    if "text" in value:
        return [Example((), _text(value["text"], "text", place))]
    raise DgemmaError(f"{place} has neither messages, nor prompt and completion, nor text", _HINT, exit_code=2)


def _turns(messages: Any, place: str) -> list[Example]:
    """Return one example for each assistant message of a conversation."""
    if not isinstance(messages, list) or not messages:
        raise DgemmaError(f"{place}: messages must be a non-empty list", _HINT, exit_code=2)
    checked = [_message(message, f"{place}, message {number}") for number, message in enumerate(messages, 1)]
    answers = [number for number, message in enumerate(checked) if message["role"] in _ANSWERING]
    if not answers:
        raise DgemmaError(f"{place} has no assistant message",
                          "The model learns the assistant messages; add at least one.", exit_code=2)  # fmt: skip
    if answers[0] == 0:
        raise DgemmaError(f"{place} begins with an assistant message",
                          "Put a user or system message first.", exit_code=2)  # fmt: skip
    return [Example(tuple(checked[:number]), checked[number]["content"]) for number in answers]


def _message(message: Any, place: str) -> Mapping[str, str]:
    """Return a message after checking its keys, role and content."""
    if not isinstance(message, dict):
        raise DgemmaError(f"{place} must have a role and a content, but is not a JSON object", _HINT, exit_code=2)
    if message.keys() != {"role", "content"}:
        keys = ", ".join(map(str, message))[:80] or "no keys"
        raise DgemmaError(
            f"{place} must have a role and a content and nothing else, but has {keys}", _HINT, exit_code=2
        )
    if message["role"] not in ROLES:
        raise DgemmaError(
            f"{place} has the unknown role {message['role']!r}", f"The roles are {', '.join(ROLES)}.", exit_code=2
        )
    return {"role": message["role"], "content": _text(message["content"], "content", place)}


def _text(value: Any, name: str, place: str) -> str:
    """Return a value after checking that it is a non-empty string that UTF-8 can encode."""
    if not isinstance(value, str) or not value.strip():
        raise DgemmaError(f"{place}: {name} must be a non-empty string", _HINT, exit_code=2)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DgemmaError(
            f"{place}: {name} contains an unpaired surrogate", r"Remove the \uD800-\uDFFF escape, or complete it.", 2
        ) from None
    return value


def as_jsonl(examples: Iterable[tuple[str, str]]) -> str:
    """Return (prompt, answer) pairs as JSONL text with one ``messages`` object on each line."""
    lines: list[Sequence[Mapping[str, str]]] = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in examples
    ]
    return "".join(json.dumps({"messages": line}) + "\n" for line in lines)
