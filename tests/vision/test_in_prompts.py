"""Tests of images in prompts: from a message to the ids, the prefix cache, and the answer."""

from __future__ import annotations

import base64
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from dgemma_mlx import Constraint, choose, edit, fill, generate, generate_batch, load
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.events import Done
from dgemma_mlx.generation.memory import Work, run_memory
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.pictures import PictureEncoder, most_patches, soft_tokens
from dgemma_mlx.generation.prompt_cache import PromptCache
from dgemma_mlx.model.soft_tokens import ImageAttention
from tests.vision.seeing import png

QUESTION = "What is it?"
SHORT: dict[str, Any] = {"seed": 1, "max_tokens": 32}


def message(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def image(seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"type": "image", "bytes": png(seed), **more}


def test_a_picture_stands_between_the_ids_before_and_after_it(seeing: Model) -> None:
    ids = seeing.encode_prompt(QUESTION, images=[png()])
    [picture] = ids.pictures.values()
    assert picture.tokens == 64 and picture.key < 0  # 8 x 8 of 70: the picture is square
    start = ids.index(picture.key)
    assert ids[start : start + 64] == [picture.key] * 64 and ids.count(picture.key) == 64
    assert ids[start - 1] == 103 and ids[start + 64] == 104
    without = [id for id in ids if id not in (103, 104) and id >= 0]
    assert without == seeing.encode_prompt(QUESTION)


def test_path_bytes_and_base64_are_the_same_prompt_whatever_the_file_is_called(seeing: Model, tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    (tmp_path / "two").write_bytes(png())
    ways: list[Any] = [
        str(tmp_path / "one.png"), tmp_path / "two", png(), image(), {"type": "image", "path": tmp_path / "one.png"},
        {"type": "image", "base64": base64.b64encode(png()).decode()},
    ]  # fmt: skip
    prompts = [seeing.encode_prompt(QUESTION, images=[way]) for way in ways]
    prompts.append(seeing.encode_prompt([message(image(), QUESTION)]))
    assert all(prompt == prompts[0] for prompt in prompts)


def test_two_pictures_of_one_size_share_no_position(seeing: Model) -> None:
    one, other = (seeing.encode_prompt(QUESTION, images=[png(seed)]) for seed in (0, 1))
    start = one.index(103) + 1
    assert one[:start] == other[:start] and one[start] != other[start] and len(one) == len(other)


def test_a_budget_gives_a_picture_of_its_own(seeing: Model) -> None:
    small, large = (seeing.encode_prompt(QUESTION, images=[image(budget=budget)]) for budget in (70, 140))
    assert len(large) - len(small) == 121 - 64
    assert not small.pictures.keys() & large.pictures.keys()


def test_text_that_looks_like_a_marker_stays_text(seeing: Model) -> None:
    ids = seeing.encode_prompt([message("<|image|> and <|image>", image(), "<image|>")])
    assert ids.count(102) == 0 and ids.count(103) == ids.count(104) == 1
    assert "<|image|> and <|image>" in seeing.tokenizer.decode([id for id in ids if id >= 0])
    assert seeing.encode_prompt("<|image|>").pictures == {}


def test_answers_depend_on_the_picture_and_on_nothing_else(seeing: Model) -> None:
    found = [generate(seeing, QUESTION, images=[png(seed)], **SHORT) for seed in (0, 1, 0)]
    assert found[0].tokens == found[2].tokens != found[1].tokens
    assert found[0].tokens != generate(seeing, QUESTION, **SHORT).tokens


def test_pictures_of_a_batch_give_the_answers_that_they_give_alone(seeing: Model) -> None:
    images: list[Any] = [[png(0)], None, [png(1), png(2)]]
    prompts, options = ["What is it?", "Sort 7 3 5", "And these?"], {"max_tokens": 32}
    together = generate_batch(seeing, prompts, images=images, seeds=[1, 2, 3], **options)
    for prompt, own, seed, done in zip(prompts, images, (1, 2, 3), together, strict=True):
        assert generate(seeing, prompt, images=own, seed=seed, **options).tokens == done.tokens


def test_small_chunks_give_the_same_answer(seeing: Model) -> None:
    options: dict[str, Any] = {"images": [png(0), png(1)], **SHORT}
    whole = generate(seeing, QUESTION, **options)
    for step in (1, 50, 100):
        assert generate(seeing, QUESTION, prefill_step_size=step, **options).tokens == whole.tokens


def test_a_prompt_cache_is_shared_with_the_same_picture_only(seeing: Model, tmp_path: Path) -> None:
    cache, first = PromptCache(), [message(image(0), "A")]

    def ask(messages: Any) -> Done:
        return generate(seeing, messages, prompt_cache=cache, **SHORT)

    start = ask(first)
    goes_on = [*first, {"role": "assistant", "content": start.text}, message("B")]
    done = ask(goes_on)
    assert done.statistics.cached_tokens > 64
    assert done.tokens == generate(seeing, goes_on, **SHORT).tokens
    cache.save(tmp_path / "kept", seeing)
    other = ask([message(image(1), "A")])
    assert other.statistics.cached_tokens < 10
    assert other.tokens == generate(seeing, [message(image(1), "A")], **SHORT).tokens
    loaded = PromptCache.load(tmp_path / "kept", seeing)
    again = generate(seeing, goes_on, prompt_cache=loaded, **SHORT)
    assert again.tokens == done.tokens and again.statistics.cached_tokens > 64


def test_a_saved_cache_belongs_to_its_rule(seeing: Model, seeing_folder: Path, tmp_path: Path) -> None:
    cache = PromptCache()
    generate(seeing, QUESTION, images=[png()], prompt_cache=cache, **SHORT)
    cache.save(tmp_path / "kept", seeing)
    with pytest.raises(DgemmaError, match="image attention google"):
        PromptCache.load(tmp_path / "kept", load(seeing_folder, image_attention="transformers"))


@pytest.mark.parametrize("rule", ["transformers", "causal"])
def test_the_rule_is_an_option_of_the_model(seeing: Model, seeing_folder: Path, rule: ImageAttention) -> None:
    other = load(seeing_folder, image_attention=rule)
    assert other.network.image_attention == rule and seeing.network.image_attention == "google"
    with pytest.raises(DgemmaError, match="image_attention must be one of"):
        load(seeing_folder, image_attention="all")  # type: ignore[arg-type]


def test_the_tower_is_read_at_the_first_picture_and_features_are_kept(seeing_folder: Path) -> None:
    model = load(seeing_folder)
    assert isinstance(model.pictures, PictureEncoder) and model.pictures._tower is None
    generate(model, QUESTION, **SHORT)
    assert model.pictures._tower is None
    [picture] = model.encode_prompt(QUESTION, images=[png()]).pictures.values()
    features = model.pictures.features(picture)
    assert features.shape == (64, 128) and features.dtype == model.network.dtype
    [again] = model.encode_prompt("Another question", images=[png()]).pictures.values()
    assert model.pictures.features(again) is features


def test_a_configuration_without_weights_is_no_tower(seeing_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(seeing_folder, tmp_path / "stripped")
    tensors: Any = mx.load(str(seeing_folder / "model.safetensors"))
    text = {name: tensor for name, tensor in tensors.items() if "vision" not in name}
    mx.save_safetensors(str(tmp_path / "stripped" / "model.safetensors"), text)
    model = load(tmp_path / "stripped")
    assert model.config.vision is None and model.pictures is None
    with pytest.raises(DgemmaError, match="the checkpoint has no vision tower"):
        model.encode_prompt(QUESTION, images=[png()])


def test_the_work_ends_between_two_pictures(seeing_folder: Path) -> None:
    model = load(seeing_folder)
    encoder = model.pictures
    assert encoder is not None
    generate(
        model, QUESTION, images=[png(seed) for seed in range(4)], cancelled=lambda: len(encoder._features) > 0, **SHORT
    )
    assert len(encoder._features) == 1


def test_fill_edit_choose_and_constraints_see_the_picture(seeing: Model) -> None:
    by_picture = [
        (
            choose(seeing, "Which?", ["red", "blue"], images=[png(seed)], seed=1)[0].log_probability,
            fill(seeing, "It is {{fill}}.", images=[png(seed)], seed=1, candidates=2).candidates[0].score,
            edit(seeing, "Shorten it.", "a red cat", images=[png(seed)], seed=1).candidates[0].score,
        )
        for seed in (0, 1)
    ]
    assert all(one != other for one, other in zip(*by_picture, strict=True))
    constraint = Constraint.choice(["red", "blue"])
    assert generate(seeing, "Which?", images=[png()], constraint=constraint, **SHORT).text in ("red", "blue")


def test_a_canvas_may_hold_the_marker_as_an_ordinary_token(seeing: Model) -> None:
    """It is that token's embedding, in decoder and encoder: a picture stands only where the prompt has one."""
    ids = seeing.encode_prompt(QUESTION, images=[png()])
    network, canvas = seeing.network, mx.array([[102, 5, 102, 7]])
    cache = network.new_cache()
    network.encode(mx.array([[max(id, 0) for id in ids]]), cache)
    assert not mx.allclose(network.decode(canvas, cache), network.decode(mx.array([[0, 5, 0, 7]]), cache))
    assert mx.array_equal(network.embed(canvas)[0, 0], network.embed_tokens.weight[102] * 128**0.5)


def test_the_memory_of_the_tower_and_of_the_masks_is_counted(seeing_folder: Path) -> None:
    model = load(seeing_folder)
    images = [image(budget=560)]
    ids = model.encode_prompt(QUESTION, images=images)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    generate(model, QUESTION, images=images, seed=1, max_tokens=1)
    peak = mx.get_peak_memory() - before
    patches = most_patches([ids])
    assert patches == 46 * 46
    estimate = run_memory(model.config, 0, len(ids), work=Work(patches=patches))
    assert peak <= estimate <= 2 * peak
    with pytest.raises(DgemmaError, match="more than the memory limit"):
        generate(model, QUESTION, images=images, memory_limit=run_memory(model.config, 0, len(ids)) // 2)


def test_images_that_cannot_be_read_are_one_line_before_anything_is_encoded(seeing: Model, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    demo = replace(seeing, config=replace(seeing.config, vision=None), name="blind")
    cases: list[tuple[Model, Any, str]] = [
        (seeing, {"images": [tmp_path / "none.png"]}, "none.png cannot be read"),
        (seeing, {"images": [tmp_path / "text.png"]}, "text.png is not a picture"),
        (seeing, {"images": [b"hello"]}, "image 1 is not a picture"),
        (seeing, {"images": [png(), b"x"]}, "image 2 is not a picture"),
        (seeing, {"images": [png()] * 65}, "65 images are too many for a prompt"),
        (seeing, {"images": [5]}, "not an image: 5"), (seeing, {"images": "a.png"}, "images must be a list"),
        (seeing, {"images": [png()], "raw": True}, "a raw prompt is one text"),
        (demo, {"images": [png()]}, "blind reads no images: the checkpoint has no vision tower"),
    ]  # fmt: skip
    for model, options, words in cases:
        with pytest.raises(DgemmaError) as error:
            generate(model, QUESTION, **options)
        assert words in error.value.message and error.value.exit_code == 2 and error.value.hint, words


def test_a_template_that_shows_fewer_images_than_there_are_is_refused(seeing: Model) -> None:
    with pytest.raises(DgemmaError, match="the model's chat template shows 1 of 2 images"):
        seeing.encode_prompt([message("a", image(0), role="system"), message(image(1), "b")])


def test_the_same_picture_twice_in_a_row_is_two_blocks(seeing: Model) -> None:
    bare = replace(seeing, config=replace(seeing.config, boi_token_id=None, eoi_token_id=None))
    ids = bare.encode_prompt(QUESTION, images=[png(), png()])
    [key] = ids.pictures
    soft = soft_tokens([ids], lambda _: mx.zeros((64, 2)))
    assert soft is not None
    start = ids.index(key)
    assert soft.rows[0, start : start + 128].tolist() == [*range(64), *range(64)]
    assert soft.blocks[0, start : start + 128].tolist() == [0] * 64 + [1] * 64


@pytest.mark.parametrize("images", [5, "cat.png", np.zeros((2, 2)), np.zeros(0)], ids=str)
def test_what_is_not_a_list_of_images_is_refused(seeing: Model, images: Any) -> None:
    with pytest.raises(DgemmaError, match="images must be"):
        generate(seeing, QUESTION, images=images)
    with pytest.raises(DgemmaError, match="images must be"):
        generate_batch(seeing, [QUESTION, QUESTION], images=images)


@pytest.mark.parametrize("content", [5, {"text": "a"}])
def test_images_before_what_is_no_text_are_refused(seeing: Model, content: Any) -> None:
    with pytest.raises(DgemmaError, match="message 1: content must be a text"):
        generate(seeing, [{"role": "user", "content": content}], images=[png()])


def test_a_budget_is_a_whole_number(seeing: Model) -> None:
    with pytest.raises(DgemmaError, match=r"70\.0 is not the budget of an image"):
        generate(seeing, [message(image(budget=70.0))])
