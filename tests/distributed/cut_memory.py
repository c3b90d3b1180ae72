"""A program that loads one slice of a checkpoint and prints the bytes of its weights and the most that MLX held.

    python -m tests.distributed.cut_memory FOLDER RANK SIZE
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from dgemma_mlx.distributed.collective import Collective
from dgemma_mlx.distributed.network import CutNetwork
from dgemma_mlx.generation.load import LoadOptions, load_cut


@dataclass
class OneOfSeveral:
    """A process that says that it is one of several, and is alone: loading sends nothing."""

    number: int
    count: int

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


def anonymous_bytes() -> int:
    """Return the largest size that this process has had, less its libraries and what it has mapped (Linux)."""
    with open("/proc/self/status") as file:
        facts = dict(line.split(":", 1) for line in file)
    return 1024 * (int(facts["VmHWM"].split()[0]) - int(facts["RssFile"].split()[0]))


def main() -> None:
    folder, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    before = anonymous_bytes()
    collective = Collective(OneOfSeveral(rank, size))  # type: ignore[arg-type]
    options = LoadOptions(folder, dtype="bfloat16", cpu_dequantize="off")
    network = load_cut(options, [1.0] * size, lambda config, cuts: CutNetwork(config, cuts, collective)).network
    own = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
    print(json.dumps({"own": own, "mlx": mx.get_peak_memory(), "process": anonymous_bytes() - before}))


if __name__ == "__main__":
    main()
