"""Wired memory: the limit is raised while something generates, and put back afterwards.

There is no Metal here, so MLX's part is replaced.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

import dgemma_mlx
from dgemma_mlx import Done, fill, generate_batch, stream
from dgemma_mlx.generation.wired import wired_memory

RECOMMENDED, BEFORE = 20_000_000_000, 7


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The limits that are set on a machine whose GPU recommends ``RECOMMENDED`` bytes, the current one last."""
    found = [BEFORE]

    def set_wired_limit(limit: int) -> int:
        found.append(limit)
        return found[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    machine = {"max_recommended_working_set_size": RECOMMENDED, "architecture": "x86_64"}
    monkeypatch.setattr(mx, "device_info", lambda: machine)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    return found


def test_overlapping_contexts_raise_the_limit_once_and_the_last_one_puts_it_back(limits: list[int]) -> None:
    first, second = wired_memory(), wired_memory()
    with first:
        second.__enter__()
        assert limits == [BEFORE, RECOMMENDED]
    assert limits == [BEFORE, RECOMMENDED]
    second.__exit__(None, None, None)
    assert limits == [BEFORE, RECOMMENDED, BEFORE]


@pytest.mark.parametrize("end", ["done", "closed", "cancelled", "batch", "error", "fill"])
def test_the_limit_is_put_back_however_an_answer_ends(limits: list[int], end: str, monkeypatch: Any) -> None:
    with monkeypatch.context() as plain:
        plain.setattr(mx.metal, "is_available", lambda: False)
        model = dgemma_mlx.load("demo")
    monkeypatch.setattr(dgemma_mlx.kernels.dispatch, "has_metal", lambda: False)
    if end == "batch":
        generate_batch(model, ["Sort 7 3 5", "Sort 2 1"], max_tokens=8, memory_limit=10**12)
    elif end == "fill":
        fill(model, "Sort 7 3 5: 3 ___:1___ 7", seed=1, memory_limit=10**12)
    else:
        events = stream(model, "Sort 7 3 5", seed=1, memory_limit=10**12, cancelled=lambda: end == "cancelled")
        assert limits == [BEFORE]  # nothing is done before the first event is asked for
        if end == "error":
            monkeypatch.setattr(model.network, "extend", None)
            with pytest.raises(TypeError):
                next(events)
        elif end == "closed":
            next(events)
            assert limits[-1] == RECOMMENDED
            del events
        else:
            assert isinstance(list(events)[-1], Done)
    assert limits == [BEFORE, RECOMMENDED, BEFORE]
