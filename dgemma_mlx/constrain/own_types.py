"""JSON schemas of Python types: pydantic models, dataclasses, TypedDicts, other type hints, and function signatures.

pydantic makes all of them, and is imported only here: a program that has a pydantic model has imported it already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_origin

from dgemma_mlx.checks import reason, shown
from dgemma_mlx.errors import DgemmaError

# Where schemas stand in those that pydantic makes.
_MAPS = ("properties", "patternProperties", "$defs")
_SCHEMAS = ("items", "prefixItems", "anyOf", "oneOf", "allOf", "additionalProperties")


def is_own_type(value: Any) -> bool:
    """Return whether a value is a type, a type hint, a function or a pydantic ``TypeAdapter``, and no JSON schema."""
    if isinstance(value, (Mapping, str, bool)) or value is None:
        return False
    return callable(value) or get_origin(value) is not None or hasattr(value, "json_schema")


def schema_of(value: Any) -> dict[str, Any]:
    """Return the JSON schema of what is validated as the type, or of the arguments with which a function is called.

    A pydantic model describes itself; of everything else pydantic's ``TypeAdapter`` makes the schema. Objects have the
    properties of their types and no others, unless the type allows others (pydantic's ``extra="allow"``). Raises
    ``DgemmaError`` (exit code 2) without pydantic, and for a type that has no JSON schema.
    """
    try:
        from pydantic import TypeAdapter
    except ImportError:
        raise DgemmaError(
            f"the schema of {_named(value)} needs pydantic", "Run pip install pydantic, or give a JSON schema.", 2
        ) from None
    try:
        if hasattr(value, "model_json_schema"):
            schema: dict[str, Any] = value.model_json_schema()
        else:
            schema = (value if isinstance(value, TypeAdapter) else TypeAdapter(value)).json_schema()
    except Exception as error:  # whatever the type's own code raises; a hint in quotes may name what is not defined
        raise DgemmaError(
            f"{_named(value)} has no JSON schema: {reason(error)}", "Use types that JSON can hold.", exit_code=2
        ) from None
    closed: dict[str, Any] = _closed(schema)
    return closed


def _closed(schema: Any) -> Any:
    """Return a schema whose objects with ``properties`` have no others where it says nothing of them."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for keyword, value in schema.items():
        if keyword in _MAPS:
            found[keyword] = {name: _closed(part) for name, part in value.items()}
        else:
            found[keyword] = _closed(value) if keyword in _SCHEMAS else value
    return {"additionalProperties": False, **found} if "properties" in found else found


def _named(value: Any) -> str:
    return str(getattr(value, "__name__", None) or shown(value))
