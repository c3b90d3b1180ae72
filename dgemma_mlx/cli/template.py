"""Templates: prompts with gaps and settings that belong to them, in TOML files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgemma_mlx.checks import is_text, shown
from dgemma_mlx.cli.settings import SETTINGS, checked, config_file, read_toml
from dgemma_mlx.errors import DgemmaError

_NAME = re.compile(r"[\w-][\w.-]*")
_GAP = re.compile(r"\{\{(\w+)\}\}|\{([^\W\d]\w*)\}")  # {{name}}, which stands for the text {name}; or {name}
_INPUT = "input"
_HINT = 'A template has `prompt = "... {input}"`, settings such as `system` and `max_tokens`, and a table [params].'


@dataclass(frozen=True)
class Template:
    """A prompt with gaps, and the settings that belong to it.

    Attributes:
        prompt: The text of the prompt; empty when the prompt is the input alone.
        settings: Settings in place of the user's, among them the system prompt.
        values: What the gaps but for ``{input}`` stand for, by name.
    """

    prompt: str
    settings: Mapping[str, Any]
    values: Mapping[str, str]

    @property
    def is_complete(self) -> bool:
        """Whether the prompt has a text and no gap for the input."""
        return bool(self.prompt.strip()) and _INPUT not in gaps(self.prompt)

    def filled(self, input: str) -> str:
        """Return the prompt with the input in its gap, or after it when it has no such gap."""
        text = _filled(self.prompt, {**self.values, _INPUT: input}).strip()
        return text if _INPUT in gaps(self.prompt) else "\n\n".join(part for part in (text, input) if part)


def templates_folder() -> Path:
    """Return the folder of the templates, which lies beside the settings file."""
    return config_file(os.environ).parent / "templates"


def template_names() -> list[str]:
    """Return the names of the templates in their folder, sorted. Raises `DgemmaError` when it cannot be read."""
    folder = templates_folder()
    try:
        return sorted(path.stem for path in folder.iterdir() if path.suffix == ".toml" and _NAME.fullmatch(path.stem))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DgemmaError(f"cannot read {folder}: {error.strerror}", "The templates lie there.") from None


def template_file(name: str) -> Path:
    """Return the file of a template: NAME.toml in the folder of the templates, or a path that ends with ``.toml``.

    Raises `DgemmaError` (exit code 2) for a name that cannot be one.
    """
    if name.endswith(".toml"):
        return Path(os.path.expanduser(name))
    if not _NAME.fullmatch(name):
        hint = "A name has letters, digits, _, - and dots; a path ends with .toml."
        raise DgemmaError(f"{shown(name)} cannot be a template's name", hint, exit_code=2)
    return templates_folder() / f"{name}.toml"


def load_template(name: str, given: Iterable[str] = ()) -> Template:
    """Read a template and fill its gaps but for ``{input}``. ``given`` are values as ``NAME=VALUE``.

    Raises `DgemmaError` (exit code 2) when there is no such template, when it is malformed, when a gap has no value, or
    when a value has no gap.
    """
    found = read_template(template_file(name))
    values = {**found.values, **_parsed(given)}
    system = found.settings.get("system", "")
    needed = {*gaps(found.prompt) - {_INPUT}, *gaps(system)}
    for problem, names in (("needs a value for", needed - {*values}), ("has no gap for", {*values} - needed)):
        if names:
            hint = f"Gaps: {', '.join(sorted(needed)) or 'none'}. --param NAME=VALUE gives a value."
            raise DgemmaError(f"the template {shown(name)} {problem} {', '.join(sorted(names))}", hint, exit_code=2)
    settings = {**found.settings, "system": _filled(system, values)} if system else found.settings
    return Template(found.prompt, settings, values)


def read_template(path: Path) -> Template:
    """Read a template with the values of its own.

    Raises `DgemmaError` (exit code 2), which names the file, when there is none or it is malformed.
    """
    try:
        content = read_toml(path)
    except FileNotFoundError:
        raise no_template(path) from None
    prompt, values = content.pop("prompt", ""), content.pop("params", {})
    if not is_text(prompt):
        raise DgemmaError(f"{path}: prompt must be a text, not {shown(prompt)}", _HINT, exit_code=2)
    if not isinstance(values, dict) or not all(map(is_text, values.values())):
        raise DgemmaError(f"{path}: params must be a table of texts", 'Write [params], then name = "value".', 2)
    if unknown := [key for key in content if key not in SETTINGS]:
        hint = f"A template has prompt, params, and settings: {', '.join(SETTINGS)}."
        raise DgemmaError(f"{path}: unknown setting {shown(unknown[0])}", hint, exit_code=2)
    content = {key: checked(key, value, f"{path}: {key}") for key, value in content.items()}
    if _INPUT in gaps(content.get("system", "")):
        raise DgemmaError(f"{path}: system cannot have the gap {{input}}", "The input stands in the prompt.", 2)
    return Template(prompt, content, values)


def no_template(path: Path) -> DgemmaError:
    """Return the error that there is no such template."""
    known = ", ".join(template_names())
    hint = f"Templates: {known}." if known else f"`dgemma-mlx templates edit {path.stem}` writes one."
    return DgemmaError(f"there is no template {path}", hint, exit_code=2)


def gaps(text: str) -> set[str]:
    """Return the names of the gaps in a text."""
    return {found[2] for found in _GAP.finditer(text) if found[2]}


def _filled(text: str, values: Mapping[str, str]) -> str:
    """Return the text with values in its gaps. Braces in a value are text, and other braces stay as they are."""
    return _GAP.sub(lambda found: values[found[2]] if found[2] else f"{{{found[1]}}}", text)


def _parsed(given: Iterable[str]) -> dict[str, str]:
    """Return the values of ``--param`` by name."""
    values: dict[str, str] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier() or name == _INPUT or name in values or not is_text(value):
            hint = "Write --param NAME=VALUE once for each NAME; the prompt itself is the input."
            raise DgemmaError(f"--param cannot be {shown(item)}", hint, exit_code=2)
        values[name] = value
    return values
