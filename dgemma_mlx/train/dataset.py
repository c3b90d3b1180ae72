"""Examples from JSONL files, in the formats that users of mlx_lm have: messages, prompt and completion, or text.

Every line is checked before any is used; a ``DgemmaError`` (exit code 2) names the file and the line of a bad one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.train.data import Conversation

TRAIN, VALID = "train.jsonl", "valid.jsonl"
ROLES = ("system", "developer", "user", "assistant", "model", "tool")
_ANSWERING = ("assistant", "model")
_HINT = (
    'A line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"prompt": "...", "completion": "..."}, or {"text": "..."}.'
)


@dataclass(frozen=True)
class Example:
    """What is asked and what is to be answered; a text without a question has no messages."""

    messages: tuple[Mapping[str, str], ...]
    answer: str


def read_data(paths: Iterable[Path], valid: Path | None = None) -> tuple[list[Example], list[Example]]:
    """Training and validation examples: of files, and of folders with ``train.jsonl`` and perhaps ``valid.jsonl``.

    A file ``valid`` is validated with instead of those.
    """
    examples: list[Example] = []
    held_out: list[Example] = []
    for path in paths:
        examples += read_examples(path / TRAIN if path.is_dir() else path)
        if valid is None and (path / VALID).exists():
            held_out += read_examples(path / VALID)
    return examples, held_out if valid is None else read_examples(valid)


def read_examples(path: Path) -> list[Example]:
    """The examples of a file: of a conversation one for each of the assistant's turns, with all that comes before."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", "DATA is a JSONL file, or a folder with "
                          f"{TRAIN} and {VALID}.", exit_code=2) from None  # fmt: skip
    except UnicodeDecodeError as error:
        raise DgemmaError(f"{path} is not UTF-8 text (byte {error.start})", exit_code=2) from None
    examples: list[Example] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            examples += _examples(line, f"{path}, line {number}")
    if not examples:
        raise DgemmaError(f"{path} holds no example", _HINT, exit_code=2)
    return examples


def encode_example(model: Model, example: Example) -> Conversation:
    """Prompt ids up to where the answer begins, and answer ids with the id that ends it."""
    tokenizer = model.tokenizer
    answer = tokenizer.encode(example.answer)
    if not example.messages:
        start = model.config.bos_token_id if tokenizer.bos_id is None else tokenizer.bos_id
        end = tokenizer.eos_id
        return [start], [*answer, model.generation.eos_token_ids[0] if end is None else end]
    return model.encode_prompt(example.messages), [*answer, turn_end(model)]


def turn_end(model: Model) -> int:
    """The id that ends an assistant's turn in the checkpoint's chat template; its end of text where it has none."""
    from dgemma_mlx.text.chat import encode_chat

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    ids = encode_chat(model.tokenizer, model.template, turns, add_generation_prompt=False)
    ends = model.generation.eos_token_ids
    return next((id for id in reversed(ids) if id in ends), ends[0])


def encode_all(model: Model, examples: Iterable[Example], max_length: int) -> tuple[list[Conversation], int]:
    """The conversations that leave room for a canvas of their answer within ``max_length`` tokens, and how many do not.

    Of an answer that is longer, the canvases that fit are kept.
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
            f"no example has room for a canvas of {canvas} tokens within {max_length}",
            "Raise --max-length, or shorten the prompts.", exit_code=2,
        )
    return kept, left_out


def _examples(line: str, place: str) -> list[Example]:
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
    if not isinstance(messages, list) or not messages:
        raise DgemmaError(f"{place}: messages must be a list with something in it", _HINT, exit_code=2)
    checked = [_message(message, f"{place}, message {number}") for number, message in enumerate(messages, 1)]
    answers = [number for number, message in enumerate(checked) if message["role"] in _ANSWERING]
    if not answers:
        raise DgemmaError(f"{place} has no message of the assistant", "It is what is learned.", exit_code=2)
    if answers[0] == 0:
        raise DgemmaError(f"{place} begins with the assistant", "A conversation begins with a question.", exit_code=2)
    return [Example(tuple(checked[:number]), checked[number]["content"]) for number in answers]


def _message(message: Any, place: str) -> Mapping[str, str]:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        keys = f"{', '.join(map(str, message))[:80]}" if isinstance(message, dict) else "no object"
        raise DgemmaError(f"{place} must have a role and a content and nothing else, it has {keys}", _HINT, exit_code=2)
    if message["role"] not in ROLES:
        raise DgemmaError(f"{place} has the role {message['role']!r}", f"Roles are {', '.join(ROLES)}.", exit_code=2)
    return {"role": message["role"], "content": _text(message["content"], "content", place)}


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DgemmaError(f"{place}: {name} must be a text with something in it", _HINT, exit_code=2)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DgemmaError(f"{place}: {name} has half a surrogate pair", _HINT, exit_code=2) from None
    return value


def as_jsonl(examples: Iterable[tuple[str, str]]) -> str:
    """Prompts and answers as lines of ``messages``."""
    lines: list[Sequence[Mapping[str, str]]] = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in examples
    ]
    return "".join(json.dumps({"messages": line}) + "\n" for line in lines)
