"""The parameters of a tool, as JSON Schema in the form that Gemma's chat template shows without losses.

The template reads ``type`` as one word, follows no reference, and knows no alternatives: a parameter without a type is
shown as ``type:""``, and a choice between two schemas not at all. Other templates show the schema as JSON, so nothing
is taken out of it.
"""

from __future__ import annotations

import json
from typing import Any

from dgemma_mlx.checks import shown
from dgemma_mlx.errors import DgemmaError

_MOST_SCHEMAS = 10_000  # of one tool, with all references expanded
_SHOWN = {"description", "type", "properties", "required", "nullable"}  # all that the template shows of an object
_DATA = ("enum", "const", "default", "examples")  # keywords whose values are no schemas
_HIDDEN = ("$defs", "definitions", *_DATA)  # keywords of items that are resolved, or kept as they are
_OTHER_NAMES = {"additionalProperties", "unevaluatedProperties", "patternProperties"}
_COMBINED = {"$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas"}
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_HINT = "Parameters are JSON Schema, as OpenAI's and Anthropic's tools have it."


def object_schema(schema: Any, place: str) -> dict[str, Any]:
    """Return an object schema, plain JSON, in the form that chat templates show. One in this form stays the same.

    References and ``allOf`` are resolved. Of ``anyOf`` and of a list of types, null becomes ``nullable``; what is left
    becomes one type such as "string or integer". Missing types are inferred, else they are "any". What the template
    loses, such as an enum of numbers, is added to the description.

    Raises ``DgemmaError`` (exit code 2), which begins with ``place``, when it is not an object schema.
    """
    if not isinstance(schema, dict):
        raise _wrong(place, f"parameters must be an object, not {shown(schema)}")
    return _Schemas(schema, place).parameters() if schema else {}


def closed_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema that a tool's arguments must validate against, given the tool's parameters, plain JSON.

    Names that the parameters do not declare are excluded, unless the parameters speak of other names themselves: a
    function takes no others. Types may be in capitals.
    """
    found: dict[str, Any] = {**_in_lower_case(schema), "type": "object"}
    required, properties = found.get("required"), found.get("properties", {})
    if not _OTHER_NAMES.isdisjoint(found) or not set(required or ()) <= set(properties or ()):
        return found
    keyword = "additionalProperties" if _COMBINED.isdisjoint(found) else "unevaluatedProperties"
    return {**found, keyword: False}


def _in_lower_case(schema: Any) -> Any:
    """Return a schema whose types are in lower case."""
    if isinstance(schema, list):
        return [_in_lower_case(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: part if key in _DATA else _in_lower_case(part) for key, part in schema.items()}
    if isinstance(kind := schema.get("type"), str):
        found["type"] = kind.lower()
    return found


class _Schemas:
    """The schemas within the parameters of one tool. References being followed are passed on, to notice a circle."""

    def __init__(self, root: dict[str, Any], place: str) -> None:
        self._root, self._place = root, place
        self._count = 0

    def parameters(self) -> dict[str, Any]:
        """Return the root in the form of ``object_schema``."""
        root, active = self._resolved(self._root, frozenset({"#"}))
        kind = root.get("type", "object")
        kind = "object" if kind in (["object"], ["object", "null"], ["null", "object"]) else kind
        if not isinstance(kind, str) or kind.lower() != "object":
            raise self._wrong(f"the type of its parameters is {shown(kind)}, not object")
        for name in ("anyOf", "oneOf", "additionalProperties", "patternProperties"):
            if isinstance(root.get(name), (dict, list)) and root[name]:
                raise self._wrong(f"its parameters have {name}, which the template cannot show")
        return self._object({**root, "type": kind}, active, [])

    def _parameter(self, value: Any, active: frozenset[str]) -> dict[str, Any]:
        """Return the schema of a parameter, with one type."""
        schema, active = self._resolved(value, active)
        notes: list[str] = []
        schema, active = self._with_one_type(schema, active, notes)
        kind = schema["type"].lower()
        if schema.get("enum") and kind != "string":
            notes.append(f"One of: {', '.join(map(_json, schema['enum']))}.")
        if kind == "array":
            schema = self._array(schema, active, notes)
        elif kind == "object":
            schema = self._object(schema, active, notes)
        description = schema.get("description", "")
        if not isinstance(description, str):
            raise self._wrong(f"a description is {shown(description)}")
        notes = [note for note in notes if note not in description]
        return {**schema, "description": " ".join(filter(None, [description, *notes]))} if notes else schema

    def _with_one_type(
        self, schema: dict[str, Any], active: frozenset[str], notes: list[str]
    ) -> tuple[dict[str, Any], frozenset[str]]:
        """Return the schema with a ``type`` that is one text."""
        for name in ("anyOf", "oneOf"):
            if name not in schema:
                continue
            if not isinstance(schema[name], list) or not schema[name]:
                raise self._wrong(f"{name} must be a list of schemas")
            options = [self._resolved(option, active) for option in schema[name]]
            some = [option for option in options if option[0].get("type") != "null"]
            rest = {key: value for key, value in schema.items() if key != name}
            if len(some) < len(options):
                rest["nullable"] = True
            if len(some) == 1:
                return self._with_one_type({**some[0][0], **rest}, some[0][1], notes)
            kinds = [self._with_one_type(option, inside, [])[0]["type"] for option, inside in some]
            schema = {**rest, name: schema[name], "type": rest.get("type", _either(kinds))}
            if any(option.keys() - {"type", "title"} for option, _ in some):
                notes.append(f"One of: {'; '.join(_json(self._expanded(option, inside)) for option, inside in some)}.")
        if "const" in schema:
            schema = {"enum": [schema["const"]], **schema}
        kind = schema.get("type", _inferred(schema))
        if isinstance(kind, list) and kind and all(isinstance(name, str) for name in kind):
            names = [name for name in kind if name.lower() != "null"] or ["null"]
            if 0 < len(names) < len(kind):
                schema = {**schema, "nullable": True}
                if "enum" in schema:
                    schema["enum"] = [value for value in schema["enum"] if value is not None]
            if len(names) > 1 and (parts := schema.keys() & {"items", "prefixItems", "properties"}):
                notes += [f"{part}: {_json(self._expanded(schema[part], active))}" for part in sorted(parts)]
            kind = _either(names)
        if not isinstance(kind, str):
            raise self._wrong(f"a type is {shown(kind)}")
        if not isinstance(schema.get("enum", []), list):
            raise self._wrong(f"an enum is {shown(schema['enum'])}")
        return (schema if schema.get("type") == kind else {**schema, "type": kind}), active

    def _object(self, schema: dict[str, Any], active: frozenset[str], notes: list[str]) -> dict[str, Any]:
        """Return the schema of an object, with the properties in the form that the template shows."""
        found = dict(schema)
        if "properties" in schema:
            found["properties"] = self._properties(schema["properties"], active)
        elif found.keys() - _SHOWN:
            found["properties"] = {}  # without it, the template takes the other keywords for properties
        for name, meaning in (("additionalProperties", "Each value"), ("patternProperties", "Values by key")):
            if isinstance(schema.get(name), dict) and schema[name]:
                notes.append(f"{meaning}: {_json(self._expanded(schema[name], active))}")
        self._check_required(schema)
        return found

    def _array(self, schema: dict[str, Any], active: frozenset[str], notes: list[str]) -> dict[str, Any]:
        """Return the schema of an array. Of its items, the template shows all keywords."""
        first = schema.get("prefixItems", schema.get("items"))
        if isinstance(first, list):
            notes.append(f"Items in this order: {_json(self._expanded(first, active))}")
        if not isinstance(schema.get("items"), dict) or not schema["items"]:
            return schema
        items, active = self._resolved(schema["items"], active)
        self._check_required(items)
        kind = items.get("type", _inferred(items))
        if not all(isinstance(name, str) for name in (kind if isinstance(kind, list) else [kind])):
            raise self._wrong(f"a type is {shown(kind)}")
        if kind != "any":
            items = {**items, "type": kind}
        found = {key: self._expanded(value, active) for key, value in items.items() if key not in _HIDDEN}
        found |= {key: items[key] for key in _DATA if key in items}
        if "properties" in items:
            found["properties"] = self._properties(items["properties"], active)
        return {**schema, "items": found}

    def _properties(self, properties: Any, active: frozenset[str]) -> dict[str, Any]:
        if not isinstance(properties, dict):
            raise self._wrong(f"properties must be an object, not {shown(properties)}")
        return {name: self._parameter(value, active) for name, value in properties.items()}

    def _check_required(self, schema: dict[str, Any]) -> None:
        names = schema.get("required", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._wrong(f"required must be a list of names, not {shown(names)}")

    def _resolved(self, value: Any, active: frozenset[str]) -> tuple[dict[str, Any], frozenset[str]]:
        """Return a schema without a reference and without ``allOf`` at its top, and the references now followed."""
        self._count += 1
        if self._count > _MOST_SCHEMAS:
            raise self._wrong(f"its parameters have more than {_MOST_SCHEMAS:,} schemas")
        schema = {} if value is True else value
        if not isinstance(schema, dict):
            raise self._wrong(f"a schema is {shown(schema)}")
        if "$ref" in schema:
            rest = {key: item for key, item in schema.items() if key != "$ref"}
            target = self._target(schema["$ref"])
            if schema["$ref"] in active:
                return {**_same_form(schema["$ref"], target), **rest}, active
            found, active = self._resolved(target, active | {schema["$ref"]})
            schema = {**found, **rest}
        if "allOf" in schema:
            parts = schema["allOf"]
            if not isinstance(parts, list):
                raise self._wrong("allOf must be a list of schemas")
            merged = {key: item for key, item in schema.items() if key != "allOf"}
            for part in parts:
                found, inside = self._resolved(part, active)
                active |= inside
                merged = _merged(merged, found)
            schema = merged
        return schema, active

    def _target(self, reference: Any) -> Any:
        """Return the schema that a reference within the parameters names."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise self._wrong(f"the reference {shown(reference)} leaves the parameters")
        target: Any = self._root
        for step in reference[1:].split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or key not in target:
                raise self._wrong(f"the reference {shown(reference)} leads nowhere")
            target = target[key]
        return target

    def _expanded(self, value: Any, active: frozenset[str]) -> Any:
        """Return a schema, or schemas in lists and objects, with all references resolved and nothing else changed."""
        if isinstance(value, list):
            return [self._expanded(item, active) for item in value]
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("$ref"), str):
            value, active = self._resolved(value, active)
        return {key: item if key in _DATA else self._expanded(item, active) for key, item in value.items()}

    def _wrong(self, problem: str) -> DgemmaError:
        return _wrong(self._place, problem)


def _inferred(schema: dict[str, Any]) -> str | list[str]:
    """Return the type that a schema without one must mean."""
    if "properties" in schema or "additionalProperties" in schema:
        return "object"
    if "items" in schema or "prefixItems" in schema:
        return "array"
    values = schema.get("enum")
    if isinstance(values, list) and values:
        kinds = list(dict.fromkeys(_TYPES.get(type(value), "null") for value in values))
        return kinds[0] if len(kinds) == 1 else kinds
    return "any"


def _either(kinds: list[str]) -> str:
    """Return several types as one text. Without any, nothing but null is left."""
    return " or ".join(dict.fromkeys(kinds)) or "null"


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of both schemas. What both have is the first one's, except that properties are joined."""
    found = {**second, **first}
    for name in first.keys() & second.keys() & {"properties", "required"}:
        one, other = first[name], second[name]
        if isinstance(one, dict) and isinstance(other, dict):
            found[name] = {**other, **one}
        elif isinstance(one, list) and isinstance(other, list):
            found[name] = [*one, *(item for item in other if item not in one)]
    return found


def _same_form(reference: str, target: Any) -> dict[str, Any]:
    """Return what is said of a schema within itself."""
    kind = target.get("type") if isinstance(target, dict) else None
    name = reference.rpartition("/")[2] if "/" in reference else "parameters"
    return {"type": kind if isinstance(kind, str) else "object", "description": f"The same form as {name}."}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _wrong(place: str, problem: str) -> DgemmaError:
    return DgemmaError(f"{place}: {problem}", _HINT, exit_code=2)
