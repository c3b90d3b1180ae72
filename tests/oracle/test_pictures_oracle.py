"""Pictures in the prompt, compared with transformers: encoder states, cache and logits under each rule of attention."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.config import FULL, SLIDING, ModelConfig
from dgemma_mlx.generation.memory import Budget
from dgemma_mlx.generation.pictures import PictureEncoder, soft_tokens
from dgemma_mlx.generation.prefill import prefill
from dgemma_mlx.model.cache import PrefixCache
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.soft_tokens import IMAGE_ATTENTION, ImageAttention
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.vision.pixels import Picture, read_picture
from tests.oracle.reference import CANVAS, Array, torch, transformers, write_checkpoint
from tests.vision.seeing import png

pytestmark = pytest.mark.oracle

# As in test_network.py: float32 sums in another order. The largest differences found are 3e-5.
TOLERANCE = 1e-4
IMAGE, BOI, EOI = 93, 94, 95


class Case:
    """A random checkpoint with two full layers and a vision tower, and a prompt with two pictures."""

    def __init__(self, folder: Path, window: int) -> None:
        write_checkpoint(
            folder, seed=5, sliding_window=window, num_hidden_layers=4, layer_types=[SLIDING, FULL, SLIDING, FULL]
        )
        self.window, self.config = window, ModelConfig.load(folder)
        assert self.config.vision is not None
        self.network: DiffusionGemma = load_model(folder, self.config)[0]
        self.encoder = PictureEncoder(folder, self.config, mx.float32)
        self.reference = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        sizes = ((40, 40), (60, 25))
        files = [png(seed, *size) for seed, size in enumerate(sizes)]
        self.pictures: list[Picture] = [read_picture(file, self.config.vision, 70, "noise") for file in files]
        rng = np.random.default_rng(0)
        text = [[int(id) for id in rng.integers(3, 90, count)] for count in (5, 4, 30)]
        one, other = ([BOI, *[picture.key] * picture.tokens, EOI] for picture in self.pictures)
        self.ids = [2, *text[0], *one, *text[1], *other, *text[2]]
        self.features = {picture.key: self.encoder.features(picture) for picture in self.pictures}

    def found(self, rule: ImageAttention, step: int = 4096) -> tuple[PrefixCache, Array]:
        """Return our cache of the prompt, and the logits (1, C, V) of a canvas after it."""
        self.network.image_attention = rule
        cache = self.network.new_cache()
        list(prefill(self.network, [self.ids], cache, Budget(step), features=self.features.__getitem__))
        return cache, np.array(self.network.decode(mx.array(canvas()), cache))

    def inputs(self) -> dict[str, Any]:
        """Return the prompt as the reference's processor returns it."""
        most = max(len(picture.patches()) for picture in self.pictures)
        pixels, positions = np.zeros((2, most, 768), np.float32), np.full((2, most, 2), -1)
        for number, picture in enumerate(self.pictures):
            count, (rows, columns) = len(picture.patches()), picture.grid
            pixels[number, :count] = picture.patches()
            positions[number, :count] = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
        ids = np.array([[IMAGE if id < 0 else id for id in self.ids]])
        return {
            "input_ids": torch.tensor(ids), "pixel_values": torch.tensor(pixels),
            "image_position_ids": torch.tensor(positions),
            "mm_token_type_ids": torch.tensor((ids == IMAGE).astype(int)),
        }  # fmt: skip

    def google_masks(self) -> dict[str, Any]:
        """Return the masks of the rule ``google``, position by position, as the reference's layers take them."""
        P, blocks, number = len(self.ids), [], -1
        for before, id in pairwise([0, *self.ids]):
            number += id < 0 and id != before
            blocks.append(number if id < 0 else -1)
        full = np.tri(P, dtype=bool)
        sliding = np.array([[
            (j <= i or blocks[i] == blocks[j] >= 0) and j > i - self.window for j in range(P)
        ] for i in range(P)])  # fmt: skip
        return {FULL: torch.tensor(full)[None, None], SLIDING: torch.tensor(sliding)[None, None]}

    def expected(self, rule: ImageAttention) -> tuple[Any, Array]:
        """Return the reference's cache of the prompt and its hidden states (1, P, M)."""
        encoder, inputs = self.reference.model.encoder, self.inputs()
        cache = transformers.DynamicCache(config=self.reference.config.get_text_config(decoder=True))
        positions = torch.arange(len(self.ids))[None]
        types = inputs.pop("mm_token_type_ids")
        masks = self.google_masks() if rule == "google" else encoder.create_masks_for_generate(
            config=self.reference.config, inputs_embeds=torch.empty(1, len(self.ids), 0),
            attention_mask=torch.ones(1, len(self.ids), dtype=torch.bool), cache=cache, position_ids=positions,
            mm_token_type_ids=types if rule == "transformers" else None,
        )  # fmt: skip
        with torch.no_grad():
            out = encoder(attention_mask=masks, cache=cache, position_ids=positions, **inputs)
        return cache, out.last_hidden_state.numpy()

    def decoded(self, cache: Any) -> Array:
        """Return the reference's logits (1, C, V) of the canvas after its cache."""
        end = len(self.ids) + CANVAS
        with torch.no_grad():
            masks = self.reference.model.decoder.create_diffusion_decoder_attention_mask(
                config=self.reference.config, inputs_embeds=torch.tensor(canvas())[..., None], cache=cache,
                decoder_attention_mask=torch.ones(1, end, dtype=torch.bool),
            )
            out = self.reference(
                decoder_input_ids=torch.tensor(canvas()), decoder_attention_mask=masks, cache=cache
            )
        logits: Array = out.logits.numpy()
        return logits


def canvas() -> Array:
    """Return a canvas in which the image token's id is an ordinary token."""
    ids = np.random.default_rng(1).integers(3, 90, (1, CANVAS))
    ids[0, 3] = IMAGE
    return ids


@pytest.fixture(scope="module", params=[16, 100, 1024])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("checkpoint"), request.param)


def differences(cache: PrefixCache, expected: Any) -> float:
    """Return the largest difference of cached keys and values; of sliding layers, within the window that is kept."""
    largest = 0.0
    for ours, theirs in zip(cache.layers, expected.layers, strict=True):
        for one, other in zip(ours.state(), (theirs.keys, theirs.values), strict=True):
            kept = other.numpy()[:, :, other.shape[2] - one.shape[2] :]
            largest = max(largest, float(np.abs(np.array(one) - kept).max()))
    return largest


@pytest.mark.parametrize("rule", IMAGE_ATTENTION)
def test_states_cache_and_logits_equal_those_of_the_reference(case: Case, rule: ImageAttention) -> None:
    expected, hidden = case.expected(rule)
    case.network.image_attention = rule
    ids = mx.array([[max(id, 0) for id in case.ids]])
    soft = soft_tokens([case.ids], case.features.__getitem__)
    ours = case.network.encode(ids, case.network.new_cache(), soft=soft)
    assert np.abs(np.array(ours) - hidden).max() < TOLERANCE
    cache, logits = case.found(rule)
    assert differences(cache, expected) < TOLERANCE
    assert np.abs(logits - case.decoded(expected)).max() < TOLERANCE


@pytest.mark.parametrize("step", [1, 7, 64, 65, 90])
def test_chunks_give_the_cache_of_the_reference(case: Case, step: int) -> None:
    expected, _ = case.expected("google")
    cache, logits = case.found("google", step)
    assert differences(cache, expected) < TOLERANCE
    assert np.abs(logits - case.decoded(expected)).max() < TOLERANCE


def test_the_rule_transformers_gives_the_cache_of_its_generate(case: Case) -> None:
    kept: list[Any] = []

    class EncodedError(Exception):
        pass

    def first_step(**arguments: Any) -> None:
        kept.append(arguments["cache"] if "cache" in arguments else arguments["model_kwargs"]["cache"])
        raise EncodedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case.reference, "_denoising_step", first_step)
        with pytest.raises(EncodedError):
            case.reference.generate(**case.inputs(), max_new_tokens=CANVAS)
    cache, _ = case.found("transformers")
    assert differences(cache, kept[0]) < TOLERANCE
