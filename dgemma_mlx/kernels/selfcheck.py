"""Whether a kernel can be trusted on this machine, and whether it is worth using: measured once, kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx

from dgemma_mlx.files import write_whole
from dgemma_mlx.kernels.operation import Operation, leaves

_REPEATS = 5

Status = Literal["faster", "slower", "wrong", "failed", "checking"]


@dataclass(frozen=True)
class Verdict:
    """What was found about a kernel; ``kernel`` and ``reference`` are seconds a call, the best of some."""

    status: Status
    detail: str = ""
    kernel: float = 0.0
    reference: float = 0.0
    pid: int = 0
    """of the process that is ``checking``"""

    @property
    def broken(self) -> bool:
        return self.status in ("wrong", "failed")


def examine(operation: Operation[..., Any], dtype: mx.Dtype) -> Verdict:
    """Runs kernel and reference on the operation's examples; compares, then times them."""
    kernel = reference = 0.0
    for example in operation.examples:
        arguments = example(dtype)
        mx.eval([leaf for leaf in leaves(arguments) if isinstance(leaf, mx.array)])
        try:
            found = operation.kernel(*arguments)
            mx.eval(found)
        except Exception as error:  # whatever a compiler or a driver may raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Verdict("failed", lines[0])
        if not operation.agree(found, operation.reference(*arguments)):
            return Verdict("wrong", "its results are not those of the reference")
        kernel += _seconds(partial(operation.kernel, *arguments))
        reference += _seconds(partial(operation.reference, *arguments))
    return Verdict("faster" if kernel < reference else "slower", kernel=kernel, reference=reference)


def _seconds(call: Callable[[], Any]) -> float:
    """The best of some calls, the first of which warms up."""
    times = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - began)
    return min(times[1:])


class Store:
    """Verdicts in a JSON file, for one MLX version and one GPU. A file that cannot be used is done without."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._machine = f"mlx {version('mlx')} on {mx.device_info().get('device_name', 'CPU')}"

    def key(self, operation: Operation[..., Any], dtype: mx.Dtype) -> str:
        digest = hashlib.sha256(operation.source.encode()).hexdigest()[:16]
        return f"{self._machine}: {operation.name} {dtype} {digest}"

    def get(self, key: str) -> Verdict | None:
        """The verdict, if there is one. A process that died while it was checking left a broken kernel behind."""
        try:
            verdict = Verdict(**self._read()[key])
        except (KeyError, TypeError):
            return None
        numbers = (verdict.kernel, verdict.reference, verdict.pid)
        if verdict.status not in get_args(Status) or not all(isinstance(n, int | float) for n in numbers):
            return None
        if verdict.status == "checking" and not _runs(verdict.pid):
            return Verdict("failed", "the program died in its self-check")
        return verdict

    def put(self, key: str, verdict: Verdict) -> None:
        with suppress(OSError):
            write_whole(self._path, json.dumps({**self._read(), key: asdict(verdict)}, indent=1))

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return entries if isinstance(entries, dict) else {}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, TypeError, OverflowError):
        return False
    return True
