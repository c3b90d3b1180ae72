"""Which part of a model's weights each machine holds.

A layer is cut so that it needs two sums over the machines. Query heads, and the inner values of the dense branch and of
the experts, are divided: each machine holds the rows of the first matrices and the columns of the last one, whose
products are added up (Shoeybi et al., arXiv 1909.08053). The vocabulary is divided by rows of the embedding table.
Norms, routers and scalars are held by all.

Inner values are cut in units of 64, because packed weights come in groups of 64 and because a matrix product whose
inner size is no multiple of 64 is slow or wrong on some GPUs. An even cut does not do: the published model has 11 units
in an expert and 33 in the dense branch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.errors import DgemmaError

UNIT = 64  # inner values

_ATTENTION = re.compile(r"layers\.(\d+)\.self_attn\.([qkvo])_proj")
_DENSE = re.compile(r"(?:layers\.\d+\.mlp|self_conditioning)\.(gate|up|down)_proj")
_EXPERTS = re.compile(r"layers\.\d+\.experts\.(gate_up|down)_proj")


@dataclass(frozen=True)
class Heads:
    """The attention heads of one machine in one kind of layer.

    Attributes:
        queries: The query heads.
        keys: The key/value heads that these query heads read. Several machines may hold the same one.
    """

    queries: range
    keys: range


@dataclass(frozen=True)
class Slice:
    """The part of a model that one machine holds.

    Attributes:
        heads: The attention heads, by kind of layer.
        mlp: The inner values of the dense branch, and of the self-conditioning block.
        experts: The inner values of each expert.
        vocabulary: The ids whose rows of the embedding table the machine holds.
    """

    heads: Mapping[str, Heads]
    mlp: range
    experts: range
    vocabulary: range


def slices(config: TextConfig, shares: Sequence[float], group_size: int = UNIT) -> list[Slice]:
    """Cut a model for machines that take these shares of it, in the order of their ranks.

    ``shares`` are positive numbers of any scale, for example bytes of memory. ``group_size`` is the number of packed
    weights that share a scale, or a common multiple of several such numbers; each cut is at a multiple of it. Raises
    ``DgemmaError`` when there are more machines than parts.
    """
    head_dims = {kind: config.layer_head_dim(kind) for kind in dict.fromkeys(config.layer_types)}
    heads = {
        kind: _cut_heads(config.num_attention_heads, config.kv_heads(kind), shares, _step(group_size, head_dim))
        for kind, head_dim in head_dims.items()
    }
    mlp = cut(config.intermediate_size, shares, group_size, "the dense branch")
    experts = cut(config.moe_intermediate_size, shares, group_size, "an expert")
    vocabulary = cut(config.vocab_size, shares, 1, "the vocabulary")
    return [
        Slice({kind: of_kind[rank] for kind, of_kind in heads.items()}, mlp[rank], experts[rank], vocabulary[rank])
        for rank in range(len(shares))
    ]


def part_of(path: str, config: TextConfig, own: Slice) -> tuple[int, list[range]] | None:
    """Return which part of a module's weights (..., O, I) a machine holds: rows (-2) or columns (-1), and which.

    ``path`` is that of the module, such as ``layers.0.mlp.up_proj``. Returns None for a module that every machine
    holds whole.
    """
    if path == "embed_tokens":
        return -2, [own.vocabulary]
    if found := _ATTENTION.fullmatch(path):
        kind = config.layer_types[int(found[1])]
        heads, D = own.heads[kind], config.layer_head_dim(kind)
        chosen = heads.queries if found[2] in "qo" else heads.keys
        return -1 if found[2] == "o" else -2, [range(chosen.start * D, chosen.stop * D)]
    if found := _DENSE.fullmatch(path):
        return (-1 if found[1] == "down" else -2), [own.mlp]
    if found := _EXPERTS.fullmatch(path):
        inner = config.moe_intermediate_size
        if found[1] == "down":
            return -1, [own.experts]
        return -2, [own.experts, range(inner + own.experts.start, inner + own.experts.stop)]
    return None


def share_of(path: str, shape: Sequence[int], config: TextConfig, own: Slice) -> Fraction:
    """Return which share of a module's weights, of unpacked ``shape`` (..., O, I), a machine holds; see ``part_of``.

    Packed weights, their scales and their biases have the same share, because cuts are between whole groups.
    """
    part = part_of(path, config, own)
    if part is None:
        return Fraction(1)
    axis, ranges = part
    return Fraction(sum(map(len, ranges)), shape[axis])


def cut(size: int, shares: Sequence[float], multiple: int, what: str) -> list[range]:
    """Cut ``size`` values into one range for each share, in whole units.

    A unit is 64 values, or less where there would be fewer units than shares, but always a multiple of ``multiple``.
    Where ``size`` is no multiple of a unit, the last range takes the rest. Raises ``DgemmaError`` when there are not
    enough units; ``what`` is the name of the values in its message.
    """
    unit = math.lcm(UNIT, multiple)
    while size // unit < len(shares) and unit % 2 == 0 and (unit // 2) % multiple == 0:
        unit //= 2
    counts = _apportion(size // unit, shares, f"{what} of {size:,} values")
    ends = [unit * sum(counts[: rank + 1]) for rank in range(len(shares))]
    ends[-1] = size
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _apportion(total: int, shares: Sequence[float], what: str) -> list[int]:
    """Distribute ``total`` whole units by shares, at least one each (largest remainders; the first wins ties)."""
    if total < len(shares):
        raise _too_many(what, len(shares))
    free = total - len(shares)  # one unit each is given in any case
    exact = [max(0.0, total * share / sum(shares) - 1) for share in shares]
    scale = free / (sum(exact) or 1)
    counts = [int(value * scale) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda rank: counts[rank] - exact[rank] * scale)
    for rank in by_remainder[: free - sum(counts)]:
        counts[rank] += 1
    return [1 + count for count in counts]


def _too_many(what: str, machines: int) -> DgemmaError:
    """Return the error for more machines than parts."""
    return DgemmaError(f"{what} cannot be cut for {machines} machines", "Use fewer machines, or a whole model on each.")


def _step(group_size: int, head_dim: int) -> int:
    """Return the least number of heads that hold whole groups of packed weights."""
    return math.lcm(group_size, head_dim) // head_dim


def _cut_heads(queries: int, keys: int, shares: Sequence[float], step: int) -> list[Heads]:
    """Divide the query heads, so that each machine holds all query heads of its key/value heads, or some of one.

    With more machines than key/value heads, several machines hold the same one and divide its query heads.
    """
    group, count = queries // keys, len(shares)
    what = f"attention with {queries} query and {keys} key/value heads"
    if count <= keys:
        counts = _apportion(keys, shares, what)
        starts = [sum(counts[:rank]) for rank in range(count)]
        owned = [range(start, start + number) for start, number in zip(starts, counts, strict=True)]
        cuts = [Heads(range(part.start * group, part.stop * group), part) for part in owned]
    else:
        cuts = []
        if group // step < math.ceil(count / keys):
            raise _too_many(what, count)
        for key in range(keys):  # the machines first * keys ... share this key/value head
            ranks = range(key * count // keys, (key + 1) * count // keys)
            parts = _apportion(group // step, [shares[rank] for rank in ranks], what)
            start = key * group
            for number in parts:
                cuts.append(Heads(range(start, start + number * step), range(key, key + 1)))
                start += number * step
    if any(len(heads.queries) % step for heads in cuts):
        raise DgemmaError(
            f"{what} cannot be cut for {count} machines: packed weights come in groups of more than one head",
            "Use fewer machines, or a checkpoint with a smaller group size.",
        )
    return cuts
