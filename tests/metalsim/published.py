"""Loading of mlx_lm modules with simulated Metal kernels, to test the simulator with kernels written for GPUs."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.metalsim.simulate import simulated

Wide = NDArray[np.float64]
F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
TOLERANCE = {F32: 2e-6, F16: 2e-3, BF16: 1.6e-2}  # relative to the largest value: a few roundings


def load(name: str, edit: Callable[[str], str] = str, **options: Any) -> Any:
    """Import a copy of the module ``name`` as if there were a GPU, and replace its kernels by simulated ones.

    ``edit`` changes the kernels' source, to plant faults. ``options`` are those of ``simulated``.
    """

    def kernel(*, source: str, header: str = "", **rest: Any) -> Any:
        return make(source=edit(source), header=edit(header), **rest)

    make = mx.fast.metal_kernel
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mlx_lm")
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        believe_in_metal(patch)
        patch.setattr(mx.fast, "metal_kernel", kernel)
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    for attribute, value in list(vars(module).items()):
        if type(value).__name__ == "nb_func" and not value.__name__:  # a result of mx.fast.metal_kernel
            setattr(module, attribute, simulated(value, **options))
    return module


def folder() -> Path:
    """Return the folder of the installed mlx_lm package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Path(pytest.importorskip("mlx_lm").__path__[0])


def believe_in_metal(patch: pytest.MonkeyPatch) -> None:
    """Patch MLX so that it reports a GPU."""
    patch.setattr(mx.metal, "is_available", lambda: True)
    patch.setattr(mx, "default_device", lambda: mx.gpu)


def normal(*shape: int, dtype: mx.Dtype = F32, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def wide(x: mx.array) -> Wide:
    return np.array(x.astype(mx.float32), np.float64)


def rms_norm(x: Wide, eps: float = 1e-5) -> Wide:
    scale: Wide = np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x / scale


def agree(found: mx.array, in_numpy: Wide, in_mlx: mx.array, tolerance: float) -> None:
    """Assert that ``found`` equals the results of NumPy in float64 and of MLX in float32 on the CPU.

    ``tolerance`` is relative to the largest value.
    """
    for expected in (in_numpy, wide(in_mlx)):
        np.testing.assert_allclose(wide(found), expected, rtol=0, atol=tolerance * np.abs(expected).max())
