"""The other machines of a cut model: each makes on its own slice the calls that rank 0 makes (``lead.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from dgemma_mlx.distributed.channel import Channel, Message
from dgemma_mlx.distributed.network import CutNetwork
from dgemma_mlx.kernels import LogitBias
from dgemma_mlx.model.cache import PrefixCache, Snapshot
from dgemma_mlx.model.soft_tokens import SoftTokens

_IDLE_BYTES = 1 << 29  # of freed memory that MLX may keep between two chunks of a prompt


class Follower:
    """A slice of a network, and what rank 0's calls refer to: caches and snapshots by key, and a canvas's state."""

    def __init__(self, network: CutNetwork, channel: Channel) -> None:
        self._network, self._channel = network, channel
        self._kept: dict[int, Any] = {}
        self._signal = self._raw = mx.zeros(0)
        self._bias: LogitBias | None = None

    def follow(self) -> Message:
        """Make every call that rank 0 makes, and return its first message that is no call: other work.

        Raises ``MachineLostError`` when rank 0 has ended.
        """
        while True:
            message = self._channel.receive()
            if "call" not in message:
                return message
            self._channel.send({"ready": self._channel.done})
            self._make(message)
            self._channel.done += 1

    def _make(self, message: Message) -> None:
        """Make one call."""
        for key in message.pop("dropped"):
            self._kept.pop(key, None)
        name = message.pop("call")
        call: Callable[..., None] = getattr(self, f"_{name}")
        call(**message)

    def _new_cache(self, key: int, left_padding: list[int] | None) -> None:
        padding = None if left_padding is None else mx.array(left_padding, mx.int32)
        self._kept[key] = self._network.new_cache(padding)

    def _cache(self, key: int) -> PrefixCache:
        cache: PrefixCache = self._kept[key]
        return cache

    def _reserve(self, cache: int, positions: int) -> None:
        self._cache(cache).reserve(positions)

    def _snapshot(self, cache: int, key: int) -> None:
        self._kept[key] = self._cache(cache).snapshot()

    def _restore(self, cache: int, snapshot: int) -> None:
        kept: Snapshot = self._kept[snapshot]
        self._cache(cache).restore(kept)

    def _fork(self, cache: int, key: int, snapshot: int, capacity: int) -> None:
        self._kept[key] = other = self._cache(cache).fork(self._kept[snapshot], capacity)
        mx.eval(other.buffers())

    def _rows(self, cache: int, key: int, rows: list[int]) -> None:
        self._kept[key] = other = self._cache(cache).rows(rows)
        mx.eval(other.buffers())

    def _encode(self, **call: Any) -> None:
        self._network.encode(*self._prefix(**call))
        self._free()

    def _extend(self, **call: Any) -> None:
        ids, cache, _, soft = self._prefix(**call)
        self._network.extend(ids, cache, soft)
        self._free()

    @staticmethod
    def _free() -> None:
        """Give back freed memory after a chunk: the sizes of its scores grow with the prefix, and do not recur."""
        if mx.get_cache_memory() > _IDLE_BYTES:
            mx.clear_cache()

    def _prefix(
        self, ids: list[list[int]], cache: int, score_bytes: int, soft: dict[str, Any] | None
    ) -> tuple[mx.array, PrefixCache, None, SoftTokens | None]:
        """Return the arguments of ``encode``."""
        own = self._cache(cache)
        own.score_bytes = score_bytes
        pictures = None
        if soft is not None:
            shape = (soft["count"], self._network.config.hidden_size)
            features = self._network.collective.from_first(None, shape, self._network.dtype)
            mx.eval(features)
            pictures = SoftTokens(features, mx.array(soft["rows"], mx.int32), mx.array(soft["blocks"], mx.int32))
        return mx.array(ids, mx.int32), own, None, pictures

    def _first_signal(self, shape: list[int]) -> None:
        self._signal = self._network.conditioning_signal(None, tuple(shape))

    def _step(self, canvas: list[list[int]], cache: int) -> None:
        self._raw = self._network.step(mx.array(canvas, mx.int32), self._signal, self._cache(cache))

    def _bar(self, shape: list[int], rows: list[list[int]]) -> None:
        table = self._network.collective.from_first(None, tuple(shape), mx.float32)
        mx.eval(table)
        self._bias = LogitBias(table, mx.array(rows, mx.int32))

    def _sample(self, uniforms: list[list[float]], temperature: float, is_barred: bool) -> None:
        bias = self._bias if is_barred else None
        self._network.sample(self._raw, mx.array(uniforms), temperature, bias)

    def _next_signal(self, temperature: float, pinned: list[tuple[int, int]]) -> None:
        self._signal = self._network.own_signal(self._raw, temperature, dict(pinned))

    def _whole(self) -> None:
        self._network.whole(self._raw)

    def _project(self, shape: list[int]) -> None:
        hidden = self._network.collective.from_first(None, tuple(shape), self._network.dtype)
        self._network.project(hidden)
