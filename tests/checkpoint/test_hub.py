"""Tests of finding a checkpoint by name. Downloads come from a Hub server on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER, Checkpoint, resolve
from dgemma_mlx.errors import DgemmaError
from tests.hub_server import Files, HubServer, Repository

OFFLINE = "no complete copy of owner/name is in the cache, and HF_HUB_OFFLINE is set"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def files(mark: str = "main") -> Files:
    """Return the files of a repository like the published ones, with some that loading does not need."""
    index = {"weight_map": {f"tensor.{i}": name for i, name in enumerate(SHARDS)}}
    return {
        "README.md": b"# A model",
        "chat_template.jinja": mark.encode(),
        "config.json": (DEMO_FOLDER / "config.json").read_bytes(),
        "generation_config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "original/model.safetensors": b"the same weights in another layout",
        "pytorch_model.bin": b"and in another format",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        **{name: f"{name} {mark}".encode() for name in SHARDS},
    }


NEEDED = sorted(set(files()) - {"README.md", "original/model.safetensors", "pytorch_model.bin"})


@pytest.fixture
def hub() -> Iterator[HubServer]:
    other = {**files(), "config.json": b'{"model_type": "llama"}'}
    repositories = {
        "owner/name": Repository({"main": files(), "v2": files("v2"), "refs/pr/1": files("pr")}),
        "owner/other": Repository({"main": other}),
        "owner/gated": Repository({"main": files()}, on_file=(403, "GatedRepo")),
        "owner/private": Repository({"main": files()}, on_info=(403, "")),
        "owner/broken": Repository({"main": files()}, on_info=(418, "")),
    }
    with HubServer(repositories) as server:
        yield server


class Shell:
    """An environment with an empty Hub cache, in which ``resolve`` runs in a new process."""

    def __init__(self, home: Path, url: str) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "DGEMMA_"))}
        self.env = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": url, "NO_PROXY": "127.0.0.1"}
        self.cache = home / "hub"

    def resolve(self, name: str, **env: str) -> dict[str, Any]:
        """Call ``resolve`` in a new process and return the checkpoint or the error as a dict."""
        code = (
            "import dataclasses, json, sys\n"
            "from dgemma_mlx import DgemmaError\n"
            "from dgemma_mlx.checkpoint.hub import resolve\n"
            "try: result = dataclasses.asdict(resolve(sys.argv[1]))\n"
            "except DgemmaError as error: result = vars(error)\n"
            "print(json.dumps(result, default=str))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, name],
            env={**self.env, **env}, stdout=subprocess.PIPE, text=True, check=True,
        )
        result: dict[str, Any] = json.loads(done.stdout)
        return result


@pytest.fixture
def shell(hub: HubServer, tmp_path: Path) -> Shell:
    return Shell(tmp_path, hub.url)


def test_demo_is_a_complete_checkpoint_and_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    demo = Checkpoint(DEMO_FOLDER, "demo", is_demo=True)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(DEMO_FOLDER))
    monkeypatch.delenv("DGEMMA_MODEL", raising=False)
    assert resolve("demo") == resolve(None) == demo
    monkeypatch.setenv("DGEMMA_MODEL", "")
    assert resolve() == demo
    monkeypatch.setenv("DGEMMA_MODEL", str(tmp_path))
    assert resolve() == Checkpoint(tmp_path, str(tmp_path), is_demo=False)
    assert resolve("demo") == demo


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "demo").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve("~/owner/name").folder == tmp_path / "owner" / "name"
    assert resolve("owner/name") == Checkpoint(Path("owner/name"), "owner/name", is_demo=False)
    assert resolve("./demo") == Checkpoint(Path("demo"), "./demo", is_demo=False)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch()
    with pytest.raises(DgemmaError, match="is a file, not a folder") as caught:
        resolve(str(weights))
    assert str(tmp_path) in caught.value.hint
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(("name", "close"), [("demoo", True), ("Demo", True), ("dem", True), ("model", False)])
def test_a_name_near_that_of_the_demo_is_noticed(name: str, close: bool) -> None:
    with pytest.raises(DgemmaError, match="there is no folder") as caught:
        resolve(name)
    assert ("Did you mean 'demo'?" in caught.value.hint) == close


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere", "~nobody/x", "../c"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(DgemmaError, match="there is no folder") as caught:
        resolve(name)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "name", ["", "\0", "owner/na me", "owner/na:me", "owner/", "a--b/c", "a/b/c", "a/name.git", "a/b@", "a/b@../c"]
)
def test_malformed_names(name: str) -> None:
    with pytest.raises(DgemmaError, match="neither a folder nor a valid Hub id") as caught:
        resolve(name)
    assert caught.value.exit_code == 2


@given(st.text().filter(lambda name: "/" not in name))
def test_any_other_text_is_a_clear_error(name: str) -> None:
    assume(not os.path.exists(name) and name not in ("demo", "~"))
    with pytest.raises(DgemmaError) as caught:
        resolve(name)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_download_once_then_work_without_network(hub: HubServer, shell: Shell) -> None:
    first = shell.resolve("owner/name")
    folder = Path(first["folder"])
    assert (first["name"], first["is_demo"]) == ("owner/name", False)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == NEEDED
    assert {name: (folder / name).read_bytes() for name in NEEDED} == {name: files()[name] for name in NEEDED}

    hub.requests.clear()
    assert shell.resolve("owner/name") == first
    assert shell.resolve("owner/name", HF_HUB_OFFLINE="1") == first
    assert hub.requests == []


@pytest.mark.parametrize(("revision", "mark"), [("v2", "v2"), ("refs/pr/1", "pr")])
def test_revision(shell: Shell, revision: str, mark: str) -> None:
    main = Path(shell.resolve("owner/name")["folder"])
    other = Path(shell.resolve(f"owner/name@{revision}")["folder"])
    assert (main / "chat_template.jinja").read_text() == "main"
    assert (other / "chat_template.jinja").read_text() == mark
    assert Path(shell.resolve(f"owner/name@{other.name}")["folder"]) == other  # the commit itself


@pytest.mark.parametrize(
    ("lost", "listed"),
    [("chat_template.jinja", True), (SHARDS[1], True), (SHARDS[1], False), ("tokenizer.json", False)],
)
def test_an_incomplete_download_is_completed(shell: Shell, lost: str, listed: bool) -> None:
    """``listed`` means that the cache stores the list of files, which older versions of the library did not do."""
    folder = Path(shell.resolve("owner/name")["folder"])
    (folder / lost).resolve().unlink()
    (folder / lost).unlink()
    if not listed:
        shutil.rmtree(shell.cache / "models--owner--name" / "trees")
    assert shell.resolve("owner/name", HF_HUB_OFFLINE="1")["message"] == OFFLINE
    assert Path(shell.resolve("owner/name")["folder"]) == folder
    assert (folder / lost).read_bytes() == files()[lost]


def test_truncated_files_are_downloaded_again(shell: Shell) -> None:
    folder = Path(shell.resolve("owner/name")["folder"])
    for name in NEEDED:
        os.truncate(folder / name, 1)
    assert shell.resolve("owner/name", HF_HUB_OFFLINE="1")["message"] == OFFLINE
    assert Path(shell.resolve("owner/name")["folder"]) == folder
    assert {name: (folder / name).read_bytes() for name in NEEDED} == {name: files()[name] for name in NEEDED}


def test_a_damaged_name_of_a_commit_is_replaced(shell: Shell) -> None:
    folder = shell.resolve("owner/name")["folder"]
    ref = shell.cache / "models--owner--name" / "refs" / "main"
    ref.write_bytes(b"\xff")
    assert shell.resolve("owner/name", HF_HUB_OFFLINE="1")["message"] == OFFLINE
    assert shell.resolve("owner/name")["folder"] == folder
    assert ref.read_text() == Path(folder).name


def test_another_model_is_refused_before_its_weights_are_fetched(hub: HubServer, shell: Shell) -> None:
    assert "llama" in shell.resolve("owner/other")["message"]
    assert not [path for path in hub.requests if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("owner/nothing", "there is neither a folder nor a Hub model owner/nothing", "hf auth login"),
        ("owner/name@v9", "owner/name has no revision 'v9'", "branch"),
        ("owner/gated", "owner/gated is gated, and this account has no access", "licence"),
        ("owner/private", "the Hub refuses access to owner/private", "hf auth login"),
        ("owner/broken", "owner/broken could not be downloaded", "connection"),
    ],
)
def test_errors_of_the_hub_are_explained(shell: Shell, name: str, message: str, hint: str) -> None:
    error = shell.resolve(name)
    assert error["message"].startswith(message)
    assert "\n" not in error["message"]
    assert hint in error["hint"]
    assert error["exit_code"] == 1


@pytest.mark.parametrize("where", ["", "hub/models--owner--name/blobs"])
def test_a_file_where_a_folder_must_be_is_named(hub: HubServer, tmp_path: Path, where: str) -> None:
    home = tmp_path / "home"
    (home / where).parent.mkdir(parents=True, exist_ok=True)
    (home / where).write_text("")
    error = Shell(home, hub.url).resolve("owner/name")
    assert error["message"].startswith(f"cannot use {home / where}")
    assert "HF_HOME" in error["hint"] and error["exit_code"] == 1


def test_no_network(tmp_path: Path) -> None:
    with HubServer({}) as gone:
        url = gone.url
    shell = Shell(tmp_path, url)
    assert "owner/name could not be downloaded" in shell.resolve("owner/name")["message"]
    error = shell.resolve("owner/name", HF_HUB_OFFLINE="1")
    assert error["message"] == OFFLINE
    assert error["exit_code"] == 1
