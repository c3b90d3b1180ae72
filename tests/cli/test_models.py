"""Checkpoints in the Hub's cache are listed, and removed only when the user asks for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.terminal import Terminal

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(cache: Path, *arguments: str, variable: str = "HF_HUB_CACHE") -> subprocess.CompletedProcess[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DGEMMA_"))}
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", "models", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=60, env={**inherited, variable: str(cache), "HF_HUB_OFFLINE": "1"}, check=False,
    )


def put(cache: Path, repo_id: str, config: str, size: int, kind: str = "models") -> Path:
    """Write a repository as the Hub's library does: blobs, and a snapshot that links to them.

    All have the same commit, as forks do.
    """
    folder = cache / f"{kind}--{repo_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    files = {"config.json": config.encode(), "tokenizer.json": b"{}", "model.safetensors": b"\1" * size}
    for name, content in files.items():
        (folder / "blobs" / name).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    return folder


OURS = json.dumps({"model_type": "diffusion_gemma"})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    put(folder, "owner/two", OURS, 3_000_000)
    put(folder, "owner/one", OURS, 1_000_000)
    put(folder, "owner/other", json.dumps({"model_type": "gemma4"}), 1000)
    put(folder, "owner/broken", "{", 1000)
    put(folder, "owner/list", "[]", 1000)
    put(folder, "owner/data", OURS, 1000, kind="datasets")
    return folder


def test_ours_are_listed_with_their_sizes(cache: Path) -> None:
    done = run(cache)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines() == ["owner/one  1.0 MB", "owner/two  3.0 MB"]
    listed = json.loads(run(cache, "--json").stdout)
    assert [model["name"] for model in listed] == ["owner/one", "owner/two"]
    assert 0 <= listed[0]["bytes"] - 1_000_000 < 50_000  # in blocks of the disk
    assert listed[0]["state"] == "whole"
    assert Path(listed[0]["folder"]) == cache / "models--owner--one"


def test_the_cache_is_found_by_hf_home_too(cache: Path) -> None:
    assert run(cache.parent, variable="HF_HOME").stdout.count(b"\n") == 2


@pytest.mark.parametrize("made", [True, False])
def test_an_empty_cache(tmp_path: Path, made: bool) -> None:
    cache = tmp_path / "hub"
    if made:
        cache.mkdir()
    done = run(cache)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"no checkpoint is in the cache" in done.stderr
    if not made:
        assert json.loads(run(cache, "--json").stdout) == []
        assert run(cache, "rm", "-y", "owner/one").returncode == 1


def test_removing_takes_the_named_ones_alone(cache: Path) -> None:
    done = run(cache, "rm", "-y", "owner/one")
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"removed owner/one, 1.0 MB" in done.stderr
    assert not (cache / "models--owner--one").exists()
    assert run(cache).stdout == b"owner/two  3.0 MB\n"
    assert (cache / "models--owner--other").exists() and (cache / "datasets--owner--data").exists()


def test_damage_elsewhere_in_the_cache_is_no_obstacle_to_removing(cache: Path) -> None:
    """Nor are a name of a commit that is not there and a link to nothing, as an interrupted download leaves them."""
    (cache / "models--owner--other" / "refs" / "main").write_bytes(b"\xff")
    (cache / "models--owner--two" / "refs" / "main").write_text("0" * 40)
    (cache / "models--owner--one" / "blobs" / "model.safetensors").unlink()
    done = run(cache, "rm", "-y", "owner/one", "owner/two")
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    assert done.stderr.startswith(b"removed owner/one, owner/two")
    assert not (cache / "models--owner--one").exists() and not (cache / "models--owner--two").exists()
    assert (cache / "models--owner--other").exists()


def test_names_from_outside_are_harmless_on_the_terminal(cache: Path) -> None:
    put(cache, "owner/a\x1b[31mb\udcff", OURS, 1000)
    (line,) = (line for line in run(cache).stdout.decode().splitlines() if line.startswith("owner/a"))
    assert line.startswith("owner/a\u241b[31mb\ufffd")
    done = run(cache, "rm", "-y", "owner/a\x1b[31mb\udcff")
    assert done.returncode == 0 and b"removed owner/a\xe2\x90\x9b[31mb" in done.stderr, done.stderr


def begin(cache: Path, repo_id: str, total: int, arrived: int) -> None:
    """Write a repository of which only the configuration, and perhaps a part of the weights, has arrived."""
    folder = put(cache, repo_id, OURS, 0)
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / "snapshots" / COMMIT / name).unlink()
        (folder / "blobs" / name).unlink()
    listed = {"config.json": {"size": len(OURS), "blob_id": "config.json"},
              "model.safetensors": {"size": 134, "blob_id": "b", "lfs_sha256": "weights", "lfs_size": total},
              "README.md": {"size": 10**9, "blob_id": "c"}}  # fmt: skip
    (folder / "trees").mkdir()
    (folder / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    if arrived:
        (folder / "blobs" / "weights.incomplete").write_bytes(b"\1" * arrived)


def test_parts_and_descriptions_are_shown_as_such_and_removed(cache: Path) -> None:
    begin(cache, "owner/part", 4_000_000, 1_500_000)
    begin(cache, "owner/description", 4_000_000, 0)
    shown = dict(line.split(maxsplit=1) for line in run(cache).stdout.decode().splitlines())
    assert shown["owner/one"] == "1.0 MB"
    assert shown["owner/part"] == "1.5 MB of 4.0 MB, `dgemma-mlx pull owner/part` continues"
    assert shown["owner/description"] == "33 bytes of 4.0 MB, a description without weights"
    listed = {model["name"]: model for model in json.loads(run(cache, "--json").stdout)}
    assert [listed[f"owner/{name}"]["state"] for name in ("part", "description")] == ["partial", "description"]
    assert (listed["owner/part"]["arrived"], listed["owner/part"]["total"]) == (1_500_033, 4_000_033)
    done = run(cache, "rm", "-y", "owner/part", "owner/description")
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    assert b"removed owner/part, owner/description, 1.5 MB" in done.stderr
    assert not (cache / "models--owner--part").exists() and not (cache / "models--owner--description").exists()


def test_a_truncated_file_and_a_part_that_is_too_long_are_no_whole_model(cache: Path) -> None:
    """As ``pull`` does, which downloads both again."""
    for repo_id in ("owner/one", "owner/two"):
        folder = cache / f"models--{repo_id.replace('/', '--')}"
        listed = {"model.safetensors": {"size": 3_000_000, "blob_id": "model.safetensors"}}
        (folder / "trees").mkdir()
        (folder / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": listed}))
    begin(cache, "owner/part", 4_000_000, 4_000_001)
    shown = dict(line.split(maxsplit=1) for line in run(cache).stdout.decode().splitlines())
    assert shown["owner/two"] == "3.0 MB"
    assert shown["owner/one"] == "0 bytes of 3.0 MB, `dgemma-mlx pull owner/one` continues"
    assert shown["owner/part"] == "33 bytes of 4.0 MB, `dgemma-mlx pull owner/part` continues"


def test_a_listing_of_nonsense_is_done_without(cache: Path) -> None:
    begin(cache, "owner/part", 4_000_000, 1_500_000)
    for nonsense in ("{", '{"files": {"model.safetensors": {"size": "x", "blob_id": 3}}}'):
        (cache / "models--owner--part" / "trees" / f"{COMMIT}.json").write_text(nonsense)
        assert b"owner/part  1.5 MB, `dgemma-mlx pull owner/part` continues\n" in run(cache).stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["rm", "owner/one"], 2, "cannot ask for confirmation"),
        (["rm", "-y", "owner/one", "owner/three"], 1, "owner/three is not in the cache"),
        (["rm", "-y", "owner/other"], 1, "owner/other is not in the cache"),
        (["rm"], 2, "missing argument"),
    ],
)
def test_what_is_refused_removes_nothing(cache: Path, arguments: list[str], exit_code: int, message: str) -> None:
    before = sorted(cache.rglob("*"))
    done = run(cache, *arguments)
    assert (done.returncode, done.stdout) == (exit_code, b"")
    error, hint = done.stderr.decode().splitlines()
    assert error.startswith("dgemma-mlx: ") and message in error
    assert hint.startswith("hint: ")
    assert sorted(cache.rglob("*")) == before


def test_a_cache_that_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("")
    done = run(tmp_path / "hub")
    assert done.returncode == 1
    assert done.stderr.startswith(b"dgemma-mlx: cannot read the Hub's cache ")


def test_a_person_is_asked_before_anything_is_removed(cache: Path) -> None:
    with Terminal(["models", "rm", "owner/one", "owner/two"], env={"HF_HUB_CACHE": str(cache)}) as terminal:
        terminal.wait_for_text("Remove owner/one, owner/two (4.0 MB)? [y/N]:")
        terminal.type("n\r")
        assert terminal.finish() == 0
    assert run(cache).stdout.count(b"\n") == 2
    with Terminal(["models", "rm", "owner/one", "owner/two"], env={"HF_HUB_CACHE": str(cache)}) as terminal:
        terminal.wait_for_text("[y/N]:")
        terminal.type("y\r")
        assert terminal.finish() == 0
        assert "removed owner/one, owner/two, 4.0 MB" in terminal.text
    assert run(cache).stdout == b""
