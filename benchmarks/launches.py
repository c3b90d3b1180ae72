"""Launches of one denoising step of the published model, counted in the graph that MLX traces. Nothing is evaluated.

    python benchmarks/launches.py [--canvas 256] [--prefix 8]

A launch is a primitive that is not a view. The network has the published model's sizes with plain bfloat16 weights,
which are never computed, and is traced as if there were a GPU. A kernel of this program and a call of ``mx.fast``
count as one launch each. (MLX's attention takes more than one where it is not fused.)

The script prints one JSON object: with references and with kernels, the launches of a whole step, those of kernels and
``mx.fast`` by name, and those of other primitives by name.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
from collections import Counter
from typing import Any

import mlx.core as mx

mx.metal.is_available = lambda: True
mx.default_device = lambda: mx.Device(mx.gpu)  # type: ignore[assignment]

from mlx.utils import tree_flatten  # noqa: E402

from dgemma_mlx.checkpoint.config import TextConfig  # noqa: E402
from dgemma_mlx.kernels import MAX_KEPT, CanvasSample, canvas_sampler  # noqa: E402
from dgemma_mlx.kernels.dispatch import set_mode  # noqa: E402
from dgemma_mlx.model.joined import join_projections  # noqa: E402
from dgemma_mlx.model.prediction import Prediction  # noqa: E402
from dgemma_mlx.model.text import DiffusionGemma  # noqa: E402

PUBLISHED: dict[str, Any] = {
    "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "hidden_size": 2816,
    "intermediate_size": 2112, "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
    "sliding_window": 1024,
}  # fmt: skip
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
FILES = (
    "attention_residual", "canvas_sampler", "moe_combine", "moe_route", "norm_residual", "qk_norm_rope",
    "sparse_soft_embedding",
)  # fmt: skip


CALLS: Counter[str] = Counter()  # launches of kernels and of mx.fast


def primitives(*arrays: mx.array) -> Counter[str]:
    """Return how often each primitive occurs in the graph of some arrays."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return Counter(re.findall(r'label ="([^"]+)", shape=rectangle', text.getvalue()))


def in_its_place(name: str, shapes: Any, dtypes: Any, inputs: list[Any]) -> list[mx.array]:
    """Count one launch, and return zeros that depend on the inputs."""
    CALLS[name] += 1
    outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    mx.eval(outputs)
    result: list[mx.array] = mx.depends(outputs, [part for part in inputs if isinstance(part, mx.array)])
    return result


def replace_kernels() -> None:
    """Put a function that counts its calls in the place of each kernel and of each function of ``mx.fast``."""
    for file in FILES:
        module = importlib.import_module(f"dgemma_mlx.kernels.{file}")
        for name in [n for n in vars(module) if n.startswith("_") and n.endswith("_kernel")]:

            def kernel(
                *, inputs: list[Any], output_shapes: Any, output_dtypes: Any, name: str = f"{file}: {name}", **_: Any
            ) -> list[mx.array]:
                return in_its_place(name, output_shapes, output_dtypes, inputs)

            setattr(module, name, kernel)
    for name in ("rms_norm", "rope", "scaled_dot_product_attention"):

        def fast(x: mx.array, *rest: Any, name: str = f"mx.fast.{name}", **options: Any) -> mx.array:
            return in_its_place(name, [x.shape], [x.dtype], [x, *rest, *options.values()])[0]

        setattr(mx.fast, name, fast)


def second_step(network: DiffusionGemma, canvas: int, prefix: int) -> Counter[str]:
    """Return the primitives of the second step after a prefix: decoder, projection and sampler.

    The first step is traced, too, because it enlarges the buffers of the keys and values.
    """
    cache = network.new_cache()
    network.encode(mx.zeros((1, prefix), mx.int32), cache)
    ids, uniforms, lists = mx.zeros((1, canvas), mx.int32), mx.zeros((1, canvas)), mx.zeros((1, canvas, MAX_KEPT))
    complete = CanvasSample(uniforms, ids, ids, ids + 1, lists.astype(mx.int32), lists, uniforms + 1)
    mx.eval(ids, uniforms, *complete)
    known = [array for _, array in tree_flatten(network.parameters())]
    for _ in range(2):
        CALLS.clear()
        before = primitives(*known)
        raw = network.project(network.decode_hidden(ids, cache, Prediction(complete)))
        known += canvas_sampler(raw, uniforms, network.config.final_logit_softcapping, 0.6)
    return primitives(*known) - before


def launches(found: Counter[str]) -> dict[str, int]:
    """Leave out the views, and sort by number."""
    return dict(Counter({name: n for name, n in found.items() if name.split()[0] not in VIEWS}).most_common())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canvas", type=int, default=256, help="positions of the canvas")
    parser.add_argument("--prefix", type=int, default=8, help="positions of the prefix")
    arguments = parser.parse_args()
    network = DiffusionGemma(TextConfig.from_dict(PUBLISHED))
    network.set_dtype(mx.bfloat16)
    network.eval()
    join_projections(network)
    replace_kernels()
    result: dict[str, Any] = {}
    for mode in ("reference", "force"):
        set_mode(mode)
        others = launches(second_step(network, arguments.canvas, arguments.prefix))
        result[mode] = {
            "launches": sum(others.values()) + CALLS.total(), "kernels": dict(CALLS.most_common()),
            "others": others,
        }  # fmt: skip
    print(json.dumps(result, indent=1))
