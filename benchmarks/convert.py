"""Measure peak memory and time of converting a checkpoint to 4 bits, optionally in comparison with mlx-vlm.

    python benchmarks/convert.py [--gigabytes 3] [--runs 1] [--peer PYTHON]

The script creates the source in a temporary folder. It has the names and layout of the real checkpoint, six layers with
large experts, and random bf16 weights. Each conversion runs in a separate process. Its peak is the resident memory of
the whole process, including the interpreter and its libraries; its time includes start_seconds for loading them.
``--peer`` names a Python interpreter that has mlx-vlm. Its default 4-bit conversion, which uses the same formats for
the same tensors, then takes turns with ours.

The script prints one JSON object with the median time and the highest peak. The exit code is 1 when our peak exceeds
the bound, (2.5 x the largest source tensor) + 600 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.checkpoint.names import source_name
from dgemma_mlx.model.text import DiffusionGemma

MB = 1_000_000
TEXT: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 704, "moe_intermediate_size": 704, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_global_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512,
    "top_k_experts": 2,
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
SHARD_BYTES = 1000 * MB
BLOCK = 8 * MB + 2  # bytes of random numbers, repeated; not a multiple of a row, so that rows differ


def make_source(folder: Path, size: float) -> dict[str, tuple[int, ...]]:
    """Write a checkpoint of about ``size`` bytes, at least 0.1 GB, and return the shapes of its tensors by name."""
    shapes = _shapes(_config(experts=2))
    for name in TOKENIZER:
        shutil.copy(DEMO_FOLDER / name, folder)
    per_expert = sum(math.prod(shape[1:]) for name, shape in shapes.items() if ".experts." in name)
    rest = sum(math.prod(shape) for name, shape in shapes.items() if ".experts." not in name)
    config = _config(experts=max(2, round((size / 2 - rest) / per_expert)))
    (folder / "config.json").write_text(json.dumps(config))
    shapes = _shapes(config)
    shards: list[list[str]] = [[]]
    for name in shapes:
        if sum(2 * math.prod(shapes[other]) for other in shards[-1]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    numbers = np.array(mx.random.normal((BLOCK // 2,), key=mx.random.key(0)).astype(mx.bfloat16).view(mx.uint16))
    for file, names in zip(files, shards, strict=True):
        _write_shard(folder / file, {name: shapes[name] for name in names}, memoryview(numbers).cast("B"))
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shapes


def _config(experts: int) -> dict[str, Any]:
    """Return the demo model's config.json with the sizes of ``TEXT``."""
    config: dict[str, Any] = json.loads((DEMO_FOLDER / "config.json").read_text())
    config["text_config"].update(TEXT, num_experts=experts)
    return config


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its published name, without computing any tensor."""
    model = DiffusionGemma(ModelConfig.from_dict(config).text)
    return {source_name(path): array.shape for path, array in dict(tree_flatten(model.parameters())).items()}


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: memoryview) -> None:
    """Write a safetensors file of bf16 tensors that are filled with repetitions of the block."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
        file.flush()
        os.fsync(file.fileno())  # otherwise the system may still write it during the first conversion


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Run a program and return its time in seconds and its peak resident memory in bytes.

    On Linux a child process inherits the peak of its parent, so this process must stay small.
    """
    with log.open("w") as file:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{log.read_text()}\n{' '.join(command)} ended with exit code {process.returncode}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(size: float, runs: int, peer: str | None) -> dict[str, float]:
    """Measure ``runs`` conversions of each converter and return sizes in MB and times in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        source, output, log = (Path(folder) / name for name in ("source", "output", "log"))
        source.mkdir()
        sizes = [2 * math.prod(shape) for shape in make_source(source, size).values()]
        convert = {"": [sys.executable, "-m", "dgemma_mlx", "convert", str(source), "-o", str(output)]}
        start = {"": [sys.executable, "-c", "import dgemma_mlx.cli.app, dgemma_convert"]}
        if peer is not None:
            options = ["--hf-path", str(source), "--mlx-path", str(output), "--quantize"]
            convert["peer_"] = [peer, "-m", "mlx_vlm", "convert", *options]
            start["peer_"] = [peer, "-c", "import mlx_vlm.convert"]
        turns = []
        for _ in range(runs):
            turn = {}
            for name, command in convert.items():
                turn[name] = run(command, log)
                shutil.rmtree(output)
            turns.append(turn)
        result = {"source_mb": sum(sizes) / MB, "largest_tensor_mb": max(sizes) / MB}
        for name in convert:
            seconds, peaks = zip(*(turn[name] for turn in turns), strict=True)
            result[f"{name}seconds"] = median(seconds)
            result[f"{name}start_seconds"], _ = run(start[name], log)
            result[f"{name}peak_mb"] = max(peaks) / MB
    return {**result, "bound_mb": 2.5 * max(sizes) / MB + 600}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the source checkpoint")
    parser.add_argument("--runs", type=int, default=1, help="conversions per converter")
    parser.add_argument("--peer", metavar="PYTHON", help="Python interpreter that has mlx-vlm")
    arguments = parser.parse_args()
    result = measure(arguments.gigabytes * 1e9, arguments.runs, arguments.peer)
    print(json.dumps({name: round(value, 2) for name, value in result.items()}))
    sys.exit(result["peak_mb"] > result["bound_mb"])
