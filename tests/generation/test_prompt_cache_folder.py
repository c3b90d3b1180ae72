"""Prompt caches that outlive a run: what is read again, what is left out, and what is deleted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

import dgemma_mlx
from dgemma_mlx import DgemmaError, Model, PromptCache
from dgemma_mlx.generation.prompt_cache_folder import PromptCacheFolder


@pytest.fixture(scope="module")
def model() -> Model:
    return dgemma_mlx.load("demo")


def encoded(model: Model, ids: Sequence[int]) -> PromptCache:
    """A prompt cache that holds these ids."""
    prompt_cache = PromptCache()
    with prompt_cache.lease():
        model.network.extend(mx.array([ids]), prompt_cache.reuse(model.network, ids))
        prompt_cache.append(ids)
    return prompt_cache


def folder_in(path: Path, lines: list[str] | None = None, count: int = 3) -> PromptCacheFolder:
    return PromptCacheFolder(path, count, [].append if lines is None else lines.append)


def names(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}


def test_what_was_written_is_read_in_the_same_order_and_for_the_owner_only(model: Model, tmp_path: Path) -> None:
    prompts = [[200 + number] * 9 for number in range(3)]
    first = folder_in(tmp_path / "new" / "caches")
    first.write(model, [encoded(model, ids) for ids in prompts])
    assert (tmp_path / "new" / "caches").stat().st_mode & 0o077 == 0
    first.close()
    again = folder_in(tmp_path / "new" / "caches")
    read = again.read(model)
    assert [list(cache.ids) for cache in read] == prompts
    again.write(model, [read[2], read[0]])
    assert [list(cache.ids) for cache in again.read(model)] == [prompts[2], prompts[0]]


def test_a_file_that_holds_it_already_is_not_written_again_unless_it_was_deleted(model: Model, tmp_path: Path) -> None:
    folder, cache = folder_in(tmp_path), encoded(model, [200, 201])
    folder.write(model, [cache])
    (path,) = tmp_path.iterdir()
    before = path.stat().st_ino
    folder.write(model, [cache])
    assert path.stat().st_ino == before
    path.unlink()
    folder.write(model, [cache])
    assert path.exists()


def test_damaged_and_foreign_files_are_one_line_each_and_the_others_are_read(model: Model, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = folder_in(tmp_path, lines, count=9)
    folder.write(model, [encoded(model, [200 + number] * 9) for number in range(3)])
    paths = sorted(tmp_path.iterdir())
    start = paths[0].name[:17]
    paths[0].write_bytes(paths[0].read_bytes()[:-50])
    (tmp_path / f"{start}{'0' * 16}.prompt").write_bytes(b"something else")
    (tmp_path / f"{start}{'1' * 16}.prompt").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / f".{start}{'2' * 16}.prompt.123").write_bytes(b"unfinished")
    good = folder.read(model)
    assert len(good) == 2 and len(lines) == 3 and all("\n" not in line for line in lines), lines
    folder.write(model, good)
    assert names(tmp_path) == {paths[1].name, paths[2].name, "notes.txt", f"{start}{'1' * 16}.prompt"}


def test_old_files_are_deleted_but_a_few_of_other_models_stay(model: Model, tmp_path: Path) -> None:
    folder = folder_in(tmp_path, count=2)
    for number in range(4):
        other = tmp_path / f"{'0' * 16}-{number:016}.prompt"
        other.write_bytes(b"of another model")
        os.utime(other, ns=(number, number))
    folder.write(model, [encoded(model, [200]), encoded(model, [201])])
    folder.write(model, [encoded(model, [202]), encoded(model, [203])])
    assert [list(cache.ids) for cache in folder.read(model)] == [[202], [203]]
    assert names(tmp_path) >= {f"{'0' * 16}-{number:016}.prompt" for number in (2, 3)}
    assert len(names(tmp_path)) == 4


def test_a_file_of_another_dtype_is_left_out(model: Model, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = folder_in(tmp_path, lines)
    folder.write(model, [encoded(model, [200, 201])])
    half = dgemma_mlx.load("demo", dtype=mx.float16)
    assert folder.read(half) == [] and len(lines) == 1 and "computed with" in lines[0]
    assert folder.read(replace(model, name="another name")) != []


def test_a_folder_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DgemmaError, match="cannot be used"):
            folder_in(path)
    first = folder_in(tmp_path / "folder")
    with pytest.raises(DgemmaError, match="another process"):
        folder_in(tmp_path / "folder")
    first.close()
    folder_in(tmp_path / "folder").close()


def test_a_folder_that_is_lost_meanwhile_is_a_line_of_the_log(model: Model, tmp_path: Path) -> None:
    lines: list[str] = []
    folder = folder_in(tmp_path / "caches", lines)
    (tmp_path / "caches").rmdir()
    (tmp_path / "caches").write_text("a file")
    folder.write(model, [encoded(model, [200])])
    assert folder.read(model) == []
    assert lines and all("\n" not in line for line in lines)
