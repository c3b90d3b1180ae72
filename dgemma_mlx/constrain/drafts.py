"""The drafts of JSON Schema, 4 to 2020-12: which keywords each has, and all of them in the spelling of 2020-12.

A schema that declares no draft is read as 2020-12. Spellings of older drafts are understood wherever they cannot mean
anything else in the draft that a schema declares, such as ``exclusiveMinimum: true`` and a list of ``items``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNDECLARED = 0
LATEST = 2020
_NAMES = {"draft-04": 4, "draft-05": 4, "draft-06": 6, "draft-07": 7, "2019-09": 2019, "2020-12": 2020}
TITLES = {4: "draft 4", 6: "draft 6", 7: "draft 7", 2019: "draft 2019-09", 2020: "draft 2020-12"}

# Keywords that allow or refuse values, and the draft in which each is new.
SINCE = {
    **dict.fromkeys(
        ("$ref", "additionalItems", "additionalProperties", "allOf", "anyOf", "dependencies", "enum",
         "exclusiveMaximum", "exclusiveMinimum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum",
         "minItems", "minLength", "minProperties", "minimum", "multipleOf", "not", "oneOf", "pattern",
         "patternProperties", "properties", "required", "type", "uniqueItems"), 4
    ),
    **dict.fromkeys(("const", "contains", "propertyNames"), 6),
    **dict.fromkeys(("if", "then", "else"), 7),
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "maxContains", "minContains", "unevaluatedItems",
                     "unevaluatedProperties", "$recursiveRef"), 2019),
    **dict.fromkeys(("$dynamicRef", "prefixItems"), 2020),
}  # fmt: skip
# Keywords that neither allow nor refuse values.
ANNOTATIONS = frozenset(
    ("$anchor", "$comment", "$defs", "$dynamicAnchor", "$id", "$recursiveAnchor", "$schema", "$vocabulary",
     "contentEncoding", "contentMediaType", "contentSchema", "default", "definitions", "deprecated", "description",
     "discriminator", "example", "examples", "id", "nullable", "readOnly", "title", "writeOnly")
)  # fmt: skip
_BOUNDS = (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum"))


def declared(uri: Any) -> int | None:
    """Return the draft that a value of ``$schema`` names.

    It is ``UNDECLARED`` for a URI of something else, and None for a draft that is not supported.
    """
    if not isinstance(uri, str) or "json-schema.org/" not in uri:
        return UNDECLARED
    known = next((draft for name, draft in _NAMES.items() if name in uri), None)
    return UNDECLARED if known is None and "draft" not in uri else known


def ignores_siblings(schema: Mapping[str, Any], draft: int) -> bool:
    """Return whether the keywords next to a ``$ref`` are ignored, as drafts before 2019-09 say."""
    return draft in (4, 6, 7) and isinstance(schema.get("$ref"), str)


def identifier(schema: Mapping[str, Any], draft: int) -> str | None:
    """Return what a schema calls itself: its ``$id``, or the ``id`` of draft 4."""
    names = {4: ("id",), UNDECLARED: ("$id", "id")}.get(draft, ("$id",))
    found = next((schema[name] for name in names if isinstance(schema.get(name), str)), None)
    return None if ignores_siblings(schema, draft) else found


def current(schema: Mapping[str, Any], draft: int) -> dict[str, Any]:
    """Return the keywords that allow or refuse values, in the spelling of 2020-12.

    Two old keywords remain where the draft is not one that has them: ``dependencies``, and the ``nullable`` of OpenAPI.
    Both are not in 2020-12, but people use them there. They narrow what a schema allows, and a negation ignores them.
    """
    if ignores_siblings(schema, draft):
        return {"$ref": schema["$ref"]}
    newest = draft or LATEST
    found = {name: value for name, value in schema.items() if SINCE.get(name, LATEST + 1) <= newest}
    if draft == UNDECLARED and schema.get("nullable") is True:
        found["nullable"] = True
    more = found.pop("additionalItems", True)
    if isinstance(found.get("items"), list):
        found["prefixItems"] = found.pop("items")
        if more is not True:
            found["items"] = more
    for exclusive, inclusive in _BOUNDS:
        if isinstance(found.get(exclusive), bool):
            strict = found.pop(exclusive)
            if strict and inclusive in found:
                found[exclusive] = found.pop(inclusive)
    if draft in (4, 6, 7) and isinstance(found.get("dependencies"), dict):
        needs = found.pop("dependencies")
        found["dependentRequired"] = {name: value for name, value in needs.items() if isinstance(value, list)}
        found["dependentSchemas"] = {name: value for name, value in needs.items() if not isinstance(value, list)}
    return found
