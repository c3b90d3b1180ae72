"""The demo model's eyes: how pictures are drawn, how its tower is trained, and what the shipped model answers."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.generation.api import generate
from dgemma_mlx.generation.load import load
from dgemma_mlx.generation.model import Model
from dgemma_mlx.train import demo_vision
from dgemma_mlx.train.pictures import as_picture, drawn, encode_pictures, questions
from dgemma_mlx.train.score import png
from dgemma_mlx.train.tasks.look import COLOURS, GRIDS, SIZES, THINGS, TOPICS, Scene, draw, draw_scene, look
from dgemma_mlx.vision.pixels import read_picture
from dgemma_mlx.vision.tower import VisionTower

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
TEXT_SHA256 = "eecd14e1e0e76913a5d74bc86062117493dceb8b3032fa1686cf464b5b95ef68"


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


@pytest.mark.parametrize("colour", COLOURS)
def test_a_drawing_has_its_colour_on_a_pale_background(colour: str) -> None:
    rng = random.Random(colour)
    for thing in (THINGS[0], THINGS[10], THINGS[-1]):
        pixels = draw(rng, Scene(*thing, colour, "large")).astype(int)
        distances = [np.abs(pixels - anchor).max(axis=-1) for anchor in COLOURS[colour]]
        assert 0.005 < (np.min(distances, axis=0) < 50).mean() < 0.7


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
    """Ids, places and pixels of a training batch equal those of a prompt with the picture's file."""
    rng, same = random.Random(1), random.Random(1)
    pictures = drawn(rng, "train", 3)
    rows, columns = same.choice(GRIDS)
    scenes = [draw_scene(same, "train") for _ in range(3)]
    files = [png(draw(same, scene, 16 * rows, 16 * columns)) for scene in scenes]
    batch, places = questions(rng, pictures.scenes, rows * columns, demo.tokenizer, demo.template)
    for number, file in enumerate(files):
        ids = batch.ids[number].tolist()[: batch.starts[number].item()]
        text = demo.tokenizer.decode([id for id in ids if not 102 <= id <= 104])
        prompt = demo.encode_prompt(text.split("user\n")[1].split("\n")[0], images=[file])
        assert [102 if id < 0 else id for id in prompt] == ids
        standing = [place for place, row in enumerate(places[number].tolist()) if row >= 0]
        assert standing == [place for place, id in enumerate(prompt) if id < 0]
        (picture,) = prompt.pictures.values()
        assert np.array_equal(np.array(pictures.patches[number]), picture.patches())


def test_pictures_are_encoded_together_as_they_are_alone() -> None:
    mx.random.seed(0)
    tower, pictures = VisionTower(demo_vision.vision_config(), 128), drawn(random.Random(0), "train", 2)
    together = encode_pictures(tower, pictures)
    alone = mx.stack([tower(patches, pictures.grid) for patches in pictures.patches])
    assert mx.allclose(together, alone, atol=1e-4)


def test_a_stage_resumes_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_vision, "BATCH", {"see": 2})
    monkeypatch.setattr(demo_vision, "_SAVE_EVERY", 2)
    monkeypatch.setitem(demo_vision.VISION, "num_hidden_layers", 1)
    config, log = demo_vision.vision_config(), list[dict[str, Any]]()
    whole = demo_vision.see(config, 4, tmp_path / "a", log.append)
    batches = iter([*[demo_vision.drawn] * 3, None])

    def cut_off(*arguments: Any) -> Any:
        batch = next(batches)
        if batch is None:
            raise KeyboardInterrupt
        return batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(demo_vision, "drawn", cut_off)
        with pytest.raises(KeyboardInterrupt):
            demo_vision.see(config, 4, tmp_path / "b", log.append)
    again = demo_vision.see(config, 4, tmp_path / "b", log.append)
    assert mx.array_equal(whole.patch_embedder.input_proj.weight, again.patch_embedder.input_proj.weight)


def test_the_text_network_is_as_it_was() -> None:
    """The tower was trained with the text network frozen, and lies in a file of its own."""
    assert hashlib.sha256((DEMO_FOLDER / "model.safetensors").read_bytes()).hexdigest() == TEXT_SHA256
    index = json.loads((DEMO_FOLDER / demo_vision.INDEX).read_text())["weight_map"]
    text, tower = (mx.load(str(DEMO_FOLDER / name)) for name in ("model.safetensors", demo_vision.SHARD))
    assert index == dict.fromkeys(text, "model.safetensors") | dict.fromkeys(tower, demo_vision.SHARD)
    assert sum(array.nbytes for array in tower.values()) < 500_000


def test_the_shipped_configuration_is_the_trainers() -> None:
    config = json.loads((DEMO_FOLDER / "config.json").read_text())
    assert config["vision_config"] == demo_vision.VISION and config.items() >= demo_vision.TOKENS.items()
    assert json.loads((DEMO_FOLDER / "processor_config.json").read_text()) == demo_vision.PROCESSOR


@pytest.mark.parametrize("topic", TOPICS)
def test_the_demo_answers_questions_about_new_pictures(demo: Model, topic: str) -> None:
    rng = random.Random(topic)
    examples = [look(rng, "heldout", topic) for _ in range(6)]
    answers = [generate(demo, each.question, images=[png(each.pixels)], seed=0).text for each in examples]
    assert sum(answer == each.answer for answer, each in zip(answers, examples, strict=True)) >= 5


@pytest.mark.parametrize(("name", "question", "answer"), [
    ("shape", "What colour is it?", "It is black."), ("shape", "What shape is it?", "It is a triangle."),
    ("dots", "How many dots are there?", "It is 5."), ("digit", "Which digit is it?", "It is 7."),
])  # fmt: skip
def test_the_demo_answers_the_questions_of_the_documentation(
    demo: Model, name: str, question: str, answer: str
) -> None:
    assert generate(demo, question, images=[PICTURES / f"{name}.png"], seed=1).text == answer
