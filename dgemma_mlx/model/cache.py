"""The key/value cache of the encoded prefix: written by ``encode``, read by ``decode``."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from dgemma_mlx.config import FULL, SLIDING, TextConfig

Mask = mx.array | str | None
"""None (every key is seen), "causal" (aligned at the last key), or a boolean array, broadcast to (B, H, L, S)."""

_STEP = 256  # full-attention buffers grow by multiples of this many positions


class _LayerCache:
    """One layer's buffers: keys and values (B, Hk, S, D), None before the first update."""

    def __init__(self) -> None:
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def state(self) -> tuple[mx.array, mx.array]:
        assert self._keys is not None and self._values is not None
        return self._keys, self._values

    @property
    def nbytes(self) -> int:
        return 0 if self._keys is None or self._values is None else self._keys.nbytes + self._values.nbytes


class FullLayerCache(_LayerCache):
    """Keys and values of all prefix positions, (B, Hk, S, D) each, in a buffer that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def _reserve(self, k: mx.array, v: mx.array, capacity: int) -> tuple[mx.array, mx.array]:
        def grown(old: mx.array | None, new: mx.array) -> mx.array:
            B, H, _, D = new.shape
            have = 0 if old is None else old.shape[2]
            if old is not None and have >= capacity:
                return old
            room = mx.zeros((B, H, -(-capacity // _STEP) * _STEP - have, D), new.dtype)
            return room if old is None else mx.concatenate([old, room], axis=2)

        return grown(self._keys, k), grown(self._values, v)

    def update(self, k: mx.array, v: mx.array, capacity: int) -> tuple[mx.array, mx.array]:
        """Appends (B, Hk, L, D) and returns the keys and values the new positions may see."""
        start, self.size = self.size, self.size + k.shape[2]
        keys, values = self._reserve(k, v, max(capacity, self.size))
        keys[:, :, start : self.size] = k
        values[:, :, start : self.size] = v
        self._keys, self._values = keys, values
        return self.state()

    def state(self) -> tuple[mx.array, mx.array]:
        keys, values = super().state()
        return keys[:, :, : self.size], values[:, :, : self.size]


class SlidingLayerCache(_LayerCache):
    """Keys and values of the last ``window - 1`` prefix positions, oldest first.

    A query sees itself and the ``window - 1`` positions before it, so no more is ever needed.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self._kept = window - 1

    def set_state(self, keys: mx.array, values: mx.array) -> None:
        self._keys, self._values = keys, values

    def update(self, k: mx.array, v: mx.array, capacity: int) -> tuple[mx.array, mx.array]:
        """Appends (B, Hk, L, D) and returns the keys and values the new positions may see."""
        if self._keys is not None and self._values is not None:
            k = mx.concatenate([self._keys, k], axis=2)
            v = mx.concatenate([self._values, v], axis=2)
        start = max(0, k.shape[2] - self._kept)
        # contiguous: a view would keep the whole chunk's buffer alive
        self._keys, self._values = mx.contiguous(k[:, :, start:]), mx.contiguous(v[:, :, start:])
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

    @property
    def rope_offset(self) -> int | mx.array:
        """The position of the next token: an int, or (B,) with left padding."""
        return self.offset if self._left_padding is None else self.offset - self._left_padding

    def reserve(self, positions: int) -> None:
        """Sizes buffers once for ``positions`` more, so that a long prefill never copies them."""
        self._capacity = self.offset + positions

    def update(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Appends one layer's (B, Hk, L, D); returns what the new positions attend over."""
        return self.layers[layer].update(k, v, self._capacity)

    def with_canvas(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """[prefix | canvas] keys and values of one layer; the cache itself is not changed."""
        if self.offset == 0:
            return k, v
        keys, values = self.layers[layer].state()
        return mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2)

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
