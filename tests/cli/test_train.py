"""``train``, ``fuse`` and ``eval`` as processes: from a file of examples to a model that answers as trained."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgemma_mlx.train.dataset import as_jsonl
from tests.cli.terminal import Terminal

FAST = ("--canvas-length", "8", "--batch-size", "4", "--optimizer", "muon", "--causal-weight", "0", "--warmup", "5")
WORDS = [f"{a} {b}" for a in ("house", "letter", "river", "tree") for b in ("one", "two")]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "dgemma_mlx", *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.jsonl").write_text(as_jsonl((word, word.split()[1]) for word in WORDS))
    (folder / "valid.jsonl").write_text(as_jsonl((word, word.split()[1]) for word in WORDS[:2]))
    return folder


@pytest.fixture(scope="module")
def adapter(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of a run that was interrupted once and continued."""
    out = tmp_path_factory.mktemp("run") / "adapter"
    arguments = ("train", "-m", "demo", "--data", data, "-o", out, "--steps", "40", *FAST, "--rank", "8",
                 "--targets", "attention,mlp,experts", "--log-every", "1", "--valid-every", "0")  # fmt: skip
    with subprocess.Popen(
        command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step  3/40"):
                process.send_signal(signal.SIGINT)
                break
        left = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "saved in" in left and "--resume continues" in left
    done = run(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert "step 40/40  validation: denoising loss" in done.stderr and "exact match" in done.stderr
    return out


def test_every_step_is_logged_once(adapter: Path) -> None:
    records = [json.loads(line) for line in (adapter / "loss.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 41))
    assert {"loss", "tokens_per_second", "seconds_left", "peak_memory", "gradient_norm"} <= records[0].keys()
    assert records[-1]["valid_loss"] < records[0]["loss"]


def evaluated(data: Path, *arguments: str | Path) -> dict[str, Any]:
    done = run("eval", "--task", data / "train.jsonl", "--json", "--batch-size", "8", "--seed", "1", *arguments)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_what_was_learned_is_in_adapter_and_fused_model(adapter: Path, data: Path, tmp_path: Path) -> None:
    assert evaluated(data, "-m", "demo", "--count", "2")["right"] == 0
    after = evaluated(data, "-m", "demo", "--adapter", adapter)
    assert after["right"] >= 6 and after["problems"] == 8 and after["denoising_steps"] > 0 and after["seconds"] > 0
    done = run("fuse", "-m", "demo", "--adapter", adapter, "-o", tmp_path / "fused")
    assert done.returncode == 0, done.stderr
    assert evaluated(data, "-m", tmp_path / "fused")["right"] >= 6
    answer = run("generate", "-m", "demo", "-q", "--seed", "1", "--adapter", adapter, WORDS[1])
    assert answer.stdout.strip() in ("one", "two") and answer.stderr == ""
    chat = subprocess.run(
        command("chat", "-m", "demo", "--seed", "1", "--adapter", adapter), input=WORDS[1] + "\n", text=True,
        capture_output=True, timeout=60, check=False, env={**os.environ, "DGEMMA_STATE": str(tmp_path / "state")},
    )  # fmt: skip
    assert chat.stdout.split() in (["one"], ["two"])


def test_fill_and_choose_take_the_adapter_too(adapter: Path, tmp_path: Path) -> None:
    gap = tmp_path / "gap"
    gap.write_text("___:1___")
    arguments = ("-m", "demo", "-q", "--seed", "1", "--adapter", adapter)
    chosen = run("choose", WORDS[1], "--from", "one,two,Rome", *arguments)
    assert chosen.stdout.splitlines()[-1].endswith("Rome"), chosen
    filled = run("fill", gap, "--prompt", WORDS[1], *arguments)
    assert filled.returncode == 0 and filled.stdout, filled


def test_a_prompt_cache_belongs_to_its_adapter(adapter: Path, tmp_path: Path) -> None:
    cache = tmp_path / "prompt.cache"
    arguments = ("generate", "-m", "demo", "-q", "--seed", "1", "--prompt-cache", cache, WORDS[1])
    assert run(*arguments, "--adapter", adapter).returncode == 0
    refused = run(*arguments)
    assert refused.returncode == 1 and "belongs to another model" in refused.stderr


def test_a_dry_run_writes_nothing(data: Path, tmp_path: Path) -> None:
    done = run("train", "-m", "demo", "--data", data, "-o", tmp_path / "out", "--dry-run", "--json", *FAST)
    plan = json.loads(done.stdout)
    assert plan["examples"] == 8 and plan["canvas_length"] == 8
    assert plan["estimated_memory"]["total"] > plan["estimated_memory"]["weights"] > 7_000_000
    assert not (tmp_path / "out").exists()


def test_what_the_maximum_length_takes_is_said_in_one_line(data: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(as_jsonl([("Sort", " ".join("7" * 100)), (" ".join("7" * 100), "7"), ("Sort", "7")]))
    done = run("train", "-m", "demo", "--data", long, "--valid", long, "-o", tmp_path / "out", "--dry-run", "--json",
               "--max-length", "80")  # fmt: skip
    lines = done.stderr.splitlines()
    for kind in ("", "validation "):
        assert (f"dgemma-mlx: --max-length 80: 1 of 3 {kind}answers cut, 37 tokens lost; "
                f"1 of 3 {kind}examples left out, no room for a canvas") in lines  # fmt: skip
    plan = json.loads(done.stdout)
    assert (plan["examples"], plan["left_out"], plan["cut"], plan["lost"]) == (2, 1, 1, 37)


def test_a_run_that_diverges_ends_with_one_line(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("train", "-m", "demo", "--data", data, "-o", out, "--steps", "1", "--learning-rate", "1e38", "-q",
               *FAST)  # fmt: skip
    message, hint = done.stderr.splitlines()
    assert done.returncode == 1 and message.startswith("dgemma-mlx: training diverged at step 1: ")
    assert hint.startswith("hint: --resume with a lower --learning-rate") and not list(out.rglob("*.safetensors"))


def test_a_cut_answer_is_said_in_one_line(tmp_path: Path) -> None:
    for extra, lines in ((("-n", "2"), 1), ((), 0)):
        done = run("generate", "-m", "demo", "--seed", "1", "-q", "Sort 7 3 5", *extra)
        assert done.returncode == 0
        assert done.stderr.splitlines() == lines * [
            "dgemma-mlx: the answer was cut off after 2 tokens, by -n, by the model's limit or by padding"
        ]


def test_a_terminal_shows_how_far_an_evaluation_is_and_keeps_only_the_result() -> None:
    with Terminal(["eval", "-m", "demo", "--task", "sudoku", "--size", "4", "--count", "3"], 80, 24) as terminal:
        assert terminal.finish() == 0
        assert re.search(r"\r1 of 3 answered, [01] right, about \d+ s left +\r2 of 3", terminal.output.decode())
        assert re.fullmatch(r"\d of 3 right \(.*", terminal.text) and "\n" not in terminal.text


def test_sudoku_is_evaluated(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    done = run("eval", "-m", "demo", "--task", "sudoku", "--size", "4", "--clues", "10", "--count", "4",
               "--batch-size", "4", "--json", "--answers", answers)  # fmt: skip
    result = json.loads(done.stdout)
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert result["problems"] == len(records) == 4
    assert result["right"] == sum(record["right"] for record in records) >= 2  # the demo knows 4x4 Sudokus
    assert result["denoising_steps"] == pytest.approx(sum(r["denoising_steps"] for r in records) / 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--data", "DATA", "-o", "OUT", "--targets", "router"), "names nothing that can be adapted"),
        (("train", "--data", "absent.jsonl", "-o", "OUT"), "cannot read absent.jsonl"),
        (("train", "--data", "DATA", "-o", "OUT", "--report-to", "paper"), "--report-to must be"),
        (("train", "--data", "DATA", "-o", "OUT", "--resume"), "holds no run"),
        (("train", "--data", "DATA", "-o", "OUT", "--full", "--rank", "4"), "--rank has no effect with --full"),
        (("train", "--data", "DATA", "-o", "OUT", "--full", "--dora"), "--dora has no effect with --full"),
        (("train", "--data", "DATA", "-o", "OUT", "--adapter", "a", "--targets", "mlp"), "no effect with --adapter"),
        (("train", "--data", "DATA", "-o", "OUT", "--adapter", "a", "--full"), "--full cannot be combined"),
        (("train", "--data", "DATA", "-o", "OUT", "--seed", "4294967296"), "from 0 to 4294967295"),
        (("eval", "--task", "DATA/train.jsonl", "--clues", "5"), "--clues is for --task sudoku"),
        (("eval", "--task", "DATA/train.jsonl", "--size", "4"), "--size is for --task sudoku"),
        (("eval", "--task", "sort"), "'sort' is neither a task nor a file"),
        (("eval", "--task", "sort"), "hint: --task is `sudoku`, or a JSONL file"),
        (("eval",), "hint: `sudoku`, or a JSONL file"),
        (("eval", "--task", "sudoku", "--size", "5"), "Sudoku of 5x5 cells is not supported"),
        (("eval", "--task", "sudoku", "--clues", "few"), "not a number of clues"),
        (("fuse", "--adapter", "absent", "-o", "OUT"), "no adapter folder absent"),
        (("generate", "--adapter", "absent", "Hello"), "no adapter folder absent"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(data: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    names = {"DATA": str(data), "OUT": str(tmp_path / "out")}
    parts = (names.get(part, part.replace("DATA/", f"{data}/")) for part in arguments[1:])
    done = run(arguments[0], "-m", "demo", *parts)
    assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and not (tmp_path / "out").exists()
