"""The network as rank 0 has it: each call is told to the other machines, which make the same call on their slices.

The whole engine runs on rank 0 alone and sees an ordinary network. It samples, applies constraints, stops, and keeps
the answer; the others (``follow.py``) only compute. Before each call, rank 0 waits until every machine is ready: on a
GPU, work that waits for another machine for some seconds would be killed.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.checks import shown
from dgemma_mlx.distributed.channel import SILENCE, WORD, Channel
from dgemma_mlx.distributed.collective import Collective
from dgemma_mlx.distributed.network import CutNetwork
from dgemma_mlx.distributed.slices import Slice
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.kernels import CanvasSample, LogitBias
from dgemma_mlx.model.cache import PrefixCache, Snapshot
from dgemma_mlx.model.experts import RouterLog
from dgemma_mlx.model.prediction import Prediction
from dgemma_mlx.model.soft_tokens import SoftTokens

TIMEOUT_VARIABLE = "DGEMMA_CLUSTER_TIMEOUT"  # seconds that a call may take on the slowest machine
_SECONDS_PER_POSITION = 0.02  # that encoding may take, in addition to the time of any call


class Leader:
    """Rank 0's side of the calls that all machines make together."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._seconds = _longest_call()
        self._is_broken = False
        self.keys = itertools.count()
        self.dropped: deque[int] = deque()  # keys of caches and snapshots that nobody refers to any more

    @contextmanager
    def call(self, name: str, encoded: int = 0, **arguments: Any) -> Iterator[None]:
        """Tell the others to make a call, wait until they are ready, and make it in the block.

        ``encoded`` is the number of positions to encode, which take time. A call that ends early leaves the machines
        at different places, so that no other call is possible.
        """
        if self._is_broken:
            raise DgemmaError("the machines are no longer at the same place", "Start the command again.")
        self._is_broken = True
        dropped = [self.dropped.popleft() for _ in range(len(self.dropped))]
        seconds = self._seconds + encoded * _SECONDS_PER_POSITION
        with _interrupted_afterwards(), self._channel.within(seconds):
            try:
                self._channel.tell({"call": name, "dropped": dropped, **arguments})
                for rank in self._channel.peers:
                    self._channel.receive(rank)
                yield
            except RuntimeError:  # MLX's, which names no machine: the channel ends this process with a line that does
                time.sleep(WORD)
                raise
            self._channel.done += 1
            self._is_broken = False

    def new_key(self, owner: Any) -> int:
        """Return a key for an object that the others keep under it as long as ``owner`` exists."""
        key = next(self.keys)
        weakref.finalize(owner, self.dropped.append, key)
        return key


@contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Put Ctrl-C off until the block has ended, so that the machines stay at the same place."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if callable(before):
        for press in pressed:
            before(*press)


def _longest_call() -> float:
    """Return the seconds that a call may take. Raises ``DgemmaError`` (exit code 2) when the variable is no number."""
    text = os.environ.get(TIMEOUT_VARIABLE)
    if not text:
        return SILENCE
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise DgemmaError(f"{TIMEOUT_VARIABLE} must be seconds, not {shown(text)}", "Unset it for 10.", exit_code=2)
    return seconds


@dataclass(frozen=True)
class LeadingSnapshot(Snapshot):
    """A snapshot on all machines.

    Attributes:
        key: The key under which the others have theirs; a list, because it is only known after the snapshot exists.
    """

    key: list[int]


class LeadingCache(PrefixCache):
    """A prefix cache on all machines. Each has the keys and values of its own heads.

    Attributes:
        key: The key under which the others have theirs.
    """

    def __init__(self, config: TextConfig, leader: Leader, left_padding: mx.array | None = None) -> None:
        super().__init__(config, left_padding)
        self._leader = leader
        self.key = leader.new_key(self)
        padding = None if left_padding is None else left_padding.tolist()
        with leader.call("new_cache", key=self.key, left_padding=padding):
            pass

    def reserve(self, positions: int) -> None:
        """Reserve room on all machines."""
        with self._leader.call("reserve", cache=self.key, positions=positions):
            super().reserve(positions)

    def snapshot(self) -> LeadingSnapshot:
        """Return the current state of all machines."""
        own = super().snapshot()
        snapshot = LeadingSnapshot(own.offset, own.sliding, [])
        snapshot.key.append(self._leader.new_key(snapshot))
        with self._leader.call("snapshot", cache=self.key, key=snapshot.key[0]):
            return snapshot

    def restore(self, snapshot: Snapshot) -> None:
        """Return to an earlier state on all machines."""
        assert isinstance(snapshot, LeadingSnapshot), "a snapshot of these machines"
        with self._leader.call("restore", cache=self.key, snapshot=snapshot.key[0]):
            super().restore(snapshot)

    def fork(self, snapshot: Snapshot, capacity: int) -> PrefixCache:
        """Return a new cache in an earlier state, on all machines."""
        assert isinstance(snapshot, LeadingSnapshot), "a snapshot of these machines"
        other = super().fork(snapshot, capacity)
        assert isinstance(other, LeadingCache)
        other.key = self._leader.new_key(other)
        with self._leader.call(
            "fork", cache=self.key, key=other.key, snapshot=snapshot.key[0], capacity=capacity
        ):
            return other

    def rows(self, rows: Sequence[int]) -> PrefixCache:
        """Return a new cache with copies of these rows, on all machines."""
        other = super().rows(rows)
        assert isinstance(other, LeadingCache)
        other.key = self._leader.new_key(other)
        with self._leader.call("rows", cache=self.key, key=other.key, rows=list(rows)):
            return other


class LeadingNetwork(CutNetwork):
    """The slice of rank 0, whose calls the other machines follow."""

    def __init__(
        self, config: TextConfig, all_slices: Sequence[Slice], collective: Collective, leader: Leader
    ) -> None:
        super().__init__(config, all_slices, collective)
        self._leader = leader
        self._barred: LogitBias | None = None  # the one that the others have

    def new_cache(self, left_padding: mx.array | None = None) -> PrefixCache:
        """Return an empty cache on all machines."""
        return LeadingCache(self.config, self._leader, left_padding)

    def encode(
        self, ids: mx.array, cache: PrefixCache, router_log: RouterLog | None = None, soft: SoftTokens | None = None
    ) -> mx.array:
        """Append ids (B, L) to the cache on all machines, and return their hidden states (B, L, M)."""
        with self._encoding("encode", ids, cache, soft):
            return super().encode(ids, cache, router_log, soft)

    def extend(self, ids: mx.array, cache: PrefixCache, soft: SoftTokens | None = None) -> None:
        """Append ids (B, L) to the cache on all machines."""
        with self._encoding("extend", ids, cache, soft):
            super().extend(ids, cache, soft)

    @contextmanager
    def _encoding(self, name: str, ids: mx.array, cache: PrefixCache, soft: SoftTokens | None) -> Iterator[None]:
        """Call ``encode`` or ``extend``. The features of pictures, which rank 0 has computed, follow."""
        assert isinstance(cache, LeadingCache)
        pictures = None if soft is None else {
            "rows": soft.rows.tolist(), "blocks": soft.blocks.tolist(), "count": soft.features.shape[0],
        }  # fmt: skip
        with self._leader.call(
            name, ids.size, ids=ids.tolist(), cache=cache.key, score_bytes=cache.score_bytes, soft=pictures
        ):
            if soft is not None:
                mx.eval(self.collective.from_first(soft.features, soft.features.shape, self.dtype))
            yield

    def conditioning_signal(
        self, self_conditioning: mx.array | Prediction | None, shape: tuple[int, ...]
    ) -> mx.array:
        """Return the signal (B, C, M) of the first step, for ``self_conditioning`` None."""
        with self._leader.call("first_signal", shape=list(shape)):
            return super().conditioning_signal(self_conditioning, shape)

    def step(self, canvas: mx.array, signal: mx.array, cache: PrefixCache, started: int = 0) -> mx.array:
        """Return the raw logits (B, C, V') of rank 0's own ids. ``signal`` is the one that was computed last."""
        assert isinstance(cache, LeadingCache)
        with self._leader.call("step", canvas=canvas.tolist(), cache=cache.key):
            return super().step(canvas, signal, cache)

    def sample(
        self, raw: mx.array, uniforms: mx.array, temperature: float, barred: LogitBias | None = None
    ) -> CanvasSample:
        """Return the ``CanvasSample`` (B, C) of all ids."""
        if barred is not None and (self._barred is None or barred.table is not self._barred.table):
            self._barred = barred
            shape = list(barred.table.shape)
            with self._leader.call("bar", shape=shape, rows=barred.rows.tolist()):
                mx.eval(self.collective.from_first(barred.table, barred.table.shape, mx.float32))
        with self._leader.call(
            "sample", uniforms=uniforms.tolist(), temperature=temperature, is_barred=barred is not None
        ):
            return super().sample(raw, uniforms, temperature, barred)

    def next_signal(
        self, raw: mx.array, sample: CanvasSample, temperature: float, barred: LogitBias | None = None
    ) -> mx.array:
        """Return rank 0's own signal (B, C, M) for the next step. Pinned positions of ``sample`` have a list of one."""
        places = np.flatnonzero(np.array(sample.kept_count) == 1)
        ids = np.array(sample.argmax).reshape(-1)[places]
        pinned = dict(zip(places.tolist(), ids.tolist(), strict=True))
        with self._leader.call("next_signal", temperature=temperature, pinned=[*pinned.items()]):
            return self.own_signal(raw, temperature, pinned)

    def whole(self, raw: mx.array) -> mx.array:
        """Return the logits (B, C, V) of all ids, given those of rank 0's own ids from ``step``."""
        with self._leader.call("whole"):
            return super().whole(raw)

    def project(self, hidden: mx.array) -> mx.array:
        """Return the raw logits (..., V) of hidden states (..., M), which are sent to the others."""
        with self._leader.call("project", shape=list(hidden.shape)):
            hidden = self.collective.from_first(hidden, hidden.shape, self.dtype)
            return CutNetwork.project(self, hidden)
