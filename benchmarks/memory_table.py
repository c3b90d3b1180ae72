"""Memory of the published model by recipe, and the Macs that give it to their GPU. Nothing is measured.

The estimate is the one of ``dgemma-mlx info``, computed as on a Mac for the published sizes. macOS gives a GPU about
two thirds of the memory up to 36 GiB and three quarters above, unless ``iogpu.wired_limit_mb`` is set.

    python benchmarks/memory_table.py
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

mx.metal.is_available = lambda: True  # the estimate of a Mac, on any machine

from launches import PUBLISHED  # noqa: E402 - the estimate asks for Metal when it is imported
from mlx.utils import tree_flatten  # noqa: E402

from dgemma_convert.plan import make_plan  # noqa: E402
from dgemma_convert.recipes import RECIPES  # noqa: E402
from dgemma_convert.source import Source, open_source  # noqa: E402
from dgemma_mlx.checkpoint.config import ModelConfig  # noqa: E402
from dgemma_mlx.checkpoint.hub import resolve  # noqa: E402
from dgemma_mlx.checkpoint.names import source_name  # noqa: E402
from dgemma_mlx.cli.verdict import CONTEXTS  # noqa: E402
from dgemma_mlx.model.text import DiffusionGemma  # noqa: E402

NAMES = ("q3", "q4-small", "q4", "q8", "bf16")
MACS = (16, 18, 24, 32, 36, 48, 64, 96, 128)  # GiB of memory


def gpu_share(memory: int) -> float:
    """Return the bytes that macOS gives the GPU of a Mac with a number of GiB of memory, by default."""
    return memory * 2**30 * (2 / 3 if memory <= 36 else 3 / 4)


def published(folder: Path) -> Source:
    """Write the headers of a bfloat16 checkpoint with the published sizes, and open it."""
    config: dict[str, Any] = {"model_type": "diffusion_gemma", "canvas_length": 256, "text_config": PUBLISHED}
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for path, array in tree_flatten(DiffusionGemma(ModelConfig.from_dict(config).text).parameters()):
        begin, end = end, end + 2 * math.prod(array.shape)
        header[source_name(path)] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # a hole, which takes no space
    return open_source(resolve(str(folder)))


def main() -> None:
    """Print the tables in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        source = published(Path(folder))
        contexts = (*CONTEXTS, 131_072)
        print("| recipe | weights |", *(f"{context:,} tokens |" for context in contexts), "smallest Mac |")
        print("| --- " * (3 + len(contexts)) + "|")
        for name in NAMES:
            plan = make_plan(source, Path(name), RECIPES[name])
            needed = [plan.memory_with(context) for context in contexts]
            mac = next(f"{gib} GB" for gib in MACS if gpu_share(gib) >= needed[0])
            print(f"| `{name}` |", *(f"{count / 1e9:.1f} GB |" for count in (plan.bytes_out, *needed)), f"{mac} |")
        print("\n| memory of the Mac |", *(f"{gib} GB |" for gib in MACS))
        print("| --- " * (1 + len(MACS)) + "|")
        print("| of the GPU, by default |", *(f"{gpu_share(gib) / 1e9:.1f} GB |" for gib in MACS))


if __name__ == "__main__":
    main()
