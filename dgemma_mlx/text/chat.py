"""Chat messages -> prompt ids, through the checkpoint's own template.

Messages and tool descriptions come from people and other programs: what reads like a control token in them
must not become one. So before rendering, a private mark is put behind every character that begins a control
token (``<`` mostly) in those strings. However the template then trims, cuts or joins them, no control token
starts in them; what the template writes itself is parsed, and the marks are taken out again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma_mlx.checkpoint.config import read_json
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.text.tokenizer import Tokenizer, named_tokens, read_tokenizer_config

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

_ASSISTANT = ("assistant", "model")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that programs give a message's thoughts
_THOUGHT = re.compile(r"(<\|channel>)(.*?)(<channel\|>)", re.DOTALL)
_MARKS = range(0xE000, 0xF900)  # the private use area


class ChatTemplate:
    """A checkpoint's chat template, rendered as transformers renders it.

    ``templates`` has the key ``default`` and may have ``tool_use``, taken when tools are given;
    ``tokens`` are the variables ``bos_token``, ``eos_token``, ... of the template.
    """

    def __init__(self, templates: Mapping[str, str], tokens: Mapping[str, str], source: str) -> None:
        """``source`` names the template in errors: the path of its file."""
        self.templates = dict(templates)
        self._tokens = dict(tokens)
        self._source = source
        self._compiled: dict[str, Template] = {}

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """From ``chat_template.jinja``, else ``tokenizer_config.json``, else ``chat_template.json``."""
        config = read_tokenizer_config(folder)
        jinja_path, json_path = folder / "chat_template.jinja", folder / "chat_template.json"
        value: Any
        if jinja_path.exists():
            path, value = jinja_path, _read_text(jinja_path)
        elif config.get("chat_template") is not None:
            path, value = folder / "tokenizer_config.json", config["chat_template"]
        elif json_path.exists():
            path, value = json_path, read_json(json_path).get("chat_template")
        else:
            raise DgemmaError(
                f"{folder} has no chat template",
                "Copy chat_template.jinja from the original checkpoint, or prompt without a template.",
            )
        return cls(_named_templates(value, path), named_tokens(config), str(path))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The conversation as text. ``extra`` are further variables of the template.

        Raises ``DgemmaError`` for an empty conversation, a broken template, or what the template refuses.
        """
        if not messages:
            raise DgemmaError("the conversation is empty", "Give at least one message.", exit_code=2)
        with_tools = tools is not None and "tool_use" in self.templates
        template = self._template("tool_use" if with_tools else "default")
        variables = {**self._tokens, "documents": None, **extra}
        variables["messages"] = [_message(message) for message in messages]
        variables["tools"] = tools
        variables["enable_thinking"] = enable_thinking
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return template.render(plain_data(variables))
        except Exception as error:  # a template is code: given what it does not expect, it may raise anything
            raise DgemmaError(
                f"the chat template refused the conversation: {error}", f"The template is {self._source}"
            ) from error

    def _template(self, name: str) -> Template:
        if name not in self._compiled:
            from jinja2 import TemplateError

            from dgemma_mlx.text.sandbox import environment

            try:
                self._compiled[name] = environment().from_string(self.templates[name])
            except (TemplateError, RecursionError) as error:
                raise DgemmaError(
                    f"cannot read the chat template: {error}", f"The template is {self._source}"
                ) from error
        return self._compiled[name]


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = False,
    add_generation_prompt: bool = True,
    **extra: Any,
) -> list[int]:
    """The ids of the rendered conversation, those of its bos included.

    Only the template writes control tokens. One exception: ``<|channel>...<channel|>`` in an assistant's
    message is left to the template, which strips thinking from the history.
    """
    data = plain_data({"messages": list(messages), "tools": tools, "extra": extra})
    mark = _unused_mark([data, template.templates])
    firsts = "".join(sorted({text[0] for text in tokenizer.special_ids}))
    first = re.compile(f"[{re.escape(firsts)}]" if firsts else "(?!)")

    def guard(text: str) -> str:
        return first.sub(lambda match: match[0] + mark, text)

    text = template.render(
        [_guard_message(message, guard) for message in data["messages"]],
        tools=_guard(data["tools"], guard),
        enable_thinking=enable_thinking,
        add_generation_prompt=add_generation_prompt,
        **_guard(data["extra"], guard),
    )
    return tokenizer.encode_control(text, ignore=(mark, _escaped(mark)))


def plain_data(value: Any) -> Any:
    """Rebuilds a value out of plain JSON types, the only ones that a stranger's template may get hold of.

    Of a subclass of str, int or float only the value is kept; anything else that JSON does not know, such as
    an image, becomes a string with its type's name.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    return f"<{type(value).__name__}>"


def _message(message: Message) -> dict[str, Any]:
    """A message without its None values, its thoughts under the names that templates read."""
    message = plain_data(message)
    if not isinstance(message, dict):
        raise DgemmaError(f"a chat message must be an object with a role, not {message!r}", exit_code=2)
    values = {name: value for name, value in message.items() if value is not None}
    thoughts = next((values[name] for name in _REASONING if name in values), None)
    return values if thoughts is None else {"thinking": thoughts, **values, "reasoning_content": thoughts}


def _guard(value: Any, guard: Callable[[str], str]) -> Any:
    """Applies ``guard`` to every string of plain data, keys included."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, dict):
        return {_guard(key, guard): _guard(item, guard) for key, item in value.items()}
    if isinstance(value, list):
        return [_guard(item, guard) for item in value]
    return value


def _guard_message(message: Any, guard: Callable[[str], str]) -> Any:
    """Guards a message; the assistant's own channel markup stays readable for the template."""
    guarded = _guard(message, guard)
    if isinstance(message, dict) and message.get("role") in _ASSISTANT:
        guarded["content"] = _guard(message.get("content"), lambda text: _guard_around_thoughts(text, guard))
    return guarded


def _guard_around_thoughts(text: str, guard: Callable[[str], str]) -> str:
    """Guards everything but the two delimiters of each complete channel."""
    pieces = _THOUGHT.split(text)  # text, open, inside, close, text, open, ...
    return "".join(piece if n % 4 in (1, 3) else guard(piece) for n, piece in enumerate(pieces))


def _unused_mark(data: Any) -> str:
    """A private character that the data contains neither as it is nor as a JSON escape."""
    text = json.dumps(data, ensure_ascii=False)
    used = set(text) | {chr(int(code, 16)) for code in re.findall(r"\\u([0-9a-fA-F]{4})", text)}
    mark = next((chr(code) for code in _MARKS if chr(code) not in used), None)
    if mark is None:
        raise DgemmaError("the conversation uses every private character of Unicode", exit_code=2)
    return mark


def _escaped(mark: str) -> str:
    """The mark as a template's ``tojson(ensure_ascii=true)`` writes it."""
    return json.dumps(mark)[1:-1]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DgemmaError(f"cannot read {path}: {error}", "The file may be damaged.") from None


def _named_templates(value: Any, path: Path) -> dict[str, str]:
    """A template is written as text or as a list of ``{"name", "template"}``."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        templates = {entry.get("name"): entry.get("template") for entry in value}
        if "default" in templates and all(isinstance(text, str) for text in templates.values()):
            return templates
    raise DgemmaError(f"{path}: chat_template is neither text nor a list with a 'default' template")
