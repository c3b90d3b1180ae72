"""A program that each of several processes runs: rank 0 prints what all of them hold of some checkpoints.

    python -m tests.distributed.slice_bytes SHARES FOLDER...

It prints a JSON array: for each rank and checkpoint, the bytes of the parameters as they are stored, and the number of
key/value heads in the buffers of a cache, over all layers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.distributed.collective import Collective
from dgemma_mlx.distributed.load import load_slice
from dgemma_mlx.distributed.network import CutNetwork


def held(folder: Path, shares: list[float], collective: Collective) -> list[int]:
    """Load this rank's slice, and return its bytes and heads."""
    config = ModelConfig.load(folder)
    network, _ = load_slice(
        folder, config, shares, lambda text, all_slices: CutNetwork(text, all_slices, collective), mx.bfloat16
    )
    cache = network.new_cache()
    network.encode(mx.zeros((1, 5), mx.int32), cache)
    parameters = dict(tree_flatten(network.parameters()))
    return [sum(array.nbytes for array in parameters.values()), sum(buffer.shape[1] for buffer in cache.buffers())]


if __name__ == "__main__":
    collective = Collective(mx.distributed.init(strict=True, backend="ring"))
    own = [held(Path(folder), json.loads(sys.argv[1]), collective) for folder in sys.argv[2:]]
    everywhere = collective.gather(mx.array(own)).tolist()
    if collective.rank == 0:
        print(json.dumps(everywhere))
