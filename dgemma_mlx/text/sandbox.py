"""The sandboxed jinja2 environment that renders chat templates, set up as in transformers.

A chat template is untrusted code. It runs in jinja2's sandbox and sees only plain JSON values. This module imports
jinja2, so import it inside a function.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class GenerationTag(Extension):
    """Support for ``{% generation %}...{% endgeneration %}``, which marks the assistant's text for training.

    The tag renders its body unchanged.

    Attributes:
        tags: Names of the tags that this extension parses.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares the attribute this way)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the body of the tag up to ``{% endgeneration %}``."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class SafeNamespace(Namespace):
    """jinja2's ``namespace(...)``, but names that begin with an underscore raise ``SecurityError``."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named self, so that namespace(self=1) works as in jinja2
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class SafeDict:
    """A replacement for ``dict`` that offers ``dict(...)`` and ``dict.fromkeys(...)`` and no other attribute."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return ``dict.fromkeys(*args)``."""
        return dict.fromkeys(*args)


def environment() -> ImmutableSandboxedEnvironment:
    """Create an environment with the filters and functions that chat templates use.

    Source: transformers ``utils/chat_template_utils.py``.
    """
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=SafeDict(), namespace=SafeNamespace
    )
    return env


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Serialize a value as JSON. Unlike jinja2's own filter, this one does not escape HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _check_name(name: Any) -> None:
    """Raise ``SecurityError`` when a template stores a name that begins with an underscore."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not store {name!r} on a namespace")
