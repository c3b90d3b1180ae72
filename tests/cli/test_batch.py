"""``generate --batch``: many prompts, one model load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.cli.batch import read_batch
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.load import load
from dgemma_mlx.generation.memory import Work, run_memory


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", "generate", "-m", "demo", "-q", "--seed", "1", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_every_prompt_is_answered_in_order_and_as_by_itself(tmp_path: Path) -> None:
    sort, count = "Sort 7 3 5", "Count from 13 to 40."
    conversation = [
        {"role": "user", "content": "My name is Ana."},
        {"role": "assistant", "content": "Nice to meet you, Ana."},
        {"role": "user", "content": "What is my name?"},
    ]
    path = write(
        tmp_path, json.dumps(sort), "", {"prompt": count, "id": "c", "max_tokens": 4}, {"prompt": sort, "seed": 7},
        {"id": 9, "prompt": conversation},
    )
    done = run("--batch", path)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert done.stderr == "dgemma-mlx: 1 of 4 answers were cut off, by -n, by the model's limit or by padding\n"
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert [record.get("id") for record in records] == [None, "c", None, 9]
    assert [record["seed"] for record in records] == [1, 1, 7, 1]
    assert [record["finish_reason"] for record in records] == ["stop", "length", "stop", "stop"]
    assert len(records[1]["tokens"]) == 4
    assert "Ana" in records[3]["text"]
    alone = json.loads(run("--json", sort).stdout)
    for name in ("text", "tokens", "seed", "finish_reason", "model"):
        assert records[0][name] == alone[name]


def test_answers_are_the_same_however_many_are_answered_at_once(tmp_path: Path) -> None:
    wishes = [{"prompt": "Sort 7 3 5"}, {"prompt": "word " * 5000}, {"prompt": "Count from 13 to 40.", "seed": 5},
              {"prompt": "Reverse: red blue", "system": "Be brief.", "max_tokens": 3}, {"prompt": "What is 2 + 5?"}]
    path = write(tmp_path, *wishes)
    answers = []
    for size in ("1", "2", "9"):
        done = run("--batch", path, "--batch-size", size)
        assert done.returncode == 1 and "1 of 5 prompts" in done.stderr
        records = [json.loads(line) for line in done.stdout.splitlines()]
        answers.append([(record.get("text"), record.get("tokens"), record.get("seed")) for record in records])
    assert answers[0] == answers[1] == answers[2]


def test_a_batch_beyond_the_memory_limit_is_answered_in_parts(tmp_path: Path) -> None:
    wishes = [{"prompt": f"Sort {n} 3 5", "seed": 1} for n in range(4)]
    path = write(tmp_path, *wishes)
    limit = f"{run_memory(load('demo').config, load('demo').weight_bytes(), 32, work=Work(2)) + 200_000}B"
    whole, parts = (run("--batch", path, "--batch-size", "4", *more) for more in ((), ("--memory-limit", limit)))
    assert (whole.returncode, parts.returncode) == (0, 0), parts.stderr
    texts = [[json.loads(line)["text"] for line in done.stdout.splitlines()] for done in (whole, parts)]
    assert texts[0] == texts[1]
    alone = run("--batch", path, "--batch-size", "4", "--memory-limit", "5MB")
    assert alone.returncode == 1 and "4 of 4 prompts" in alone.stderr


def test_a_prompt_that_cannot_be_answered_does_not_stop_the_others(tmp_path: Path) -> None:
    done = run("--batch", write(tmp_path, json.dumps("word " * 5000), json.dumps("Sort 7 3 5")))
    long, sort = map(json.loads, done.stdout.splitlines())
    assert "positions" in long["error"] and "text" not in long
    assert sort["text"] == "3 5 7"
    assert done.returncode == 1
    assert "1 of 2 prompts" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not JSON", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{", "not JSON"),
        (7, "no prompt"),
        ("[]", "no prompt"),
        ({}, "no prompt"),
        ({"id": 1}, "no prompt"),
        ('""', "prompt cannot be"),
        ('" \\n"', "prompt cannot be"),
        ({"prompt": 3}, "prompt cannot be"),
        ({"prompt": []}, "prompt cannot be"),
        ({"prompt": ["a"]}, "a chat message must be an object with a role, not 'a'"),
        ({"prompt": [{"role": "user"}]}, "message 1: it has no content"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url' cannot be"),
        ({"prompt": "a", "tools": {}}, "tools must be a list of tools, not {}"),
        ({"prompt": "a", "tools": None}, "tools cannot be null"),
        ({"prompt": "a", "tool_choice": "required"}, "tool_choice is 'required', but there are no tools"),
        ({"prompt": "a", "tools": [{"name": "f"}], "tool_choice": "g"}, "tool_choice names 'g', which no tool has"),
        ({"prompt": "a", "tools": [{"name": "a b"}]}, "tool 1: 'a b' cannot be its name"),
        ({"prompt": "a", "tool_choice": 1}, "tool_choice cannot be 1"),
        ({"prompt": "\ud800"}, "is not JSON: a string holds a lone surrogate"),
        ({"prompt": "a", "seed": -1}, "seed cannot be -1"),
        ({"prompt": "a", "seed": True}, "seed cannot be true"),
        ({"prompt": "a", "seed": 2**64}, "seed cannot be"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens cannot be 0"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens cannot be 1.5"),
        ({"prompt": "a", "system": None}, "system cannot be null"),
        ({"prompt": "a", "id": []}, "id cannot be"),
        ({"prompt": "a", "temp": 1}, "unknown key 'temp'"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_answered(line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps("good"), "", line)
    with pytest.raises(DgemmaError) as error:
        read_batch(path)
    assert f"{path}, line 3" in error.value.message and message in error.value.message
    assert error.value.exit_code == 2 and error.value.hint
    assert len(error.value.message) < len(str(path)) + 200


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    prompt = "a\u2028b\u0085c\x0bd"
    path = write(tmp_path, json.dumps(prompt, ensure_ascii=False).replace("\\u000b", "\\u000b"))
    assert read_batch(path) == [{"prompt": prompt}]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DgemmaError, match="No such file"):
        read_batch(tmp_path / "none")
    with pytest.raises(DgemmaError, match="holds no prompt"):
        read_batch(write(tmp_path, "", " "))
    (tmp_path / "latin").write_bytes(b'"caf\xe9"\n')
    with pytest.raises(DgemmaError, match=r"not UTF-8 text \(byte 4\)"):
        read_batch(tmp_path / "latin")


def test_what_does_not_go_with_a_batch(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps("Sort 7 3 5"))
    for more in (["a prompt"], ["--jsonl"], ["--trace", str(tmp_path / "t")], ["--show-steps", "2"]):
        done = run("--batch", path, *more)
        assert done.returncode == 2 and "--batch" in done.stderr and done.stdout == ""
