"""The demo model's eyes: how pictures are drawn, how the tower is trained on them, and what the shipped model answers."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.generation.api import generate, load
from dgemma_mlx.generation.model import Model
from dgemma_mlx.train import demo_vision
from dgemma_mlx.train.pictures import as_picture, drawn, encode_pictures, questions, soft_tokens
from dgemma_mlx.train.score import png
from dgemma_mlx.train.tasks.look import COLOURS, GRIDS, SIZES, THINGS, TOPICS, Scene, draw, draw_scene, look
from dgemma_mlx.vision.pixels import read_picture

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
TEXT_SHA256 = "TEXTHASH"


@pytest.fixture(scope="module")
def demo() -> Model:
    return load("demo")


@pytest.mark.parametrize("topic", TOPICS)
def test_the_same_numbers_draw_the_same_picture(topic: str) -> None:
    one, same, other = (look(random.Random(seed), "train", topic) for seed in (1, 1, 2))
    assert np.array_equal(one.pixels, same.pixels) and (one.question, one.answer) == (same.question, same.answer)
    assert not np.array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize("grid", sorted(set(GRIDS)))
def test_a_picture_has_the_size_that_it_is_resized_to(grid: tuple[int, int]) -> None:
    """So training sees the pixels that the tower gets for the picture's file."""
    config = demo_vision.vision_config()
    example = look(random.Random(3), "train", "digit", grid)
    read = read_picture(png(example.pixels), config, config.default_budget, "picture")
    assert read.grid == grid and np.array_equal(read.pixels, example.pixels)
    assert np.array_equal(as_picture(example.pixels).patches(), read.patches())


def test_training_never_draws_what_is_held_out() -> None:
    scenes = [Scene(*thing, colour, size) for thing in THINGS for colour in COLOURS for size in SIZES]
    heldout = {scene for scene in scenes if scene.split == "heldout"}
    assert all(sum((scene.kind, scene.value) == thing for scene in heldout) == 2 for thing in THINGS)
    assert {scene.colour for scene in heldout} == set(COLOURS) and {scene.size for scene in heldout} == set(SIZES)
    rng = random.Random(0)
    assert {draw_scene(rng, "train") for _ in range(5000)} == set(scenes) - heldout
    assert {draw_scene(rng, "heldout") for _ in range(500)} == heldout


@pytest.mark.parametrize("thing", THINGS, ids=" ".join)
def test_a_drawing_has_its_colour_on_a_pale_background(thing: tuple[str, str]) -> None:
    rng = random.Random(0)
    for colour, anchors in COLOURS.items():
        pixels = draw(rng, Scene(*thing, colour, "large")).astype(int)
        distances = [np.abs(pixels - anchor).max(axis=-1) for anchor in anchors]
        share = (np.min(distances, axis=0) < 50).mean()
        assert 0.005 < share < 0.7


def test_dots_do_not_touch() -> None:
    rng = random.Random(0)
    for count in range(1, 7):
        pixels = draw(rng, Scene("count", str(count), "black", "large"))
        dark = pixels.max(axis=-1) < 90
        seen = 0
        while dark.any():
            seen += 1
            todo = [tuple(np.argwhere(dark)[0])]
            while todo:
                y, x = todo.pop()
                if 0 <= y < dark.shape[0] and 0 <= x < dark.shape[1] and dark[y, x]:
                    dark[y, x] = False
                    todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        assert seen == count


def test_a_batch_is_what_inference_sees(demo: Model) -> None:
    """Ids, places and features of a training batch equal those of a prompt with the picture's file."""
    assert demo.pictures is not None
    rng, numbers = random.Random(1), random.Random(1)
    pictures = drawn(rng, "train", 3)
    grid = numbers.choice(GRIDS)
    scenes = [draw_scene(numbers, "train") for _ in range(3)]
    files = [png(draw(numbers, scene, grid[0] * 16, grid[1] * 16)) for scene in scenes]
    tower = demo.pictures
    batch, rows = questions(rng, pictures.scenes, grid[0] * grid[1], demo.tokenizer, demo.template)
    for number, file in enumerate(files):
        ids = batch.ids[number].tolist()[: batch.starts[number].item()]
        text = demo.tokenizer.decode([id for id in ids if not 102 <= id <= 104])
        question = text.split("user\n")[1].split("\n")[0]
        prompt = demo.encode_prompt(question, images=[file])
        places = [place for place, id in enumerate(prompt) if id < 0]
        assert [place for place, row in enumerate(rows[number].tolist()) if row >= 0] == places
        assert [102 if id < 0 else id for id in prompt] == ids
        (picture,) = prompt.pictures.values()
        assert np.array_equal(np.array(pictures.patches[number]), picture.patches())
    features = mx.stack([tower.features(as_picture(draw_again)) for draw_again in _pixels(files)])
    assert soft_tokens(features, rows).features.shape == (3 * grid[0] * grid[1], 128)


def _pixels(files: list[bytes]) -> list[np.ndarray]:
    config = demo_vision.vision_config()
    return [read_picture(file, config, 70, "picture").pixels for file in files]


def test_a_stage_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_vision, "BATCH", {"see": 2})
    monkeypatch.setattr(demo_vision, "_SAVE_EVERY", 2)
    monkeypatch.setitem(demo_vision.VISION, "num_hidden_layers", 1)
    config, log = demo_vision.vision_config(), []
    whole = demo_vision.see(config, 4, tmp_path / "a", log.append)

    class Stop(Exception):
        pass

    def stop(rng: random.Random, *_: object) -> None:
        raise Stop

    original = demo_vision.drawn
    calls = iter([original, original, original, stop])
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(demo_vision, "drawn", lambda *arguments: next(calls)(*arguments))
        demo_vision.see(config, 4, tmp_path / "b", log.append)
    again = demo_vision.see(config, 4, tmp_path / "b", log.append)
    assert mx.array_equal(whole.colours.weight, again.colours.weight)
