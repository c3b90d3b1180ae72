"""Loading of the vision tower from a checkpoint folder: the tensors' names, shapes, dtypes and packing are checked."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.names import remap
from dgemma_mlx.checkpoint.shards import open_tensors
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.load import check_parameters, pack_modules
from dgemma_mlx.vision.tower import LIMITS, VisionTower

_PREFIX = re.compile(r"model\.encoder\.(?:vision_tower|embed_vision)\.")
_FLOAT32 = ("std_bias", "std_scale")
_PROJECTION = "embedding_projection"


def load_tower(folder: Path, config: ModelConfig, dtype: mx.Dtype) -> VisionTower:
    """Build the vision tower of a checkpoint folder and load its weights.

    The tensors lie among those of the text network, or in a file of their own, ``optiq/optiq_vision.safetensors``.

    Args:
        folder: The checkpoint folder.
        config: The folder's configuration.
        dtype: The dtype of the tower. For float16 it is float32 instead, because the tower's activations may leave the
            range of float16.

    Returns:
        The tower in evaluation mode, with evaluated weights.

    Raises:
        DgemmaError: The checkpoint has no tower or one that is not supported, files are damaged, or the tensors do not
            match the configuration.
    """
    if config.vision is None:
        raise _no_tower(folder)
    config.vision.require_supported()
    stored = remap(open_tensors(folder)).vision
    if not config.vision.use_clipped_linears:
        stored = {name: tensor for name, tensor in stored.items() if not name.endswith(LIMITS)}
    if not stored:
        raise _no_tower(folder)
    names = {_PREFIX.sub("", name, count=1): name for name in stored}
    tensors = {path: stored[name] for path, name in names.items()}
    tower = VisionTower(config.vision, config.text.hidden_size)
    pack_modules(tower, config.quantization or {}, tensors, _source_name)
    check_parameters(tower, tensors, names, _source_name)
    wide = mx.float32 if dtype == mx.float16 else dtype
    tower.load_weights([(path, _converted(path, tensor, wide)) for path, tensor in tensors.items()])
    tower.eval()
    mx.eval(tower.parameters())
    return tower


def _converted(path: str, tensor: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return a tensor in the dtype that its parameter has in the tower."""
    if not mx.issubdtype(tensor.dtype, mx.floating):
        return tensor
    return tensor.astype(mx.float32 if path in _FLOAT32 else dtype)


def _source_name(path: str) -> str:
    """Return the name that a parameter or module has in a published checkpoint."""
    part = "embed_vision" if path.startswith(_PROJECTION) else "vision_tower"
    return f"model.encoder.{part}.{path}"


def _no_tower(folder: Path) -> DgemmaError:
    """Return the error of a checkpoint without tower."""
    return DgemmaError(
        f"{folder} reads no images: the checkpoint has no vision tower",
        "`dgemma-mlx info MODEL` says whether a model has one; or leave the images out.", exit_code=2,
    )
