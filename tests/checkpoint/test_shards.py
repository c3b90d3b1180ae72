"""Headers of safetensors files: every tensor has a place of its own, of the size that its shape needs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.checkpoint.shards import read_header
from dgemma_mlx.errors import DgemmaError


def header(path: Path, entries: Any, data: int) -> Path:
    """Write a safetensors file with these entries and ``data`` zero bytes after them."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def test_scalars_and_empty_tensors_have_places_too(tmp_path: Path) -> None:
    entries = {"a": entry("F32", [], 0, 4), "b": entry("F32", [0, 3], 4, 4), "c": entry("BF16", [2, 1], 4, 8)}
    tensors = read_header(header(tmp_path / "x", {"__metadata__": {"format": "mlx"}, **entries}, 8))
    assert {name: (tensor.shape, tensor.nbytes) for name, tensor in tensors.items()} == {
        "a": ((), 4), "b": ((0, 3), 0), "c": ((2, 1), 4)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, "the place or size of b is wrong"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [3], 0, 12)}, "the place or size of b is wrong"),
        ({"a": entry("F64", [2], 0, 12)}, "the place or size of a is wrong"),
        ({"a": entry("F32", [1, 2], 0, 12)}, "the place or size of a is wrong"),
        ({"a": entry("F32", [-3], 0, 12)}, "is not a safetensors file"),
        ({"a": entry("F32", [-1, -3], 0, 12)}, "is not a safetensors file"),
        ({"a": entry("F32", [3.0], 0, 12)}, "is not a safetensors file"),
        ({"a": entry("F32", ["3"], 0, 12)}, "is not a safetensors file"),
        ({"a": entry("F32", "3", 0, 12)}, "is not a safetensors file"),
        ({"a": entry("F32", [2**40, 2**40], 0, 12)}, "is not a safetensors file"),
        ({"a": entry("F32", [0, 2**62], 0, 0), "b": entry("F32", [3], 0, 12)}, "is not a safetensors file"),
        ({"a": entry("F32", [3], 12, 0)}, "bytes, but its header promises"),
        ({"a": entry("F32", [3], -12, 0)}, "is not a safetensors file"),
        ({"a": entry("F32", [3], False, 12)}, "is not a safetensors file"),
        ({"a": entry("F32", [3], 0.0, 12)}, "is not a safetensors file"),
        ({"a": entry(["F32"], [3], 0, 12)}, "the place or size of a is wrong"),
        ({"a": entry("F4", [3], 0, 12)}, "the place or size of a is wrong"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [0], 12, 12)}, "the place or size of b is wrong"),
        ({"a": [0, 12]}, "is not a safetensors file"),
        ([entry("F32", [3], 0, 12)], "is not a safetensors file"),
        ('{"\\ud800": 1}', "is not a safetensors file"),
        ('{"a": ' + "[" * 100_000, "is not a safetensors file"),
        ({"\x1b" * 100_000: entry("F32", [1], 0, 12)}, "is wrong in the header"),
        ({}, "bytes, but its header promises"),
    ],
)
def test_a_header_that_promises_what_cannot_be_is_refused(tmp_path: Path, entries: Any, message: str) -> None:
    with pytest.raises(DgemmaError) as error:
        read_header(header(tmp_path / "x", entries, 12))
    assert message in error.value.message
    assert error.value.hint
    assert "\x1b" not in error.value.message
