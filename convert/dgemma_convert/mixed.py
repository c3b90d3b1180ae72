"""The recipe "mixed": choose the bits of each part of a layer by measured error, within a budget of bytes.

Each group of tensors (the attention of one layer, its experts, ...) is packed with 3, 4, 5, 6 and 8 bits, and the error
of its output is measured. With calibration texts, the error of each input channel is weighted by the channel's mean
square in the activations: |x dW|^2 = sum over channels of x_i^2 |dW_i|^2, if the channels are independent. Without
calibration texts, all channels have the same weight. The budget is then spent greedily, each time on the group whose
error falls most for each byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from dgemma_convert.formats import Format
from dgemma_convert.recipes import KEPT, class_of, layer_of
from dgemma_convert.source import Source, Weight
from dgemma_convert.walk import Walk, as_float, make_samples
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.layer import Layer
from dgemma_mlx.sizes import size

BITS = (3, 4, 5, 6, 8)
_SAMPLE_VALUES = 8 << 20  # number of values of a tensor that are measured, in slabs spread over its rows
_SLABS = 8

Moments = dict[str, mx.array]  # parameter path -> mean square of each input channel, (I,) float32


@dataclass(frozen=True)
class Group:
    """A group of tensors that get the same number of bits.

    Attributes:
        name: For example "layer 3 experts" or "embeddings".
        paths: Parameter paths of the tensors.
        values: Number of values in all tensors.
        size: Packed size in bytes, by number of bits.
        error: Relative error of the output (root mean square), by number of bits.
    """

    name: str
    paths: tuple[str, ...]
    values: int
    size: Mapping[int, int]
    error: Mapping[int, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the group's entry in the report."""
        error = {bits: round(error, 6) for bits, error in self.error.items()}
        return {"values": self.values, "bytes": dict(self.size), "error": error}


def groups_of(source: Source, group_size: int) -> dict[str, list[str]]:
    """Return the parameter paths of all matrices that can be packed, by the name of their group."""
    groups: dict[str, list[str]] = {}
    for path, weight in source.text.items():
        tensor_class = class_of(path + weight.suffix)
        if tensor_class != KEPT and Format(4, group_size).fits(weight.shape):
            layer = layer_of(path)
            groups.setdefault(tensor_class if layer is None else f"layer {layer} {tensor_class}", []).append(path)
    return groups


def measure(source: Source, group_size: int, moments: Moments,
            progress: Callable[[int, int], None]) -> list[Group]:
    """Measure the error of every group at each number of bits, on a sample of its rows.

    Args:
        source: The checkpoint.
        group_size: Number of values that share a scale.
        moments: Mean squares of input channels; a path that is missing weights all channels alike.
        progress: Called with the number of groups done and the number of all groups.
    """
    groups = groups_of(source, group_size)
    table = []
    for done, (name, paths) in enumerate(groups.items(), 1):
        weights = [source.text[path] for path in paths]
        errors = dict.fromkeys(BITS, 0.0)
        total = 0.0
        for path, weight in zip(paths, weights, strict=True):
            squares, norm = _squares(weight, group_size, moments.get(path))
            total += norm
            errors = {bits: errors[bits] + squares[bits] for bits in BITS}
        size = {b: sum(_packed_bytes(w, Format(b, group_size)) for w in weights) for b in BITS}
        relative = {bits: (error / total) ** 0.5 if total else 0.0 for bits, error in errors.items()}
        table.append(Group(name, tuple(paths), sum(w.size for w in weights), size, relative))
        progress(done, len(groups))
    return table


def solve(groups: Sequence[Group], budget: int, *, by_size: bool) -> dict[str, int]:
    """Choose the number of bits of each group so that all groups together stay within ``budget`` bytes.

    A greedy search lowers the sum of squared relative errors. All groups start with the fewest bits. The step that
    lowers the sum most for each byte is taken, as long as one fits into the budget. With ``by_size``, the error of a
    group is multiplied by its number of values.

    Returns the bits by group name. Raises ``DgemmaError`` (exit code 2) if even the fewest bits exceed the budget.
    """
    chosen = {group.name: BITS[0] for group in groups}
    left = budget - sum(group.size[BITS[0]] for group in groups)
    if left < 0:
        raise DgemmaError(
            f"the target is {size(-left)} too small, even with {BITS[0]} bits for every packed weight",
            "Choose a larger --target-size or --target-bpw.", exit_code=2,
        )

    def steps() -> Iterator[tuple[float, int, str, int]]:
        for group in groups:
            have = chosen[group.name]
            for bits in (b for b in BITS if b > have):
                extra = group.size[bits] - group.size[have]
                gain = (group.error[have] ** 2 - group.error[bits] ** 2) * (group.values if by_size else 1)
                if extra <= left and gain > 0:
                    yield gain / extra, extra, group.name, bits

    while best := max(steps(), default=None):
        _, extra, name, bits = best
        chosen[name] = bits
        left -= extra
    return chosen


def calibrate(source: Source, texts: Sequence[tuple[str, str]], progress: Callable[[int, int], None]) -> Moments:
    """Run the source on (prompt, answer) pairs, layer by layer, and record the inputs of each matrix.

    ``progress`` is called with the number of layers done and the number of all layers.
    """
    samples = make_samples(source.folder, source.config, texts)
    walk = Walk(source.folder, source.config, samples)
    moments: Moments = {}
    layers = source.config.text.num_hidden_layers
    for index in range(layers):
        recorders: dict[str, Recorder] = {}
        walk.next_layer(lambda layer, kept=recorders: _record(layer, kept))  # type: ignore[misc]
        moments |= {f"layers.{index}.{path}": recorder.mean_square() for path, recorder in recorders.items()}
        mx.eval(moments)
        progress(index + 1, layers)
    states = mx.concatenate([state[0] for state in walk.final_states()])
    moments["embed_tokens"] = mx.square(states.astype(mx.float32)).mean(axis=0)
    return moments


class Recorder(nn.Module):
    """A wrapper around a linear module that sums the squares of its inputs.

    Attributes:
        inner: The wrapped module.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._sums: list[mx.array] = []
        self._rows = 0

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self._sums.append(mx.square(rows).sum(axis=0))
        self._rows += rows.shape[0]
        result: mx.array = self.inner(x, *args, **options)
        return result

    def mean_square(self) -> mx.array:
        """Return the mean square of each input channel over all recorded rows, (I,) float32."""
        return mx.stack(self._sums).sum(axis=0) / self._rows


def _record(layer: Layer, recorders: dict[str, Recorder]) -> None:
    """Wrap every matrix of a layer in a ``Recorder`` and add it to ``recorders`` by its path."""
    modules = dict(tree_flatten(layer.leaf_modules(), is_leaf=nn.Module.is_module))
    for path, module in modules.items():
        if "weight" in module and module.weight.ndim > 1:
            recorders[path] = Recorder(module)
    layer.update_modules(tree_unflatten(list(recorders.items())))


def _squares(weight: Weight, group_size: int, moments: mx.array | None) -> tuple[dict[int, float], float]:
    """Return the sum of squared errors at each number of bits, and the sum of squares of the weight itself.

    Both are measured on a sample of the rows and scaled up to the whole tensor, so that the tensors of a group count by
    their sizes. Channels are weighted by ``moments`` (I,).
    """
    squared_errors = dict.fromkeys(BITS, 0.0)
    total, seen = 0.0, 0
    for start, stop in _slabs(weight):
        rows = weight.values(weight.load(start, stop))
        values = rows.astype(mx.float32)
        scale = mx.array(1.0) if moments is None else moments
        errors = []
        for bits in BITS:
            packing = Format(bits, group_size)
            errors.append((mx.square(packing.unpack(packing.pack(rows)).astype(mx.float32) - values) * scale).sum())
        norm = (mx.square(values) * scale).sum()
        mx.eval(errors, norm)
        squared_errors = {
            bits: squared_errors[bits] + as_float(error) for bits, error in zip(BITS, errors, strict=True)
        }
        total += as_float(norm)
        seen += rows.size
        mx.clear_cache()
    share = weight.size / seen
    return {bits: error * share for bits, error in squared_errors.items()}, total * share


def _slabs(weight: Weight) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that are spread over the first axis and hold about ``_SAMPLE_VALUES`` values together."""
    rows = weight.shape[0]
    most = max(1, _SAMPLE_VALUES * rows // weight.size)
    if most >= rows:
        return iter([(0, rows)])
    count = min(_SLABS, most)
    height = most // count
    return ((i * rows // count, i * rows // count + height) for i in range(count))


def _packed_bytes(weight: Weight, packing: Format) -> int:
    """Return the size of a weight in bytes after packing."""
    return sum(part.nbytes for part in packing.parts(weight.shape))


def read_calibration(path: Path) -> list[tuple[str, str]]:
    """Read calibration texts, one on each line, as (prompt, answer) pairs.

    The first half of the words of a line is the prompt, and the second half is the answer. Raises ``DgemmaError`` if
    the file cannot be read or has no text.
    """
    hint = "A calibration file has one text on each line, in UTF-8."
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DgemmaError(f"cannot read {path}: {error.strerror}", hint) from None
    except UnicodeDecodeError as error:
        raise DgemmaError(f"{path} is not UTF-8 text (byte {error.start})", hint) from None
    words = [line.split() for line in lines if line.strip()]
    if not words:
        raise DgemmaError(f"{path} contains no text", hint)
    return [(" ".join(line[: -(-len(line) // 2)]), " ".join(line[-(-len(line) // 2) :])) for line in words]
