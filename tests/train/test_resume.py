"""Runs that diverge, and the files of a run that is resumed: damaged, swapped or of nonsense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.train.finetune import FinetuneConfig, last_step, read_log
from dgemma_mlx.train.loop import MAX_SEED
from tests.train.test_finetune import CONFIG, run

SHORT = replace(CONFIG, steps=2, save_every=1, log_every=1, schedule="constant", warmup=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_a_run_that_diverges_keeps_nothing_of_it(tmp_path: Path, optimizer: str, rate: float) -> None:
    """Finite weights that make the loss infinite count as well: a later step could not continue from them."""
    with pytest.raises(DgemmaError, match="training diverged at step 1: ") as error:
        run(tmp_path, replace(SHORT, steps=1, optimizer=optimizer, learning_rate=rate))
    assert error.value.exit_code == 1 and "continues from the beginning" in error.value.hint
    assert not list(tmp_path.rglob("*.safetensors")) and last_step(tmp_path) == 0


def test_a_diverged_run_is_resumed_from_its_last_good_state(tmp_path: Path) -> None:
    """With a lower rate, it ends with the bytes of a run that has always had that rate."""
    run(tmp_path / "good", replace(SHORT, steps=3))
    run(tmp_path / "bad", replace(SHORT, steps=3), stop=1)
    assert last_step(tmp_path / "bad") == 2
    with pytest.raises(DgemmaError, match="training diverged at step 3") as error:
        run(tmp_path / "bad", replace(SHORT, steps=3, learning_rate=1e38), resume=True)
    assert "keeps the state of step 2" in error.value.hint and last_step(tmp_path / "bad") == 2
    run(tmp_path / "bad", replace(SHORT, steps=3), resume=True)
    for name in ("adapter_model.safetensors", "run.json"):
        assert (tmp_path / "good" / name).read_bytes() == (tmp_path / "bad" / name).read_bytes(), name


def tensors(path: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> None:
    """Rewrite a safetensors file with changed tensors."""
    loaded: Any = mx.load(str(path))
    changed = change({name: mx.array(value) for name, value in loaded.items()})
    mx.eval(changed)
    mx.save_safetensors(str(path), changed)


def first(loaded: dict[str, mx.array], change: Callable[[mx.array], mx.array]) -> dict[str, mx.array]:
    """Change the first tensor that is a matrix."""
    name = next(name for name, value in loaded.items() if value.ndim == 2)
    return {**loaded, name: change(loaded[name])}


def swap(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other")
    (folder / "optimizer.safetensors").rename(folder / "model.safetensors")
    (folder / "other").rename(folder / "optimizer.safetensors")


LAYER = "layers.9.self_attn.q_proj.lora_a"  # the demo model has fewer layers
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "further layer": (
        lambda f: tensors(f / "model.safetensors", lambda t: {**t, LAYER: mx.zeros((4, 2))}), "has unknown tensors"),
    "far layer": (
        lambda f: tensors(f / "model.safetensors", lambda t: {**t, LAYER.replace("9", "99999"): mx.zeros(1)}),
        "has unknown tensors"),
    "module": (
        lambda f: tensors(f / "model.safetensors", lambda t: {**t, "norm.weight": mx.zeros(4)}), "unknown tensors"),
    "no tensors": (lambda f: tensors(f / "model.safetensors", lambda t: {"step": mx.zeros(1)}), "lacks layers"),
    "shape": (lambda f: tensors(f / "model.safetensors", lambda t: first(t, mx.transpose)), "has shape"),
    "integers": (
        lambda f: tensors(f / "model.safetensors", lambda t: first(t, lambda a: a.astype(mx.int32))), "has shape"),
    "nan": (
        lambda f: tensors(f / "model.safetensors", lambda t: first(t, lambda a: a * float("nan"))), "not finite"),
    "infinite state": (
        lambda f: tensors(f / "optimizer.safetensors", lambda t: first(t, lambda a: a + float("inf"))), "not finite"),
    "cut off": (lambda f: (f / "optimizer.safetensors").write_bytes(b"cut off"), "not a safetensors file"),
    "missing optimizer": (lambda f: (f / "optimizer.safetensors").unlink(), "optimizer.safetensors cannot be read"),
    "missing weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    "flat": (
        lambda f: tensors(f / "optimizer.safetensors",
                          lambda t: {n.rpartition(".")[2] + str(i): a for i, (n, a) in enumerate(t.items())}),
        r"optimizer\.safetensors (lacks|has unknown)"),
    "swapped": (swap, "model.safetensors (lacks|has unknown)"),
    "far step": (lambda f: (f / "state.json").write_text('{"step": 3}'), "is of step 3, but the run has 2 steps"),
    **{f"step {value}": (
        lambda f, value=value: (f / "state.json").write_text(json.dumps({"step": value})), "state.json")  # type: ignore[misc]
       for value in (None, "2", -1, 0, 1.5, True, 10**30, float("nan"), [], {"a": 1}, "x" * 100_000)},
    "no object": (lambda f: (f / "state.json").write_text("[1]"), "does not contain a JSON object"),
    "deep": (lambda f: (f / "state.json").write_text("[" * 100_000), "cannot read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "one"
    run(out, SHORT)
    return out


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(finished: Path, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    change, words = DAMAGE[damage]
    change(out / "checkpoint")
    with pytest.raises(DgemmaError, match=words) as error:
        run(out, SHORT, resume=True)
    assert "\n" not in error.value.message and len(error.value.message) < 400


@pytest.mark.parametrize(
    "line", ["5", "[]", '{"loss": 1.0}', '{"step": "1"}', '{"step": 1, "loss": NaN}', '{"step": 1, "loss": [1]}',
             "[" * 100_000, '{"step": 1e400}', "\x00" * 8, '{"step": 1, "lo'],
)  # fmt: skip
def test_a_line_of_the_log_that_is_no_record_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "loss.jsonl"
    path.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 3, "loss": 1.0}}\n')
    with pytest.raises(DgemmaError, match=r"loss\.jsonl, line 2 is not a record"):
        read_log(path)
    path.write_text(f'{{"step": 1, "loss": 2.0}}\n{line}')  # cut off by a crash
    assert read_log(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("text", ["[1]", "", "{", '{"seed": 7}', '{"steps": "2"}'])
def test_a_record_of_the_run_of_nonsense_is_refused(finished: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DgemmaError, match=r"started with other values|cannot read|does not contain"):
        run(tmp_path, SHORT, resume=True)


@pytest.mark.parametrize(
    "settings",
    [{"seed": 2**32}, {"steps": 10**30}, {"batch_size": 2**63}, {"learning_rate": float("inf")},
     {"learning_rate": 1e39}, {"weight_decay": float("inf")}, {"causal_weight": 1e300}],
)  # fmt: skip
def test_numbers_that_the_training_cannot_hold_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(DgemmaError, match="is too large") as error:
        FinetuneConfig(**settings)
    assert error.value.exit_code == 2


def test_the_largest_seed_trains(tmp_path: Path) -> None:
    run(tmp_path, replace(SHORT, steps=1, seed=MAX_SEED))
    assert last_step(tmp_path) == 1
