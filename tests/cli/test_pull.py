"""Getting a model from the Hub: the verdict, the question, the bar, Ctrl-C, and the lines of a pipe."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from dgemma_mlx.checkpoint.shards import read_header
from tests.cli.terminal import Terminal
from tests.hub_server import Files, HubServer, Repository

DEMO: Files = {path.name: path.read_bytes() for path in DEMO_FOLDER.iterdir() if path.is_file()}
HEADER = 100_001  # bytes that the Hub's library reads of the weights to know their sizes
SORT = ("generate", "-q", "-m", "owner/tiny", "--seed", "1", "Sort 7 3 5")


def huge() -> Files:
    """Return the demo with so many experts that no machine has the memory, as the header of its weights alone."""
    experts = 8 * 2**20
    config = json.loads(DEMO["config.json"])
    config["text_config"]["num_experts"] = experts
    header, end = {}, 0
    for name, tensor in read_header(DEMO_FOLDER / "model.safetensors").items():
        shape = [experts if n == 8 else n for n in tensor.shape]
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text
    return {**DEMO, "config.json": json.dumps(config).encode(), "model.safetensors": weights}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    repositories = {"owner/tiny": Repository({"main": dict(DEMO)}), "owner/huge": Repository({"main": huge()})}
    with HubServer(repositories) as server:
        yield server


@pytest.fixture
def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "DGEMMA_MODEL"}
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, env=inherited | environment, check=False,
    )


def test_a_missing_model_is_offered_and_ctrl_c_stops_it_at_once(
    hub: HubServer, environment: dict[str, str], tmp_path: Path
) -> None:
    hub.rate = 1_000_000
    with Terminal(SORT, env=environment) as terminal:
        terminal.wait_for_text("Download 4.4 MB? [Y/n]:")
        first, second, third, _ = terminal.screen.rows[:4]
        assert re.fullmatch(r"owner/tiny: 4.4 MB to download; [\d.]+ [GT]B free on the disk", first)
        assert second.startswith("memory: 19.") and "with 4,096 tokens of context; " in second
        assert third.startswith("fits with ")
        assert hub.sent["model.safetensors"] <= HEADER
        terminal.type("\r")
        terminal.wait_for(lambda: bool(re.search(r"━ [1-3]\.\d/4\.4 MB [\d.]+ [kM]B/s 0:00:0\d", terminal.text)))
        assert len(terminal.screen.rows) == 5  # one bar
        terminal.type("\x03")
        assert terminal.finish(seconds=5) == 130
        assert terminal.text.count("interrupted") == 1 and terminal.text.splitlines()[-1] == "interrupted"
        assert "Traceback" not in terminal.text and not terminal.screen.cursor.hidden
    hub.rate = None
    with Terminal(SORT, env=environment) as terminal:
        terminal.wait_for_text("are here already; ")
        terminal.wait_for_text("[Y/n]:")
        terminal.type("y\r")
        assert terminal.finish() == 0
        assert "downloaded owner/tiny, 4.4 MB" in terminal.text and "━" not in terminal.text
        assert terminal.text.endswith("3 5 7")
    assert hub.sent["model.safetensors"] < len(DEMO["model.safetensors"]) + 1_000_000


@pytest.mark.slow
def test_a_refused_download_is_an_error(hub: HubServer, environment: dict[str, str]) -> None:
    with Terminal(SORT, env=environment) as terminal:
        terminal.wait_for_text("[Y/n]:")
        terminal.type("n\r")
        assert terminal.finish() == 1
        assert "dgemma-mlx: nothing was downloaded" in terminal.text
    assert hub.sent["model.safetensors"] <= HEADER


def test_in_a_pipe_there_are_lines_and_no_question(environment: dict[str, str]) -> None:
    done = run(environment, *SORT)
    assert (done.returncode, done.stdout) == (0, "3 5 7\n")
    *verdict, begun, ended = done.stderr.splitlines()
    assert len(verdict) == 3 and verdict[-1].startswith("fits with ")
    assert (begun, ended) == ("downloading owner/tiny, 4.4 MB of 4.4 MB", "downloaded owner/tiny, 4.4 MB")
    done = run(environment, *SORT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 5 7\n", "")


@pytest.mark.slow
def test_pull_downloads_and_then_updates(hub: HubServer, environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, "pull", "owner/tiny")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines()[-1] == "try: dgemma-mlx chat -m owner/tiny"
    done = run(environment, "pull", "owner/tiny")
    assert done.stderr.splitlines()[0] == "owner/tiny is complete and up to date"
    hub.repositories["owner/tiny"].revisions["main"]["generation_config.json"] = b'{"max_denoising_steps": 7}'
    before = hub.sent["model.safetensors"]
    done = run(environment, "pull", "owner/tiny")
    assert done.returncode == 0, done.stderr
    snapshots = tmp_path / "hub/models--owner--tiny/snapshots"
    newest = snapshots / (tmp_path / "hub/models--owner--tiny/refs/main").read_text()
    assert (newest / "generation_config.json").read_bytes() == b'{"max_denoising_steps": 7}'
    assert hub.sent["model.safetensors"] - before <= HEADER


def test_a_complete_copy_is_enough_where_the_hub_cannot_be_asked(
    hub: HubServer, environment: dict[str, str]
) -> None:
    assert run(environment, "pull", "owner/tiny").returncode == 0
    kept = "owner/tiny is complete in the cache; the Hub could not be asked for a newer one"
    for trouble in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = run({**environment, **trouble}, "pull", "owner/tiny")
        assert (done.returncode, done.stderr.splitlines()[0]) == (0, kept)
    hub.repositories["owner/tiny"].on_info = (403, "")  # an answer
    done = run(environment, "pull", "owner/tiny")
    assert done.returncode == 1 and "the Hub refuses access to owner/tiny" in done.stderr


def test_what_does_not_fit_is_said_and_a_full_disk_is_foreseen(hub: HubServer, environment: dict[str, str]) -> None:
    with Terminal(["pull", "owner/huge"], env=environment) as terminal:
        terminal.wait_for_text("[y/N]:")
        assert "does not fit, nor would the smallest recipe, which takes " in terminal.text
        terminal.type("\r")
        assert terminal.finish() == 1
    hub.repositories["owner/huge"].claimed["model.safetensors"] = 10**16
    done = run(environment, "pull", "owner/huge")
    assert done.returncode == 1
    assert "10000.0 TB are to be downloaded" in done.stderr and done.stderr.splitlines()[-1].startswith("hint: Free")
    assert hub.sent["model.safetensors"] < 1_000_000


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("demo", 2, "demo is on this machine already"),
        ("owner/none", 1, "there is neither a folder nor a Hub model owner/none"),
        ("nonsense", 1, "there is no folder"),
    ],
)
def test_names_that_cannot_be_pulled(environment: dict[str, str], name: str, code: int, message: str) -> None:
    done = run(environment, "pull", name)
    error, hint = done.stderr.splitlines()
    assert done.returncode == code and message in error and hint.startswith("hint: ")
