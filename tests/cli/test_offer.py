"""The first chat offers the published models, on a Mac or where DGEMMA_OFFER says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dgemma_mlx.checkpoint.hub import DEMO_FOLDER
from tests.cli.terminal import Terminal
from tests.hub_server import HubServer, Repository

NAMES = [f"mlx-community/diffusiongemma-26B-A4B-it-{bits}bit" for bits in (4, 8)]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    files = {path.name: path.read_bytes() for path in DEMO_FOLDER.iterdir() if path.is_file()}
    with HubServer({name: Repository({"main": files}) for name in NAMES}) as server:
        yield server


@pytest.fixture
def environment(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1",
        "DGEMMA_OFFER": "1", "DGEMMA_STATE": str(tmp_path / "state"), "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "HOME": str(tmp_path),
    }  # fmt: skip


@pytest.mark.slow
def test_the_first_chat_offers_models_and_remembers_the_choice(environment: dict[str, str]) -> None:
    with Terminal(["chat"], columns=120, env=environment) as terminal:
        terminal.wait_for_text("Number, 1 to 4 [1]:")
        shown = terminal.text.splitlines()[-5:-1]
        assert [line.split()[1] for line in shown] == ["4-bit", "8-bit", "q3", "demo"]
        assert all("fits with " in line for line in shown[:3]) and "4.4 MB" in shown[0]
        terminal.type("7\r")
        terminal.wait_for(lambda: terminal.text.count("Number") == 2)
        terminal.type("2\r")
        terminal.wait_for_text("Download 4.4 MB? [Y/n]:")
        terminal.type("\r")
        terminal.wait_for_text(f"{NAMES[1]} is now the model in ")
        terminal.wait_for_text(">>>")
        terminal.type("\x04")
        assert terminal.finish() == 0
    with Terminal(["chat"], columns=120, env=environment | {"HF_HUB_OFFLINE": "1"}) as terminal:
        terminal.wait_for_text(">>>")
        assert "Number" not in terminal.text and "demo" not in terminal.text


@pytest.mark.slow
def test_a_recipe_is_offered_with_its_commands(environment: dict[str, str]) -> None:
    with Terminal(["chat"], columns=120, env=environment) as terminal:
        terminal.wait_for_text("Number, 1 to 4")
        terminal.type("3\r")
        assert terminal.finish() == 0
        assert "dgemma-mlx convert google/diffusiongemma-26B-A4B-it --recipe q3" in terminal.text


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"DGEMMA_OFFER": "0"}, {"HF_HUB_OFFLINE": "1"}], ids=["off", "offline"])
def test_the_demo_answers_where_nothing_can_be_offered(environment: dict[str, str], changes: dict[str, str]) -> None:
    with Terminal(["chat"], columns=120, env=environment | changes) as terminal:
        terminal.wait_for_text("the built-in demo answers")
        terminal.wait_for_text(">>>")
        assert "Number" not in terminal.text
        assert ("cannot be offered" in terminal.text) == ("HF_HUB_OFFLINE" in changes)


@pytest.mark.slow
def test_nothing_is_chosen_after_ctrl_c(environment: dict[str, str], tmp_path: Path) -> None:
    with Terminal(["chat"], columns=120, env=environment) as terminal:
        terminal.wait_for_text("Number, 1 to 4")
        terminal.type("\x03")
        assert terminal.finish() == 130
    assert not (tmp_path / "config").exists()
