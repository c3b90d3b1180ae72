"""The recipes: tables of rules that say in which format each class of tensors is packed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dgemma_convert.formats import Format

EMBEDDINGS, ATTENTION, DENSE, ROUTER = "embeddings", "attention", "dense MLP", "router"
EXPERTS, SELF_CONDITIONING = "experts", "self-conditioning"
KEPT, VISION = "norms and scalars", "vision"
LINEAR = (EMBEDDINGS, ATTENTION, DENSE, ROUTER, EXPERTS, SELF_CONDITIONING)
CLASSES = (*LINEAR, KEPT, VISION)

_PATTERNS = (
    (EMBEDDINGS, re.compile(r"embed_tokens\.weight$")),
    (ATTENTION, re.compile(r"\.self_attn\.[qkvo]_proj\.")),
    (DENSE, re.compile(r"\.mlp\.\w+_proj\.")),
    (ROUTER, re.compile(r"\.router\.proj\.")),
    (EXPERTS, re.compile(r"\.experts\.\w+_proj\.")),
    (SELF_CONDITIONING, re.compile(r"self_conditioning\.\w+_proj\.")),
)
_LAYER = re.compile(r"layers\.(\d+)\.")
_EDGE_LAYERS = 3


def class_of(parameter: str) -> str:
    """Return the class of a text parameter by its path, for example ``layers.0.mlp.up_proj.weight``."""
    return next((name for name, pattern in _PATTERNS if pattern.search(parameter)), KEPT)


def layer_of(parameter: str) -> int | None:
    """Return the layer index in a parameter's path, or None if it belongs to no layer."""
    found = _LAYER.search(parameter)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Rule:
    """One rule of a recipe.

    Attributes:
        classes: Classes of tensors that the rule covers.
        format: The format in which they are packed.
        edge: Cover only tensors in the first three and the last three layers.
    """

    classes: tuple[str, ...]
    format: Format
    edge: bool = False

    def covers(self, tensor_class: str, layer: int | None, layers: int) -> bool:
        """Return whether the rule covers a tensor of a class, in a layer (or in none) of ``layers`` layers."""
        if tensor_class not in self.classes:
            return False
        return not self.edge or (layer is not None and not _EDGE_LAYERS <= layer < layers - _EDGE_LAYERS)


@dataclass(frozen=True)
class Recipe:
    """A named list of rules. The first rule that covers a tensor decides; a tensor without a rule stays bf16.

    Attributes:
        name: The name that ``--recipe`` takes.
        summary: One line for users.
        rules: The rules, in order of precedence.
    """

    name: str
    summary: str
    rules: tuple[Rule, ...] = ()

    def format_of(self, tensor_class: str, layer: int | None, layers: int) -> Format | None:
        """Return the format of a tensor in a layer (or in none) of ``layers`` layers, or None if it stays bf16."""
        return next((rule.format for rule in self.rules if rule.covers(tensor_class, layer, layers)), None)

    def with_group_size(self, group_size: int) -> Recipe:
        """Return the recipe with another group size in its affine rules. The other modes have fixed group sizes."""
        rules = (
            replace(rule, format=replace(rule.format, group_size=group_size)) if rule.format.mode == "affine" else rule
            for rule in self.rules
        )
        return replace(self, rules=tuple(rules))


_BULK = (EXPERTS, SELF_CONDITIONING)
_SENSITIVE = (EMBEDDINGS, ATTENTION, ROUTER, DENSE)
_Q8 = Rule(_SENSITIVE, Format(8))
MIXED = "mixed"
DEFAULT = "q4"

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("q4", "experts and self-conditioning 4-bit, the rest 8-bit, like the published 4-bit conversions",
               (Rule(_BULK, Format(4)), _Q8)),
        Recipe("q8", "all linear layers 8-bit", (Rule(LINEAR, Format(8)),)),
        Recipe("q4-small", "all linear layers 4-bit", (Rule(LINEAR, Format(4)),)),
        Recipe("q3", "experts 3-bit, but 4-bit in the first and last three layers; the rest as in q4",
               (Rule((EXPERTS,), Format(4), edge=True), Rule((EXPERTS,), Format(3)),
                Rule((SELF_CONDITIONING,), Format(4)), _Q8)),
        Recipe("mxfp4", "experts and self-conditioning mxfp4, the rest 8-bit",
               (Rule(_BULK, Format(4, 32, "mxfp4")), _Q8)),
        Recipe("mxfp8", "all linear layers mxfp8", (Rule(LINEAR, Format(8, 32, "mxfp8")),)),
        Recipe("nvfp4", "experts and self-conditioning nvfp4, the rest 8-bit",
               (Rule(_BULK, Format(4, 16, "nvfp4")), _Q8)),
        Recipe("bf16", "not quantized; only converted to the layout of MLX checkpoints"),
        Recipe(MIXED, "3, 4, 5, 6 or 8 bits for each part of a layer, by measured error (--target-size, --target-bpw)"),
    )
}
