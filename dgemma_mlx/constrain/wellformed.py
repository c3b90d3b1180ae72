"""Whether the keywords of a JSON schema have values of the right form, wherever the schema leads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain.document import REFERENCES, Document, Place, escaped, reject
from dgemma_mlx.constrain.limits import check_time

TYPES = ("null", "boolean", "number", "integer", "string", "array", "object")
_Check = Callable[[Any], bool]


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_type(value: Any) -> bool:
    return value in TYPES if isinstance(value, str) else bool(value) and _is_names(value) and set(value) <= set(TYPES)


_COUNT: tuple[str, _Check] = (
    "a whole number of at least 0", lambda value: is_number(value) and value >= 0 and value % 1 == 0
)  # fmt: skip
_NUMBER: tuple[str, _Check] = ("a finite number", is_number)
_TEXT: tuple[str, _Check] = ("text", lambda value: isinstance(value, str))
_LIST: tuple[str, _Check] = ("a list of at least one schema", lambda value: isinstance(value, list) and bool(value))
_MAP: tuple[str, _Check] = ("an object", lambda value: isinstance(value, dict))
_FORMS: dict[str, tuple[str, _Check]] = {
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _COUNT),
    **dict.fromkeys(("minContains", "maxContains"), _COUNT),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBER),
    **dict.fromkeys(("pattern", "format", *REFERENCES), _TEXT),
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), _LIST),
    **dict.fromkeys(("properties", "patternProperties", "dependentSchemas", "dependencies"), _MAP),
    "multipleOf": ("a finite number above 0", lambda value: is_number(value) and value > 0),
    "uniqueItems": ("true or false", lambda value: isinstance(value, bool)),
    "type": (f"one or more of {', '.join(TYPES)}", _is_type),
    "enum": ("a list of values", lambda value: isinstance(value, list)),
    "prefixItems": ("a list of schemas", lambda value: isinstance(value, list)),
    # In draft 3, a boolean; ``hints`` says that it has no effect.
    "required": ("a list of names", lambda value: isinstance(value, bool) or _is_names(value)),
    "dependentRequired": (
        "an object of lists of names", lambda value: isinstance(value, dict) and all(map(_is_names, value.values()))
    ),
}  # fmt: skip
_SINGLE = (
    "items", "contains", "additionalProperties", "propertyNames", "not", "if", "then", "else", "unevaluatedItems",
    "unevaluatedProperties",
)  # fmt: skip


def check(document: Document) -> None:
    """Raise ``DgemmaError`` (exit code 2), with the path, where a keyword has a value of the wrong form.

    All schemas are checked that the document leads to, references included. A definition that nothing refers to may
    be anything.
    """
    for place in document.places:  # grows
        check_time()
        for name, value in place.keywords.items():
            form, is_right = _FORMS.get(name, ("", None))
            if is_right is not None and not is_right(value):
                reject(f"{place.path}/{name}", f"{name} must be {form}, not {shown(value)}")
        for part, *steps in _parts(place):
            document.node(place, part, *steps)
        for name in REFERENCES:
            if name in place.keywords:
                document.node(place, document.target(place, name), name)


def _parts(place: Place) -> Iterator[tuple[Any, ...]]:
    """Yield the schemas directly within a schema, each with the steps that lead to it."""
    words = place.keywords
    for name in ("prefixItems", "allOf", "anyOf", "oneOf"):
        yield from ((part, name, n) for n, part in enumerate(words.get(name, ())))
    for name in ("properties", "patternProperties", "dependentSchemas"):
        yield from ((part, name, key) for key, part in words.get(name, {}).items())
    for key, part in words.get("dependencies", {}).items():
        if not isinstance(part, list):
            yield part, "dependencies", key
        elif not _is_names(part):
            path = f"{place.path}/dependencies/{escaped(key)}"
            reject(path, f"dependencies must be a list of names or a schema, not {shown(part)}")
    yield from ((words[name], name) for name in _SINGLE if name in words)
