"""Compare the vision tower, and the prefill of a prompt with a picture, with mlx-vlm: CPU time and peak memory.

    python benchmarks/vision.py --peer PYTHON [--runs 3] [--budgets 70,280] [--layers 8]

Both programs read the same random checkpoint, which the script creates: the vision tower of the published model in a
half of its width and with fewer layers (heads of 72 values, patches of 16 pixels, float32), and a small text network.
Each measurement runs in a process of its own, after a first picture of another size; the programs take turns.
``--peer`` names a Python interpreter that has mlx-vlm; without it, this project is measured alone. The table shows
medians, and the ratio of mlx-vlm's to ours.

* tower: CPU time from the patches of a picture to its soft tokens, and MLX's peak memory meanwhile without the weights
* prefill: the same for a prompt of the picture and 256 tokens of text, tower included
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

IMAGE, BOI, EOI = 93, 94, 95
QUANTITIES = {"tower_cpu": "tower CPU, s", "tower_peak": "tower peak, MB", "prefill_cpu": "prefill CPU, s",
              "prefill_peak": "prefill peak, MB"}  # fmt: skip


def write(folder: Path, layers: int) -> None:
    """Write a random checkpoint."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from dgemma_mlx.checkpoint.config import ModelConfig
    from dgemma_mlx.model.text import DiffusionGemma
    from dgemma_mlx.train.demo import CONFIG, GENERATION
    from dgemma_mlx.train.export import export
    from dgemma_mlx.vision.tower import VisionTower

    vision = {
        "model_type": "gemma4_vision", "hidden_size": 576, "intermediate_size": 2152, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 72, "patch_size": 16, "pooling_kernel_size": 3,
        "position_embedding_size": 10240, "standardize": True, "default_output_length": 280,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }  # fmt: skip
    config = {**CONFIG, "vision_config": vision, "image_token_id": IMAGE, "boi_token_id": BOI, "eoi_token_id": EOI}
    config["text_config"] = {**CONFIG["text_config"], "sliding_window": 1024}
    parsed = ModelConfig.from_dict(config)
    assert parsed.vision is not None
    mx.random.seed(0)
    export(DiffusionGemma(parsed.text), config, GENERATION, folder, mx.float32)
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    tower: Any = tree_flatten(VisionTower(parsed.vision, parsed.text.hidden_size).parameters())
    for path, array in tower:
        part = "embed_vision" if path.startswith("embedding_projection") else "vision_tower"
        tensors[f"model.encoder.{part}.{path}"] = array
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})


def grid(budget: int) -> tuple[int, int]:
    """Return the rows and columns of the patches of a picture of 4 to 3 at a budget of soft tokens."""
    columns = int((budget * 9 * 4 / 3) ** 0.5) // 3 * 3
    return int(budget * 9 / columns) // 3 * 3, columns


def ours(folder: Path) -> tuple[Any, Any]:
    """Return our functions that encode a picture (rows, columns, 16, 16, 3), and a prompt with one."""
    import mlx.core as mx

    from dgemma_mlx.checkpoint.config import ModelConfig
    from dgemma_mlx.generation.memory import Budget
    from dgemma_mlx.generation.prefill import prefill
    from dgemma_mlx.model.load import load_model
    from dgemma_mlx.vision.load import load_tower

    config = ModelConfig.load(folder)
    network, tower = load_model(folder, config)[0], load_tower(folder, config, mx.float32)
    mx.eval(network.parameters())

    def encode(pixels: Any) -> Any:
        return tower(pixels.reshape(-1, 768), pixels.shape[:2])

    def fill(pixels: Any) -> Any:
        count, cache = pixels.shape[0] * pixels.shape[1] // 9, network.new_cache()
        ids = [2, BOI, *[-1] * count, EOI, *[7] * 256]
        list(prefill(network, [ids], cache, Budget(2048), features=lambda _: encode(pixels)))
        return cache.state()

    return encode, fill


def peers(folder: Path) -> tuple[Any, Any]:
    """Return the functions of ``ours`` for mlx-vlm."""
    import mlx.core as mx
    from mlx_vlm.utils import load_model

    model: Any = load_model(folder, lazy=False)
    encoder = model.model.encoder

    def image(pixels: Any) -> Any:
        rows, columns = pixels.shape[:2]
        return mx.array(pixels.transpose(4, 0, 2, 1, 3).reshape(1, 3, rows * 16, columns * 16))

    def encode(pixels: Any) -> Any:
        return encoder.embed_vision(encoder.vision_tower(image(pixels)))

    def fill(pixels: Any) -> Any:
        count = pixels.shape[0] * pixels.shape[1] // 9
        ids = mx.array([[2, BOI, *[IMAGE] * count, EOI, *[7] * 256]])
        cache = model.diffusion_prefill_cache(
            ids, cache=model.make_cache(), pixel_values=image(pixels), mm_token_type_ids=(ids == IMAGE).astype(mx.int32)
        )
        return [layer.state for layer in cache]

    return encode, fill


def child(program: str, folder: Path, budget: int) -> None:
    """Measure one program in this process, and print what was found as JSON."""
    import mlx.core as mx

    encode, fill = (ours if program == "dgemma-mlx" else peers)(folder)
    rows, columns = grid(budget)
    pixels = np.random.default_rng(0).random((rows, columns, 16, 16, 3), np.float32)
    found = {}
    for name, work in (("tower", encode), ("prefill", fill)):
        mx.eval(work(pixels[:6, :6]))
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        began = time.process_time()
        mx.eval(work(pixels))
        found[f"{name}_cpu"] = time.process_time() - began
        found[f"{name}_peak"] = (mx.get_peak_memory() - before) / 1e6
    print(json.dumps(found))


def main() -> None:
    """Measure both programs in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="a Python interpreter with mlx-vlm")
    parser.add_argument("--runs", type=int, default=3, help="processes of each program")
    parser.add_argument("--budgets", default="70,280", help="budgets of soft tokens")
    parser.add_argument("--layers", type=int, default=8, help="layers of the tower")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        program, folder, budget = arguments.child
        child(program, Path(folder), int(budget))
        return
    programs = {"dgemma-mlx": sys.executable, **({"mlx-vlm": arguments.peer} if arguments.peer else {})}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arguments.layers)
        for budget in map(int, arguments.budgets.split(",")):
            runs: dict[str, list[dict[str, float]]] = {program: [] for program in programs}
            for _ in range(arguments.runs):
                for program, python in programs.items():
                    command = [python, __file__, "--child", program, folder, str(budget)]
                    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    runs[program].append(json.loads(out.splitlines()[-1]))
            rows, columns = grid(budget)
            print(f"\nbudget {budget}: {rows} x {columns} patches, {rows * columns // 9} soft tokens")
            for name, heading in QUANTITIES.items():
                middle = {program: median(run[name] for run in found) for program, found in runs.items()}
                cells = "  ".join(f"{program} {value:9.2f}" for program, value in middle.items())
                ratio = f"  x {middle['mlx-vlm'] / middle['dgemma-mlx']:.2f}" if "mlx-vlm" in middle else ""
                print(f"{heading:18} {cells}{ratio}", flush=True)


if __name__ == "__main__":
    main()
