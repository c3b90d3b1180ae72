"""The texts of the values that a JSON schema allows, as terms over bytes.

A value is written by a rule for each node (``values.Node``), so schemas may be recursive, and a part of a schema is
translated when a text comes to it.
"""

from __future__ import annotations

import string
from itertools import islice
from typing import Any

from dgemma_mlx.constrain.arrays import ArrayTexts
from dgemma_mlx.constrain.context import Context
from dgemma_mlx.constrain.document import Document
from dgemma_mlx.constrain.hints import warn
from dgemma_mlx.constrain.nested import NestedRules
from dgemma_mlx.constrain.normal import Normalizer
from dgemma_mlx.constrain.objects import ObjectTexts, with_demands_at_names
from dgemma_mlx.constrain.spelling import JsonSpelling
from dgemma_mlx.constrain.terms import Term
from dgemma_mlx.constrain.texts import Numbers, Strings
from dgemma_mlx.constrain.values import NOTHING, Algebra, Node, Object, Values
from dgemma_mlx.constrain.wellformed import check

_BEGINNINGS = frozenset(string.ascii_letters + string.digits)  # told apart where values must be different
MOST_EARLY = 200  # parts of a schema that are looked at before a text comes to them
_PROSE = frozenset({"$comment", "$ref", "$schema", "description", "format", "pattern", "title"})


class Writer:
    """The texts of one document's values.

    Attributes:
        context: What the texts are made of.
        start: The texts of the document.
    """

    def __init__(self, schema: Any, spelling: type[JsonSpelling] = JsonSpelling) -> None:
        """Write the values of a schema, which is given as parsed JSON, as ``spelling`` spells them."""
        patterns, formats, texts = strings_in(schema)
        strings, numbers = Strings(patterns | spelling.patterns, formats, set().union(*texts)), Numbers()
        algebra = Algebra(strings.terms, numbers.terms, numbers.number, strings.text)
        document = Document(schema)
        check(document)
        warn(document, stacklevel=4)
        self._normal = Normalizer(document, algebra, strings, numbers)
        spelled = spelling(strings, numbers)
        rules = NestedRules(spelled.terms)
        self.context = Context(
            strings, numbers, algebra, spelled, rules, self._normal.values, self._value, self._written, self._objects
        )
        self._look_through(document.start)
        self.start = self._value(document.start)

    def _value(self, node: Node) -> Term:
        if node == NOTHING:
            return self.context.spelling.terms.none
        return self.context.rules.rule(("value", node), lambda: self._written(self._normal.values(node)))

    def _look_through(self, start: Node) -> None:
        """Look at the parts of the schema, the outer ones first, so that their errors are raised now.

        Of a large schema, the parts after the first ``MOST_EARLY`` wait until a text comes to them.
        """
        known = {start}
        waiting = [start]
        for node in islice(waiting, MOST_EARLY):  # grows
            values = self._normal.values(node)
            parts = [part for shape in values.arrays for part in (*shape.prefix, shape.items)]
            parts += [part for shape in values.arrays for part, _, _ in shape.contains]
            parts += [part for shape in values.objects for _, part, _ in shape.properties]
            parts += [region.node for shape in values.objects for region in (*shape.regions, *shape.some)]
            new = dict.fromkeys(part for part in parts if part not in known)
            known.update(new)
            waiting += new

    def _written(self, values: Values) -> Term:
        spelling = self.context.spelling
        options = [spelling.literal("null")] if values.null else []
        options += [spelling.literal("true" if each else "false") for each in sorted(values.booleans)]
        options += [spelling.number(values.numbers), spelling.string(values.strings)]
        options += [ArrayTexts(self.context, shape).term for shape in values.arrays]
        options += [self._objects(shape) for shape in values.objects]
        return spelling.terms.either(options)

    def _objects(self, shape: Object, narrowed: tuple[str, Term] | None = None) -> Term:
        shapes = with_demands_at_names(shape, self.context.algebra) if shape.some else [shape]
        return self.context.spelling.terms.either(ObjectTexts(self.context, each, narrowed).term for each in shapes)


def strings_in(schema: Any) -> tuple[set[str], set[str], set[str]]:
    """Return the patterns, the formats and the texts that a schema names, which may be JSON of any form."""
    patterns: set[str] = set()
    formats: set[str] = set()
    texts: set[str] = set()
    waiting = [(schema, False)]
    while waiting:
        part, is_value = waiting.pop()  # is_value: whether it stands within an enum or a const
        if isinstance(part, str):
            texts.add(part)
        elif isinstance(part, list):
            waiting += [(each, is_value) for each in part]
        elif isinstance(part, dict):
            texts.update(part)
            if isinstance(part.get("patternProperties"), dict):
                patterns.update(part["patternProperties"])
            if part.get("uniqueItems") is True or _is_above_1(part.get("minProperties")):
                texts |= _BEGINNINGS
            for key, value in part.items():
                if key in ("pattern", "format") and isinstance(value, str):
                    (patterns if key == "pattern" else formats).add(value)
                if is_value or key not in _PROSE or not isinstance(value, str):
                    waiting.append((value, is_value or key in ("enum", "const")))
    return patterns, formats, texts


def _is_above_1(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 1
