"""Several machines, each with the whole model: the same results in the same order, whatever happens to the others."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dgemma_mlx.checkpoint.hub import resolve
from dgemma_mlx.cli.bench import of_all
from tests.distributed.whole import alone, machines, together, untimed

FEW = ("-n", "8", "--max-denoising-steps", "3", "--batch-size", "4")  # little work for an answer


def test_two_hundred_answers_with_one_machine_killed_half_way(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(f"Sort {n % 10} {n * 7 % 10} {n // 10}") + "\n" for n in range(200)))
    asked = ("generate", "-m", "demo", "--seed", "1", "--batch", prompts, *FEW)
    expected = [untimed(line) for line in alone(*asked).splitlines()]
    assert len(expected) == 200
    found = []
    with machines(2, tmp_path, asked) as (first, second):
        assert first.stdout is not None and first.stderr is not None
        for line in first.stdout:
            found.append(untimed(line))
            if len(found) == 80:  # the pipe holds others that are done
                second.kill()
        assert first.wait(30) == 0
        said = first.stderr.read().splitlines()
    assert found == expected
    lost = f"dgemma-mlx: {socket.gethostname()} (rank 1) has ended; this machine does its work"
    assert said == ["dgemma-mlx: 2 machines, each with the whole model", lost]


def test_an_evaluation_counts_the_same(tmp_path: Path) -> None:
    asked = ("eval", "-m", "demo", "--task", "sudoku", "--size", "4", "--count", "8", "--json")
    assert untimed(together(tmp_path, *asked)) == untimed(alone(*asked))


def test_the_candidates_of_a_fill_are_the_same(tmp_path: Path) -> None:
    text = tmp_path / "text.json"
    text.write_text('{"name": "Simon", "age": ___}')
    asked = ("fill", text, "-m", "demo", "--seed", "3", "--candidates", "3", "--json", "--max-denoising-steps", "9",
             "--prompt", "Make a JSON object: Simon is 59 years old and lives in Rome.")  # fmt: skip
    assert untimed(together(tmp_path, *asked)) == untimed(alone(*asked))


def test_every_machine_measures(tmp_path: Path) -> None:
    asked = ("bench", "-m", "demo", "--runs", "1", "--steps", "1", "--prompt-tokens", "8", "--json")
    found = json.loads(together(tmp_path, *asked))
    assert [facts["host"].rpartition(" (")[2] for facts in found] == ["rank 0)", "rank 1)"]
    assert [facts["prompts"][0]["prompt_tokens"] for facts in found] == [8, 8]
    last = of_all(found).splitlines()[-1]
    assert last.startswith("2 machines together: ") and last.endswith(" tokens/s after the prompts")


def test_a_machine_with_another_checkpoint_ends_all(tmp_path: Path) -> None:
    folders = [tmp_path / "own", tmp_path / "other"]
    for folder in folders:
        shutil.copytree(resolve("demo").folder, folder / "model")
    weights = next((folders[1] / "model").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Sort 7 3 5"\n')
    with machines(2, tmp_path, ("generate", "-m", "~/model", "--batch", prompts), folders) as processes:
        ends = [process.communicate(timeout=60) for process in processes]
    name = socket.gethostname()
    line = f"dgemma-mlx: {name} (rank 1) has another checkpoint, configuration or adapter than {name}\n"
    assert [process.returncode for process in processes] == [1, 1]
    assert [stderr for _, stderr in ends] == [line, line]
    assert not ends[0][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "--task", "sudoku", "--split"), "--split needs several machines"),
        (("eval", "--task", "sudoku", "--hostfile", "h.json", "--anyway"), "--anyway is for a model that is cut"),
        (("generate", "--hostfile", "h.json", "--split", "Hi"), "--split is for work that several machines can share"),
    ],
)
def test_options_without_effect_are_refused(arguments: tuple[str, ...], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, f"dgemma-mlx: {message}")
