"""The log of a training run: lines, a plot, and the files of a dashboard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dgemma_mlx.cli.train_log import line, open_log, plot
from dgemma_mlx.errors import DgemmaError

TRAINED = {
    "step": 20, "loss": 1.5, "diffusion": 1.25, "gradient_norm": 0.5, "tokens_per_second": 1234,
    "seconds_left": 7260, "peak_memory": 12_300_000,
}  # fmt: skip
VALIDATED = {"step": 20, "valid_loss": 1.125, "exact_match": 0.25}


def test_a_record_is_a_line() -> None:
    assert line(TRAINED, 100) == (
        "step  20/100  loss 1.5000  1,234 tokens/s (prompts and canvases)  2 h 1 min left  peak 12.3 MB"
    )
    assert line({**TRAINED, "seconds_left": 59}, 100).count("59 s left") == 1
    assert line(VALIDATED, 100) == "step  20/100  validation: denoising loss 1.1250  exact match 25%"
    assert line({"step": 20, "valid_loss": 1.125}, 20) == "step 20/20  validation: denoising loss 1.1250"


def test_the_plot_is_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(tmp_path)
    assert not list(tmp_path.iterdir())  # nothing was logged
    records = [{**TRAINED, "step": step} for step in (10, 20)] + [VALIDATED]
    (tmp_path / "loss.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plot(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with open_log(tmp_path, 100, "tensorboard", quiet=True) as log:
        log(TRAINED)
        log(VALIDATED)
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert all(name.encode() in data for name in ("diffusion", "valid_loss", "exact_match"))


def test_a_dashboard_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma_mlx.cli.train_log.find_spec", lambda name: None)
    with pytest.raises(DgemmaError, match="needs wandb"), open_log(tmp_path, 1, "wandb", quiet=True):
        pass
