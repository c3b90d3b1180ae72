"""Sums over the machines, and what they take: messages and bytes are counted."""

from __future__ import annotations

import faulthandler
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


class Collective:
    """The collective operations of a group of machines, of which this process is one.

    Every machine must call the same operations in the same order. Their results are lazy, as those of
    ``mx.distributed``.

    Attributes:
        rank: The number of this machine, from 0.
        size: The number of machines.
        messages: Number of operations so far.
        nbytes: Bytes of the arrays that this machine has put into them.
    """

    def __init__(self, group: mx.distributed.Group) -> None:
        self._group = group
        self.rank, self.size = group.rank(), group.size()
        self.messages = self.nbytes = 0

    def sum(self, own: mx.array) -> mx.array:
        """Return the sum of every machine's array, which all have one shape and dtype."""
        self._count(own)
        return mx.distributed.all_sum(own, group=self._group)

    def gather(self, own: mx.array) -> mx.array:
        """Return every machine's array (...), stacked by rank: (size, ...)."""
        self._count(own)
        return mx.distributed.all_gather(own[None], group=self._group)

    def from_first(self, own: mx.array | None, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Return the array of rank 0 on every machine. The others pass None; ``shape`` and ``dtype`` are its."""
        return self.sum(mx.zeros(shape, dtype) if own is None else own)

    def _count(self, own: mx.array) -> None:
        self.messages += 1
        self.nbytes += own.nbytes


@contextmanager
def ending_after(seconds: float, line: str) -> Iterator[None]:
    """End this process, with a line on stderr and exit code 1, when the block takes longer.

    MLX holds Python's lock while it connects the machines, and waits for ever for one that does not come: no thread of
    this program could do anything about it. The timer of ``faulthandler`` needs no lock. It writes its report into a
    pipe, at whose other end a shell prints the line instead.
    """
    script = 'read -r _ && { printf "dgemma-mlx: %s\\n" "$1" >&2; cat > /dev/null; }'
    with subprocess.Popen(["/bin/sh", "-c", script, "sh", line], stdin=subprocess.PIPE) as shell:
        assert shell.stdin is not None
        faulthandler.dump_traceback_later(seconds, exit=True, file=shell.stdin.fileno())
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
