"""Conversion of chat messages into prompt ids, through the checkpoint's own chat template.

People and other programs write the messages and tool descriptions. Text in them that reads like a control token must
not become one. Before rendering, ``encode_chat`` therefore inserts a private-use character, the mark, after every
character in these strings that can begin a control token (usually ``<``). No control token can start in a marked
string, however the template trims, cuts or joins it. After rendering, control tokens are parsed (only the template can
have written them) and the marks are removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma_mlx.checks import reason
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.json_text import read_json
from dgemma_mlx.text.images import images_of
from dgemma_mlx.text.messages import Message, conversation
from dgemma_mlx.text.tokenizer import Tokenizer
from dgemma_mlx.text.tokenizer_config import named_tokens, read_tokenizer_config
from dgemma_mlx.text.tools import Tool, declarations

if TYPE_CHECKING:
    from jinja2 import Template

# Conversations that have a part, with and without it. A template that renders both alike leaves the part out.
_ASKED: dict[str, Any] = {"role": "user", "content": "a"}
_ANSWERED: dict[str, Any] = {"role": "assistant", "content": "b"}
_CALLED = {**_ANSWERED, "tool_calls": [{"id": "c", "type": "function", "function": {"name": "d", "arguments": {}}}]}
_RESULT: dict[str, Any] = {"role": "tool", "name": "d", "content": "e"}
_TOOL = {"type": "function", "function": {"name": "d", "description": "", "parameters": {"type": "object"}}}
_PROBES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "tools": ([_ASKED], [_ASKED]),
    "tool calls": ([_ASKED, _CALLED], [_ASKED, _ANSWERED]),
    "results of tool calls": ([_ASKED, _CALLED, {**_RESULT, "tool_call_id": "c"}], [_ASKED, _CALLED]),
    "tool messages": ([_ASKED, _RESULT], [_ASKED]),  # whose calls are text
}
_CHANNEL = re.compile(r"(<\|channel>)(.*?)(<channel\|>)", re.DOTALL)
_MARKS = range(0xE000, 0xF900)  # Unicode's private use area


class ChatTemplate:
    """A checkpoint's chat template, rendered as in transformers.

        template = ChatTemplate.load(Path("path/to/checkpoint"))
        text = template.render([{"role": "user", "content": "Hello"}])

    ``render`` trusts its messages: control tokens in them stay in the text. Use ``encode_chat`` to get the ids of a
    prompt from untrusted messages.

    Attributes:
        templates: Jinja sources by name. ``default`` always exists. ``tool_use``, if present, renders conversations
            with tools.
    """

    def __init__(self, templates: Mapping[str, str], tokens: Mapping[str, str], source: str) -> None:
        """Create a template from its sources. Most callers use ``load`` instead.

        ``tokens`` are the template's variables ``bos_token``, ``eos_token`` and so on. ``source`` is the path of the
        template's file, for error messages.
        """
        self.templates = dict(templates)
        self._tokens = dict(tokens)
        self._source = source
        self._compiled: dict[str, Template] = {}
        self._left_out: dict[str, bool] = {}

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Load the chat template of a checkpoint folder.

        The template is read from ``chat_template.jinja``, or else from ``tokenizer_config.json``, or else from
        ``chat_template.json``. Raises ``DgemmaError`` when none of these has a template or the file cannot be read.
        """
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
                "Copy chat_template.jinja from the original checkpoint, or use raw prompts (raw=True, --raw).",
            )
        return cls(_named_templates(value, path), named_tokens(config), str(path))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        enable_thinking: bool = False,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """Render a conversation as text.

        ``messages`` are those of ``text.messages.conversation``, and ``tools`` those of ``text.tools.declarations``.
        ``enable_thinking`` asks the model to think before it answers. ``add_generation_prompt`` ends the text with the
        beginning of the model's turn. ``extra`` are further variables of the template.

        Raises ``DgemmaError`` when a message or a tool is malformed (exit code 2), the template cannot be compiled, or
        the template raises an error.
        """
        return self.render_checked(
            conversation(messages), declarations(tools), enable_thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt, **extra,
        )  # fmt: skip

    def render_checked(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], **variables: Any
    ) -> str:
        """Render messages that ``conversation`` has returned and tools that ``declarations`` has returned.

        ``variables`` are the further variables of the template. Raises ``DgemmaError`` as ``render`` does.
        """
        template = self._template("tool_use" if tools and "tool_use" in self.templates else "default")
        variables = {**self._tokens, "documents": None, **variables, "messages": messages, "tools": tools or None}
        from dgemma_mlx.text.budget import TooMuch
        from dgemma_mlx.text.sandbox import render

        try:
            return render(template, plain_data(variables))
        except TooMuch as error:
            raise DgemmaError(f"the chat template was stopped: {error}", f"The template is {self._source}.") from None
        except Exception as error:  # a template is code, so unexpected input may raise any exception
            raise DgemmaError(
                f"the chat template rejected the conversation: {reason(error)}", f"The template is {self._source}."
            ) from error

    def leaves_out(self, part: str) -> bool:
        """Return whether the template never shows a part of ``_PROBES``, such as "tool calls"."""
        if part not in self._left_out:
            options = {"enable_thinking": False, "add_generation_prompt": True}
            whole, rest = _PROBES[part]
            try:
                text = self.render_checked(whole, [_TOOL] if part == "tools" else [], **options)
                self._left_out[part] = text == self.render_checked(rest, [], **options)
            except DgemmaError:  # it refuses such a conversation, so it does not leave the part out silently
                self._left_out[part] = False
        return self._left_out[part]

    def _template(self, name: str) -> Template:
        """Return the compiled template with this name. Compile it on first use."""
        if name not in self._compiled:
            from dgemma_mlx.text.sandbox import compiled

            try:
                self._compiled[name] = compiled(self.templates[name])
            except Exception as error:  # jinja2 makes Python code of a template, which may be malformed in many ways
                raise DgemmaError(
                    f"cannot compile the chat template: {reason(error)}", f"The template is {self._source}."
                ) from error
        return self._compiled[name]


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    enable_thinking: bool = False,
    add_generation_prompt: bool = True,
    trust_assistant: bool = False,
    **extra: Any,
) -> list[int]:
    """Return the token ids of a rendered conversation, including bos. The parameters are those of ``render``.

    Only the template can write control tokens: the same characters in a message or tool description become ordinary
    tokens. There is one exception. The template sees the markup ``<|channel>...<channel|>`` in an assistant's message,
    because it removes thinking from the history. With ``trust_assistant``, which is for training data, all control
    tokens in an assistant's content count as such.

    Raises ``DgemmaError`` as ``ChatTemplate.render`` does, when the template leaves out the tools, calls of tools or
    their results (exit code 2), and for images, which ``ModelText.encode_prompt`` reads.
    """
    extra |= {"enable_thinking": enable_thinking, "add_generation_prompt": add_generation_prompt}
    checked = conversation(messages)
    if images_of(checked):
        raise DgemmaError("this reads no images", "Leave them out of the messages.", exit_code=2)
    return encode_checked(tokenizer, template, checked, declarations(tools), trust_assistant=trust_assistant, **extra)


def encode_checked(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *,
    trust_assistant: bool = False, **variables: Any,
) -> list[int]:
    """Return the ids of messages that ``conversation`` has returned and tools that ``declarations`` has returned.

    An image is a part ``{"type": "image"}``, for which templates write the token ``<|image|>``. The other parameters
    and the errors are those of ``encode_chat``.
    """
    data = {"messages": list(messages), "tools": list(tools), "extra": plain_data(variables)}
    mark = _unused_mark([data, template.templates])
    first_characters = "".join(sorted({text[0] for text in tokenizer.special_ids}))
    control_start = re.compile(f"[{re.escape(first_characters)}]" if first_characters else "(?!)")

    def guard(text: str) -> str:
        return control_start.sub(lambda match: match[0] + mark, text)

    guarded = [_guard_message(message, guard, trust_assistant) for message in data["messages"]]
    text = template.render_checked(guarded, _guard(data["tools"], guard), **_guard(data["extra"], guard))
    for part in _parts(data["messages"], data["tools"]):
        if template.leaves_out(part):
            raise DgemmaError(
                f"the model's chat template leaves out the {part}", "Write them into a user message.", exit_code=2
            )
    return tokenizer.encode_control(text, ignore=(mark, _escaped(mark)))


def _parts(messages: Sequence[Message], tools: Sequence[Any]) -> set[str]:
    """Return which of the parts in ``_PROBES`` a conversation has."""
    found = {"tools"} if tools else set()
    for message in messages:
        if "tool_calls" in message:
            found.add("tool calls")
        if message["role"] == "tool":
            found.add("results of tool calls" if "tool_call_id" in message else "tool messages")
    return found


def plain_data(value: Any) -> Any:
    """Convert a value to plain JSON types, the only types that an untrusted template may see.

    An instance of a subclass of str, int or float becomes the plain str, int or float. A value that JSON cannot
    represent, such as an image, becomes a string with the name of its type.
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


def _guard(value: Any, guard: Callable[[str], str]) -> Any:
    """Apply ``guard`` to every string in plain data, including the keys of objects."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, dict):
        return {_guard(key, guard): _guard(item, guard) for key, item in value.items()}
    if isinstance(value, list):
        return [_guard(item, guard) for item in value]
    return value


def _guard_message(message: Any, guard: Callable[[str], str], trust_assistant: bool) -> Any:
    """Guard a message. Leave the channel markup in an assistant's content readable for the template.

    With ``trust_assistant``, the whole content of an assistant stays as it is.
    """
    guarded = _guard(message, guard)
    if message["role"] == "assistant" and "content" in message:
        content = message["content"]
        guard_content = partial(_guard_around_channels, guard=guard)
        guarded["content"] = content if trust_assistant else _guard(content, guard_content)
    return guarded


def _guard_around_channels(text: str, guard: Callable[[str], str]) -> str:
    """Guard a text except for the two delimiters of each complete channel."""
    pieces = _CHANNEL.split(text)  # text, open, inside, close, text, open, ...
    return "".join(piece if n % 4 in (1, 3) else guard(piece) for n, piece in enumerate(pieces))


def _unused_mark(data: Any) -> str:
    """Return a private-use character that the data contains neither literally nor as a JSON escape."""
    text = json.dumps(data, ensure_ascii=False)
    used = set(text) | {chr(int(code, 16)) for code in re.findall(r"\\u([0-9a-fA-F]{4})", text)}
    mark = next((chr(code) for code in _MARKS if chr(code) not in used), None)
    if mark is None:
        raise DgemmaError(
            "the conversation contains all private-use characters from U+E000 to U+F8FF",
            "Remove at least one of these characters from the messages.", exit_code=2,
        )
    return mark


def _escaped(mark: str) -> str:
    """Return the JSON escape of the mark, which a template's ``tojson(ensure_ascii=true)`` writes."""
    return json.dumps(mark)[1:-1]


def _read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises ``DgemmaError`` when that fails."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        hint = "The file may be damaged; download it again."
        raise DgemmaError(f"cannot read {path}: {reason(error)}", hint) from None


def _named_templates(value: Any, path: Path) -> dict[str, str]:
    """Return the templates by name. A file stores one text, or a list of ``{"name": ..., "template": ...}``."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        templates = {entry.get("name"): entry.get("template") for entry in value}
        if "default" in templates and all(isinstance(text, str) for text in templates.values()):
            return templates
    raise DgemmaError(
        f"{path}: chat_template is neither text nor a list with a 'default' template",
        "Copy the file from the original checkpoint.",
    )
