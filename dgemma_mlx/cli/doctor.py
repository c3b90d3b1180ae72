"""``dgemma-mlx doctor``: check whether this machine is suitable, how fast it is, and what to change."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from dgemma_mlx.cli.parameters import AsJson, section
from dgemma_mlx.cli.pipe import quiet_when_closed
from dgemma_mlx.errors import how_to_install

_PROBE_SECONDS = 5.0  # duration of each of the two probes
_TOLERANCE = 0.01  # relative error that passes the self-check: Macs may multiply float32 with ten bits
_ENOUGH_MEMORY = 24e9  # the published 4-bit weights are 16.6 GB
_ENOUGH_DISK = 20e9

NoProbe = Annotated[
    bool, section("Measurements")("--no-probe", help="Leave out the speed probe, which takes ten seconds.")
]
Recheck = Annotated[
    bool,
    section("Measurements")("--recheck", help="Forget the stored verdicts on the Metal kernels, and check them again."),
]


def doctor(no_probe: NoProbe = False, recheck: Recheck = False, as_json: AsJson = False) -> None:
    """Check this machine and say what to change.

    The output has the chip, the memory, the versions, Metal and the caches, a self-check of MLX's arithmetic, the state
    of this program's own Metal kernels, and a speed probe.

    Examples:
        dgemma-mlx doctor
        dgemma-mlx doctor --no-probe --json
        dgemma-mlx doctor --recheck
    """
    facts = examine()
    facts["kernels"] = kernels(recheck)
    facts["self_check"] = self_check()
    if not no_probe:
        facts["probe"] = probe()
    facts["advice"] = advice(facts)
    with quiet_when_closed():
        print(json.dumps(facts) if as_json else _as_text(facts))


def examine() -> dict[str, Any]:
    """Return the facts that need no computation: versions, chip, memory, Metal and the Hub's cache."""
    import platform
    import shutil

    import mlx.core as mx
    from huggingface_hub.constants import HF_HUB_CACHE

    from dgemma_mlx.version import __version__

    cache = Path(HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        "dgemma_mlx": __version__,
        "python": platform.python_version(),
        "mlx": _version("mlx"),
        "huggingface_hub": _version("huggingface_hub"),
        "mlx_lm": _version("mlx-lm"),
        "pillow": _version("pillow"),
        "av": _version("av"),
        "os": " ".join(("macOS", platform.mac_ver()[0]) if sys.platform == "darwin" else platform.uname()[0:3:2]),
        "machine": platform.machine(),
        "chip": _chip(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "metal": mx.metal.is_available(),
        "gpu_memory": mx.device_info().get("max_recommended_working_set_size") if mx.metal.is_available() else None,
        "cache_folder": str(cache),
        "cache_free": shutil.disk_usage(existing).free,
    }


def self_check() -> dict[str, float]:
    """Return the errors of the operations that generation uses.

    An error is the largest difference from numpy's float64 result, divided by the largest value of that result.
    """
    import mlx.core as mx
    import numpy as np

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape), mx.float32)

    def wide(array: mx.array) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array(array, np.float64)

    x, experts, chosen = normal(32, 256), normal(4, 64, 256), np.repeat(np.arange(4), 8)
    w, scales, biases = mx.quantize(experts, group_size=64, bits=4)
    unpacked = wide(mx.dequantize(w, scales, biases, group_size=64, bits=4)).swapaxes(1, 2)
    q, k, v = normal(1, 4, 32, 64) / 8, normal(1, 4, 48, 64), normal(1, 4, 48, 64)
    weights = np.exp(wide(q) @ wide(k).swapaxes(2, 3))
    pairs = {
        "matmul": (x @ experts[0].T, wide(x) @ wide(experts)[0].T),
        "quantized_matmul": (
            mx.quantized_matmul(x, w[0], scales[0], biases[0], group_size=64, bits=4), wide(x) @ unpacked[0]
        ),
        "gather_qmm": (
            mx.gather_qmm(x[:, None], w, scales, biases, rhs_indices=mx.array(chosen), group_size=64, bits=4,
                          sorted_indices=True),
            wide(x)[:, None] @ unpacked[chosen],
        ),
        "attention": (
            mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0), weights @ wide(v) / weights.sum(-1, keepdims=True)
        ),
    }  # fmt: skip
    return {name: float(abs(wide(ours) - right).max() / abs(right).max()) for name, (ours, right) in pairs.items()}


def kernels(recheck: bool) -> dict[str, Any]:
    """Return the mode of this program's Metal kernels and the verdicts of their self-check.

    Nothing is checked where there is no Metal or where the kernels are switched off. ``recheck`` forgets the stored
    verdicts first, and raises ``DgemmaError`` where nothing can be checked.
    """
    from dgemma_mlx.cli.settings import Settings
    from dgemma_mlx.kernels import OPERATIONS
    from dgemma_mlx.kernels.dispatch import forget_verdicts, has_metal, set_mode

    mode = Settings()["kernels"].value
    set_mode(mode)
    if recheck:
        forget_verdicts()
    checks = [
        {"operation": operation.name, "dtype": str(dtype).removeprefix("mlx.core."), **asdict(operation.verdict(dtype))}
        for operation in OPERATIONS
        for dtype in operation.dtypes
        if has_metal() and mode != "off"
    ]
    return {"mode": mode, "operations": [operation.name for operation in OPERATIONS], "checks": checks}


def probe() -> dict[str, float]:
    """Measure matrix products and denoising steps of the built-in model for a few seconds each."""
    import mlx.core as mx

    from dgemma_mlx.events import Draft
    from dgemma_mlx.generation.api import stream
    from dgemma_mlx.generation.load import load

    size, dtype = (2048, mx.bfloat16) if mx.metal.is_available() else (512, mx.float32)
    a = mx.random.normal((size, size)).astype(dtype)
    mx.eval(a)
    products, seconds = _repeat(lambda: mx.eval(a @ a))
    model = load("demo")
    steps = 0
    began = time.perf_counter()
    while time.perf_counter() - began < _PROBE_SECONDS:
        steps += sum(isinstance(event, Draft) for event in stream(model, "Count from 13 to 40.", seed=steps))
    return {
        "matmul_tflops": round(products * 2 * size**3 / seconds / 1e12, 4),
        "demo_steps_per_second": round(steps / (time.perf_counter() - began), 1),
    }


def advice(facts: dict[str, Any]) -> list[str]:
    """Return what the user might change, one line each. The list is empty when everything is in order."""
    found = []
    if not facts["metal"]:
        found.append("no Metal: the program works, but slowly; it is made for Macs with Apple silicon")
    found += [
        f"the kernel {check['operation']} is not used for {check['dtype']}: {check['detail']}; --recheck checks again"
        for check in facts["kernels"]["checks"]
        if check["status"] in ("wrong", "failed")
    ]
    for name, error in facts["self_check"].items():
        if not error < _TOLERANCE:
            found.append(f"MLX gets {name} wrong here ({error:.2g}): update macOS, and mlx with pip install -U mlx")
    if facts["machine"] == "x86_64" and sys.platform == "darwin":
        found.append("this Python is for Intel Macs; install an arm64 one")
    if facts["memory"] < _ENOUGH_MEMORY:
        found.append("less than 24 GB of memory: too little for the published 4-bit weights (16.6 GB)")
    if facts["cache_free"] < _ENOUGH_DISK:
        found.append(f"less than 20 GB free for models in {facts['cache_folder']}; HF_HOME names another folder")
    return found


def _repeat(action: Callable[[], None]) -> tuple[int, float]:
    """Repeat an action for ``_PROBE_SECONDS`` and return the number of repetitions and the seconds they took."""
    action()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _PROBE_SECONDS:
        action()
        count += 1
    return count, time.perf_counter() - began


def _kernel_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the table about the Metal kernels: their mode, then one row per kernel and dtype."""
    names, mode = facts["kernels"]["operations"], facts["kernels"]["mode"]
    if not facts["metal"] or mode == "off":
        why = "switched off" if mode == "off" else "no Metal"
        return [("kernels", f"none of {len(names)}, {why}: plain MLX operations are used instead")]
    rows = [("kernels", f"mode {mode}; milliseconds of the kernel and of plain MLX; the faster one is used")]
    for check in facts["kernels"]["checks"]:
        times = f"{1e3 * check['kernel']:8.3f} {1e3 * check['reference']:8.3f}" if check["kernel"] else check["detail"]
        rows.append(("", f"{check['operation']:22} {check['dtype']:9} {check['status']:8} {times}"))
    return rows


def _chip() -> str:
    """Return the name of the processor."""
    import platform
    import subprocess

    if sys.platform == "darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _reader(library: str, version: str | None, packages: str) -> str:
    """Return which library reads images or videos, or how to install it."""
    if version is None:
        return f"cannot be read without {library}: {how_to_install(packages)}"
    return f"read with {library} {version}"


def _as_text(facts: dict[str, Any]) -> str:
    """Return the facts as rows, and the advice after them."""
    from dgemma_mlx.sizes import size

    metal = f"yes, {size(facts['gpu_memory'])} for the GPU" if facts["metal"] else "no"
    rows = [
        ("chip", f"{facts['chip']} ({facts['machine']})"),
        ("memory", size(facts["memory"])),
        ("system", facts["os"]),
        ("Metal", metal),
        ("versions", f"dgemma-mlx {facts['dgemma_mlx']}, mlx {facts['mlx']}, Python {facts['python']}"),
        ("self-check", f"{len(facts['self_check'])} operations, error at most {max(facts['self_check'].values()):.1g}"),
        ("models in", f"{facts['cache_folder']}, {size(facts['cache_free'])} free"),
        ("images", _reader("Pillow", facts["pillow"], "pillow")),
        ("videos", _reader("PyAV", facts["av"], "av pillow")),
    ]
    if result := facts.get("probe"):
        rows.append(("products", f"{1000 * result['matmul_tflops']:,.0f} GFLOP/s"))
        rows.append(("demo model", f"{result['demo_steps_per_second']:.0f} denoising steps/s"))
    rows += _kernel_rows(facts)
    lines = [f"{name:10} {value}" for name, value in rows]
    return "\n".join([*lines, *(f"! {line}" for line in facts["advice"])] + ([] if facts["advice"] else ["all well"]))
