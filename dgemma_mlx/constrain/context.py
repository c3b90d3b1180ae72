"""What the writers of arrays and objects share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dgemma_mlx.constrain.nested import NestedRules
from dgemma_mlx.constrain.spelling import JsonSpelling
from dgemma_mlx.constrain.terms import Term
from dgemma_mlx.constrain.texts import Numbers, Strings
from dgemma_mlx.constrain.values import Algebra, Node, Object, Values


@dataclass(frozen=True)
class Context:
    """What the texts of one document's arrays and objects are made of.

    Attributes:
        strings, numbers: The terms of strings and of numbers, over characters.
        algebra: Intersections of values.
        spelling: How values are spelled.
        rules: The rules of values, and of what follows an item or a property.
        values: What a node allows, in normal form.
        value: The texts of a node's values.
        written: The texts of values in normal form.
        objects: The texts of a shape of objects, of which one property is narrowed to some strings.
    """

    strings: Strings
    numbers: Numbers
    algebra: Algebra
    spelling: JsonSpelling
    rules: NestedRules
    values: Callable[[Node], Values]
    value: Callable[[Node], Term]
    written: Callable[[Values], Term]
    objects: Callable[[Object, tuple[str, Term] | None], Term]
