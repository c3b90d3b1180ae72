"""Loading of one machine's slice of a checkpoint. Only its own parts of the tensors are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import ModelConfig, TextConfig
from dgemma_mlx.checkpoint.names import DECODER, parameter_names
from dgemma_mlx.checkpoint.shards import StoredTensor, stored_tensors
from dgemma_mlx.distributed.network import CutNetwork
from dgemma_mlx.distributed.reading import read_part
from dgemma_mlx.distributed.slices import Slice, part_of, slices
from dgemma_mlx.model.load import load_model, pack_modules


def cut_for(config: ModelConfig, network: nn.Module, shares: Sequence[float]) -> list[Slice]:
    """Return the slices of a checkpoint for machines with these shares. ``network`` is the whole one, lazy."""
    sizes = {module.group_size for module in network.modules() if "scales" in module}
    return slices(config.text, shares, math.lcm(*sizes) if sizes else 1)


def load_slice(
    folder: Path, config: ModelConfig, shares: Sequence[float],
    make: Callable[[TextConfig, list[Slice]], CutNetwork], dtype: mx.Dtype | None = None,
) -> tuple[CutNetwork, bool]:
    """Build this machine's slice of the text network and read its weights, and say whether there is a vision tower.

    Args:
        folder: The checkpoint folder.
        config: The folder's configuration.
        shares: The shares of the machines in the model, by rank.
        make: Makes the network with random weights from the whole network's sizes and all slices.
        dtype: As in ``load_model``.

    Raises:
        DgemmaError: As ``load_model`` does, when a file cannot be read, and when the model cannot be cut so often.
    """
    whole, weights = load_model(folder, config, dtype)  # lazy: for its checks, and for what is packed
    all_slices = cut_for(config, whole, shares)
    network = make(config.text, all_slices)
    own = all_slices[network.collective.rank]
    if config.quantization is not None:
        pack_modules(network, config.quantization, weights.text, DECODER.__add__)
    stored = stored_tensors(folder)
    names, _ = parameter_names(stored)
    modules = dict(whole.named_modules())
    if dtype is None and mx.default_device() == mx.Device(mx.cpu):
        dtype = mx.float32
    for path in weights.text:
        array = _read(path, stored[names[path]], modules, config.text, own)
        if dtype is not None and mx.issubdtype(array.dtype, mx.floating):
            array = array.astype(dtype)
            mx.eval(array)
        network.load_weights([(path, array)], strict=False)
    network.eval()
    return network, bool(weights.vision)


def _read(
    path: str, stored: StoredTensor, modules: dict[str, nn.Module], config: TextConfig, own: Slice
) -> mx.array:
    """Read the own part of the tensor of a parameter path."""
    module_path, _, name = path.rpartition(".")
    part = part_of(module_path, config, own)
    if part is None:
        return read_part(stored)
    axis, ranges = part
    module = modules[module_path]
    if axis == -1 and "scales" in module:
        per = 32 / module.bits if name == "weight" else module.group_size  # weights in one stored value
        ranges = [range(int(each.start / per), int(each.stop / per)) for each in ranges]
    return read_part(stored, axis, ranges)
