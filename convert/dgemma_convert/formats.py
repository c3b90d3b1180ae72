"""How a matrix is packed: MLX's quantization formats, their sizes, packing and unpacking.

A format works on the last axis of a matrix (..., O, I) or a stack of them; every row is packed by itself, so a tensor
can be packed a few rows at a time. Source: ``mlx.core.quantize``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

_SCALE_DTYPE = {"affine": "BF16", "mxfp4": "U8", "mxfp8": "U8", "nvfp4": "U8"}
ITEM_SIZE = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "U32": 4}
"""Bytes an element of the dtypes that checkpoints hold, in safetensors' words."""


_OWN = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
"""MLX's own bits and group size of each mode; only affine mode has others."""


@dataclass(frozen=True)
class Part:
    """One tensor of a stored weight: the suffix of its name, dtype and shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = ITEM_SIZE[self.dtype]
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Format:
    """``bits`` a value and one scale (in affine mode also one bias) for ``group_size`` values of a row."""

    bits: int
    group_size: int = 64
    mode: str = "affine"

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> Format:
        """Reads an entry of config.json's ``quantization``; absent keys take MLX's own values for the mode.
        Raises ``ValueError`` for what MLX does not know."""
        mode = entry.get("mode", "affine")
        if mode not in tuple(_OWN):
            raise ValueError(f"there is no mode {mode!r}")
        own_bits, own_size = _OWN[mode]
        bits, group_size = entry.get("bits", own_bits), entry.get("group_size", own_size)
        whole = type(bits) is int and type(group_size) is int
        if mode == "affine":
            known = whole and bits in (2, 3, 4, 5, 6, 8) and group_size in (32, 64, 128)
        else:
            known = whole and (bits, group_size) == _OWN[mode]
        if not known:
            raise ValueError(f"{mode} has no {bits!r} bits in groups of {group_size!r}")
        return cls(bits, group_size, mode)

    def as_config(self) -> dict[str, Any]:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        return f"{self.bits}-bit g{self.group_size}" if self.mode == "affine" else self.mode

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether rows of this shape can be cut into groups; a matrix that cannot stays as it is."""
        return len(shape) >= 2 and shape[-1] % self.group_size == 0

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """What a weight of ``shape`` (..., I) is stored as."""
        *rows, width = shape
        scales = (*rows, width // self.group_size)
        packed = Part(".weight", "U32", (*rows, width * self.bits // 32))
        names = (".scales", ".biases") if self.mode == "affine" else (".scales",)
        return (packed, *(Part(name, _SCALE_DTYPE[self.mode], scales) for name in names))

    def pack(self, weight: mx.array) -> list[mx.array]:
        """weight (..., I) -> the arrays of ``parts``; scales and biases have the weight's dtype."""
        return list(mx.quantize(weight, self.group_size, self.bits, mode=self.mode))

    def unpack(self, parts: Sequence[mx.array]) -> mx.array:
        """The arrays of ``parts`` -> (..., I) bfloat16."""
        packed, *rest = parts
        if self.mode == "affine":  # MLX multiplies and adds in the scales' dtype: bfloat16 would round twice
            rest = [part.astype(mx.float32) for part in rest]
        scales, *biases = rest
        return mx.dequantize(
            packed, scales, biases[0] if biases else None, self.group_size, self.bits, mode=self.mode, dtype=mx.bfloat16
        )


PLAIN = "BF16"
"""What stays unpacked is written in this dtype."""
