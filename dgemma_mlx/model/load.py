"""Loading of the text network from a checkpoint folder.

The tensors' names, shapes, dtypes and quantization are checked. The weights are not read from disk before their use.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.names import DECODER, Weights, module_quantization, remap, some_of, source_name
from dgemma_mlx.checkpoint.shards import open_tensors
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.model.text import DiffusionGemma

_DAMAGED = "The checkpoint does not match its config.json. Fetch or convert it again."


def load_model(folder: Path, config: ModelConfig, dtype: mx.Dtype | None = None, *,
               strict: bool = True) -> tuple[DiffusionGemma, Weights]:
    """Build the network of ``config`` with the tensors of a checkpoint folder, lazily.

    Args:
        folder: The checkpoint folder.
        config: The folder's configuration.
        dtype: Convert all floating-point tensors to this dtype. By default they keep the stored dtype on a GPU and
            become float32 on a CPU, because MLX's CPU back end is many times slower in bfloat16.
        strict: Whether tensors that the network does not know are an error. If False, they are ignored.

    Returns:
        The network in evaluation mode, and the checkpoint's tensors, which include those of the vision tower.

    Raises:
        DgemmaError: The files are missing or damaged, or the tensors do not match the configuration.
    """
    weights = remap(open_tensors(folder))
    model = DiffusionGemma(config.text)
    if config.quantization is not None:
        pack_modules(model, config.quantization, weights.text, DECODER.__add__)
    if dtype is None and mx.default_device() == mx.Device(mx.cpu):
        dtype = mx.float32
    if not strict:
        known = dict(tree_flatten(model.parameters()))
        weights.text = {path: tensor for path, tensor in weights.text.items() if path in known}
    check_parameters(model, weights.text, weights.names, source_name)
    if dtype is not None:
        weights.text = {
            name: tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor
            for name, tensor in weights.text.items()
        }
    model.load_weights(list(weights.text.items()))
    model.eval()
    return model, weights


def pack_modules(
    network: nn.Module, quantization: Mapping[str, Any], paths: Container[str], module_name: Callable[[str], str]
) -> None:
    """Replace each module of a network whose weights are packed, using the group size, bits and mode of that module.

    A module is packed if ``paths``, of the parameters in a checkpoint, holds its ``scales``. ``module_name`` returns
    the name that a module's path has in the checkpoint. Raises ``DgemmaError`` when MLX does not support a module's
    quantization.
    """

    def packed(path: str, module: nn.Module) -> nn.Module:
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in paths:
            return module
        chosen = module_quantization(quantization, module_name(path))
        try:
            quantized: nn.Module = module.to_quantized(**chosen)
        except (ValueError, TypeError):
            raise DgemmaError(f"config.json: {module_name(path)} cannot be quantized as {chosen}", _DAMAGED) from None
        return quantized

    network.update_modules(tree_map_with_path(packed, network.leaf_modules(), is_leaf=nn.Module.is_module))


def check_parameters(
    network: nn.Module, tensors: Mapping[str, mx.array], names: Mapping[str, str], source_name: Callable[[str], str]
) -> None:
    """Check that parameters and tensors match one to one, in path, shape and kind of dtype.

    ``tensors`` has the tensors by parameter path, ``names`` their names in the checkpoint, and ``source_name`` returns
    the name that a missing tensor would have. A parameter and a tensor with different floating-point dtypes match.
    Raises ``DgemmaError`` otherwise.
    """
    expected = dict(tree_flatten(network.parameters()))
    if missing := sorted(expected.keys() - tensors.keys()):
        raise DgemmaError(f"the checkpoint lacks {some_of([source_name(path) for path in missing])}", _DAMAGED)
    if unexpected := sorted(tensors.keys() - expected.keys()):
        unknown = [names[path] for path in unexpected]
        raise DgemmaError(f"the checkpoint has unknown tensors: {some_of(unknown)}", _DAMAGED)
    for path, parameter in expected.items():
        name, tensor = names[path], tensors[path]
        if tensor.shape != parameter.shape:
            raise DgemmaError(f"{name} has shape {tensor.shape}, but config.json asks for {parameter.shape}", _DAMAGED)
        both_floating = all(mx.issubdtype(array.dtype, mx.floating) for array in (tensor, parameter))
        if tensor.dtype != parameter.dtype and (not both_floating or tensor.dtype == mx.float64):  # not on a GPU
            raise DgemmaError(f"{name} has dtype {tensor.dtype}, not {parameter.dtype}", _DAMAGED)
