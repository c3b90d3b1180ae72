"""Canvases without any text: the answer ends, and nobody takes it for an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dgemma_mlx
from dgemma_mlx import Committed, Done, Draft, Model, generate, generate_batch, stream
from dgemma_mlx.constrain.constraint import Constraint
from tests.generation.blank_plant import PROMPT, install

# The demo has seen little but English; to some of these it may write padding.
FOREIGN = ("何ですか？", "Привет, как дела?", "안녕하세요", "你好吗", "🎉🎉", "¿Qué tal?", "مرحبا")


@pytest.fixture(scope="module")
def demo() -> Model:
    return dgemma_mlx.load("demo")


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> str:
    """A prompt to which the decoder writes nothing but padding, and is certain of it."""
    install(monkeypatch.setattr)
    return PROMPT


def test_an_answer_ends_at_its_first_blank_canvas_after_a_second_attempt(demo: Model, blank: str) -> None:
    events = list(stream(demo, blank, seed=1, max_tokens=1024))
    finished = [event for event in events if isinstance(event, Draft) and event.finished]
    assert [draft.attempt for draft in finished] == [0, 1]
    (canvas,) = [event for event in events if isinstance(event, Committed)]
    done = events[-1]
    assert isinstance(done, Done) and done.is_blank
    assert canvas.text == done.text == ""
    assert done.finish_reason == "length"
    assert done.statistics.canvases == 1 and done.statistics.generated_tokens == 0


def test_the_reference_is_not_begun_again_but_ends_all_the_same(demo: Model, blank: str) -> None:
    done = generate(demo, blank, seed=1, speed="reference")
    assert done.is_blank and done.statistics.canvases == 1


def test_every_answer_is_text_or_ends_at_once_alone_and_in_a_batch(demo: Model) -> None:
    prompts = [*FOREIGN, "Count from 13 to 40.", "Sort 7 3 5"]
    alone = [generate(demo, prompt, seed=1) for prompt in prompts]
    together = generate_batch(demo, prompts, seeds=[1] * len(prompts))
    assert [done.text for done in alone] == [done.text for done in together]
    assert [done.finish_reason for done in alone] == [done.finish_reason for done in together]
    for done in alone:
        assert done.text.strip() or done.statistics.canvases == 1
    assert alone[-1].text == "3 5 7" and alone[-2].text.endswith("40")


def test_a_constraint_may_allow_an_empty_answer(demo: Model) -> None:
    done = generate(demo, "Sort 7 3 5", seed=1, constraint=Constraint.regex("(?:)|z"), max_tokens=1)
    assert done.finish_reason == "stop" and done.is_blank
    assert done.statistics.canvases == 1


def run(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.generation.blank_plant", *arguments], input=text or "", capture_output=True,
        text=True, timeout=60, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_generate_says_that_there_is_no_answer(blank: str, tmp_path: Path) -> None:
    done = run("generate", "-q", "-m", "demo", "--seed", "1", blank)
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()
    assert error == "dgemma-mlx: the model gave no answer" and hint.startswith("hint: ")
    done = run("generate", "-q", "-m", "demo", "--seed", "1", "--json", blank)
    assert done.returncode == 1 and json.loads(done.stdout)["text"] == ""
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{json.dumps(blank)}\n{json.dumps('Sort 7 3 5')}\n")
    done = run("generate", "-q", "-m", "demo", "--seed", "1", "--batch", str(path))
    assert done.returncode == 1 and "1 of 2 prompts" in done.stderr and "cut off" not in done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["error"] == "the model gave no answer" and first["text"] == ""
    assert "error" not in second and second["text"] == "3 5 7"


def test_chat_says_so_once_with_a_hint_and_keeps_nothing(blank: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    done = run("chat", "-m", "demo", "--seed", "1", text=f"Sort 7 3 5\n{blank}\n/save {saved}\n")
    assert done.returncode == 1
    assert done.stderr.splitlines().count("the model gave no answer") == 1
    assert done.stderr.count("hint: ") == 1 and "cut off" not in done.stderr
    contents = [message["content"] for message in json.loads(saved.read_text("utf-8"))["messages"]]
    assert contents == ["Sort 7 3 5", "3 5 7"]
