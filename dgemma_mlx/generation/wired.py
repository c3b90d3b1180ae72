"""Wired memory: weights that macOS must not page out while an answer is generated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import mlx.core as mx


class _State:
    """The generations of this process that want wired memory.

    Attributes:
        lock: Guards the other attributes.
        users: Number of active ``wired_memory`` contexts.
        before: The limit in bytes that was in force before the first of them.
    """

    lock = Lock()
    users = 0
    before = 0


@contextmanager
def wired_memory() -> Iterator[None]:
    """Let MLX wire as much memory as the GPU recommends, until the last of these contexts ends.

    Without it, macOS pages a model that nearly fills the memory out between two steps. Contexts may overlap in any
    order, as generators do. Without Metal nothing happens.
    """
    if not mx.metal.is_available():
        yield
        return
    with _State.lock:
        if not _State.users:
            _State.before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        _State.users += 1
    try:
        yield
    finally:
        with _State.lock:
            _State.users -= 1
            if not _State.users:
                mx.synchronize()  # memory in use must not be unwired
                mx.set_wired_limit(_State.before)
