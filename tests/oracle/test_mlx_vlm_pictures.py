"""mlx-vlm reads our checkpoints with a vision tower, and gives our logits under its rule of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.generation.memory import Budget
from dgemma_mlx.generation.pictures import PictureEncoder
from dgemma_mlx.generation.prefill import prefill
from dgemma_mlx.vision.pixels import read_picture
from tests.model.checkpoint import load
from tests.oracle.peer import Peer
from tests.vision.seeing import png, write_seeing

pytestmark = pytest.mark.oracle

IMAGE, BOI, EOI = 102, 103, 104


def test_a_picture_gives_the_logits_of_mlx_vlm(tmp_path: Path) -> None:
    # mlx-vlm pads the picture's patches to this number of soft tokens.
    folder = write_seeing(tmp_path / "seeing", default_output_length=70)
    network, weights = load(folder, mx.float32)
    config = ModelConfig.load(folder)
    assert config.vision is not None and weights.vision
    network.image_attention = "transformers"
    picture = read_picture(png(), config.vision, 70, "noise")
    ids = [2, 5, 6, BOI, *[picture.key] * picture.tokens, EOI, 7, 8, 9]
    cache, canvas = network.new_cache(), mx.arange(200, 232)[None]
    encoder = PictureEncoder(folder, config, mx.float32)
    list(prefill(network, [ids], cache, Budget(), features=lambda _: encoder.features(picture)))
    ours = np.array(network.decode(canvas, cache))

    model: Any = Peer(folder).model
    plain = mx.array([[IMAGE if id < 0 else id for id in ids]])
    pixels = mx.array(picture.pixels.astype(np.float32).transpose(2, 0, 1)[None] / 255)
    theirs = model.diffusion_prefill_cache(
        plain, cache=model.make_cache(), pixel_values=pixels, mm_token_type_ids=(plain == IMAGE).astype(mx.int32)
    )
    found = np.array(model.diffusion_decoder_logits(canvas, theirs))
    assert np.abs(found - ours).max() < 1e-3
