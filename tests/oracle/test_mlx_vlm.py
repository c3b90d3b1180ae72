"""mlx-vlm both ways: its conversions load here and give its logits, and it loads the demo checkpoint.

Everything is computed in float32 from the same stored weights; what differs is the order of operations.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from numpy.typing import NDArray

from dgemma_mlx.config import GenerationConfig, ModelConfig
from dgemma_mlx.model.text import DiffusionGemma
from tests.model.checkpoint import flat_config, load, random_tensors, write_checkpoint

mlx_vlm: Any = pytest.importorskip("mlx_vlm")
convert: Any = pytest.importorskip("mlx_vlm.convert").convert
utils: Any = pytest.importorskip("mlx_vlm.utils")
pytestmark = pytest.mark.oracle

Logits = NDArray[np.float32]
DEMO = Path(__file__).parents[2] / "dgemma_mlx" / "demo"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
TOLERANCE = 1e-4


def own_mode(mode: str) -> dict[str, Any]:
    return {"quantize": True, "q_mode": mode, "q_group_size": None, "q_bits": None}


CONVERSIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "4 bit": {"quantize": True},  # mlx-vlm's own choice: experts and self-conditioning 4, the rest 8
    "8 bit": {"quantize": True, "q_bits": 8},
    "4 bit in groups of 32": {"quantize": True, "q_group_size": 32},
    "mixed_4_8": {"quantize": True, "quant_predicate": "mixed_4_8"},
    "mxfp4": own_mode("mxfp4"),  # again with 8-bit affine ones among them, whose entries say no mode
    "mxfp8": own_mode("mxfp8"),
    "nvfp4": own_mode("nvfp4"),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a local folder needs no network")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 source checkpoint with random weights; converting it takes a tokenizer."""
    config = flat_config()
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, config, random_tensors(config, mx.bfloat16), shards=2)
    for name in TOKENIZER:
        shutil.copy(DEMO / name, folder)
    return folder


class Peer:
    """mlx-vlm's model of a folder, in float32."""

    def __init__(self, folder: Path) -> None:
        self.model = utils.load_model(folder, lazy=True)
        self.model.update(
            tree_map(
                lambda array: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array,
                self.model.parameters(),
            )
        )

    def logits(self, prefix: mx.array, canvases: list[mx.array]) -> Logits:
        """(2, C, V) after each canvas but the last, too, is appended: without and with self-conditioning."""
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
    """The same of this package."""
    cache, found = model.new_cache(), []
    model.encode(prefix, cache)
    for canvas in canvases:
        first = model.decode(canvas, cache)
        found += [first, model.decode(canvas, cache, first / 0.6)]
        model.encode(canvas, cache)
    return np.array(mx.concatenate(found))


def some_ids(model: DiffusionGemma, prefix: int, canvas: int, avoid: int | None) -> tuple[mx.array, list[mx.array]]:
    """A prompt of ``prefix`` tokens and two canvases, without the image token's id."""
    rng = np.random.default_rng(prefix)
    allowed = np.setdiff1d(np.arange(model.config.vocab_size), [-1 if avoid is None else avoid])
    ids = mx.array(rng.choice(allowed, (1, prefix + 2 * canvas)))
    return ids[:, :prefix], [ids[:, prefix : prefix + canvas], ids[:, prefix + canvas :]]


def assert_same_logits(folder: Path, prefixes: tuple[int, ...]) -> None:
    config = ModelConfig.load(folder)
    model, peer = load(folder, mx.float32)[0], Peer(folder)
    for prefix in prefixes:
        ids = some_ids(model, prefix, config.canvas_length, config.image_token_id)
        ours, theirs = our_logits(model, *ids), peer.logits(*ids)
        assert ours.shape == (4, config.canvas_length, model.config.vocab_size)
        assert np.abs(ours - theirs).max() <= TOLERANCE
        assert np.abs(ours[0] - ours[1]).max() > 100 * TOLERANCE  # self-conditioning does something


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_give_the_logits_of_mlx_vlm(source: Path, tmp_path: Path, conversion: str) -> None:
    convert(str(source), str(tmp_path / "mlx"), trust_remote_code=False, **CONVERSIONS[conversion])
    scales = [name for name in load(tmp_path / "mlx")[1].text if name.endswith(".scales")]
    assert bool(scales) == (conversion != "bf16")
    assert_same_logits(tmp_path / "mlx", (5, 8, 21))  # within the window of 8, as long as it, longer


def test_conversion_keeps_the_settings(source: Path, tmp_path: Path) -> None:
    convert(str(source), str(tmp_path / "mlx"), trust_remote_code=False, quantize=True)
    before, after = ModelConfig.load(source), ModelConfig.load(tmp_path / "mlx")
    assert (after.text, after.canvas_length, after.vision) == (before.text, before.canvas_length, None)
    assert GenerationConfig.load(tmp_path / "mlx", after) == GenerationConfig.load(source, before)


def test_source_checkpoint_reads_the_same(source: Path) -> None:
    assert_same_logits(source, (5, 21))


@pytest.mark.parametrize("quantize", [False, True])
def test_mlx_vlm_loads_the_demo(tmp_path: Path, quantize: bool) -> None:
    folder = DEMO
    if quantize:
        folder = tmp_path / "mlx"
        convert(str(DEMO), str(folder), trust_remote_code=False, quantize=True)
    assert_same_logits(folder, (12, 100))  # shorter and longer than the window of 64


def test_mlx_vlm_reads_the_demos_tokenizer(tmp_path: Path) -> None:
    _, processor = mlx_vlm.load(str(DEMO), lazy=True)
    prompt = "<bos><|turn>user\nSort 52, 7, 31<turn|>\n<|turn>model\n"
    ids = processor.tokenizer.encode(prompt, add_special_tokens=False)
    vocabulary = json.loads((DEMO / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"]: token["id"] for token in vocabulary}
    assert ids[:2] == [special["<bos>"], special["<|turn>"]]
    assert processor.tokenizer.decode(ids) == prompt


def test_id_of_the_image_token_is_text_where_there_is_no_image(source: Path) -> None:
    """mlx-vlm embeds padding instead, also in a committed canvas that happens to hold the id."""
    config, peer = ModelConfig.load(source), Peer(source)
    model, _ = load(source, mx.float32)
    prefix, canvases = some_ids(model, 6, config.canvas_length, None)
    assert config.image_token_id
    prefix[0, 3] = config.image_token_id
    ours = our_logits(model, prefix, canvases)
    assert np.abs(ours - peer.logits(prefix, canvases)).max() > 100 * TOLERANCE
    peer.model.config.image_token_id = None
    assert np.abs(ours - peer.logits(prefix, canvases)).max() <= TOLERANCE
