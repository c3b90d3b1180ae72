"""Downloads from the Hub and uploads to it, with a local server and real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import mlx.core as mx
import pexpect
import pytest

from tests.convert.checkpoints import SMALL_FILES, digests, make_source, names_in, read
from tests.hub_server import Files, HubServer, Repository
from tests.model.checkpoint import flat_config, load, random_tensors

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = sorted(["config.json", "model.safetensors.index.json", *SMALL_FILES, *SHARDS])
SAYS_SOURCE = ["conversion_report.json", "README.md"]
BREAK = 11_000_000  # bytes after which a connection breaks


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by revision. In the revision "big", one shard is longer than a chunk."""
    folder = tmp_path_factory.mktemp("sources")
    small = flat_config(vocab_size=768)
    big = flat_config(vocab_size=768, num_hidden_layers=1, layer_types=["full_attention"], num_experts=512)
    return {
        revision: make_source(
            folder / revision / "name", config, random_tensors(config, mx.bfloat16, seed), shards=2, tokenizer=True
        )
        for revision, config, seed in [("main", small, 0), ("v2", small, 1), ("big", big, 2)]
    }


@pytest.fixture
def hub(sources: dict[str, Path]) -> Iterator[HubServer]:
    beside = {"README.md": b"# A model", "pytorch_model.bin": b"other weights", "original/config.json": b"{}"}
    revisions = {revision: {**content(folder), **beside} for revision, folder in sources.items()}
    with HubServer({"owner/name": Repository(revisions)}) as server:
        yield server


def content(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Shell:
    """A user's shell in a folder of its own, logged in to the Hub, with an empty cache."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.folder.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "DGEMMA_"))}
        self.env = {
            **kept, "HF_HOME": str(folder / "cache"), "HF_ENDPOINT": url, "HF_TOKEN": "hf_dummy",
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

    def convert(self, *arguments: str | Path, exit_code: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "dgemma_mlx", "convert", *map(str, arguments)], cwd=self.folder,
            env={**self.env, **env}, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == exit_code, done.stderr
        return done

    def terminal(self, *arguments: str | Path) -> pexpect.spawn:
        """Start the command on a terminal."""
        return pexpect.spawn(
            sys.executable, ["-m", "dgemma_mlx", "convert", *map(str, arguments)], cwd=str(self.folder),
            env={**self.env, "TERM": "xterm"}, encoding="utf-8", codec_errors="replace",
            timeout=100, dimensions=(40, 100),
        )  # fmt: skip

    def failure(self, *arguments: str | Path, **env: str) -> tuple[str, str]:
        """Return the last two lines of a command that fails: the error and its hint."""
        *before, error, hint = self.convert(*arguments, exit_code=1, **env).stderr.splitlines()
        assert error.startswith("dgemma-mlx: ") and hint.startswith("hint: ")
        assert not any(line.startswith(("dgemma-mlx:", "hint:", "Traceback")) for line in before)
        return error, hint


@pytest.fixture
def shell(hub: HubServer, tmp_path: Path) -> Shell:
    return Shell(tmp_path / "home", hub.url)


def assert_same_conversion(one: Path, other: Path) -> None:
    """Check that two outputs are equal, except for the name of their source."""
    ours, theirs = digests(one), digests(other)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= set(SAYS_SOURCE)
    report, other_report = read(one / "conversion_report.json"), read(other / "conversion_report.json")
    assert {**report, "source": ""} == {**other_report, "source": ""}


def whole(hub: HubServer) -> list[str]:
    """Return the files that were downloaded from their beginning."""
    return sorted(name for name, part in hub.downloads if part in (None, "bytes=0-"))


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_fetches_what_is_needed_and_converts_it(
    sources: dict[str, Path], hub: HubServer, shell: Shell, revision: str
) -> None:
    name = "owner/name" if revision == "main" else f"owner/name@{revision}"
    shell.convert(sources[revision], "-o", "local")
    assert hub.requests == []
    shell.convert(name, "-o", "out")
    assert whole(hub) == NEEDED
    assert_same_conversion(shell.folder / "out", shell.folder / "local")
    assert read(shell.folder / "out/conversion_report.json")["source"] == name
    assert "base_model: owner/name\n" in (shell.folder / "out/README.md").read_text()

    hub.requests.clear()
    shell.convert(name, "--recipe", "q8")
    assert hub.requests == []
    assert "name-q8" in names_in(shell.folder)
    assert load(shell.folder / "name-q8")


def test_a_plan_needs_no_weights(sources: dict[str, Path], hub: HubServer, shell: Shell) -> None:
    plan = json.loads(shell.convert("owner/name", "--dry-run", "--json").stdout)
    local = json.loads(shell.convert(sources["main"], "--dry-run", "--json").stdout)
    assert not set(whole(hub)) & set(SHARDS)
    for key in ("classes", "bytes_in", "bytes_out", "shards", "warnings"):
        assert plan[key] == local[key]
    assert names_in(shell.folder) == {"cache"}


def test_a_broken_download_is_resumed(sources: dict[str, Path], hub: HubServer, shell: Shell) -> None:
    broken = big_shard(sources)
    hub.repositories["owner/name"].troubles[broken] = [BREAK]
    shell.convert("owner/name@big", "-o", "out")
    shell.convert(sources["big"], "-o", "local")
    assert_same_conversion(shell.folder / "out", shell.folder / "local")
    assert [part for name, part in hub.downloads if name == broken][-2:] == ["bytes=0-", f"bytes={BREAK}-"]
    assert whole(hub) == NEEDED


def test_after_a_failed_download_only_what_is_missing_is_fetched(
    sources: dict[str, Path], hub: HubServer, shell: Shell
) -> None:
    broken = big_shard(sources)
    hub.repositories["owner/name"].troubles[broken] = [BREAK, HTTPStatus.GONE]
    error, hint = shell.failure("owner/name@big", "-o", "out")
    assert "owner/name@big could not be downloaded: " in error and "410" in error
    assert "next attempt" in hint
    assert names_in(shell.folder) == {"cache"}

    hub.downloads.clear()
    shell.convert("owner/name@big", "-o", "out")
    shell.convert(sources["big"], "-o", "local")
    assert (broken, f"bytes={BREAK}-") in hub.downloads and not set(whole(hub)) & {*SHARDS, "tokenizer.json"}
    assert_same_conversion(shell.folder / "out", shell.folder / "local")


def big_shard(sources: dict[str, Path]) -> str:
    sizes = {name: (sources["big"] / name).stat().st_size for name in SHARDS}
    name = max(sizes, key=lambda name: sizes[name])
    assert sizes[name] > BREAK
    return name


@pytest.mark.parametrize("recipe", [["q4"], ["mixed", "--target-bpw", "6"]], ids=["q4", "mixed"])
def test_bars_of_the_download_stay_whole(hub: HubServer, shell: Shell, recipe: list[str]) -> None:
    """The bar of the work redraws the terminal, so it starts after the bar of the download."""
    program = shell.terminal("owner/name", "-o", "out", "--recipe", *recipe)
    program.expect(pexpect.EOF)
    assert "downloaded owner/name" in program.before
    assert "it/s" not in program.before and "B/s]" not in program.before  # none of the library's bars
    assert "\x1b\x1b" not in program.before  # an escape sequence of the download's bars, broken up by ours
    assert "out" in names_in(shell.folder)


@pytest.mark.parametrize("exists", [False, True])
def test_upload(sources: dict[str, Path], hub: HubServer, shell: Shell, exists: bool) -> None:
    if exists:
        hub.repositories["owner/new"] = Repository({"main": {"README.md": b"old", "notes.txt": b"mine"}})
    kept = {"notes.txt": b"mine"} if exists else {}
    done = shell.convert(sources["main"], "-o", "out", "--upload-repo", "owner/new", "-y")
    assert done.stderr.endswith("uploaded to owner/new\n")
    assert hub.repositories["owner/new"].revisions["main"] == {**kept, **content(shell.folder / "out")}
    assert list(hub.stored.values()) == [(shell.folder / "out/model.safetensors").read_bytes()]


@pytest.mark.parametrize("path", ["/api/repos/create", "/api/models/owner/new/commit/main"])
def test_a_refused_upload_leaves_the_conversion(
    sources: dict[str, Path], hub: HubServer, shell: Shell, path: str
) -> None:
    hub.on_write[path] = (403, "")
    error, hint = shell.failure(sources["main"], "-o", "out", "--upload-repo", "owner/new", "-y")
    assert error.startswith("dgemma-mlx: uploading out to owner/new failed: 403 Forbidden")
    assert "conversion is complete" in hint and "hf upload owner/new out" in hint
    assert load(shell.folder / "out")


def test_upload_without_login(sources: dict[str, Path], shell: Shell) -> None:
    error, hint = shell.failure(sources["main"], "-o", "out", "--upload-repo", "owner/new", "-y", HF_TOKEN="")
    assert "uploading out to owner/new failed: " in error
    assert "hf auth login" in hint


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_user_confirms_the_upload(sources: dict[str, Path], hub: HubServer, shell: Shell, answer: str) -> None:
    program = shell.terminal(sources["main"], "-o", "out", "--upload-repo", "owner/new")
    program.expect(r"Upload out to owner/new\? \[y/N\]")
    assert hub.requests == [] and "out" in names_in(shell.folder)
    program.sendline(answer)
    program.expect(pexpect.EOF)
    program.close()
    assert program.exitstatus == 0
    assert ("owner/new" in hub.repositories) == (answer == "y")


def test_an_upload_without_a_terminal_needs_yes(sources: dict[str, Path], hub: HubServer, shell: Shell) -> None:
    done = shell.convert(sources["main"], "-o", "out", "--upload-repo", "owner/new", exit_code=2)
    assert "cannot ask for confirmation, because stdin is not a terminal" in done.stderr
    assert hub.requests == [] and names_in(shell.folder) == set()
