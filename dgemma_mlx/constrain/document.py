"""The schemas of one JSON schema document: where they stand, their draft, and what their references name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import unquote, urldefrag, urljoin

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain import drafts
from dgemma_mlx.constrain.limits import check_time
from dgemma_mlx.constrain.values import ANYTHING, NOTHING, Node, complement
from dgemma_mlx.errors import DgemmaError

_SCHEMAS = frozenset(
    ("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
     "unevaluatedItems", "unevaluatedProperties")
)  # fmt: skip
_LISTS = frozenset(("allOf", "anyOf", "items", "oneOf", "prefixItems"))
_MAPS = frozenset(("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties"))
_RECURSIVE = "$recursiveAnchor"  # stands for its name among the dynamic anchors
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")

Scope = tuple[tuple[str, int], ...]  # for each dynamic anchor, the identity of the schema that it names


def reject(path: str, problem: str, hint: str = "docs/constrained.md lists what is supported.") -> NoReturn:
    """Raise ``DgemmaError`` (exit code 2) about the schema at a path."""
    raise DgemmaError(f"the JSON schema at {short(path)}: {problem}", hint, exit_code=2)


def short(path: str) -> str:
    """Return a path as messages show it: of a long one, both ends."""
    return path if len(path) <= 100 else f"{path[:50]}…{path[-49:]}"


def escaped(step: object) -> str:
    """Return a step of a JSON pointer, as it is written (RFC 6901)."""
    return str(step).replace("~", "~0").replace("/", "~1")


@dataclass(frozen=True, eq=False)
class Place:
    """A schema of the document, as it is reached.

    Attributes:
        keywords: Its keywords that allow or refuse values, in the spelling of 2020-12.
        path: Its path, ``#`` for the document itself.
        base: The URI that its references are relative to.
        draft: Its draft, ``drafts.UNDECLARED`` when none is declared.
        scope: What the dynamic anchors name here.
    """

    keywords: Mapping[str, Any]
    path: str
    base: str
    draft: int
    scope: Scope


@dataclass(frozen=True)
class _Known:
    """A schema that stands in the document, and what holds wherever it is reached from: see ``Place``."""

    schema: dict[str, Any]
    path: str
    base: str
    draft: int


class Document:
    """The schemas of one document, by number.

    Attributes:
        places: The schemas that have been reached.
        start: The node of the document itself.
        judges: Whether ``unevaluatedProperties`` or ``unevaluatedItems`` occurs, so that shapes must record what other
            keywords have judged.
    """

    def __init__(self, root: Any) -> None:
        self.places: list[Place] = []
        self._numbers: dict[tuple[int, Scope], int] = {}
        self._ends: dict[int, Node] = {}  # where references lead that have no other keywords next to them
        self._known: dict[int, _Known] = {}
        self._resources: dict[str, Any] = {"": root}
        self._anchors: dict[tuple[str, str], dict[str, Any]] = {}
        self._dynamic: dict[str, dict[str, int]] = {}  # base -> anchor -> identity of its schema
        self._root = root
        self.judges = False
        self._index(root, "#", "", drafts.UNDECLARED)
        self.start = self.node(None, root)

    def schemas(self) -> Iterator[tuple[Mapping[str, Any], str, int]]:
        """Yield each schema object as it is written, with its path and its draft."""
        for known in self._known.values():
            yield known.schema, known.path, known.draft

    # --- where schemas stand

    def _index(self, schema: Any, path: str, base: str, draft: int) -> None:
        """Find the schemas within a schema, with their identifiers and anchors."""
        waiting = [(schema, path, base, draft)]
        while waiting:
            check_time()
            schema, path, base, draft = waiting.pop()
            if not isinstance(schema, dict) or id(schema) in self._known:
                continue
            if "$schema" in schema and (path == "#" or "$id" in schema or "id" in schema):
                found = drafts.declared(schema["$schema"])
                if found is None:
                    problem = f"the draft {shown(schema['$schema'])} is not supported"
                    reject(path, problem, "Drafts 4, 6, 7, 2019-09 and 2020-12 are.")
                draft = found
            base = self._name(schema, path, base, draft)
            self._known[id(schema)] = _Known(schema, path, base, draft)
            self.judges |= "unevaluatedProperties" in schema or "unevaluatedItems" in schema
            waiting += [(part, f"{path}/{steps}", base, draft) for part, steps in _within(schema)]

    def _name(self, schema: dict[str, Any], path: str, base: str, draft: int) -> str:
        """Record the identifier and the anchors of a schema. Return the base URI within it."""
        name = drafts.identifier(schema, draft)
        if name is not None and name.startswith("#"):
            self._anchors[base, name[1:]] = schema
        elif name is not None:
            base = urldefrag(_joined(base, name, path))[0]
            self._resources.setdefault(base, schema)
        if path == "#":
            self._resources[base] = schema
        if drafts.ignores_siblings(schema, draft):
            return base
        for key in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(key), str):
                self._anchors[base, schema[key]] = schema
        if isinstance(schema.get("$dynamicAnchor"), str):
            self._dynamic.setdefault(base, {})[schema["$dynamicAnchor"]] = id(schema)
        if schema.get(_RECURSIVE) is True:
            self._dynamic.setdefault(base, {})[_RECURSIVE] = id(schema)
        return base

    # --- nodes

    def node(self, near: Place | None, schema: Any, *steps: object, negated: bool = False) -> Node:
        """Return the node of a schema, or of its negation.

        ``near`` is the place that it is reached from, and ``steps`` lead from there to it. Raises ``DgemmaError``
        (exit code 2) for what is not a schema, and for a reference that leads nowhere or only to itself.
        """
        scope: Scope = () if near is None else near.scope
        followed: dict[int, None] = {}  # numbers of the references on the way
        while isinstance(schema, dict):
            number = self._number(schema, scope, near, steps)
            near = self.places[number]
            if number in followed:
                reject(near.path, "the reference leads to itself")
            if number in self._ends or len(near.keywords) != 1 or "$ref" not in near.keywords:
                found = self._ends.get(number, frozenset({2 * number}) if near.keywords else ANYTHING)
                break
            followed[number] = None
            scope, steps, schema = near.scope, ("$ref",), self.target(near, "$ref")
        else:
            if not isinstance(schema, bool):
                reject(_path(near, steps), f"a schema must be an object, true or false, not {shown(schema)}")
            found = ANYTHING if schema else NOTHING
        self._ends.update(dict.fromkeys(followed, found))
        return complement(found) if negated else found

    def _number(self, schema: dict[str, Any], scope: Scope, near: Place | None, steps: tuple[object, ...]) -> int:
        """Return the number of the place of a schema, which is entered with a scope."""
        known = self._known.get(id(schema))
        if known is None:  # it is made from a constant
            base = "" if near is None else near.base
            known = self._known[id(schema)] = _Known(schema, _path(near, steps), base, drafts.UNDECLARED)
        scope = self._entered(scope, known.base)
        number = self._numbers.setdefault((id(schema), scope), len(self.places))
        if number == len(self.places):
            keywords = drafts.current(schema, known.draft)
            self.places.append(Place(keywords, known.path, known.base, known.draft, scope))
        return number

    def _entered(self, scope: Scope, base: str) -> Scope:
        """Return what the dynamic anchors name after a schema with this base is entered: the outermost ones stay."""
        if base not in self._dynamic:
            return scope
        return tuple(sorted({**self._dynamic[base], **dict(scope)}.items()))

    # --- references

    def target(self, place: Place, keyword: str) -> Any:
        """Return the schema that a keyword of ``REFERENCES`` names.

        Raises ``DgemmaError`` (exit code 2) when it is not within the document.
        """
        reference = place.keywords[keyword]
        path = f"{place.path}/{keyword}"
        if not isinstance(reference, str):
            reject(path, f"a reference must be text, not {shown(reference)}")
        whole = place.base + reference if reference.startswith("#") else _joined(place.base, reference, path)
        base, _, fragment = whole.partition("#")
        if base not in self._resources:
            problem = f"{shown(reference)} is not within the schema"
            reject(path, problem, "References to other documents are not followed.")
        found = self._fragment(base, unquote(fragment))
        if found is None:
            reject(path, f"{shown(reference)} does not exist", "Check the names of the reference.")
        (schema,) = found
        name = {"$dynamicRef": fragment, "$recursiveRef": _RECURSIVE}.get(keyword, "")
        anchored = isinstance(schema, dict) and name and self._dynamic.get(base, {}).get(name) == id(schema)
        return self._known[dict(place.scope).get(name, id(schema))].schema if anchored else schema

    def _fragment(self, base: str, fragment: str) -> tuple[Any] | None:
        """Return the schema that a fragment names within a resource; None when there is none."""
        if not fragment:
            return (self._resources[base],)
        if not fragment.startswith("/"):
            found = self._anchors.get((base, fragment))
            return None if found is None else (found,)
        # People also write paths from the document's root below a schema with an identifier.
        for resource in (self._resources[base], self._root):
            at = self._pointer(resource, fragment)
            if at is not None:
                return at
        return None

    def _pointer(self, target: Any, pointer: str) -> tuple[Any] | None:
        """Return what a JSON pointer names; None when it does not exist."""
        near = self._known.get(id(target))
        path = (near.path if near else "#") + pointer
        for written in pointer.split("/")[1:]:
            step = written.replace("~1", "/").replace("~0", "~")
            number = int(step) if isinstance(target, list) and step.isdecimal() and len(step) < 10 else -1
            if isinstance(target, dict) and step in target:
                target = target[step]
            elif isinstance(target, list) and 0 <= number < len(target):
                target = target[number]
            else:
                return None
            near = self._known.get(id(target), near)
        if near is not None:
            self._index(target, path, near.base, near.draft)
        return (target,)


def _within(schema: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yield the schemas directly within a schema, with the steps that lead to them."""
    for key, part in schema.items():
        if key in _MAPS and isinstance(part, dict):
            yield from ((each, f"{key}/{escaped(name)}") for name, each in part.items())
        elif key in _LISTS and isinstance(part, list):
            yield from ((each, f"{key}/{n}") for n, each in enumerate(part))
        elif key in _SCHEMAS:
            yield part, key


def _path(near: Place | None, steps: tuple[object, ...]) -> str:
    """Return the path of the schema that steps lead to from a place."""
    return "/".join(["#" if near is None else near.path, *map(escaped, steps)])


def _joined(base: str, reference: str, path: str) -> str:
    """Return a reference relative to a base URI."""
    try:
        return urljoin(base, reference)
    except ValueError:
        reject(path, f"{shown(reference)} is not a URI")
