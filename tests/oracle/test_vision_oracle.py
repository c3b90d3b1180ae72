"""The patches and soft tokens of pictures, compared with transformers."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageOps

from dgemma_mlx.checkpoint.config import ModelConfig
from dgemma_mlx.checkpoint.vision_config import BUDGETS, VisionConfig
from dgemma_mlx.vision.load import load_tower
from dgemma_mlx.vision.pixels import read_picture
from tests.model.checkpoint import flat_config

torch: Any = pytest.importorskip("torch")
modeling: Any = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
configuration: Any = pytest.importorskip("transformers.models.gemma4.configuration_gemma4")
processing: Any = pytest.importorskip("transformers.models.gemma4.image_processing_pil_gemma4")

pytestmark = pytest.mark.oracle

CONFIG = VisionConfig()
SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 24, "position_embedding_size": 128,
}  # fmt: skip


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return a picture of random pixels, each four times."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    generator = np.random.default_rng(width * height)
    pixels = generator.integers(0, 256, (math.ceil(height / 2), math.ceil(width / 2), channels), dtype=np.uint8)
    pixels = pixels.repeat(2, 0).repeat(2, 1)[:height, :width]
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def palette_with_transparency() -> bytes:
    return saved(noise(90, 70).quantize(16), transparency=3)


FILES = {
    "1x1": saved(noise(1, 1)),
    "20x3000": saved(noise(20, 3000)),
    "3000x20": saved(noise(3000, 20)),
    "as it is": saved(noise(768, 768)),
    "exif 6": saved(noise(120, 80), "JPEG", exif=exif(6)),
    "RGBA": saved(noise(100, 60, "RGBA")),
    "LA": saved(noise(100, 60, "LA")),
    "P": palette_with_transparency(),
    "L": saved(noise(64, 200, "L")),
    "1": saved(noise(64, 200, "L").convert("1")),
    "CMYK": saved(noise(61, 83, "CMYK"), "JPEG"),
}


def reference_patches(image: Image.Image, budget: int) -> np.ndarray[Any, Any]:
    processor = processing.Gemma4ImageProcessorPil(max_soft_tokens=budget)
    found = processor(images=ImageOps.exif_transpose(image), return_tensors="np")
    return found["pixel_values"][0], found["image_position_ids"][0], int(found["num_soft_tokens_per_image"][0])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", FILES)
def test_patches_equal_those_of_the_reference_bit_for_bit(name: str, budget: int) -> None:
    data = FILES[name]
    expected, positions, tokens = reference_patches(Image.open(io.BytesIO(data)), budget)
    picture = read_picture(data, CONFIG, budget, name)
    patches = picture.patches()
    assert np.array_equal(patches, expected[: len(patches)])
    assert (positions[len(patches) :] == -1).all()
    rows, columns = picture.grid
    grid = [(column, row) for row in range(rows) for column in range(columns)]
    assert np.array_equal(positions[: len(patches)], grid)
    assert picture.tokens == tokens


def test_grey_levels_of_16_bits_are_scaled_to_8_first() -> None:
    levels = np.random.default_rng(0).integers(0, 65_536, (60, 90)).astype(np.uint16)
    scaled = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
    expected, _, _ = reference_patches(scaled, 70)
    patches = read_picture(saved(Image.fromarray(levels)), CONFIG, 70, "grey").patches()
    assert np.array_equal(patches, expected[: len(patches)])


def reference_tower(change: dict[str, Any], text_width: int) -> tuple[Any, Any]:
    """Return the reference's tower and projection with random weights, norms and limits included."""
    config = configuration.Gemma4VisionConfig(**{**SMALL, **change})
    tower = modeling.Gemma4VisionModel(config).eval()
    text = configuration.Gemma4TextConfig(hidden_size=text_width)
    projection = modeling.Gemma4MultimodalEmbedder(config, text).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in [*tower.named_parameters(), *projection.named_parameters(), *tower.named_buffers()]:
            if name.endswith("_min"):
                weight.fill_(-1.0)
            elif name.endswith("_max"):
                weight.fill_(1.2)
            elif "inv_freq" in name:
                continue
            elif weight.ndim >= 2:
                weight.normal_(0, weight.shape[-1] ** -0.5)
            else:
                weight.normal_(1, 0.2)
    return tower, projection


def save_tower(folder: Path, change: dict[str, Any], tower: Any, projection: Any) -> ModelConfig:
    state = {f"model.encoder.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    state |= {f"model.encoder.embed_vision.{name}": tensor for name, tensor in projection.state_dict().items()}
    tensors = {name: mx.array(tensor.numpy()) for name, tensor in state.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return ModelConfig.from_dict({**flat_config(), "vision_config": {**SMALL, **change}})


@pytest.mark.parametrize(
    "change", [{}, {"standardize": True}, {"use_clipped_linears": True}, {"standardize": True, "head_dim": 72}], ids=str
)
@pytest.mark.parametrize("size", [(90, 120), (40, 3)], ids=str)
def test_soft_tokens_equal_those_of_the_reference(
    tmp_path: Path, change: dict[str, Any], size: tuple[int, int]
) -> None:
    width = flat_config()["text_config"]["hidden_size"]
    tower, projection = reference_tower(change, width)
    config = save_tower(tmp_path, change, tower, projection)
    assert config.vision is not None
    picture = read_picture(saved(noise(*size)), config.vision, 70, "noise")
    patches, positions, _ = reference_patches(noise(*size), 70)
    with torch.no_grad():
        pooled = tower(torch.tensor(patches)[None], torch.tensor(positions)[None]).last_hidden_state
        expected = projection(pooled).numpy()
    found = np.array(load_tower(tmp_path, config, mx.float32)(picture.patches(), picture.grid))
    assert found.shape == expected.shape == (picture.tokens, width)
    assert np.abs(found - expected).max() < 1e-4
