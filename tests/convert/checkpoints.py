"""Small source checkpoints for the converter, and checks of its outputs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dgemma_convert import Report, convert
from dgemma_convert.formats import Format
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.checkpoint.shards import shard_files
from dgemma_mlx.errors import DgemmaError
from tests.model.checkpoint import Tensors, flat_config, random_tensors, write_checkpoint

SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
TOKENIZER_VOCABULARY = 768  # size of the demo tokenizer's vocabulary
SMALLEST = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}

TOWER = "model.encoder.vision_tower.encoder.layers.0"
VISION = {
    f"{TOWER}.self_attn.q_proj.linear.weight": (64, 64),
    f"{TOWER}.self_attn.q_proj.input_max": (1,),
    f"{TOWER}.input_layernorm.weight": (64,),
    "model.encoder.vision_tower.patch_embedder.position_embedding_table": (2, 5, 64),
    "model.encoder.embed_vision.embedding_projection.weight": (128, 64),
}


@cache
def some_tensors(dtype: mx.Dtype = mx.bfloat16, vocab_size: int = 96) -> Tensors:
    """Return the text tensors of ``flat_config(vocab_size=...)``. Callers must not change them."""
    tensors = random_tensors(flat_config(vocab_size=vocab_size), dtype)
    mx.eval(tensors)
    return tensors


@cache
def smallest_tensors(dtype: mx.Dtype = mx.bfloat16) -> Tensors:
    """Return the text tensors of ``flat_config(**SMALLEST)``. Callers must not change them."""
    tensors = random_tensors(flat_config(**SMALLEST), dtype)
    mx.eval(tensors)
    return tensors


def vision_tensors(dtype: mx.Dtype = mx.bfloat16) -> Tensors:
    return {name: mx.random.normal(shape, key=mx.random.key(i)).astype(dtype)
            for i, (name, shape) in enumerate(VISION.items())}


def make_source(
    folder: Path, config: Mapping[str, Any] | None = None, tensors: Mapping[str, mx.array] | None = None, *,
    shards: int = 1, tokenizer: bool = False,
) -> Path:  # fmt: skip
    """Write a source checkpoint: bf16 unless ``tensors`` are given. With ``tokenizer``, it gets the demo's tokenizer.

    Without a ``config``, the vocabulary has the size of the tokenizer's.
    """
    if config is None:
        config = flat_config(vocab_size=TOKENIZER_VOCABULARY) if tokenizer else flat_config()
    if tensors is None:
        tensors = some_tensors(vocab_size=config["text_config"]["vocab_size"])
    write_checkpoint(folder, config, tensors, shards)
    if tokenizer:
        for name in SMALL_FILES:
            shutil.copy(DEMO_FOLDER / name, folder)
    return folder


def smallest_source(folder: Path) -> Path:
    """Write a source checkpoint with one layer, for tests that convert it dozens of times."""
    return make_source(folder, flat_config(**SMALLEST), smallest_tensors())


def stored(folder: Path) -> Tensors:
    """Return every tensor in the weight files of a checkpoint, by its stored name."""
    tensors: Tensors = {}
    for path in shard_files(folder):
        part = mx.load(str(path))
        assert isinstance(part, dict)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def identical(one: mx.array, other: mx.array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool(mx.array_equal(one, other))


def unpacked(parts: Sequence[mx.array], packing: Format) -> mx.array:
    """Return the values of a packed weight, computed by MLX in float32 and rounded to bfloat16 once."""
    scales = [part.astype(mx.float32) if packing.mode == "affine" else part for part in parts[1:]]
    values = mx.dequantize(
        parts[0], *scales, group_size=packing.group_size, bits=packing.bits, mode=packing.mode, dtype=mx.float32
    )
    return values.astype(mx.bfloat16)


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 digest of every file in a folder, by its name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def names_in(folder: Path) -> set[str]:
    """Return the names of everything in a folder, including hidden files."""
    return {path.name for path in folder.iterdir()}


def user_error(error: DgemmaError) -> str:
    """Return message and hint of an error, after checking that each of them is one line."""
    assert error.message and error.hint
    assert "\n" not in error.message + error.hint
    return f"{error.message} {error.hint}"


def check_output(report: Report, tensors: Tensors) -> None:
    """Check that an output has exactly the tensors of the source, as bf16 or packed as MLX packs a whole tensor."""
    found = stored(report.output)
    formats = {target.weight.name: target.format for target in report.plan.targets}
    expected: Tensors = {}
    for name, tensor in tensors.items():
        module, wide = name.removesuffix(".weight"), tensor.astype(mx.bfloat16)
        if packing := formats.get(module):
            arrays = mx.quantize(wide, packing.group_size, packing.bits, mode=packing.mode)
            names = (module + suffix for suffix in (".weight", ".scales", ".biases"))
            expected |= dict(zip(names, arrays, strict=False))
        else:
            bare_expert = re.search(r"experts\.\w+_proj$", name)
            expected[f"{name}.weight" if bare_expert else name] = wide
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert identical(found[name], tensor), name


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    """Return the content of every file below a folder, and None for every folder below it."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def failure(source: Path | str, output: Path | None = None, *arguments: Any, code: int = 1, **options: Any) -> str:
    """Return message and hint of a conversion that fails and changes nothing in the source's parent folder."""
    parent = Path(source).parent
    before = snapshot(parent)
    with pytest.raises(DgemmaError) as caught:
        convert(str(source), output, *arguments, **options)
    assert snapshot(parent) == before
    assert caught.value.exit_code == code
    return user_error(caught.value)
