"""mlx-vlm: its converter, and its logits of a checkpoint folder for comparison with ours.

Everything is computed in float32 from the same stored weights. Only the order of operations differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from numpy.typing import NDArray

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.model.text import DiffusionGemma
from tests.model.checkpoint import load

mlx_vlm: Any = pytest.importorskip("mlx_vlm")
_convert: Any = pytest.importorskip("mlx_vlm.convert").convert
_utils: Any = pytest.importorskip("mlx_vlm.utils")

Logits = NDArray[np.float32]
DEMO = Path(__file__).parents[2] / "dgemma_mlx" / "demo"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def peer_convert(source: Path, output: Path, **options: Any) -> Path:
    """Convert a checkpoint with mlx-vlm and return ``output``."""
    _convert(str(source), str(output), trust_remote_code=False, **options)
    return output


def own_mode(mode: str) -> dict[str, Any]:
    """Return mlx-vlm's options for a mode with a fixed group size and number of bits."""
    return {"quantize": True, "q_mode": mode, "q_group_size": None, "q_bits": None}


class _WideEmbedding(nn.QuantizedEmbedding):
    """An embedding that returns float32. Modes without biases unpack to bfloat16, which activations would inherit."""

    def __call__(self, ids: mx.array) -> mx.array:
        unpacked: mx.array = super().__call__(ids)
        return unpacked.astype(mx.float32)


class Peer:
    """mlx-vlm's model of a folder, in float32."""

    def __init__(self, folder: Path) -> None:
        self.model = _utils.load_model(folder, lazy=True)
        self.model.update(
            tree_map(
                lambda array: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array,
                self.model.parameters(),
            )
        )
        for _, module in self.model.named_modules():
            if isinstance(module, nn.QuantizedEmbedding):
                module.__class__ = _WideEmbedding

    def logits(self, prefix: mx.array, canvases: list[mx.array]) -> Logits:
        """Return the logits of all canvases, without and with self-conditioning for each: (2 * canvases, C, V).

        Each canvas is appended to the prefix of the next one.
        """
        model, found = self.model, []
        cache = model.diffusion_prefill_cache(prefix, cache=model.make_cache())
        table = model.diffusion_prepare_self_conditioning()
        for canvas in canvases:
            first = model.diffusion_decoder_logits(canvas, cache)
            signal = model.diffusion_self_conditioning(first / 0.6, table)
            found += [first, model.diffusion_decoder_logits(canvas, cache, signal)]
            cache = model.diffusion_update_cache(canvas, cache=cache)
        return np.array(mx.concatenate(found))


def our_logits(model: DiffusionGemma, prefix: mx.array, canvases: list[mx.array]) -> Logits:
    """Return what ``Peer.logits`` returns, computed by this package."""
    cache, found = model.new_cache(), []
    model.encode(prefix, cache)
    for canvas in canvases:
        first = model.decode(canvas, cache)
        found += [first, model.decode(canvas, cache, first / 0.6)]
        model.encode(canvas, cache)
    return np.array(mx.concatenate(found))


def some_ids(model: DiffusionGemma, prefix: int, canvas: int, avoid: int | None) -> tuple[mx.array, list[mx.array]]:
    """Return random ids of a prompt (1, prefix) and two canvases (1, canvas), without the id ``avoid``."""
    rng = np.random.default_rng(prefix)
    allowed = np.setdiff1d(np.arange(model.config.vocab_size), [-1 if avoid is None else avoid])
    ids = mx.array(rng.choice(allowed, (1, prefix + 2 * canvas)))
    return ids[:, :prefix], [ids[:, prefix : prefix + canvas], ids[:, prefix + canvas :]]


def assert_same_logits(folder: Path, prefixes: tuple[int, ...], tolerance: float) -> None:
    """Load a folder with both programs and check that all logits agree within ``tolerance``."""
    config = ModelConfig.load(folder)
    model, peer = load(folder, mx.float32)[0], Peer(folder)
    for prefix in prefixes:
        ids = some_ids(model, prefix, config.canvas_length, config.image_token_id)
        ours, theirs = our_logits(model, *ids), peer.logits(*ids)
        assert ours.shape == (4, config.canvas_length, model.config.vocab_size)
        assert np.abs(ours - theirs).max() <= tolerance
        assert np.abs(ours[0] - ours[1]).max() > 100 * tolerance  # self-conditioning has an effect
