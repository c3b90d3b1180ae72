"""Examples from JSONL files in the formats of mlx_lm: messages, prompt and completion, or plain text.

A whole file is checked before any of its examples is used. An error names the file and the line of a bad example. A key
that is not read is an error, because the model would be trained without it.

An assistant's message may have ``tool_calls``, and a tool's message its result (see ``text.messages``). An answer that
calls tools is its content and its calls, as the model writes them.

What the model learns to write is trusted: control tokens in an assistant's message, a completion and a text count as
such, as in mlx_lm. What it reads is not: the same characters in any other message are ordinary text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.model import Model
from dgemma_mlx.json_text import parse_json
from dgemma_mlx.text.images import is_image
from dgemma_mlx.text.messages import THINKING_KEYS, Message, conversation
from dgemma_mlx.text.tools import call_text, declarations
from dgemma_mlx.train.batches import Conversation

TRAIN, VALID = "train.jsonl", "valid.jsonl"
_FORMS = (("messages", "tools"), ("prompt", "completion", "tools"), ("text",))  # the keys of a line
_THINKS, _CALLED, _WAITS = "<|channel>", "<tool_call|>", "<|tool_response>"  # see ``text.parts``
_HINT = (
    'A line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"prompt": "...", "completion": "..."}, or {"text": "..."}.'
)


@dataclass(frozen=True)
class Example:
    """One answer to learn or to compare with, and the conversation that it answers.

    Attributes:
        messages: The messages before the answer, as ``text.messages.conversation`` reads them. Empty for a plain text.
        answer: The text of the answer, or the whole plain text.
        tools: Declarations of the tools that the conversation has (see ``text.tools.declarations``).
        place: The file and the line of the example, for error messages.
    """

    messages: tuple[Message, ...]
    answer: str
    tools: tuple[Mapping[str, Any], ...] = ()
    place: str = ""


@dataclass(frozen=True)
class Limited:
    """What a maximum length has taken from a set of examples.

    Attributes:
        left_out: Number of examples that leave no room for a canvas and are left out.
        cut: Number of answers that are cut to the whole canvases that fit.
        lost: Number of tokens that these answers lose.
    """

    left_out: int = 0
    cut: int = 0
    lost: int = 0


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
    answer: the end of the turn in a chat, or the end of the text for a plain text. An answer that begins with thinking
    gets a prompt that asks for thinking.

    Raises ``DgemmaError``, which names the example's place, if the checkpoint's chat template rejects or leaves out a
    part of the conversation, or if the answer contains padding.
    """
    tokenizer = model.tokenizer
    answer = tokenizer.encode_control(example.answer)
    if model.config.pad_token_id in answer:
        raise DgemmaError(f"{example.place}: the answer contains the padding token", "Remove it.", exit_code=2)
    if example.messages:
        prompt = _encode_prompt(model, example, thinking=answer[:1] == [tokenizer.special_ids.get(_THINKS)])
        end = _end_of_call(model) if answer[-1:] == [tokenizer.special_ids.get(_CALLED)] else turn_end(model)
    else:
        prompt = [model.config.bos_token_id if tokenizer.bos_id is None else tokenizer.bos_id]
        end = model.generation.eos_token_ids[0] if tokenizer.eos_id is None else tokenizer.eos_id
        answer = answer[1:] if answer[:1] == prompt else answer  # of a text that is templated already
    return prompt, answer if answer[-1:] == [end] else [*answer, end]


def _encode_prompt(model: Model, example: Example, thinking: bool) -> list[int]:
    """Return the ids of the conversation before an answer."""
    from dgemma_mlx.text.chat import encode_chat

    try:
        return encode_chat(
            model.tokenizer, model.template, example.messages, tools=example.tools, enable_thinking=thinking,
            trust_assistant=True,
        )  # fmt: skip
    except DgemmaError as error:
        raise DgemmaError(f"{example.place}: {error.message}", error.hint, error.exit_code) from None


def _end_of_call(model: Model) -> int:
    """Return the id that ends a tool call: the one that asks for the tool's response, if the checkpoint stops at it."""
    waits = model.tokenizer.special_ids.get(_WAITS)
    return waits if waits is not None and waits in model.generation.eos_token_ids else turn_end(model)


def visible_answer(model: Model, example: Example) -> str:
    """Return the text of an example's answer that a reader sees, without thinking, tool calls and control tokens."""
    from dgemma_mlx.text.parts import parse_parts

    return parse_parts(model.tokenizer, model.tokenizer.encode_control(example.answer)).text


def turn_end(model: Model) -> int:
    """Return the id that ends an assistant's turn in the checkpoint's chat template.

    If the template ends the turn with none of the checkpoint's end-of-text ids, return the first of these ids.
    """
    from dgemma_mlx.text.chat import encode_chat

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    ids = encode_chat(model.tokenizer, model.template, turns, add_generation_prompt=False)
    ends = model.generation.eos_token_ids
    return next((id for id in reversed(ids) if id in ends), ends[0])


def encode_all(model: Model, examples: Iterable[Example], max_length: int) -> tuple[list[Conversation], Limited]:
    """Tokenize examples and limit each of them to ``max_length`` tokens.

    An answer that is too long is cut to the whole canvases that fit. An example is left out if not even one canvas fits
    after its prompt. Returns the conversations, and how many examples were cut and left out. Raises ``DgemmaError``
    (exit code 2) if all examples are left out.
    """
    canvas, kept = model.config.canvas_length, []
    left_out = cut = lost = 0
    for example in examples:
        prompt, answer = encode_example(model, example)
        fitting = (max_length - len(prompt)) // canvas * canvas
        if fitting <= 0:
            left_out += 1
            continue
        kept.append((prompt, answer[:fitting]))
        if len(answer) > fitting:
            cut, lost = cut + 1, lost + len(answer) - fitting
    if not kept:
        raise DgemmaError(
            f"no example leaves room for a canvas of {canvas} tokens within {max_length} tokens",
            "Raise --max-length, or shorten the prompts.", exit_code=2,
        )
    return kept, Limited(left_out, cut, lost)


def _examples(line: str, place: str) -> list[Example]:
    """Parse one line. ``place`` names its file and number in errors."""
    try:
        value = parse_json(line)
    except ValueError as error:
        raise DgemmaError(f"{place} is not JSON: {error}", _HINT, exit_code=2) from None
    if not isinstance(value, dict):
        raise DgemmaError(f"{place} is not a JSON object", _HINT, exit_code=2)
    given = {name: item for name, item in value.items() if item is not None}
    form = next((form for form in _FORMS if not given.keys().isdisjoint(set(form) - {"tools"})), None)
    if form is None:
        raise DgemmaError(f"{place} has neither messages, nor prompt and completion, nor text", _HINT, exit_code=2)
    if unread := [name for name in given if name not in form]:
        raise DgemmaError(
            f"{place}: {shown(unread[0])} is not read beside {form[0]}",
            f"The keys of such a line are {', '.join(form)}. Put everything else into the messages, or remove it.", 2,
        )
    tools = _tools(given.get("tools", []), place)
    if form[0] == "messages":
        return _turns(given["messages"], tools, place)
    if form[0] == "text":
        return [Example((), _text(given["text"], "text", place), (), place)]
    prompt, completion = (_text(given.get(name), name, place) for name in ("prompt", "completion"))
    return [Example(({"role": "user", "content": prompt},), completion, tools, place)]


def _tools(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    """Return the declarations of tools after checking them."""
    try:
        declarations(value)
        return tuple(value)
    except DgemmaError as error:
        raise DgemmaError(f"{place}: {error.message}", error.hint, exit_code=2) from None


def _turns(messages: Any, tools: tuple[Mapping[str, Any], ...], place: str) -> list[Example]:
    """Return one example for each assistant message of a conversation."""
    if not isinstance(messages, list) or not messages:
        raise DgemmaError(f"{place}: messages must be a non-empty list", _HINT, exit_code=2)
    for number, message in enumerate(messages, 1):
        _check_content(message, f"{place}, message {number}")
    try:
        checked = conversation(messages)
    except DgemmaError as error:
        raise DgemmaError(f"{place}, {error.message}", error.hint, exit_code=2) from None
    answers = [number for number, message in enumerate(checked) if message["role"] == "assistant"]
    if not answers:
        raise DgemmaError(f"{place} has no assistant message",
                          "The model learns the assistant messages; add at least one.", exit_code=2)  # fmt: skip
    if checked[0]["role"] in ("assistant", "tool"):
        kind = "a tool" if checked[0]["role"] == "tool" else "an assistant"
        raise DgemmaError(f"{place} begins with {kind} message", "Put a user or system message first.", exit_code=2)
    return [Example(tuple(messages[:number]), _answer(checked[number]), tools, place) for number in answers]


def _answer(message: Message) -> str:
    """Return an assistant's message as the model writes it: the content, then the calls."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return message.get("content", "") + "".join(call_text(call["name"], call["arguments"]) for call in calls)


def _check_content(message: Any, place: str) -> None:
    """Raise ``DgemmaError`` for an image, for nothing to learn or to read, and for thinking outside the content."""
    if not isinstance(message, dict):
        raise DgemmaError(f"{place} must have a role and a content, but is not a JSON object", _HINT, exit_code=2)
    if thinking := [name for name in THINKING_KEYS if message.get(name) is not None]:
        raise DgemmaError(
            f"{place}: {thinking[0]} is not read", "Write thinking into the content, as the model writes it.", 2
        )
    if isinstance(message.get("content"), list) and any(map(is_image, message["content"])):
        raise DgemmaError(f"{place} has an image", "Training and evaluation take no images yet; remove the line.", 2)
    if message.get("role") != "tool" and not (message.get("content") is None and message.get("tool_calls")):
        _text(message.get("content"), "content", place)


def _text(value: Any, name: str, place: str) -> str:
    """Return a value after checking that it is a string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise DgemmaError(f"{place}: {name} must be a non-empty string", _HINT, exit_code=2)
    return value


def as_jsonl(examples: Iterable[tuple[str, str]]) -> str:
    """Return (prompt, answer) pairs as JSONL text with one ``messages`` object on each line."""
    lines: list[Sequence[Mapping[str, str]]] = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in examples
    ]
    return "".join(json.dumps({"messages": line}) + "\n" for line in lines)
