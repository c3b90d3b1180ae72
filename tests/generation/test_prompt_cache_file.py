"""Prompt caches on disk: what comes back is what was written, and every other file is refused with one line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import dgemma_mlx
from dgemma_mlx import DgemmaError, Model, PromptCache, generate
from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.generation.prompt_cache_file import check_place
from tests.model.checkpoint import quantized, write_checkpoint
from tests.reuse import decoded

WINDOW = 64  # the demo model's
IDS = np.random.default_rng(0).integers(200, 768, 320).tolist()


@pytest.fixture(scope="module")
def model() -> Model:
    return dgemma_mlx.load("demo")


def encoded(model: Model, *points: int, marks: tuple[str, ...] = ("turn", "canvas")) -> PromptCache:
    """Return a cache of ``IDS`` up to the last point, with a mark at each point before it."""
    prompt_cache = PromptCache()
    cache, start = prompt_cache.reuse(model.network, IDS), 0
    for i, point in enumerate(points):
        model.network.encode(mx.array([IDS[start:point]]), cache)
        prompt_cache.append(IDS[start:point], None if i == len(points) - 1 else marks[i])
        start = point
    return prompt_cache


def reloaded(prompt_cache: PromptCache, path: Path, model: Model) -> PromptCache:
    prompt_cache.save(path, model)
    return PromptCache.load(path, model)


@pytest.mark.parametrize(
    "points",
    [
        (1,), (63,), (64,), (65,), (3, 10), (30, 50, 63), (62, 63, 64), (63, 64, 65), (64, 127, 128), (40, 150, 160),
        (10, 200, 210), (100, 120, 140), (70, 140), (70, 134, 135),
    ],
)  # fmt: skip
def test_what_was_saved_goes_on_and_goes_back_as_if_it_had_stayed(
    model: Model, tmp_path: Path, points: tuple[int, ...]
) -> None:
    """It equals the cache in memory bit for bit, and nearly a fresh one, which is encoded in other chunks."""
    stayed = encoded(model, *points)
    loaded = reloaded(stayed, tmp_path / "cache", model)
    other = (IDS[0] - 200 + 1) % 500 + 200
    prompts = [IDS[: points[-1]], IDS[: points[-1] + 9]]
    prompts += [[*IDS[:point], other, *IDS[:5]] for point in reversed(points[:-1])]
    for ids in prompts:
        known, logits = decoded(model, loaded, ids)
        expected_known, expected = decoded(model, stayed, ids)
        assert known == expected_known
        assert known in points
        np.testing.assert_array_equal(logits, expected)
        np.testing.assert_allclose(logits, decoded(model, PromptCache(), ids)[1], atol=1e-4)


def test_saved_after_going_back_and_on_again_it_holds_the_new_text(model: Model, tmp_path: Path) -> None:
    prompt_cache = encoded(model, 100, 150, 200)
    ids = [*IDS[:120], *IDS[200:290]]
    decoded(model, prompt_cache, ids)  # back to the mark at 100, and 110 more
    loaded = reloaded(prompt_cache, tmp_path / "cache", model)
    known, logits = decoded(model, loaded, ids)
    assert known == len(ids)
    np.testing.assert_array_equal(logits, decoded(model, prompt_cache, ids)[1])


def test_a_prompt_that_goes_on_encodes_only_what_is_new(model: Model, tmp_path: Path) -> None:
    """Conversations longer than the sliding window, each turn with a freshly loaded cache."""
    path = tmp_path / "cache"
    messages = [{"role": "user", "content": "Hello " * 70 + "My name is Ana."}]
    stayed, cached = PromptCache(), 0
    options: dict[str, Any] = {"max_tokens": 32, "generation": model.generation.override(max_denoising_steps=3)}
    for number, question in enumerate(("What is my name?", "Sort 7 3 5", "")):
        loaded = PromptCache.load(path, model) if number else PromptCache()
        options["seed"] = number
        fresh = generate(model, messages, **options)
        for prompt_cache in (loaded, stayed):
            answer = generate(model, messages, prompt_cache=prompt_cache, **options)
            assert answer.tokens == fresh.tokens
            assert answer.statistics.cached_tokens == cached
        loaded.save(path, model)
        cached = len(model.encode_prompt(messages))
        assert cached > WINDOW
        messages += [{"role": "assistant", "content": fresh.text}, {"role": "user", "content": question}]


def test_a_file_that_holds_it_already_is_not_written_again(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    prompt_cache = encoded(model, 20, 30)
    prompt_cache.save(path, model)
    written = path.stat().st_ino
    for one in (prompt_cache, PromptCache.load(path, model)):
        decoded(model, one, IDS[:30])
        one.save(path, model)
        assert path.stat().st_ino == written
        decoded(model, one, IDS[:31])
        one.save(path, model)
        assert path.stat().st_ino != written
        written = path.stat().st_ino
    prompt_cache.save(tmp_path / "elsewhere", model)
    assert (tmp_path / "elsewhere").read_bytes() != b""


def test_an_empty_cache_leaves_no_file(model: Model, tmp_path: Path) -> None:
    prompt_cache = PromptCache()
    prompt_cache.save(tmp_path / "cache", model)
    prompt_cache.reuse(model.network, IDS)
    prompt_cache.save(tmp_path / "cache", model)
    assert list(tmp_path.iterdir()) == []


def test_other_programs_can_read_it(model: Model, tmp_path: Path) -> None:
    encoded(model, 100, 120, 140).save(tmp_path / "cache", model)
    tensors, metadata = mx.load(str(tmp_path / "cache"), format="safetensors", return_metadata=True)
    assert tensors["ids"].tolist() == IDS[:140]
    assert metadata["model"] == "demo"
    assert tensors["layers.5.keys"].shape == (1, 1, 140, 64)
    assert tensors["layers.0.keys"].shape == (1, 2, 63 + 20 + 20, 32)  # positions in several windows are stored once


@contextmanager
def interrupted_after(calls: int) -> Iterator[None]:
    """Raise KeyboardInterrupt after a number of Python function calls."""
    left = calls

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal left
        left -= event == "call"
        if left == 0:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("seed", range(16))
def test_interrupted_anywhere_what_is_saved_is_exact(model: Model, tmp_path: Path, seed: int) -> None:
    path = tmp_path / "cache"
    prompt_cache = encoded(model, 70, 80)
    ids = [*IDS[:75], *IDS[200:290]]
    for calls in random.Random(seed).sample(range(1, 2500), 2):
        try:
            with interrupted_after(calls):
                cache = prompt_cache.reuse(model.network, ids)
                for start in range(cache.offset, len(ids), 40):
                    part = ids[start : start + 40]
                    model.network.encode(mx.array([part]), cache)
                    prompt_cache.append(part, mark="canvas")
        except KeyboardInterrupt:
            pass
        prompt_cache.save(path, model)
        for one in (PromptCache.load(path, model), prompt_cache):
            known, logits = decoded(model, one, [*ids, 300])
            assert known in {70, 110, 150, 165, 166}
            np.testing.assert_allclose(logits, decoded(model, PromptCache(), [*ids, 300])[1], atol=1e-4)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the demo model's folder that a test may change."""
    return Path(shutil.copytree(DEMO_FOLDER, tmp_path / "copy"))


def weights(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        found |= loaded
    return found


def rewritten(folder: Path, tensors: dict[str, mx.array], **options: Any) -> Model:
    """The model of a folder whose weights are replaced."""
    mx.eval(tensors)
    for name in ("model.safetensors.index.json", "model-vision.safetensors"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text()) | options.pop("config", {})
    write_checkpoint(folder, config, tensors, **options)
    return dgemma_mlx.load(folder)


def refused(path: Path, model: Model) -> str:
    """Return the error message; the file must stay as it was."""
    before = path.read_bytes()
    with pytest.raises(DgemmaError) as caught:
        PromptCache.load(path, model)
    assert caught.value.hint and "\n" not in caught.value.message + caught.value.hint
    assert len(caught.value.message) < 600
    assert path.read_bytes() == before
    return caught.value.message


@pytest.fixture
def saved(model: Model, tmp_path: Path) -> Path:
    """A file of a turn, a canvas and some more, longer than the window."""
    path = tmp_path / "saved.cache"
    encoded(model, 5, 72, 80).save(path, model)
    return path


def test_the_same_weights_elsewhere_are_the_same_model(saved: Path, copy: Path) -> None:
    other = rewritten(copy, weights(copy), shards=3)
    known, _ = decoded(other, PromptCache.load(saved, other), IDS[:90])
    assert known == 80


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.3.self_attn.v_proj.weight", "layers.5.layer_scalar"])
def test_a_trained_twin_is_another_model(saved: Path, copy: Path, name: str) -> None:
    tensors = weights(copy)
    tensors[f"model.decoder.{name}"] *= 1.01
    assert "to other weights of 'demo'" in refused(saved, rewritten(copy, tensors))


def test_a_changed_architecture_is_another_model(saved: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["sliding_window"] = 32
    assert "another model" in refused(saved, rewritten(copy, weights(copy), config=config))


def test_packed_weights_are_another_model_and_unpacking_them_another_way(saved: Path, copy: Path) -> None:
    scheme = {"group_size": 64, "bits": 8, "mode": "affine"}
    packed, _ = quantized(weights(copy), lambda path: scheme if "experts" in path and "router" not in path else None)
    assert "another model" in refused(saved, rewritten(copy, packed, config={"quantization": scheme}))
    unpacked, as_it_is = (dgemma_mlx.load(copy, cpu_dequantize=choice) for choice in ("on", "off"))
    path = saved.with_name("packed.cache")
    encoded(unpacked, 20, 30).save(path, unpacked)
    if mx.default_device() == mx.Device(mx.cpu):
        assert "was computed with" in refused(path, as_it_is)
    assert decoded(unpacked, PromptCache.load(path, unpacked), IDS[:40])[0] == 30
    half = dgemma_mlx.load(copy, cpu_dequantize="on", dtype=mx.bfloat16)
    assert "was computed with" in refused(path, half)
    assert decoded(half, reloaded(encoded(half, 30), path, half), IDS[:40])[0] == 30


def test_only_the_model_that_filled_it_can_save_it(model: Model, tmp_path: Path) -> None:
    prompt_cache = encoded(model, 10)
    with pytest.raises(DgemmaError, match="another model"):
        prompt_cache.save(tmp_path / "cache", dgemma_mlx.load("demo"))


def test_a_truncated_file_is_damaged(saved: Path, model: Model) -> None:
    whole = saved.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 7, 8, 9, 100, len(whole) - 32, len(whole) - 1, *rng.sample(range(len(whole)), 20)]:
        saved.write_bytes(whole[:length])
        assert "damaged" in refused(saved, model)
    saved.write_bytes(whole + b"\0")
    assert "damaged" in refused(saved, model)


@pytest.mark.parametrize("seed", range(4))
def test_no_flipped_bit_goes_unseen(saved: Path, model: Model, seed: int) -> None:
    whole = saved.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(seed)
    places = rng.sample(range(header), 40) + rng.sample(range(header, len(whole)), 4)
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        saved.write_bytes(changed)
        refused(saved, model)


def forge(path: Path, change: Callable[[dict[str, Any], bytearray], object]) -> None:
    """Change header and data, and correct the digest."""
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8:start]), bytearray(whole[start:-32])
    change(header, data)
    text = json.dumps(header).encode()
    body = struct.pack("<Q", len(text)) + text + data
    path.write_bytes(body + hashlib.sha256(body).digest())


def set_marks(marks: object) -> Callable[[dict[str, Any], bytearray], object]:
    return lambda header, data: header["__metadata__"].update(marks=json.dumps(marks))


def set_entry(name: str, **values: object) -> Callable[[dict[str, Any], bytearray], object]:
    return lambda header, data: header[name].update(values)


def set_id(value: int) -> Callable[[dict[str, Any], bytearray], object]:
    return lambda header, data: struct.pack_into("<q", data, 8 * 17, value)


FORGERIES: dict[str, Callable[[dict[str, Any], bytearray], object]] = {
    "id out of the vocabulary": set_id(768),
    "no ids": set_entry("ids", shape=[0], data_offsets=[0, 0]),
    "fewer ids": set_entry("ids", shape=[79]),
    "a negative count": set_entry("ids", shape=[-80]),
    "a count that is none": set_entry("ids", shape=[True]),
    "a count with a fraction": set_entry("ids", shape=[80.5]),
    "a huge count": set_entry("ids", shape=[1 << 62], data_offsets=[0, 1 << 64]),
    "more than the model's positions": set_entry("ids", shape=[4097]),
    "ids of two dimensions": set_entry("ids", shape=[80, 1]),
    "ids that are floats": set_entry("ids", dtype="F32"),
    "a mark after the end": set_marks({"turn": 81}),
    "a mark at 0": set_marks({"turn": 0}),
    "a mark below 0": set_marks({"turn": -3}),
    "a mark too few": set_marks({"canvas": 72}),
    "a mark that is true": set_marks({"turn": True}),
    "a mark that is a float": set_marks({"turn": 40.0, "canvas": 72}),
    "marks that are a list": set_marks([40, 72]),
    "marks that are a number": set_marks(3),
    "marks that are not JSON": lambda header, data: header["__metadata__"].update(marks="{"),
    "deep marks": lambda header, data: header["__metadata__"].update(marks="[" * 100_000),
    "marks that are not a string": lambda header, data: header["__metadata__"].update(marks={"turn": 40}),
    "no marks": lambda header, data: header["__metadata__"].pop("marks"),
    "no metadata": lambda header, data: header.pop("__metadata__"),
    "metadata of another kind": lambda header, data: header.update(__metadata__=[1]),
    "no format": lambda header, data: header["__metadata__"].pop("format"),
    "another format": lambda header, data: header["__metadata__"].update(format="mlx"),
    "a format without a number": lambda header, data: header["__metadata__"].update(format="dgemma-mlx prompt cache x"),
    "a layer is missing": lambda header, data: header.pop("layers.2.keys"),
    "a layer too many": lambda header, data: header.update({"layers.6.keys": header["layers.5.keys"]}),
    "an unknown tensor": lambda header, data: header.update(extra=header["ids"]),
    "other heads": set_entry("layers.0.keys", shape=[1, 1, 80, 64]),
    "two rows": set_entry("layers.5.values", shape=[2, 1, 40, 64]),
    "no shape": lambda header, data: header["layers.0.keys"].pop("shape"),
    "a shape that is none": set_entry("layers.0.keys", shape="1, 2, 80, 32"),
    "a negative shape": set_entry("layers.0.keys", shape=[-1, -2, 80, 32]),
    "another dtype": set_entry("layers.0.keys", dtype="I32"),
    "an unknown dtype": set_entry("layers.0.keys", dtype="F7"),
    "overlapping data": lambda header, data: header["layers.5.keys"].update(
        data_offsets=header["layers.5.values"]["data_offsets"]
    ),
    "data before the beginning": set_entry("layers.0.keys", data_offsets=[-20480, 0]),
    "an entry that is a list": lambda header, data: header.update({"layers.0.keys": []}),
    "more data": lambda header, data: data.extend(b"\0" * 64),
    "less data": lambda header, data: data.__delitem__(slice(-64, None)),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_is_refused(saved: Path, model: Model, name: str) -> None:
    forge(saved, FORGERIES[name])
    message = refused(saved, model)
    assert "damaged" in message and str(saved) in message


def test_forging_alone_changes_nothing(saved: Path, model: Model) -> None:
    forge(saved, lambda header, data: None)
    assert decoded(model, PromptCache.load(saved, model), IDS[:80])[0] == 80
    forge(saved, set_id(IDS[0]))  # only the digest could detect this change, and it is corrected
    assert decoded(model, PromptCache.load(saved, model), IDS[:80])[0] == 5  # the mark before it


def test_a_newer_format_asks_for_a_newer_program(saved: Path, model: Model) -> None:
    forge(saved, lambda header, data: header["__metadata__"].update(format="dgemma-mlx prompt cache 3", marks="?"))
    assert "newer" in refused(saved, model)


def test_an_older_format_is_said_to_be_older(saved: Path, model: Model) -> None:
    forge(saved, lambda header, data: header["__metadata__"].update(format="dgemma-mlx prompt cache 1", marks="?"))
    assert "older" in refused(saved, model)


@pytest.mark.parametrize("content", [b"", b"text\n", b"\xff" * 50, b"\2" + b"\0" * 7 + b"[]", b"\1" + b"\0" * 7 + b"7"])
def test_other_files_are_not_prompt_caches(tmp_path: Path, model: Model, content: bytes) -> None:
    path = tmp_path / "cache"
    path.write_bytes(content)
    assert "is not a prompt cache" in refused(path, model)


def test_a_model_is_not_a_prompt_cache(copy: Path, model: Model) -> None:
    assert "is not a prompt cache" in refused(copy / "model.safetensors", model)


def test_what_is_not_a_file_is_neither_read_nor_replaced(model: Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    prompt_cache = encoded(model, 10)
    for path in (tmp_path, tmp_path / "pipe"):
        for act in (lambda p: PromptCache.load(p, model), lambda p: prompt_cache.save(p, model), check_place):
            with pytest.raises(DgemmaError, match="is not a file"):
                act(path)
    with pytest.raises(DgemmaError, match="No such file"):
        PromptCache.load(tmp_path / "missing", model)


def test_a_place_that_cannot_be_written_is_known_beforehand(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "cache", tmp_path / ("x" * 300)):
        with pytest.raises(DgemmaError, match="cannot write"):
            check_place(path)
        with pytest.raises(DgemmaError, match="cannot write"):
            encoded(model, 10).save(path, model)
    check_place(tmp_path / "new" / "cache")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("most", [100, 5_000, 100_000])
def test_where_writing_fails_midway_the_old_file_stays(saved: Path, model: Model, most: int) -> None:
    before = saved.read_bytes()
    assert len(before) > most
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(DgemmaError, match="cannot write") as caught:
            encoded(model, 200).save(saved, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.hint
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("content", [b"ten years of work", b"\x00" * 100])
def test_a_file_of_someone_else_is_not_replaced(tmp_path: Path, model: Model, content: bytes) -> None:
    path = tmp_path / "thesis"
    path.write_bytes(content)
    with pytest.raises(DgemmaError, match="is not a prompt cache"):
        encoded(model, 20).save(path, model)
    with pytest.raises(DgemmaError, match="is not a prompt cache"):
        check_place(path)
    assert path.read_bytes() == content
    path.write_bytes(b"")  # as tempfile makes it
    encoded(model, 20).save(path, model)
    assert PromptCache.load(path, model) is not None
