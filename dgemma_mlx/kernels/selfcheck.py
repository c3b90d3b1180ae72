"""The self-check of kernels: whether a kernel is correct on this machine and faster than its reference.

Each kernel is checked and timed once per machine and dtype, and the verdict is stored on disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx

from dgemma_mlx.files import write_whole
from dgemma_mlx.json_text import parse_json
from dgemma_mlx.kernels.operation import Operation, leaves

_REPEATS = 5  # timed calls

# Result of a self-check: "faster" and "slower" compare a correct kernel with the reference, "wrong" means that the
# results differ, "failed" that the kernel did not compile or run, and "checking" that the check has not ended.
Status = Literal["faster", "slower", "wrong", "failed", "checking"]


@dataclass(frozen=True)
class Verdict:
    """The result of a kernel's self-check.

    Attributes:
        status: The result in one word, see ``Status``.
        detail: What is wrong with a broken kernel, in one line.
        kernel: Best time of a call of the kernel in seconds, summed over the operation's examples.
        reference: The same for the reference.
    """

    status: Status
    detail: str = ""
    kernel: float = 0.0
    reference: float = 0.0

    @property
    def broken(self) -> bool:
        """Whether the kernel failed or computed wrong results."""
        return self.status in ("wrong", "failed")


def examine(operation: Operation[..., Any], dtype: mx.Dtype) -> Verdict:
    """Run an operation's kernel and reference on its examples, compare their results, and time both.

    An exception of the kernel becomes a verdict.
    """
    kernel = reference = 0.0
    for example in operation.examples:
        arguments = example(dtype)
        mx.eval([leaf for leaf in leaves(arguments) if isinstance(leaf, mx.array)])
        try:
            found = operation.kernel(*arguments)
            mx.eval(found)
        except Exception as error:  # a compiler or a driver may raise anything
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Verdict("failed", lines[0])
        if not operation.agree(found, operation.reference(*arguments)):
            return Verdict("wrong", "its results differ from the reference")
        kernel += _seconds(partial(operation.kernel, *arguments))
        reference += _seconds(partial(operation.reference, *arguments))
    return Verdict("faster" if kernel < reference else "slower", kernel=kernel, reference=reference)


def _seconds(call: Callable[[], Any]) -> float:
    """Return the shortest time of ``_REPEATS`` calls in seconds, after one call to warm up."""
    times = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - began)
    return min(times[1:])


class Store:
    """The stored verdicts of this machine, in a JSON file.

    The keys contain the MLX version and the GPU, so that a change of either repeats the checks. A file that cannot be
    read counts as empty, and a file that cannot be written is ignored.

    A check holds a lock on a file beside the JSON file, and the operating system releases the lock when the process
    ends. So an entry "checking" that nobody holds the lock for belongs to a process that died in the check, whatever
    program has its process id now. One check runs at a time, because another one would disturb the times.
    """

    def __init__(self, path: Path) -> None:
        """Use the JSON file ``path``, which does not need to exist."""
        from importlib.metadata import version

        self._path = path
        self._machine = f"mlx {version('mlx')} on {mx.device_info().get('device_name', 'CPU')}"

    def key(self, operation: Operation[..., Any], dtype: mx.Dtype) -> str:
        """Return the key of an operation's verdict for a dtype on this machine, with a digest of the Metal source."""
        digest = hashlib.sha256(operation.source.encode()).hexdigest()[:16]
        return f"{self._machine}: {operation.name} {dtype} {digest}"

    def get(self, key: str) -> Verdict | None:
        """Return the verdict stored under a key, or None."""
        try:
            verdict = Verdict(**self._read()[key])
        except (KeyError, TypeError):
            return None
        numbers = (verdict.kernel, verdict.reference)
        known = verdict.status in get_args(Status) and isinstance(verdict.detail, str)
        if not known or not all(isinstance(n, int | float) for n in numbers):
            return None
        return verdict

    def put(self, key: str, verdict: Verdict) -> None:
        """Store a verdict under a key."""
        self._write({**self._read(), key: asdict(verdict)})

    def settle(self, key: str, check: Callable[[], Verdict]) -> Verdict:
        """Return the verdict of ``check`` and store it under a key, unless a verdict is stored there already.

        The entry is "checking" until the check ends. An exception of the check, Ctrl-C for example, removes the entry,
        so that the kernel is checked again. An entry that a dead process has left means that the kernel crashed it: the
        verdict is "failed". While another thread or process runs a check, the result is "checking".
        """
        with self._alone() as alone:
            if not alone:
                return Verdict("checking")
            verdict = self.get(key)
            if verdict is None:
                self.put(key, Verdict("checking"))
                try:
                    verdict = check()
                except BaseException:
                    self._write({other: entry for other, entry in self._read().items() if other != key})
                    raise
                self.put(key, verdict)
            elif verdict.status == "checking":
                verdict = Verdict("failed", "the program crashed during the self-check")
                self.put(key, verdict)
            return verdict

    def clear(self) -> None:
        """Remove all verdicts. Raises ``OSError``."""
        self._path.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Yield whether no other thread or process runs a check, and keep them from it during the block."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path.with_suffix(".lock"), os.O_RDONLY | os.O_CREAT, 0o644)
        except OSError:  # the verdicts cannot be stored either
            yield True
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError as error:  # a file system without locks does not prevent a check
            alone = not isinstance(error, BlockingIOError)
        try:
            yield alone
        finally:
            os.close(descriptor)

    def _read(self) -> dict[str, Any]:
        """Return the content of the file; an empty dict if it cannot be read or is not a JSON object."""
        try:
            entries = parse_json(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}

    def _write(self, entries: dict[str, Any]) -> None:
        """Replace the content of the file."""
        with suppress(OSError):
            write_whole(self._path, json.dumps(entries, indent=1))
