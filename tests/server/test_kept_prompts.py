"""Encoded prompts that outlive the server, and the model in memory."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from dgemma_mlx import DgemmaError
from dgemma_mlx.generation.prompt_cache_folder import PromptCacheFolder
from dgemma_mlx.server.app import make_app
from dgemma_mlx.server.settings import ServerSettings
from tests.server.live import serving

PROMPT = "Count from 3 to 9."


def ask(address: str, lines: list[str], *turns: str) -> tuple[str, int, int]:
    """Return the answer, and how many of the prompt's tokens were cached, and all of them, as the log tells it."""
    before = len(lines)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    body: dict[str, Any] = {"messages": messages, "seed": 1}
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
    pattern = r"(\d+) of (\d+) prompt tokens cached"  # other lines, such as that of a damaged file, may come first
    while (cached := re.search(pattern, "\n".join(lines[before:]))) is None:
        time.sleep(0.01)
    return answer["choices"][0]["message"]["content"], int(cached[1]), int(cached[2])


def test_a_conversation_goes_on_after_a_restart(tmp_path: Path) -> None:
    lines: list[str] = []
    with serving(log=lines.append, prompt_cache_dir=tmp_path) as address:
        text, cached, length = ask(address, lines, PROMPT)
        assert cached == 0
    with serving(log=lines.append, prompt_cache_dir=tmp_path) as address:
        _, cached, _ = ask(address, lines, PROMPT, text, "Sort 7 3 5")
        assert cached == length
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    lines.clear()
    with serving(log=lines.append, prompt_cache_dir=tmp_path) as address:
        assert ask(address, lines, PROMPT) == (text, 0, length)
    assert "damaged" in lines[0]


def test_a_model_that_is_unloaded_leaves_nothing_behind_and_its_prompts_come_back(tmp_path: Path) -> None:
    lines: list[str] = []
    with serving(log=lines.append, prompt_cache_dir=tmp_path, keep_alive=0.3) as address:
        text, _, length = ask(address, lines, PROMPT)
        while httpx.get(f"{address}/health").json()["loaded"]:
            time.sleep(0.05)
        metrics = httpx.get(f"{address}/metrics").text
        assert "dgemma_model_loaded 0\n" in metrics and "dgemma_prompt_caches 0\n" in metrics
        assert ask(address, lines, PROMPT) == (text, length, length)


def test_a_folder_that_another_server_uses_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    other = PromptCacheFolder(tmp_path, 1, print)
    with pytest.raises(DgemmaError, match="another process"):
        make_app(lambda: pytest.fail("loaded"), ServerSettings("demo", prompt_cache_dir=tmp_path))
    other.close()
