"""Normal forms of JSON schemas, drafts 4 to 2020-12: which values a schema allows, as ``values.Values``.

What a schema says of one value is combined here: ``allOf``, ``anyOf``, ``oneOf``, ``not``, ``if``, references and
everything beside them. What it says of items and properties stays a node until it is asked for. A set may be smaller
than what the schema allows, never larger; a negation is therefore never taken of a set, but of each keyword.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import reduce
from typing import Any, NoReturn
from urllib.parse import unquote, urldefrag, urljoin

from dgemma_mlx.checks import shown
from dgemma_mlx.constrain import values as v
from dgemma_mlx.constrain.values import ANYTHING, NOTHING, Algebra, Array, Node, Object, Region, Values
from dgemma_mlx.constrain.terms import UNBOUNDED, Term
from dgemma_mlx.errors import DgemmaError

TYPES = ("null", "boolean", "number", "integer", "string", "array", "object")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_SCHEMAS = ("additionalProperties", "unevaluatedProperties", "propertyNames", "items", "additionalItems", "unevaluatedItems",
            "contains", "not", "if", "then", "else")


class Document:
    """The schemas of one document, by number."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.schemas: list[Any] = []
        self.paths: list[str] = []
        self._base: list[str] = []
        self._numbers: dict[int, int] = {}
        self._anchors: dict[str, Any] = {"": root}
        self._bases: dict[int, str] = {}
        self._index(root, "", set())

    def _index(self, schema: Any, base: str, seen: set[int]) -> None:
        """Collect the identifiers and anchors of all subschemas."""
        waiting = [(schema, base)]
        while waiting:
            schema, base = waiting.pop()
            if isinstance(schema, list):
                waiting += [(part, base) for part in schema]
            if not isinstance(schema, dict) or id(schema) in seen:
                continue
            seen.add(id(schema))
            for key in ("$id", "id"):
                name = schema.get(key)
                if isinstance(name, str):
                    if name.startswith("#"):
                        self._anchors[base + name] = schema
                    else:
                        base = urldefrag(urljoin(base, name))[0]
                        self._anchors[base] = schema
            for key in ("$anchor", "$dynamicAnchor"):
                if isinstance(schema.get(key), str):
                    self._anchors[f"{base}#{schema[key]}"] = schema
            self._bases[id(schema)] = base
            for key, part in schema.items():
                if key not in ("enum", "const", "default", "examples", "example"):
                    waiting.append((part, base))

    def node(self, schema: Any, path: str, *, negated: bool = False) -> Node:
        """Return a node for one schema."""
        if schema is True or schema == {}:
            return NOTHING if negated else ANYTHING
        if schema is False:
            return ANYTHING if negated else NOTHING
        key = id(schema)
        if key not in self._numbers:
            self._numbers[key] = len(self.schemas)
            self.schemas.append(schema)
            self.paths.append(path)
        return frozenset({2 * self._numbers[key] + negated})

    def resolve(self, reference: Any, schema: Any, path: str) -> Any:
        """Return what a reference names."""
        if not isinstance(reference, str):
            reject(path, "a reference must be text")
        base = self._bases.get(id(schema), "")
        whole = urljoin(base, reference) if not reference.startswith("#") else base + reference
        place, _, fragment = whole.partition("#")
        if whole in self._anchors:
            return self._anchors[whole]
        if place in self._anchors:
            if not fragment:
                return self._anchors[place]
            if fragment.startswith("/"):
                return self._pointer(self._anchors[place], fragment, path)
        if place == base or not base:
            if reference.startswith("#/"):
                return self._pointer(self.root, unquote(reference[1:]), path)
        reject(path, f"{shown(reference)} is not within the schema", "Remote references are not followed.")

    def _pointer(self, target: Any, pointer: str, path: str) -> Any:
        for step in pointer.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and step in target:
                target = target[step]
            elif isinstance(target, list) and step.isascii() and step.isdigit() and len(step) < 9 and int(step) < len(target):
                target = target[int(step)]
            else:
                reject(path, f"{shown(pointer)} does not exist")
        return target


def reject(path: str, problem: str, hint: str = "docs/constrained.md lists what is supported.") -> NoReturn:
    raise DgemmaError(f"the JSON schema at {path[:100]}: {problem}", hint, exit_code=2)


class Normalizer:
    """What the schemas of a document allow."""

    def __init__(self, document: Document, algebra: Algebra, strings: Any, numbers: Any) -> None:
        """``strings`` makes terms of patterns, formats and texts, ``numbers`` of bounds."""
        self._document, self._algebra, self._strings, self._numbers = document, algebra, strings, numbers
        self._known: dict[int, Values] = {}
        self._nodes: dict[Node, Values] = {}
        self._open: list[int] = []

    def values(self, node: Node) -> Values:
        """Return what a node allows."""
        if node not in self._nodes:
            parts = [self._literal(literal) for literal in sorted(node)]
            self._nodes[node] = reduce(self._algebra.both, parts, self._algebra.all)
        return self._nodes[node]

    def _literal(self, literal: int) -> Values:
        if literal < 0:
            return self._algebra.none
        if literal not in self._known:
            schema, path = self._document.schemas[literal // 2], self._document.paths[literal // 2]
            if literal in self._open:
                reject(path, "the schema refers to itself, without an array or object between")
            self._open.append(literal)
            if not isinstance(schema, Mapping):
                reject(path, f"a schema must be an object, true or false, not {shown(schema)}")
            make = self._negated if literal % 2 else self._positive
            self._known[literal] = make(schema, path)
            self._open.pop()
        return self._known[literal]

    # --- what a schema says

    def _positive(self, schema: Mapping[str, Any], path: str) -> Values:
        a = self._algebra
        parts = list(self._own(schema, path))
        for name in ("allOf", "anyOf", "oneOf"):
            if name in schema:
                parts.append(getattr(self, f"_{name}")(self._list(schema, name, path), f"{path}/{name}"))
        if "not" in schema:
            parts.append(self.values(self._document.node(schema["not"], f"{path}/not", negated=True)))
        if "if" in schema:
            parts.append(self._if(schema, path))
        for name in ("$ref", "$dynamicRef", "$recursiveRef"):
            if name in schema:
                parts.append(self.values(self._document.node(self._document.resolve(schema[name], schema, path), f"{path}/{name}")))
        parts += self._dependencies(schema, path)
        found = reduce(a.both, parts, a.all)
        if "unevaluatedProperties" in schema:
            found = self._unevaluated_properties(found, schema["unevaluatedProperties"], path)
        if "unevaluatedItems" in schema:
            node = self._document.node(schema["unevaluatedItems"], f"{path}/unevaluatedItems")
            found = v.replace(found, arrays=tuple(self._unevaluated_items(each, node) for each in found.arrays))
        return found

    def _own(self, schema: Mapping[str, Any], path: str) -> Iterator[Values]:
        """Yield what the keywords for one type say."""
        a = self._algebra
        if "type" in schema:
            yield self._types(schema["type"], path, nullable=schema.get("nullable") is True)
        for name in ("enum", "const"):
            if name in schema:
                listed = schema[name] if name == "enum" else [schema[name]]
                if not isinstance(listed, list):
                    reject(f"{path}/enum", "enum must be a list of values")
                yield a.either([a.none, a.none, *(self._constant(value, f"{path}/{name}") for value in listed)])
        if any(name in schema for name in ("minLength", "maxLength", "pattern", "format")):
            term = self._strings.everything
            least, most = self._count(schema, "minLength", path), self._count(schema, "maxLength", path)
            if least is not None or most is not None:
                term = self._strings.lengths(least or 0, UNBOUNDED if most is None else most)
            if "pattern" in schema:
                term = a.strings.every([term, self._strings.pattern(schema["pattern"], f"{path}/pattern")])
            if "format" in schema:
                term = a.strings.every([term, self._strings.format(schema["format"])])
            yield v.replace(a.all, strings=term)
        if any(name in schema for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")):
            yield v.replace(a.all, numbers=self._numbers.within(self._bounds(schema, path), path))
        if any(name in schema for name in ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "contains", "uniqueItems")):
            yield v.replace(a.all, arrays=(self._array(schema, path),))
        if any(name in schema for name in ("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties", "propertyNames")):
            yield v.replace(a.all, objects=tuple([self._object(schema, path)]))

    def _types(self, named: Any, path: str, nullable: bool = False) -> Values:
        types = named if isinstance(named, list) else [named]
        for kind in types:
            if kind not in TYPES:
                reject(f"{path}/type", f"{shown(kind)} is not a type", f"The types are {', '.join(TYPES)}.")
        a = self._algebra
        numbers = a.all.numbers if "number" in types else self._numbers.whole if "integer" in types else a.numbers.none
        return Values(
            "null" in types or nullable, frozenset({True, False} if "boolean" in types else ()), numbers,
            a.strings.everything if "string" in types else a.strings.none,
            a.all.arrays if "array" in types else (), a.all.objects if "object" in types else (),
        )

    def _constant(self, value: Any, path: str) -> Values:
        a = self._algebra
        if value is None:
            return v.replace(a.none, null=True)
        if isinstance(value, bool):
            return v.replace(a.none, booleans=frozenset({value}))
        if isinstance(value, (int, float)):
            return v.replace(a.none, numbers=self._numbers.equal(value, path))
        if isinstance(value, str):
            return v.replace(a.none, strings=self._strings.text(value))
        if isinstance(value, list):
            items = tuple(self._const_node(item, path) for item in value)
            return v.replace(a.none, arrays=(Array(items, NOTHING, len(items), len(items)),))
        properties = tuple((name, self._const_node(item, path), True) for name, item in value.items())
        shape = Object(properties, (Region(a.strings.everything, NOTHING, True),), frozenset(value))
        return v.replace(a.none, objects=(shape,))

    def _const_node(self, value: Any, path: str) -> Node:
        key = json.dumps(value, sort_keys=True)
        made = self.__dict__.setdefault("_constants", {})
        if key not in made:
            made[key] = {"const": value}
        return self._document.node(made[key], path)

    def _array(self, schema: Mapping[str, Any], path: str) -> Array:
        node = self._document.node
        items, prefix = schema.get("items", True), schema.get("prefixItems", [])
        if isinstance(items, list):  # before 2020-12
            prefix, items = items, schema.get("additionalItems", True)
        nodes = tuple(node(part, f"{path}/prefixItems/{n}") for n, part in enumerate(prefix))
        judged = UNBOUNDED if any(name in schema for name in ("additionalItems",)) or ("items" in schema and not isinstance(schema["items"], list)) else len(nodes)
        contains = ()
        if "contains" in schema:
            least = self._count(schema, "minContains", path)
            most = self._count(schema, "maxContains", path)
            contains = ((node(schema["contains"], f"{path}/contains"), 1 if least is None else least, UNBOUNDED if most is None else most),)
        most = self._count(schema, "maxItems", path)
        return Array(nodes, node(items, f"{path}/items"), self._count(schema, "minItems", path) or 0,
                     UNBOUNDED if most is None else most, contains, schema.get("uniqueItems") is True, judged)

    def _object(self, schema: Mapping[str, Any], path: str) -> Object:
        a, node = self._algebra, self._document.node
        properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for name, value in (("properties", properties), ("patternProperties", patterns)):
            if not isinstance(value, Mapping):
                reject(f"{path}/{name}", f"{name} must be an object")
        required = schema.get("required", [])
        if isinstance(required, bool):
            required = []  # draft 3
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            reject(f"{path}/required", "required must be a list of names")
        regions = [(a.strings.everything, ANYTHING, False)]
        for pattern, part in patterns.items():
            term, exact = self._strings.searched(pattern, f"{path}/patternProperties")
            inner, split = node(part, f"{path}/patternProperties/{pattern}"), []
            for names, known, judged in regions:
                inside = a.names_in_both(names, term)
                outside = a.names_in_both(names, a.strings.other(exact))
                split += [(inside, known | inner, True)] if inside is not a.strings.none else []
                split += [(outside, known, judged)] if outside is not a.strings.none else []
            regions = split
        extra = node(schema.get("additionalProperties", True), f"{path}/additionalProperties")
        has_extra = "additionalProperties" in schema
        divided = [Region(names, known if judged else extra, judged or has_extra) for names, known, judged in regions]
        named = []
        for name, part in properties.items():
            inner = node(part, f"{path}/properties/{name}")
            for region, (names, known, judged) in zip(divided, regions):
                if judged and a.contains(names, name):
                    inner |= known
            named.append((name, inner, True))
        shape = Object(tuple(named), tuple(divided), frozenset(required), self._count(schema, "minProperties", path) or 0,
                       UNBOUNDED if (most := self._count(schema, "maxProperties", path)) is None else most)
        if "propertyNames" in schema:
            names = self.values(node(schema["propertyNames"], f"{path}/propertyNames")).strings
            kept = tuple(Region(both, r.node, r.evaluated) for r in divided if (both := a.names_in_both(r.names, names)) is not a.strings.none)
            rest = a.names_in_both(a.strings.everything, a.strings.other(names))
            kept += (Region(rest, NOTHING, True),) if rest is not a.strings.none else ()
            shape = v.replace(shape, regions=kept, properties=tuple((name, inner if a.contains(names, name) else NOTHING, judged) for name, inner, judged in named))
        return shape

    def _count(self, schema: Mapping[str, Any], name: str, path: str) -> int | None:
        value = schema.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
            reject(f"{path}/{name}", f"{name} must be a whole number, 0 or more")
        return min(int(value), UNBOUNDED)

    def _bounds(self, schema: Mapping[str, Any], path: str) -> dict[str, Fraction]:
        found = {}
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
            value = schema.get(name)
            if name.startswith("exclusive") and isinstance(value, bool):  # draft 4
                inclusive = "minimum" if name == "exclusiveMinimum" else "maximum"
                if value and inclusive in schema:
                    found[name] = found.pop(inclusive)
                continue
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                reject(f"{path}/{name}", f"{name} must be a number")
            try:
                found[name] = Fraction(Decimal(str(value)))
            except (ValueError, OverflowError):
                reject(f"{path}/{name}", f"{name} must be a finite number")
        return found

    # --- applicators

    def _list(self, schema: Mapping[str, Any], name: str, path: str) -> list[Any]:
        found = schema[name]
        if not isinstance(found, list) or not found:
            reject(f"{path}/{name}", f"{name} must be a list of at least one schema")
        return found

    def _allOf(self, parts: list[Any], path: str) -> Values:
        return reduce(self._algebra.both, [self.values(self._document.node(part, f"{path}/{n}")) for n, part in enumerate(parts)])

    def _anyOf(self, parts: list[Any], path: str) -> Values:
        found = [self.values(self._document.node(part, f"{path}/{n}")) for n, part in enumerate(parts)]
        return self._algebra.either([*found, self._algebra.none])

    def _oneOf(self, parts: list[Any], path: str) -> Values:
        a, nodes = self._algebra, [self._document.node(part, f"{path}/{n}") for n, part in enumerate(parts)]
        branches = []
        for n, node in enumerate(nodes):
            found = self.values(node)
            for m, other in enumerate(nodes):
                if m != n and (other == node or self.may_overlap(node, other)):
                    found = a.both(found, self.values(self.negation(other)))
            branches.append(found)
        return a.either([*branches, a.none])

    def negation(self, node: Node) -> Node:
        if not node:
            return NOTHING
        if node == NOTHING:
            return ANYTHING
        (literal,) = node
        return frozenset({literal ^ 1})

    def may_overlap(self, one: Node, other: Node) -> bool:
        """Return False when no value belongs to both, True where that is not plain to see."""
        from dgemma_mlx.constrain.apart import Apart

        return not Apart(self._document).apart(one, other)

    def _if(self, schema: Mapping[str, Any], path: str) -> Values:
        node, a = self._document.node, self._algebra
        then = a.both(self.values(node(schema["if"], f"{path}/if")), self.values(node(schema.get("then", True), f"{path}/then")))
        other = a.both(self.values(node(schema["if"], f"{path}/if", negated=True)), self.values(node(schema.get("else", True), f"{path}/else")))
        return a.either([then, other])

    def _dependencies(self, schema: Mapping[str, Any], path: str) -> Iterator[Values]:
        a = self._algebra
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, needs in (schema.get(keyword) or {}).items():
                if isinstance(needs, str):
                    needs = [needs]
                if isinstance(needs, list):
                    shape = Object(regions=a.any_object.regions, required=frozenset([name, *needs]))
                    yes = v.replace(a.all, objects=(shape,))
                else:
                    here = self.values(self._document.node(needs, f"{path}/{keyword}/{name}"))
                    yes = a.both(here, v.replace(a.all, objects=(Object(regions=a.any_object.regions, required=frozenset([name])),)))
                    yes = v.replace(here, objects=yes.objects)
                no = Object(((name, NOTHING, False),), a.any_object.regions)
                yield a.either([yes, v.replace(a.all, objects=(no,))]) if not isinstance(needs, list) else v.replace(a.all, objects=tuple(dict.fromkeys([*yes.objects, no])))

    def _unevaluated_properties(self, found: Values, schema: Any, path: str) -> Values:
        node = self._document.node(schema, f"{path}/unevaluatedProperties")

        def judged(shape: Object) -> Object:
            properties = tuple((name, inner if known else inner | node, True) for name, inner, known in shape.properties)
            regions = tuple(Region(r.names, r.node if r.evaluated else r.node | node, True) for r in shape.regions)
            return v.replace(shape, properties=properties, regions=regions)

        shapes = tuple(shape for shape in map(judged, found.objects) if self._algebra._possible(shape))
        return v.replace(found, objects=shapes)

    @staticmethod
    def _unevaluated_items(shape: Array, node: Node) -> Array:
        if shape.evaluated >= UNBOUNDED:
            return shape
        prefix = tuple(inner if n < shape.evaluated else inner | node for n, inner in enumerate(shape.prefix))
        return v.replace(shape, prefix=prefix, items=shape.items | node, evaluated=UNBOUNDED)

    # --- what a schema excludes

    def _negated(self, schema: Mapping[str, Any], path: str) -> Values:
        """Return values that the schema does not allow: those that one keyword excludes. They need not be all of them."""
        a = self._algebra
        return a.either([a.none, a.none, *self._excluded(schema, path)])

    def _excluded(self, schema: Mapping[str, Any], path: str) -> Iterator[Values]:
        a, node = self._algebra, self._document.node
        if "type" in schema:
            yield self._other_types(schema["type"], path)
        for name in ("enum", "const"):
            if name in schema:
                yield self._other_constants(schema[name] if name == "enum" else [schema[name]], path)
        only = lambda **kinds: v.replace(a.none, **kinds)
        least, most = self._count(schema, "minLength", path), self._count(schema, "maxLength", path)
        if least:
            yield only(strings=self._strings.lengths(0, least - 1))
        if most is not None:
            yield only(strings=self._strings.lengths(most + 1, UNBOUNDED))
        if "pattern" in schema:
            yield only(strings=a.strings.other(self._strings.searched(schema["pattern"], f"{path}/pattern")[1]))
        for name, value in self._bounds(schema, path).items():
            opposite = {"minimum": "exclusiveMaximum", "maximum": "exclusiveMinimum", "exclusiveMinimum": "maximum", "exclusiveMaximum": "minimum"}
            if name in opposite:
                yield only(numbers=self._numbers.within({opposite[name]: value}, path))
            else:
                yield only(numbers=a.numbers.every([self._numbers.decimals, a.numbers.other(self._numbers.within({name: value}, path))]))
        shape = lambda **kinds: only(objects=(v.replace(a.any_object, **kinds),))
        for name, part in (schema.get("properties") or {}).items():
            inner = node(part, f"{path}/properties/{name}", negated=True)
            if inner != NOTHING:
                yield shape(properties=((name, inner, False),), required=frozenset({name}))
        required = schema.get("required")
        for name in required if isinstance(required, list) else []:
            yield shape(properties=((name, NOTHING, False),))
        if (least := self._count(schema, "minProperties", path)):
            yield shape(most=least - 1)
        if (most := self._count(schema, "maxProperties", path)) is not None:
            yield shape(least=most + 1)
        if "items" in schema and not isinstance(schema["items"], list) and not schema.get("prefixItems"):
            inner = node(schema["items"], f"{path}/items", negated=True)
            if inner != NOTHING:
                yield only(arrays=(Array(contains=((inner, 1, UNBOUNDED),)),))
        for n, part in enumerate(schema.get("prefixItems") or ()):
            inner = node(part, f"{path}/prefixItems/{n}", negated=True)
            yield only(arrays=(Array((ANYTHING,) * n + (inner,), least=n + 1),))
        if (least := self._count(schema, "minItems", path)):
            yield only(arrays=(Array(most=least - 1),))
        if (most := self._count(schema, "maxItems", path)) is not None:
            yield only(arrays=(Array(least=most + 1),))
        if "contains" in schema and "minContains" not in schema:
            yield only(arrays=(Array(items=node(schema["contains"], f"{path}/contains", negated=True)),))
        for name in ("anyOf", "oneOf"):
            if name in schema:
                nodes = [node(part, f"{path}/{name}/{n}", negated=True) for n, part in enumerate(self._list(schema, name, path))]
                yield self.values(frozenset().union(*nodes))
        for n, part in enumerate(schema.get("allOf") or ()):
            yield self.values(node(part, f"{path}/allOf/{n}", negated=True))
        if "not" in schema:
            yield self.values(node(schema["not"], f"{path}/not"))
        if "$ref" in schema:
            yield self.values(node(self._document.resolve(schema["$ref"], schema, path), f"{path}/$ref", negated=True))
        if "if" in schema:
            yield self.values(node(schema["if"], path) | node(schema.get("then", True), path, negated=True))
            yield self.values(node(schema["if"], path, negated=True) | node(schema.get("else", True), path, negated=True))

    def _other_types(self, named: Any, path: str) -> Values:
        a, types = self._algebra, named if isinstance(named, list) else [named]
        known = self._types(named, path)
        if "number" in types:
            numbers = a.numbers.none
        elif "integer" in types:
            numbers = a.numbers.every([self._numbers.decimals, a.numbers.other(self._numbers.integers)])
        else:
            numbers = a.all.numbers
        return Values(
            not known.null, frozenset({True, False}) - known.booleans, numbers,
            a.strings.none if "string" in types else a.strings.everything, () if known.arrays else a.all.arrays,
            () if known.objects else a.all.objects,
        )

    def _other_constants(self, listed: list[Any], path: str) -> Values:
        a = self._algebra
        known = a.either([a.none, a.none, *(self._constant(value, path) for value in listed)])
        numbers = a.numbers.every([self._numbers.decimals, a.numbers.other(known.numbers)]) if known.numbers is not a.numbers.none else a.all.numbers
        arrays: tuple[Array, ...] = a.all.arrays
        if known.arrays:
            lengths = {shape.least for shape in known.arrays}
            arrays = tuple(Array(least=n, most=n) for n in range(max(lengths) + 1) if n not in lengths) + (Array(least=max(lengths) + 1),)
        objects = a.all.objects
        if known.objects:
            sizes = {len(shape.required) for shape in known.objects}
            objects = tuple(v.replace(a.any_object, least=n, most=n) for n in range(max(sizes) + 1) if n not in sizes) + (v.replace(a.any_object, least=max(sizes) + 1),)
        return Values(not known.null, frozenset({True, False}) - known.booleans, numbers, a.strings.other(known.strings), arrays, objects)
