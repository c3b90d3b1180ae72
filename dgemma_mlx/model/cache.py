"""The key/value cache of the prefix, which ``encode`` extends and ``decode`` reads.

``PrefixCache`` is the cache of the whole network and explains the idea. It holds a ``FullLayerCache`` or a
``SlidingLayerCache`` for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import mlx.core as mx

from dgemma_mlx.checkpoint.config import FULL, SLIDING, TextConfig
from dgemma_mlx.model.soft_tokens import ImageAttention, SoftTokens

# Which keys each query sees: None for all, "causal" for a causal mask in which the last query sees the last key, or
# a boolean array that is broadcastable to (B, H, L, S).
Mask = mx.array | str | None

SPARE = 1024  # extra positions of a full-attention buffer: room for a few canvases, so that it seldom grows
SCORE_BYTES = 32 << 20  # default bound on the attention scores (H, L, S) of a row in memory at once, as float32


class _LayerCache:
    """The keys and values of one layer, in two buffers (B, Hk, S, D) that are laid out as [prefix | spare room].

    Each denoising step writes the keys and values of its canvas into the spare room, over those of the previous step.
    A write is a slice update: MLX performs it in place if nothing else refers to the buffer, and copies the buffer
    first otherwise, so that other holders of the array never see a change.

    Attributes:
        size: Number of prefix positions in the buffers.
    """

    _spare = 0  # extra positions that a new buffer gets beyond the requested capacity

    def __init__(self) -> None:
        self._buffers: tuple[mx.array, mx.array] | None = None  # of keys and of values
        self.size = 0

    def set_state(self, keys: mx.array, values: mx.array) -> None:
        """Use keys and values (B, Hk, S, D), for example those that ``state`` returned, as the whole prefix.

        The arrays themselves are not changed: they have no spare room, so the next canvas is written to new buffers.
        """
        self._buffers, self.size = (keys, values), keys.shape[2]

    def state(self) -> tuple[mx.array, mx.array]:
        """Return the keys and values of the prefix, each (B, Hk, size, D). The layer must not be empty."""
        return self._first(self.size)

    def with_canvas(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values of [prefix | canvas], each (B, Hk, size + C, D).

        ``k`` and ``v`` (B, Hk, C, D) belong to the canvas, which does not become part of the prefix: ``size`` stays
        as it is.
        """
        end = self.size + k.shape[2]
        self._write(k, v, end)
        return self._first(end)

    def _first(self, count: int) -> tuple[mx.array, mx.array]:
        """Return the first ``count`` positions of both buffers."""
        assert self._buffers is not None
        keys, values = self._buffers
        return keys[:, :, :count], values[:, :, :count]

    def _write(self, k: mx.array, v: mx.array, capacity: int) -> None:
        """Write keys and values (B, Hk, L, D) after the prefix.

        If the buffers are too small, they are first replaced by buffers for ``capacity`` positions and the spare room.
        """
        end = self.size + k.shape[2]
        if self._buffers is None or self._buffers[0].shape[2] < end:
            old_keys, old_values = self._buffers or (None, None)
            self._buffers = self._grown(old_keys, k, capacity), self._grown(old_values, v, capacity)
        keys, values = self._buffers
        keys[:, :, self.size : end] = k
        values[:, :, self.size : end] = v

    def _grown(self, old: mx.array | None, like: mx.array, capacity: int) -> mx.array:
        """Return a buffer for ``capacity`` positions and the spare room, which begins with the prefix in ``old``."""
        B, H, _, D = like.shape
        room = mx.zeros((B, H, capacity + self._spare - self.size, D), like.dtype)
        return room if old is None else mx.concatenate([old[:, :, : self.size], room], axis=2)

    @property
    def buffers(self) -> tuple[mx.array, ...]:
        """Both buffers, with the spare room; none before the first use."""
        return self._buffers or ()


class FullLayerCache(_LayerCache):
    """The keys and values of a full-attention layer, for all prefix positions.

    Keys and values of these layers come from one projection, but the cache stores both. Storing the projection alone
    would halve the memory, but each step would have to norm and rotate it again for the whole prefix: in the published
    model's 5 full-attention layers at 262,144 positions, that reads 2.7 GB and writes 5.4 GB per step, where the
    attention itself reads 5.4 GB. Computing the keys from stored values would round them twice, which gives different
    keys in half precision.
    """

    _spare = SPARE

    def update(self, k: mx.array, v: mx.array, capacity: int) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, Hk, L, D) and return those that the new positions attend over.

        These are the whole prefix, (B, Hk, size, D). Buffers that must grow get at least ``capacity`` positions.
        """
        end = self.size + k.shape[2]
        self._write(k, v, max(capacity, end))
        self.size = end
        return self.state()

    def fork(self, size: int, capacity: int) -> FullLayerCache:
        """Return a copy of the first ``size`` positions, with room for ``capacity`` positions and a few canvases."""
        other = FullLayerCache()
        other.size = size
        keys, values = self._first(size)
        other._buffers = other._grown(keys, keys, capacity), other._grown(values, values, capacity)
        return other


class SlidingLayerCache(_LayerCache):
    """The keys and values of a sliding-window layer, for the last ``window - 1`` prefix positions, oldest first.

    A query sees itself and the ``window - 1`` positions before it, so older positions are never needed. An update
    copies the positions that remain. It runs once per canvas, while the many denoising steps copy nothing.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self._kept = window - 1

    def update(self, k: mx.array, v: mx.array, capacity: int) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, Hk, L, D) and return those that the new positions attend over.

        These are the stored window followed by the new positions. Afterwards the last ``window - 1`` of them are kept.
        ``capacity`` is ignored, because the window has a fixed size.
        """
        if self._buffers is not None:
            keys, values = self.state()
            k, v = mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2)
        start = max(0, k.shape[2] - self._kept)
        # Copied, because a view would keep the whole chunk's buffer alive.
        kept = mx.contiguous(k[:, :, start:]), mx.contiguous(v[:, :, start:])
        self.set_state(*kept)
        # Without this dependency MLX would make the copies of all layers last, and hold each chunk until then.
        k, v = mx.depends([k, v], list(kept))
        return k, v


def prefix_masks(
    queries: mx.array, keys: mx.array, all_keys: mx.array, window: int, soft: SoftTokens | None, rule: ImageAttention
) -> tuple[mx.array, mx.array | None]:
    """Return the masks of sliding-window layers, (..., L, S), and of full layers, or None where these are causal.

    ``queries`` (L, 1) and ``keys`` (S,) are positions, and ``all_keys`` are those of full layers. ``rule`` says what
    the ``soft`` tokens among the queries see; it is described in ``model.soft_tokens``.
    """
    causal, near = keys <= queries, keys > queries - window
    if soft is None or rule == "causal":
        return causal & near, None
    same = soft.same_block(keys.size)
    if rule == "google":
        return (causal | same) & near, None
    return causal & near | same, (all_keys <= queries) | soft.same_block(all_keys.size)


def row_positions(rope_offset: int | mx.array, batch: int, length: int) -> mx.array:
    """Return the positions ``rope_offset``, ``rope_offset + 1``, ... of a call, (B, L) int32.

    ``rope_offset`` is the first position, an int or an array (B,). ``batch`` is B and ``length`` is L.
    """
    first = mx.array(rope_offset, mx.int32).reshape(-1, 1)
    return mx.contiguous(mx.broadcast_to(first + mx.arange(length, dtype=mx.int32), (batch, length)))


@dataclass(frozen=True)
class Snapshot:
    """A state of a ``PrefixCache`` to which it can return.

    Attributes:
        offset: Number of positions that were encoded.
        sliding: Keys and values of each sliding-window layer by layer index, each (B, Hk, S, D) with S at most
            ``window - 1``. Empty when nothing was encoded.
    """

    offset: int
    sliding: dict[int, tuple[mx.array, mx.array]]


class PrefixCache:
    """The keys and values of every layer for the prefix, that is, for the prompt and the committed canvases.

    Attention compares the queries of new positions with the keys of all earlier positions and averages their values.
    The keys and values of a prefix position depend only on the tokens up to it, because ``encode`` is causal. They are
    therefore computed once and stored here, and every denoising step reads them again. Without the cache, each of the
    up to 48 steps of a canvas would run the network over the whole prefix.

    The two kinds of layer need different parts of the prefix. A full-attention layer sees all of it, so its buffers
    grow with the prefix. A sliding-window layer sees only the last ``sliding_window - 1`` positions before a query, so
    it stores no more than these, and its memory stays constant.

    Life of a cache: ``encode`` gets the masks from ``encode_masks``, calls ``update`` in each layer to append the new
    keys and values, and calls ``advance`` at the end. ``decode`` gets the masks from ``canvas_masks`` and calls
    ``with_canvas`` in each layer, which places the keys and values of the canvas after the prefix for this step only.
    The cache grows only when the prompt or a committed canvas is encoded.

    To go back to an earlier state, take a ``snapshot`` and ``restore`` it later. A full-attention layer only forgets
    the later positions. A sliding-window layer needs its earlier window again, which the snapshot holds.

    The rows of a batch may have prompts of different lengths. Shorter rows then begin with padding, which no text
    position sees. The positions of row b are counted from ``-left_padding[b]``, so that its text begins at position 0
    as it would alone.

    Args:
        config: Configuration of the network, which gives the kinds of layers and the window.
        left_padding: Number of padding positions at the start of each row, (B,) int32; None for no padding.

    Attributes:
        offset: Number of positions encoded so far, the same for all rows, padding included.
        layers: The cache of each layer, first to last.
        score_bytes: Bound on the attention scores of a row that exist at once, in bytes (see ``attend``).
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
        self.score_bytes = SCORE_BYTES

    @property
    def is_whole(self) -> bool:
        """Whether every layer holds ``offset`` positions. False after an interrupted ``encode`` or ``restore``."""
        return all(end == self.offset for end in self._ends)

    @property
    def rope_offset(self) -> int | mx.array:
        """The position of the next token for the rotary embedding: an int, or an array (B,) with left padding."""
        return self.offset if self._left_padding is None else self.offset - self._left_padding

    def reserve(self, positions: int) -> None:
        """Let new buffers of full-attention layers have room for ``positions`` more positions and a few canvases.

        Reserving the length of a long prompt avoids copies of the buffers while the prompt is encoded in chunks.
        """
        self._capacity = max(self._capacity, self.offset + positions)

    def update(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, Hk, L, D) to the layer with this index.

        Returns the keys and values (B, Hk, S, D) that the new positions attend over. Call ``advance`` after the update
        of all layers.
        """
        self._ends[layer] = self.offset + k.shape[2]
        return self.layers[layer].update(k, v, self._capacity)

    def with_canvas(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys and values of [prefix | canvas], (B, Hk, S, D), for the layer with this index.

        ``k`` and ``v`` (B, Hk, C, D) are those of the canvas. The prefix does not change.
        """
        return (k, v) if self.offset == 0 else self.layers[layer].with_canvas(k, v)

    def advance(self, positions: int) -> None:
        """Add ``positions`` to ``offset`` after every layer has appended that many positions."""
        self.offset += positions

    def snapshot(self) -> Snapshot:
        """Return the current state for ``restore``, without copying.

        A full-attention layer needs no copy, because later positions are only written after the current ones.
        """
        sliding = {
            i: layer.state() for i, layer in enumerate(self.layers) if isinstance(layer, SlidingLayerCache)
        }
        return Snapshot(self.offset, sliding if self.offset else {})

    def restore(self, snapshot: Snapshot) -> None:
        """Return to an earlier state of this cache.

        Afterwards, snapshots with a larger ``offset`` are invalid, because new positions overwrite theirs.
        """
        self._return_to(snapshot)

    def _return_to(self, snapshot: Snapshot) -> None:
        self.offset = snapshot.offset
        for i, layer in enumerate(self.layers):
            if isinstance(layer, FullLayerCache):
                layer.size = snapshot.offset
            else:
                layer.set_state(*snapshot.sliding[i])
        self._ends = [snapshot.offset] * len(self.layers)

    def fork(self, snapshot: Snapshot, capacity: int) -> PrefixCache:
        """Return a new cache in an earlier, non-empty state of this one, with room for ``capacity`` positions.

        Neither cache changes the other. The copy is lazy; evaluate its ``buffers`` before this cache is used again,
        so that this one's buffers need not be copied.
        """
        other = copy(self)
        other.layers = [
            layer.fork(snapshot.offset, capacity) if isinstance(layer, FullLayerCache) else copy(layer)
            for layer in self.layers
        ]
        other._return_to(snapshot)
        return other

    def rows(self, rows: Sequence[int]) -> PrefixCache:
        """Return a new cache that holds copies of these rows of this one, in this order. A row may be repeated."""
        chosen = mx.array(list(rows), mx.int32)
        other = copy(self)
        if self._left_padding is not None:
            other._left_padding = self._left_padding[chosen]
        other.layers, other._ends = [copy(layer) for layer in self.layers], list(self._ends)
        for layer in other.layers if self.offset else ():
            layer.set_state(*(array[chosen] for array in layer.state()))
        return other

    def encode_masks(
        self, length: int, soft: SoftTokens | None = None, rule: ImageAttention = "google"
    ) -> dict[str, Mask]:
        """Return the mask of each kind of layer for appending ``length`` positions, the ``soft`` tokens among them.

        The keys of a mask's last axis are those that ``update`` returns: the whole prefix in full-attention layers, the
        stored window in sliding-window layers, each followed by the new positions. ``rule`` is described in
        ``model.soft_tokens``.
        """
        end = self.offset + length
        if self._left_padding is None and soft is None and end <= self._window:
            return {FULL: "causal", SLIDING: "causal"}
        queries = mx.arange(self.offset, end)[:, None]  # (L, 1)
        keys, all_keys = mx.arange(self.offset - min(self.offset, self._window - 1), end), mx.arange(end)
        sliding, full = prefix_masks(queries, keys, all_keys, self._window, soft, rule)
        if self._left_padding is None:
            return {FULL: "causal" if full is None else full, SLIDING: sliding}
        full = all_keys <= queries if full is None else full
        # A padding position sees itself: a softmax over no key would be NaN.
        return {
            FULL: self._unpadded(all_keys) & full | (all_keys == queries),
            SLIDING: self._unpadded(keys) & sliding | (keys == queries),
        }

    def canvas_masks(self, length: int) -> dict[str, Mask]:
        """Return the mask of each kind of layer for a canvas of ``length`` positions.

        A canvas position sees the whole canvas and every stored prefix position that is not padding.
        """
        if self._left_padding is None:
            return {FULL: None, SLIDING: None}
        end = self.offset + length
        first = self.offset - min(self.offset, self._window - 1)
        return {FULL: self._unpadded(mx.arange(end)), SLIDING: self._unpadded(mx.arange(first, end))}

    def _unpadded(self, keys: mx.array) -> mx.array:
        """Return which key positions (S,) are not padding, (B, 1, 1, S) bool."""
        assert self._left_padding is not None
        return (keys >= self._left_padding[:, None])[:, None, None, :]

    def state(self) -> list[mx.array]:
        """Return the prefix's arrays of all layers, for ``mx.eval``; an empty list for an empty cache."""
        return [array for layer in self.layers for array in layer.state()] if self.offset else []

    def buffers(self) -> list[mx.array]:
        """Return the buffers of all layers, with the spare room. Once they are evaluated, nothing here is lazy."""
        return [buffer for layer in self.layers for buffer in layer.buffers]

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes, with the spare room."""
        return sum(buffer.nbytes for buffer in self.buffers())
