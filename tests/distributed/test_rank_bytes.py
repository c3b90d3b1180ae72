"""What each machine holds of a model that is cut: said from the headers, and compared with what is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from dgemma_convert.source import open_source
from dgemma_mlx.checkpoint.hub import resolve
from dgemma_mlx.cli.ranks import cut_source, rank_facts
from tests.model.checkpoint import flat_config, quantized, random_tensors, write_checkpoint
from tests.several import run_on_ranks

SIZES = {"hidden_size": 128, "intermediate_size": 320, "moe_intermediate_size": 192, "head_dim": 64}
# Loads the slices of some checkpoints as they are stored, and prints the bytes of the parameters and of a cache.
LOAD = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.distributed.collective import Collective
from dgemma_mlx.distributed.load import load_slice
from dgemma_mlx.distributed.network import CutNetwork
collective = Collective(mx.distributed.init(strict=True, backend="ring"))
found = []
for folder in map(Path, sys.argv[2:]):
    config = ModelConfig.load(folder)
    network, _ = load_slice(
        folder, config, json.loads(sys.argv[1]), lambda text, all: CutNetwork(text, all, collective), mx.bfloat16
    )
    parameters = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
    cache = network.new_cache()
    network.encode(mx.zeros((1, 5), mx.int32), cache)
    cache.reserve(5 + config.canvas_length)
    found.append([parameters, sum(buffer.shape[1] for buffer in cache.buffers())])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A plain checkpoint, one of 4 bits with a router of 8 bits, and one of 8 bits in groups of 32."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tensors = random_tensors(flat_config(**SIZES), mx.bfloat16)
    mixed, eight = {"group_size": 64, "bits": 4}, {"group_size": 32, "bits": 8}
    own = {f"layers.{i}.router.proj": {"group_size": 64, "bits": 8} for i in range(3)}
    found = [write_checkpoint(folder / "plain", flat_config(**SIZES), tensors)]
    for name, common, single in (("4bit", mixed, own), ("8bit", eight, {})):
        config = {**flat_config(**SIZES), "quantization": {**common, **single}}
        packed, _ = quantized(tensors, lambda path, c=common, s=single: s.get(path.removeprefix("model.decoder."), c))
        found.append(write_checkpoint(folder / name, config, packed))
    return found


@pytest.mark.parametrize("shares", [[1, 1], [3, 1, 1]], ids=["two", "three uneven"])
def test_the_bytes_are_those_of_the_loaded_slices(tmp_path: Path, checkpoints: list[Path], shares: list[int]) -> None:
    outputs = run_on_ranks(tmp_path, len(shares), ["-c", LOAD, json.dumps(shares), *map(str, checkpoints)])
    loaded = [json.loads(output) for output in outputs]  # by rank, then by checkpoint
    for index, folder in enumerate(checkpoints):
        source = open_source(resolve(str(folder)))
        for rank, own in enumerate(cut_source(source, shares)):
            facts = rank_facts(source, own, [])
            assert facts["bytes"] == loaded[rank][index][0], (folder.name, rank)
            keys = [facts["heads"][kind]["keys"] for kind in source.config.text.layer_types]
            assert 2 * sum(keys) == loaded[rank][index][1]
