"""What each machine holds of a model that is cut: said from the headers, and compared with what is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from dgemma_convert.source import open_source
from dgemma_mlx.checkpoint.hub import resolve
from dgemma_mlx.cli.ranks import cut_source, rank_facts
from tests.distributed.machines import run_on_ranks
from tests.model.checkpoint import flat_config, quantized, random_tensors, write_checkpoint

SIZES = {"hidden_size": 128, "intermediate_size": 320, "moe_intermediate_size": 192, "head_dim": 64}


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
    program = ("tests.distributed.slice_bytes", json.dumps(shares), *map(str, checkpoints))
    loaded = run_on_ranks(tmp_path, len(shares), *program)  # by rank, then by checkpoint
    for index, folder in enumerate(checkpoints):
        source = open_source(resolve(str(folder)))
        for rank, own in enumerate(cut_source(source, shares)):
            facts = rank_facts(source, own, [])
            assert facts["bytes"] == loaded[rank][index][0], (folder.name, rank)
            keys = [facts["heads"][kind]["keys"] for kind in source.config.text.layer_types]
            assert 2 * sum(keys) == loaded[rank][index][1]


def info(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", "info", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip


def test_info_says_what_each_rank_holds() -> None:
    facts = json.loads(info("--ranks", "2", "--json", "demo").stdout)
    first, second = facts["cut"]["ranks"]
    heads = {"queries": 2, "keys": 1}
    assert first["heads"] == {"sliding_attention": heads, "full_attention": heads}
    assert (first["mlp"], first["experts"], first["vocabulary"]) == (64, 32, 384)
    assert first == second and list(first["memory"]) == list(facts["memory"])
    whole, own = facts["memory"]["1024"], first["memory"]["1024"]
    # The only key/value head of the full layer is on both, those of the five sliding layers are divided.
    assert whole["cache"] / 2 < own["cache"] < whole["cache"] and own["total"] < whole["total"]
    assert facts["cut"]["step"]["messages"] == 16
    assert json.loads(info("--json", "demo").stdout)["cut"] is None


def test_info_says_it_in_words_and_what_cannot_be_cut() -> None:
    lines = info("--ranks", "3", "demo").stdout.splitlines()
    start = lines.index("  cut over 3 machines with equal shares:")
    assert lines[start + 1].startswith("    rank 0: ") and lines[start + 1].endswith(" of weights")
    assert lines[start + 2] == "      sliding layers: 2 query and 1 key/value heads"
    assert lines[-1].startswith("    a denoising step sums ") and lines[-1].endswith(" in 16 messages")
    refused = info("--ranks", "5", "demo")
    assert refused.returncode == 1
    assert "attention with 4 query and 2 key/value heads cannot be cut for 5 machines" in refused.stderr
    assert info("--ranks", "1", "demo").returncode == 2
