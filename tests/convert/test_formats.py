"""Packing: the shapes that MLX returns, and the meaning of the packed bits."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_convert.formats import Format
from tests.convert.checkpoints import identical, unpacked

AFFINE = [Format(bits, group_size) for bits in (3, 4, 5, 6, 8) for group_size in (32, 64, 128)]
FORMATS = [*AFFINE, Format(4, 32, "mxfp4"), Format(8, 32, "mxfp8"), Format(4, 16, "nvfp4")]
SHAPES = [(7, 256), (3, 5, 128)]
DTYPES = {"U32": mx.uint32, "U8": mx.uint8, "BF16": mx.bfloat16}

every_format = pytest.mark.parametrize("packing", FORMATS, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def weight(shape: tuple[int, ...]) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(0)).astype(mx.bfloat16)


@every_format
@every_shape
def test_parts_are_what_mlx_returns(packing: Format, shape: tuple[int, ...]) -> None:
    arrays = mx.quantize(weight(shape), packing.group_size, packing.bits, mode=packing.mode)
    parts = packing.parts(shape)
    assert [part.suffix for part in parts] == [".weight", ".scales", ".biases"][: len(arrays)]
    for part, array in zip(parts, arrays, strict=True):
        assert (DTYPES[part.dtype], part.shape, part.nbytes) == (array.dtype, array.shape, array.nbytes)


@every_format
@every_shape
def test_rows_are_packed_independently(packing: Format, shape: tuple[int, ...]) -> None:
    whole = weight(shape)
    expected = mx.quantize(whole, packing.group_size, packing.bits, mode=packing.mode)
    for step in range(1, shape[0] + 1):
        blocks = [packing.pack(whole[start : start + step]) for start in range(0, shape[0], step)]
        for pieces, array in zip(zip(*blocks, strict=True), expected, strict=True):
            assert identical(mx.concatenate(pieces), array), step


@every_format
@every_shape
def test_unpacking_is_what_mlx_does(packing: Format, shape: tuple[int, ...]) -> None:
    parts = packing.pack(weight(shape))
    expected = unpacked(parts, packing)
    assert identical(packing.unpack(parts), expected)
    error = mx.abs(expected - weight(shape)).astype(mx.float32).mean()
    assert 0 < float(error) < {3: 0.2, 4: 0.12, 5: 0.06, 6: 0.04, 8: 0.03}[packing.bits]  # normal weights


@pytest.mark.parametrize("packing", AFFINE, ids=str)
def test_affine_bits_are_a_little_endian_stream(packing: Format) -> None:
    """Decode by hand: ``bits`` for each value, lowest bit first, and value = scale * q + bias."""
    packed, scales, biases = packing.pack(weight((4, 256)))
    stream = np.unpackbits(np.array(packed).view(np.uint8), axis=-1, bitorder="little")
    q = stream.reshape(4, 256, packing.bits) @ (1 << np.arange(packing.bits))
    by_group = np.array(scales.astype(mx.float32)), np.array(biases.astype(mx.float32))
    scale, bias = (np.repeat(values, packing.group_size, axis=-1) for values in by_group)
    values = np.array(packing.unpack([packed, scales, biases]).astype(mx.float32))
    np.testing.assert_allclose(values, q * scale + bias, rtol=2**-8, atol=1e-6)  # bfloat16 has 8 bits


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_absent_keys_of_the_config_take_mlx_own_values(mode: str) -> None:
    packing = Format.from_config({"mode": mode})
    arrays = mx.quantize(weight((2, 256)), mode=mode)
    assert [part.shape for part in packing.parts((2, 256))] == [array.shape for array in arrays]


@every_format
def test_config_entry_reads_back(packing: Format) -> None:
    entry: dict[str, Any] = packing.as_config()
    assert set(entry) == {"group_size", "bits", "mode"}
    assert Format.from_config(entry) == packing


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((4, 128), True), ((4, 192), False), ((128,), False), ((), False), ((2, 3, 256), True), ((2, 3, 64), False)],
)
def test_a_row_is_cut_into_whole_groups(shape: tuple[int, ...], fits: bool) -> None:
    assert Format(4, 128).fits(shape) == fits
