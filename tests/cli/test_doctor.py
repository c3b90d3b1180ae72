"""``doctor``: its facts, measurements and advice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import dgemma_mlx
from dgemma_mlx.cli import doctor
from dgemma_mlx.kernels import DispatchedOperation, dispatch
from dgemma_mlx.kernels.selfcheck import Store, Verdict


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "dgemma_mlx", "doctor", *arguments], stdin=subprocess.DEVNULL, capture_output=True,
        timeout=120, env={**os.environ, **environment}, check=False,
    )


def test_it_tells_what_is_here(tmp_path: Path) -> None:
    done = run("--no-probe", "--json", HF_HUB_CACHE=str(tmp_path / "not" / "yet"))
    assert (done.returncode, done.stderr) == (0, b"")
    facts = json.loads(done.stdout)
    assert facts["dgemma_mlx"] == dgemma_mlx.__version__
    assert facts["python"] == sys.version.split()[0]
    assert facts["mlx"].split(".") >= ["0", "32"]
    assert facts["pillow"] and facts["av"]
    assert facts["metal"] is mx.metal.is_available()
    assert facts["memory"] > 1e9 and facts["cache_free"] > 0
    assert facts["cache_folder"] == str(tmp_path / "not" / "yet")
    assert facts["os"] and facts["machine"] and isinstance(facts["chip"], str)
    assert facts["self_check"].keys() == {"matmul", "quantized_matmul", "gather_qmm", "attention"}
    assert all(0 < error < 0.01 for error in facts["self_check"].values())
    assert "probe" not in facts
    assert facts["kernels"]["mode"] == "auto"
    assert "canvas_sampler" in facts["kernels"]["operations"]
    if not facts["metal"]:
        assert facts["kernels"]["checks"] == []
    assert ("no Metal" in " ".join(facts["advice"])) is not facts["metal"]


def test_it_says_the_same_to_people() -> None:
    done = run("--no-probe", COLUMNS="20")
    assert (done.returncode, done.stderr) == (0, b"")
    rows = done.stdout.decode().splitlines()
    names = [row[:10].strip() for row in rows if not row.startswith("!")]
    assert names[:6] == ["chip", "memory", "system", "Metal", "versions", "self-check"]
    assert "kernels" in names
    assert any(row.startswith("images     read with Pillow ") for row in rows)
    assert any(row.startswith("! ") for row in rows) != (rows[-1] == "all well")


FINE = {
    "operation": "moe_route", "dtype": "float16", "status": "faster", "detail": "", "kernel": 1e-3, "reference": 2e-3,
}  # fmt: skip
WRONG = {**FINE, "status": "wrong", "detail": "its results differ", "kernel": 0.0}


def good_facts() -> dict[str, Any]:
    return {
        "metal": True, "machine": "arm64", "memory": 64e9, "cache_free": 500e9, "cache_folder": "/cache",
        "self_check": {"matmul": 1e-6}, "kernels": {"mode": "auto", "operations": ["moe_route"], "checks": [FINE]},
    }  # fmt: skip


def test_a_missing_library_for_images_is_a_line_with_the_command_that_installs_it() -> None:
    missing = "cannot be read without PyAV: pip install av pillow, or pipx inject dgemma-mlx av pillow"
    assert doctor._reader("PyAV", None, "av pillow") == missing


def test_a_good_machine_needs_no_advice() -> None:
    assert doctor.advice(good_facts()) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"metal": False}, "no Metal"),
        ({"memory": 16e9}, "24 GB of memory"),
        ({"cache_free": 5e9}, "HF_HOME"),
        ({"self_check": {"matmul": 0.5}}, "matmul wrong"),
        ({"self_check": {"matmul": float("nan")}}, "matmul wrong"),
        ({"kernels": {"mode": "auto", "operations": ["moe_route"], "checks": [FINE, WRONG]}}, "moe_route is not used"),
    ],
)
def test_each_trouble_has_its_advice(change: dict[str, Any], word: str) -> None:
    (line,) = doctor.advice({**good_facts(), **change})
    assert word in line


def test_a_row_for_every_kernel_and_dtype() -> None:
    facts = {**good_facts(), "kernels": {"mode": "auto", "operations": ["moe_route"], "checks": [FINE, WRONG]}}
    head, *rows = (text.split() for _, text in doctor._kernel_rows(facts))
    assert "auto" in head[1]
    assert rows == [
        ["moe_route", "float16", "faster", "1.000", "2.000"],
        ["moe_route", "float16", "wrong", "its", "results", "differ"],
    ]


def test_recheck_forgets_the_verdicts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without Metal every kernel fails, so a verdict "faster" can only be a stored one."""
    store = Store(tmp_path / "kernels.json")
    monkeypatch.setattr(dispatch, "has_metal", lambda: True)
    monkeypatch.setattr(dispatch, "_store", lambda: store)
    monkeypatch.setattr(dispatch._State, "mode", "auto")
    kernel = DispatchedOperation(
        "broken", mx.fft.fft, mx.abs, examples=[lambda dtype: (mx.ones(8, dtype),)], source=""
    )
    monkeypatch.setattr("dgemma_mlx.kernels.OPERATIONS", (kernel,))
    for dtype in (mx.bfloat16, mx.float16):
        store.put(store.key(kernel, dtype), Verdict("faster", "", 1.0, 2.0))
    store.put("left by another version", Verdict("failed"))
    assert [check["status"] for check in doctor.kernels(recheck=False)["checks"]] == ["faster", "faster"]
    kernel._verdicts.clear()  # as a new process
    with pytest.warns(RuntimeWarning, match="the kernel broken does not work here"):
        assert [check["status"] for check in doctor.kernels(recheck=True)["checks"]] == ["wrong", "wrong"]
    assert store.get("left by another version") is None


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_recheck_is_refused_where_nothing_can_be_checked(mode: str) -> None:
    if mode == "auto" and mx.metal.is_available():
        pytest.skip("needs a machine without Metal")
    done = run("--recheck", DGEMMA_KERNELS=mode)
    line, hint = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout) == (2, b"")
    assert ("switched off" if mode == "off" else "without Metal") in line and hint.startswith("hint: ")


def test_the_probe_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 0.3)
    found = doctor.probe()
    assert found.keys() == {"matmul_tflops", "demo_steps_per_second"}
    assert all(value > 0 for value in found.values())
