"""Invalid options and outputs: one clear error, and no files left behind."""

from __future__ import annotations

import resource
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from dgemma_convert import RECIPES, convert
from dgemma_mlx.errors import DgemmaError
from tests.convert.checkpoints import (
    SMALL_FILES,
    digests,
    failure,
    make_source,
    names_in,
    smallest_source,
    user_error,
)
from tests.model.odd_values import reported

# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "q5"}, "q5"),
        ({"recipe": ""}, "recipe"),
        ({"group_size": 48}, "48"),
        ({"group_size": 0}, "group size"),
        ({"group_size": -64}, "-64"),
        ({"recipe": "mixed"}, "--target-size"),
        ({"recipe": "mixed", "target_bytes": 10}, "too small"),
        ({"recipe": "mixed", "target_bytes": 0}, "too small"),
        ({"recipe": "mixed", "target_bpw": 2.9}, "too small"),
        ({"recipe": "mixed", "target_bpw": -1.0}, "target"),
        ({"recipe": "mixed", "target_bpw": float("nan")}, "target"),
        ({"recipe": "mixed", "target_bpw": float("inf")}, "target"),
        ({"recipe": "mixed", "target_bpw": 5.0, "target_bytes": 10**9}, "one of the two"),
        ({"recipe": "q4", "target_bpw": 4.5}, "mixed"),
        ({"recipe": "q8", "target_bytes": 10**9}, "mixed"),
        ({"recipe": "q4", "calibration": Path("texts")}, "calibration"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in failure(smallest_source(tmp_path / "source"), code=2, **options)


def test_error_names_all_recipes(tmp_path: Path) -> None:
    message = failure(smallest_source(tmp_path / "source"), None, "q5", code=2)
    assert all(recipe in message for recipe in RECIPES)


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"caf\xe9"], ids=["absent", "empty", "blank", "latin-1"])
def test_calibration_texts(tmp_path: Path, content: bytes | None) -> None:
    source, texts = make_source(tmp_path / "source", tokenizer=True), tmp_path / "texts"
    if content is not None:
        texts.write_bytes(content)
    assert str(texts) in failure(source, None, "mixed", target_bpw=5, calibration=texts)


@pytest.mark.parametrize("lost", ["tokenizer.json", "chat_template.jinja"])
def test_comparing_without_a_tokenizer_fails_first(tmp_path: Path, lost: str) -> None:
    source = make_source(tmp_path / "source", tokenizer=True)
    (source / lost).unlink()
    assert set(SMALL_FILES) > names_in(source) & set(SMALL_FILES)
    stages: list[str] = []
    failure(source, check=True, progress=lambda stage, done, total: stages.append(stage))
    assert stages == []
    texts = tmp_path / "texts"
    texts.write_text("sort 2 1\n")
    failure(source, None, "mixed", target_bpw=5, calibration=texts)


# The output


def test_existing_output(tmp_path: Path) -> None:
    source = smallest_source(tmp_path / "source")
    output = convert(str(source), tmp_path / "out").output
    message = failure(source, output, code=2)
    assert str(output) in message and "--force" in message
    assert "--force" in failure(source, output, resume=True, code=2)
    convert(str(source), output, "bf16", force=True)
    assert names_in(tmp_path) == {"source", "out"}
    assert digests(output) == digests(convert(str(source), tmp_path / "again" / "out", "bf16").output)


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    source = smallest_source(tmp_path / "source")
    (source / "LICENSE-of-the-old-one").touch()
    output = convert(str(source), tmp_path / "out").output
    (source / "LICENSE-of-the-old-one").unlink()
    assert "LICENSE-of-the-old-one" in names_in(output)
    convert(str(source), output, force=True)
    assert "LICENSE-of-the-old-one" not in names_in(output)
    (tmp_path / "empty").mkdir()
    convert(str(source), tmp_path / "empty", force=True)


def test_a_link_to_an_output_stays_a_link(tmp_path: Path) -> None:
    source = smallest_source(tmp_path / "source")
    output = convert(str(source), tmp_path / "disk" / "out").output
    (tmp_path / "link").symlink_to(output)
    assert convert(str(source), tmp_path / "link", "bf16", force=True).output == output
    assert (tmp_path / "link").is_symlink() and names_in(tmp_path / "disk") == {"out"}


@pytest.mark.parametrize("force", [False, True])
def test_folder_that_appears_during_the_conversion_is_kept(tmp_path: Path, force: bool) -> None:
    source, output = smallest_source(tmp_path / "source"), tmp_path / "out"

    def meanwhile(stage: str, done: int, total: int) -> None:
        output.mkdir(exist_ok=True)
        (output / "cat.jpg").write_text("miaow")

    error = reported(lambda: convert(str(source), output, force=force, progress=meanwhile))
    assert error is not None and "is not replaced" in user_error(error)
    assert (output / "cat.jpg").read_text() == "miaow"
    shutil.rmtree(output)
    convert(str(source), output, resume=True)
    assert names_in(tmp_path) == {"source", "out"}


@pytest.mark.parametrize("force", [False, True])
def test_folder_of_someone_else_is_not_replaced(tmp_path: Path, force: bool) -> None:
    source, output = smallest_source(tmp_path / "source"), tmp_path / "photos"
    output.mkdir()
    (output / "cat.jpg").write_text("miaow")
    assert str(output) in failure(source, output, force=force, code=2)
    assert str(output / "cat.jpg") in failure(source, output / "cat.jpg", force=force, code=2)
    other = smallest_source(tmp_path / "another checkpoint")  # not written by this program
    assert str(other) in failure(source, other, force=force, code=2)
    own = convert(str(source), tmp_path / "own").output
    (own / "notes.md").touch()
    assert "notes.md" in failure(source, own, force=force, code=2)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("place", [".", "inside", "inside/it", "..", "../other/../source"])
def test_output_in_and_around_the_source(tmp_path: Path, place: str, force: bool) -> None:
    source = smallest_source(tmp_path / "parent" / "source")
    assert "source" in failure(source, source / place, force=force, code=2)


def test_source_through_a_link(tmp_path: Path) -> None:
    source = smallest_source(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    failure(source, tmp_path / "link", force=True, code=2)
    failure(tmp_path / "link", source, force=True, code=2)


@pytest.mark.parametrize("output", [".", "..", "x" * 250], ids=["here", "above", "long"])
def test_output_with_an_odd_name(tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = smallest_source(tmp_path / "source")
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    error = reported(lambda: convert(str(source), output))
    assert error
    user_error(error)
    assert (names_in(here), names_in(here.parent), names_in(tmp_path)) == (set(), {"here"}, {"source", "work"})


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    source, file = smallest_source(tmp_path / "source"), tmp_path / "file"
    file.write_text("mine")
    message = failure(source, file / "out")
    assert str(file / "out") in message and "--resume" in message


def test_disk_that_is_full_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = smallest_source(tmp_path / "source")
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        message = failure(source)
    assert "free" in message and "-o" in message
    convert(str(source))


def test_disk_that_is_full_later(tmp_path: Path) -> None:
    """A limit on file sizes makes a write fail as a full disk does. The work that is done is kept."""
    source = smallest_source(tmp_path / "source")
    whole = convert(str(source), tmp_path / "whole" / "out").output
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(DgemmaError, match="writing") as caught:
            convert(str(source), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "--resume" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert digests(convert(str(source), tmp_path / "out", resume=True).output) == digests(whole)
