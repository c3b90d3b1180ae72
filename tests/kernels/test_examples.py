"""Tests of the examples with which the self-check compares and times a kernel and its reference."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import mlx.core as mx
import pytest

from dgemma_mlx.kernels import OPERATIONS, DispatchedOperation
from dgemma_mlx.kernels.operation import leaves

MOST_BYTES = 64e6
sampler = import_module("dgemma_mlx.kernels.canvas_sampler")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_a_check_takes_little_memory(
    operation: DispatchedOperation[..., Any], dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may run in the middle of an answer, whose memory is limited."""
    monkeypatch.setattr(sampler, "_CPU_BLOCK", sampler._GPU_BLOCK)
    for example in operation.examples:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        arguments = example(dtype)
        mx.eval([leaf for leaf in leaves(arguments) if isinstance(leaf, mx.array)])
        mx.eval(operation.reference(*arguments))
        assert mx.get_peak_memory() - before < MOST_BYTES
