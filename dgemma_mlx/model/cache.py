"""The key/value cache of the encoded prefix: written by ``encode``, read by ``decode``."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import mlx.core as mx

from dgemma_mlx.checkpoint.config import FULL, SLIDING, TextConfig

Mask = mx.array | str | None
"""None (every key is seen), "causal" (aligned at the last key), or a boolean array, broadcast to (B, H, L, S)."""

SPARE = 1024  # positions of a full-attention buffer beyond the prompt: room for a few canvases, so that it seldom grows


class _LayerCache:
    """One layer's buffers [prefix | room]: keys and values (B, Hk, S, D), None before the first update.

    What is behind the prefix, ``size`` positions, is free: a canvas is written there at each denoising step. Writing
    is a slice update. MLX does it in place when nobody else holds the buffer, and else copies it first, so that
    whoever does hold it never sees a change.
    """

    _spare = 0
    """positions that a new buffer has beyond those it is made for"""

    def __init__(self) -> None:
        self._keys: mx.array | None = None
        self._values: mx.array | None = None
        self.size = 0

    def set_state(self, keys: mx.array, values: mx.array) -> None:
        """Takes over what ``state`` gave. The arrays themselves stay as they are: a canvas needs new buffers."""
        self._keys, self._values, self.size = keys, values, keys.shape[2]

    def state(self) -> tuple[mx.array, mx.array]:
        """The prefix's keys and values, (B, Hk, size, D) each."""
        return self._first(self.size)

    def with_canvas(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """[prefix | canvas] keys and values, for the canvas' (B, Hk, C, D)."""
        end = self.size + k.shape[2]
        self._write(k, v, end)
        return self._first(end)

    def _first(self, count: int) -> tuple[mx.array, mx.array]:
        assert self._keys is not None and self._values is not None
        return self._keys[:, :, :count], self._values[:, :, :count]

    def _write(self, k: mx.array, v: mx.array, capacity: int) -> None:
        """Puts (B, Hk, L, D) behind the prefix. Too small a buffer gives way to one of ``capacity`` positions."""
        end = self.size + k.shape[2]
        if self._keys is None or self._values is None or self._keys.shape[2] < end:
            self._keys, self._values = self._grown(self._keys, k, capacity), self._grown(self._values, v, capacity)
        self._keys[:, :, self.size : end] = k
        self._values[:, :, self.size : end] = v

    def _grown(self, old: mx.array | None, like: mx.array, capacity: int) -> mx.array:
        B, H, _, D = like.shape
        room = mx.zeros((B, H, capacity + self._spare - self.size, D), like.dtype)
        return room if old is None else mx.concatenate([old[:, :, : self.size], room], axis=2)

    @property
    def nbytes(self) -> int:
        return 0 if self._keys is None or self._values is None else self._keys.nbytes + self._values.nbytes


class FullLayerCache(_LayerCache):
    """Keys and values of all prefix positions.

    Both come from one projection, which would be half the bytes, but it would have to be normed and rotated again for
    the whole prefix at each step. Counted for the published model's 5 full layers at 262,144 positions: 2.7 GB to
    read and 5.4 GB to write, where attention itself reads 5.4 GB. Keeping the values alone, a key would be
    rounded twice: in half precision not the same key. So both are kept.
    """

    _spare = SPARE

    def update(self, k: mx.array, v: mx.array, capacity: int) -> tuple[mx.array, mx.array]:
        """Appends (B, Hk, L, D) and returns the keys and values the new positions may see."""
        end = self.size + k.shape[2]
        self._write(k, v, max(capacity, end))
        self.size = end
        return self.state()


class SlidingLayerCache(_LayerCache):
    """Keys and values of the last ``window - 1`` prefix positions, oldest first.

    A query sees itself and the ``window - 1`` positions before it, so no more is ever needed. The order is kept by
    copying what stays at each update, once a canvas: little beside the canvas' denoising steps, which copy nothing.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self._kept = window - 1

    def update(self, k: mx.array, v: mx.array, capacity: int) -> tuple[mx.array, mx.array]:
        """Appends (B, Hk, L, D) and returns the keys and values the new positions may see."""
        if self._keys is not None:
            keys, values = self.state()
            k, v = mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2)
        start = max(0, k.shape[2] - self._kept)
        # contiguous: a view would keep the whole chunk's buffer alive
        kept = mx.contiguous(k[:, :, start:]), mx.contiguous(v[:, :, start:])
        self.set_state(*kept)
        # Else MLX would leave the copies of all layers to the end, and hold the chunk's keys and values until then.
        k, v = mx.depends([k, v], list(kept))
        return k, v


def row_positions(rope_offset: int | mx.array, batch: int, length: int) -> mx.array:
    """(B, L) int32: the positions from ``rope_offset``, an int or (B,), on."""
    first = mx.array(rope_offset, mx.int32).reshape(-1, 1)
    return mx.contiguous(mx.broadcast_to(first + mx.arange(length, dtype=mx.int32), (batch, length)))


@dataclass(frozen=True)
class Snapshot:
    """A point to go back to: how many positions were encoded, and what the sliding layers held then."""

    offset: int
    sliding: dict[int, tuple[mx.array, mx.array]]
    """by layer; (B, Hk, S, D) each"""


class PrefixCache:
    """Keys and values of every layer for the positions encoded so far.

    ``left_padding`` (B,) int32 says how many of the first positions of each row are padding: they are seen by
    nobody, and row b's positions are counted from ``-left_padding[b]``, so that its text begins at 0 as it would alone.
    """

    def __init__(self, config: TextConfig, left_padding: mx.array | None = None) -> None:
        self._window = config.sliding_window
        self._left_padding = left_padding
        self._capacity = 0
        self.offset = 0
        self.layers: list[FullLayerCache | SlidingLayerCache] = [
            FullLayerCache() if kind == FULL else SlidingLayerCache(config.sliding_window)
            for kind in config.layer_types
        ]
        self._ends = [0] * len(self.layers)

    @property
    def is_whole(self) -> bool:
        """Whether every layer holds what ``offset`` says: not so where an ``encode`` or ``restore`` was interrupted."""
        return all(end == self.offset for end in self._ends)

    @property
    def rope_offset(self) -> int | mx.array:
        """The position of the next token: an int, or (B,) with left padding."""
        return self.offset if self._left_padding is None else self.offset - self._left_padding

    def reserve(self, positions: int) -> None:
        """Sizes buffers once for ``positions`` more and some canvases, so that a long prefill never copies them."""
        self._capacity = max(self._capacity, self.offset + positions)

    def update(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Appends one layer's (B, Hk, L, D); returns what the new positions attend over."""
        self._ends[layer] = self.offset + k.shape[2]
        return self.layers[layer].update(k, v, self._capacity)

    def with_canvas(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """[prefix | canvas] keys and values of one layer; the canvas is written behind the prefix, which stays."""
        return (k, v) if self.offset == 0 else self.layers[layer].with_canvas(k, v)

    def advance(self, positions: int) -> None:
        """Counts positions that every layer has appended."""
        self.offset += positions

    def snapshot(self) -> Snapshot:
        """The present state. Full layers need no copy: what follows is only written behind it."""
        sliding = {
            i: layer.state() for i, layer in enumerate(self.layers) if isinstance(layer, SlidingLayerCache)
        }
        return Snapshot(self.offset, sliding if self.offset else {})

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot of this cache, not before one that was restored since."""
        self.offset = snapshot.offset
        for i, layer in enumerate(self.layers):
            if isinstance(layer, FullLayerCache):
                layer.size = snapshot.offset
            else:
                layer.set_state(*snapshot.sliding[i])
        self._ends = [snapshot.offset] * len(self.layers)

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows of the batch alone. Snapshots taken before are of no use then."""
        chosen = mx.array(list(rows), mx.int32)
        if self._left_padding is not None:
            self._left_padding = self._left_padding[chosen]
        for layer in self.layers:
            layer.set_state(*(array[chosen] for array in layer.state()))

    def repeated(self, rows: int) -> PrefixCache:
        """Another cache, of so many rows that all hold what the one row of this one does."""
        other = copy(self)
        other.layers, other._ends = [copy(layer) for layer in self.layers], list(self._ends)
        for layer in other.layers:
            layer.set_state(*(mx.repeat(array, rows, axis=0) for array in layer.state()))
        return other

    def encode_masks(self, length: int) -> dict[str, Mask]:
        """For each kind of layer, who sees whom when ``length`` positions are appended."""
        end = self.offset + length
        if self._left_padding is None and end <= self._window:
            return {FULL: "causal", SLIDING: "causal"}
        queries = mx.arange(self.offset, end)[:, None]  # (L, 1)
        first = self.offset - min(self.offset, self._window - 1)
        keys = mx.arange(first, end)
        sliding = (keys <= queries) & (keys > queries - self._window)
        if self._left_padding is None:
            return {FULL: "causal", SLIDING: sliding}
        all_keys = mx.arange(end)
        full = all_keys <= queries
        # A padding position sees itself, or its softmax over nothing would be NaN.
        return {
            FULL: self._unpadded(all_keys) & full | (all_keys == queries),
            SLIDING: self._unpadded(keys) & sliding | (keys == queries),
        }

    def canvas_masks(self, length: int) -> dict[str, Mask]:
        """For each kind of layer, what a canvas of ``length`` positions sees: everything but padding."""
        if self._left_padding is None:
            return {FULL: None, SLIDING: None}
        end = self.offset + length
        first = self.offset - min(self.offset, self._window - 1)
        return {FULL: self._unpadded(mx.arange(end)), SLIDING: self._unpadded(mx.arange(first, end))}

    def _unpadded(self, keys: mx.array) -> mx.array:
        """(B, 1, 1, S) bool: which of the key positions hold text."""
        assert self._left_padding is not None
        return (keys >= self._left_padding[:, None])[:, None, None, :]

    def state(self) -> list[mx.array]:
        """Every array of the cache, to evaluate."""
        return [array for layer in self.layers for array in layer.state()] if self.offset else []

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the buffers take."""
        return sum(layer.nbytes for layer in self.layers)
