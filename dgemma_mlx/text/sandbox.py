"""The sandboxed jinja2 environment that renders chat templates, set up as in transformers.

A chat template is untrusted code. It runs in jinja2's sandbox, sees only plain JSON values, and has a budget of work
and memory (``text.budget``). This module imports jinja2, so import it inside a function.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from dgemma_mlx.text.budget import Budget, TooMuch, current

_LONGEST_TEMPLATE = 1 << 20  # characters; Gemma's has 17,000
# Names that no template can write.
_COUNT, _KEPT = "{count}", "{kept}"


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


class _Counted(NodeTransformer):
    """Makes a template count its steps and the values that it makes, as ``text.budget`` says."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (as jinja2 names it)
        """Count the repetitions of a loop, also those that its condition leaves out."""
        self._count(node)
        if node.test is not None:
            node.test = nodes.And(_filter(_COUNT, nodes.Const(0)), node.test)
        return node

    def _count(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        data = sum(len(part.data) for statement in node.body for part in statement.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_filter(_COUNT, nodes.Const(data))))
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = _count  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Replace ``a ~ b`` by ``[a, b] | join``, which is counted."""
        self.generic_visit(node)
        return _filter("join", nodes.List(node.nodes))

    def _made(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        counted = isinstance(node, nodes.Dict) or getattr(node, "ctx", "load") == "load"
        if isinstance(node, nodes.Getitem):
            counted = isinstance(node.arg, nodes.Slice)
        return _filter(_KEPT, node) if counted else node

    visit_List = visit_Tuple = visit_Dict = visit_Getitem = _made  # noqa: N815


def _filter(name: str, value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a budget for each rendering."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Counted().visit(super()._parse(source, name, filename))
        tree.set_environment(self).set_lineno(1)
        return tree  # type: ignore[no-any-return]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current.get()
        budget.before_binop(operator, left, right)
        return budget.kept(super().call_binop(context, operator, left, right))

    # The names are those of jinja2, so that a template may call a macro with an argument named self.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget, owner = current.get(), getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            args = tuple(_whole(part) for part in args)
            budget.before_call(__obj.__name__, owner, args, kwargs)
        return budget.kept(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            current.get().check_format(str(value.__self__), [*args, kwargs])
            return wrapped(*args, **kwargs)

        return checked


def environment() -> ImmutableSandboxedEnvironment:
    """Create an environment with the filters and functions that chat templates use.

    Source: transformers ``utils/chat_template_utils.py``.
    """
    # Without the optimizer, nothing is computed while the template is compiled, outside any budget.
    env = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols], optimized=False,
        finalize=_written,
    )
    env.filters["tojson"] = _tojson
    for name, function in env.filters.items():
        env.filters[name] = _budgeted(name, function)
    env.filters[_COUNT] = _count
    env.filters[_KEPT] = _kept
    env.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=SafeDict(), namespace=SafeNamespace
    )
    del env.globals["lipsum"]
    return env


def compiled(source: str) -> Template:
    """Compile a template. Raises an exception of any kind when it is malformed."""
    if len(source) > _LONGEST_TEMPLATE:
        raise TooMuch(f"it is longer than {_LONGEST_TEMPLATE:,} characters")
    return environment().from_string(source)


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """Render a template. Raises ``TooMuch`` when it takes too much work or memory, and what else the template raises.

    The bounds are counts, which grow with the size of ``variables``.
    """
    token = current.set(Budget(len(json.dumps(variables))))
    try:
        return "".join(template.generate(variables))
    finally:
        current.reset(token)


def _count(size: int) -> bool:
    current.get().step(size)
    return True


def _kept(value: Any) -> Any:
    return current.get().kept(value)


@pass_context  # so that nothing is written while the template is compiled
def _written(_: Context, value: Any) -> Any:
    """Count a value that the template writes."""
    budget = current.get()
    budget.step(budget.size(value))
    return value


def _budgeted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter, with its arguments and its result counted."""
    skipped = hasattr(function, "jinja_pass_arg")  # the filter's first argument is jinja2's

    @wraps(function)
    def budgeted(*args: Any, **kwargs: Any) -> Any:
        budget = current.get()
        own, (value, *given) = args[:skipped], args[skipped:]
        if name in ("join", "sum"):
            value = _whole(value)
        budget.before_call(name, value, tuple(given), kwargs)
        return budget.kept(function(*own, value, *given, **kwargs))

    return budgeted


def _whole(value: Any) -> Any:
    """Return the items of an iterator as a list, each counted, and any other value unchanged."""
    if not isinstance(value, Iterator):
        return value
    items = []
    for item in value:
        current.get().step(sys.getsizeof(item))
        items.append(item)
    return items


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
    if len(format) > 100:
        raise TooMuch("it formats a date with more than 100 characters")
    return datetime.now().strftime(format)


def _check_name(name: Any) -> None:
    """Raise ``SecurityError`` when a template stores a name that begins with an underscore."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not store {name!r} on a namespace")
