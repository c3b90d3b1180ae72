"""Which folders may be replaced, and that a folder is replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dgemma_mlx import files
from dgemma_mlx.checkpoint.output import check_apart, check_output, is_in, output_folder, write_fuse_report
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.files import locked_folder, recover_folder, replace_folder

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    folder = tmp_path / "fused"
    folder.mkdir()
    for name in (SHARD, "config.json", "tokenizer.json", "model.safetensors.index.json"):
        (folder / name).touch()
    write_fuse_report(folder)
    return folder


def refusal(check: Callable[[], None]) -> str:
    with pytest.raises(DgemmaError) as caught:
        check()
    assert caught.value.exit_code == 2
    return caught.value.message


def test_an_output_is_replaced_only_with_force(fused: Path) -> None:
    check_output(fused, True, [])
    assert "already exists" in refusal(lambda: check_output(fused, False, []))


def test_an_output_of_version_0_1_is_recognised(fused: Path) -> None:
    (fused / "fuse_report.json").unlink()
    record = {"made_by": "dgemma-mlx 0.1.0", "recipe": "q4", "shards": {SHARD: "0" * 64}}
    (fused / "conversion_report.json").write_text(json.dumps(record))
    (fused / "README.md").touch()
    check_output(fused, True, [])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.tex", "x"), ("model-00002-of-00002.safetensors", "x"), ("checkpoint/state.json", "{}"),
        ("adapter_model.safetensors", "x"), (".hidden", "x"), ("run.json", "{}"), ("config.json.bak", "x"),
        ("LICENSE-notes.txt", "x"), ("tokenizer-research.txt", "x"), ("README.md", "x"),
    ],
)  # fmt: skip
def test_one_unknown_entry_is_enough(fused: Path, name: str, content: str) -> None:
    (fused / name).parent.mkdir(exist_ok=True)
    (fused / name).write_text(content)
    assert name.split("/")[0] in refusal(lambda: check_output(fused, True, []))


@pytest.mark.parametrize(
    "report", ["", "[]", "{}", '{"made_by": "mlx_lm", "shards": ["%s"]}', '{"made_by": 5}', "\xe9"]
)
def test_a_report_of_someone_else_is_none(fused: Path, report: str) -> None:
    (fused / "fuse_report.json").write_bytes((report % SHARD if "%" in report else report).encode("latin-1"))
    refusal(lambda: check_output(fused, True, []))


def test_links_within_an_output_belong_to_someone_else(fused: Path, tmp_path: Path) -> None:
    (fused / "config.json").rename(tmp_path / "blob")
    (fused / "config.json").symlink_to(tmp_path / "blob")  # as in the Hub's cache
    assert "config.json" in refusal(lambda: check_output(fused, True, []))


def test_places_are_compared_by_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models")
    for output in (source, source.parent, source / "new", source / "a" / "b", tmp_path / "link",
                   tmp_path / "link" / "source", source / ".." / "source", tmp_path / "link" / "source" / "new"):
        assert "source" in refusal(lambda output=output: check_apart(output, [source])), output  # type: ignore[misc]
    for output in (tmp_path / "models" / "source2", tmp_path / "link" / "new"):
        check_apart(output, [source])
    assert is_in(tmp_path / "link" / "source" / "x", source) and not is_in(tmp_path / "x", tmp_path / "missing")
    if (tmp_path / "MODELS").exists():  # a disk that ignores the case of letters
        assert is_in(tmp_path / "MODELS" / "Source", source)
    monkeypatch.chdir(source)
    assert "current folder" in refusal(lambda: check_apart(tmp_path / "models", []))
    assert "current folder" in refusal(lambda: check_apart(output_folder(Path(".")), []))
    assert "current folder" in refusal(lambda: check_apart(output_folder(Path("..")), []))
    monkeypatch.setenv("HOME", str(tmp_path / "models"))
    monkeypatch.chdir("/")
    assert "home folder" in refusal(lambda: check_apart(tmp_path, []))


@pytest.mark.parametrize("exchanges", [True, False], ids=["one step", "two renames"])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges:  # as on disks that cannot
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "out"
    for number in range(3):
        new = tmp_path / "new"
        new.mkdir()
        (new / str(number)).touch()
        replace_folder(new, target)
        assert [path.name for path in target.iterdir()] == [str(number)]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_returns_after_a_crash_between_two_renames(fused: Path) -> None:
    fused.rename(fused.with_name(".fused.old"))
    recover_folder(fused)
    assert (fused / SHARD).exists() and not fused.with_name(".fused.old").exists()


def test_a_folder_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"

    def second() -> None:
        with locked_folder(folder):
            pass

    with locked_folder(folder), pytest.raises(DgemmaError, match="another process is writing"):
        second()
    second()


def test_a_name_that_is_not_utf_8_is_refused() -> None:
    """MLX cannot write weights to it."""
    assert "not UTF-8" in refusal(lambda: output_folder("a\udcffb"))
