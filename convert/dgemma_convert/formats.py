"""The quantization formats of MLX: how a matrix is packed, how large it becomes, and how it is unpacked.

A format works on the last axis of a matrix (..., O, I) or of a stack of matrices. Every row is packed independently, so
a tensor can be packed a few rows at a time. Source: ``mlx.core.quantize``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from dgemma_mlx.checks import shown

_SCALE_DTYPE = {"affine": "BF16", "mxfp4": "U8", "mxfp8": "U8", "nvfp4": "U8"}
# Bytes per element of the dtypes in checkpoints, by the names that safetensors gives them.
ITEM_SIZE = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "U32": 4}
PLAIN = "BF16"  # the dtype of weights that are not packed

# MLX's default bits and group size of each mode. Only the affine mode supports other values.
_DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


@dataclass(frozen=True)
class Part:
    """One stored tensor of a weight.

    Attributes:
        suffix: Suffix of the tensor's name: ".weight", ".scales" or ".biases".
        dtype: The dtype by the name that safetensors gives it, for example "U32".
        shape: The shape of the stored tensor.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        count = ITEM_SIZE[self.dtype]
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Format:
    """A quantization format.

    Attributes:
        bits: Number of bits for each value.
        group_size: Number of consecutive values of a row that share a scale and, in the affine mode, a bias.
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
    """

    bits: int
    group_size: int = 64
    mode: str = "affine"

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> Format:
        """Read an entry of ``quantization`` in config.json. Missing keys take MLX's defaults for the mode.

        Raises ``ValueError`` if MLX does not support the format.
        """
        mode = entry.get("mode", "affine")
        if mode not in tuple(_DEFAULTS):
            raise ValueError(f"there is no mode {shown(mode)}")
        default_bits, default_size = _DEFAULTS[mode]
        bits, group_size = entry.get("bits", default_bits), entry.get("group_size", default_size)
        integers = type(bits) is int and type(group_size) is int
        if mode == "affine":
            known = integers and bits in (2, 3, 4, 5, 6, 8) and group_size in (32, 64, 128)
        else:
            known = integers and (bits, group_size) == _DEFAULTS[mode]
        if not known:
            raise ValueError(f"the mode {mode} does not support {shown(bits)} bits in groups of {shown(group_size)}")
        return cls(bits, group_size, mode)

    def as_config(self) -> dict[str, Any]:
        """Return the entry of ``quantization`` in config.json for this format."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def __str__(self) -> str:
        """Return a short name, for example "4-bit g64" or "mxfp4"."""
        return f"{self.bits}-bit g{self.group_size}" if self.mode == "affine" else self.mode

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether a weight of this shape is a matrix whose rows divide into whole groups."""
        return len(shape) >= 2 and shape[-1] % self.group_size == 0

    def parts(self, shape: Sequence[int]) -> tuple[Part, ...]:
        """Return the tensors that store a weight of shape (..., I)."""
        *rows, width = shape
        scales = (*rows, width // self.group_size)
        packed = Part(".weight", "U32", (*rows, width * self.bits // 32))
        names = (".scales", ".biases") if self.mode == "affine" else (".scales",)
        return (packed, *(Part(name, _SCALE_DTYPE[self.mode], scales) for name in names))

    def pack(self, weight: mx.array) -> list[mx.array]:
        """Pack a weight (..., I) into the arrays that ``parts`` describes.

        Affine scales and biases have the dtype of the weight.
        """
        return list(mx.quantize(weight, self.group_size, self.bits, mode=self.mode))

    def unpack(self, parts: Sequence[mx.array]) -> mx.array:
        """Unpack the arrays that ``parts`` describes into a weight (..., I) bfloat16."""
        packed, *rest = parts
        if self.mode == "affine":  # MLX computes in the dtype of the scales, and bfloat16 would round twice
            rest = [part.astype(mx.float32) for part in rest]
        scales, *biases = rest
        return mx.dequantize(
            packed, scales, biases[0] if biases else None, self.group_size, self.bits, mode=self.mode, dtype=mx.bfloat16
        )
