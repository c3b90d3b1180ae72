"""The network of one machine: a slice of every layer, and the sums over the machines that make the layers whole.

Every machine calls the same methods in the same order. Each call evaluates its results, so that all machines are at the
same place. Between the calls the residual stream, hidden states, and statistics of the vocabulary are the same on all
machines; logits, keys, values and signals are those of the machine's own slice.

A denoising step takes two sums in each layer, one for the expected embeddings, one for the self-conditioning together
with the embeddings of the canvas, and two small ones for the statistics of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from dgemma_mlx.checkpoint.config import FULL, TextConfig
from dgemma_mlx.distributed.collective import Collective
from dgemma_mlx.distributed.slices import Slice, part_of
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.kernels import (
    MAX_KEPT,
    CanvasSample,
    LogitBias,
    Route,
    canvas_sampler,
    sparse_soft_embedding,
)
from dgemma_mlx.model.attention import AppendKV
from dgemma_mlx.model.cache import Mask, PrefixCache
from dgemma_mlx.model.experts import RouterLog
from dgemma_mlx.model.layer import Layer
from dgemma_mlx.model.prediction import Prediction, least_kept
from dgemma_mlx.model.soft_tokens import SoftTokens
from dgemma_mlx.model.text import DiffusionGemma


def own_config(config: TextConfig, own: Slice, kind: str) -> TextConfig:
    """Return the sizes of a machine's own slice of a model, with the heads that it has in a ``kind`` of layer."""
    heads = own.heads[kind]
    cut = replace(
        config, num_attention_heads=len(heads.queries), intermediate_size=len(own.mlp),
        moe_intermediate_size=len(own.experts), vocab_size=len(own.vocabulary),
    )  # fmt: skip
    if kind == FULL:
        return replace(cut, num_global_key_value_heads=len(heads.keys))
    return replace(cut, num_key_value_heads=len(heads.keys))


class CutLayer(Layer):
    """A slice of a layer. The arguments and results of a call are whole, as those of ``Layer``."""

    def __init__(self, config: TextConfig, kind: str, collective: Collective) -> None:
        """``config`` holds the sizes of the slice (see ``own_config``)."""
        super().__init__(config, kind)
        self._collective = collective

    def _attended(
        self, normed: mx.array, positions: mx.array, mask: Mask, append: AppendKV, score_bytes: int
    ) -> mx.array:
        """Return the attention's output (B, L, M), summed over the machines."""
        return self._collective.sum(super()._attended(normed, positions, mask, append, score_bytes))

    def _branches(self, dense: mx.array, rows: mx.array, route: Route) -> tuple[mx.array, mx.array]:
        """Return the outputs of both branches, (B, L, M), summed over the machines before the experts' norm."""
        routed = self.experts.summed(rows, route)
        both = self._collective.sum(mx.stack([self.mlp(dense), routed.reshape(dense.shape)]))
        return both[0], self.post_feedforward_layernorm_2(both[1])


class OwnSample(NamedTuple):
    """What a machine keeps of a step's sample.

    Attributes:
        raw: The logits that were sampled, (B, C, V') for the V' ids of the machine.
        sample: The sample of these ids alone.
        share: The probability of these ids together, (B, C) float32.
        bias: The bias on these ids, or None.
    """

    raw: mx.array
    sample: CanvasSample
    share: mx.array
    bias: LogitBias | None


class CutNetwork(DiffusionGemma):
    """A slice of the text network.

    Attributes:
        config: The sizes of the whole network.
        collective: The operations over all machines.
    """

    def __init__(self, config: TextConfig, all_slices: Sequence[Slice], collective: Collective) -> None:
        own = all_slices[collective.rank]
        super().__init__(own_config(config, own, FULL))
        self.config = config
        self.collective = collective
        self.layers = [CutLayer(own_config(config, own, kind), kind, collective) for kind in config.layer_types]
        self._vocabularies = [each.vocabulary for each in all_slices]
        self._own = own
        self._vocabulary = own.vocabulary
        self._sampled: OwnSample | None = None

    @property
    def machines(self) -> int:
        """Number of machines over which the network is cut."""
        return self.collective.size

    @property
    def is_lazy(self) -> bool:
        """False: every call evaluates its results."""
        return False

    def own_part(self, path: str, name: str, value: mx.array) -> mx.array:
        """Return the part of an adapter's ``lora_a`` (..., I, r) or ``lora_b`` (..., r, O) that belongs to the slice.

        Raises ``DgemmaError`` for DoRA: the length of a row of weights is not known where its columns are cut.
        """
        part = part_of(path, self.config, self._own)
        assert part is not None, "every module that can be adapted is cut"
        if name == "m":
            hint = "`dgemma-mlx fuse` merges it into the weights, which can be cut."
            raise DgemmaError("a DoRA adapter is not for a model that is cut over several machines", hint, exit_code=2)
        axis, ranges = part
        if (name == "lora_a") != (axis == -1):
            return value
        chosen = mx.concatenate([mx.arange(each.start, each.stop) for each in ranges])
        return mx.take(value, chosen, axis=-2 if name == "lora_a" else -1)

    def embed(self, ids: mx.array) -> mx.array:
        """Return the embeddings (B, L, M) of ids (B, L), scaled by sqrt(M)."""
        return self.collective.sum(self._own_embeddings(ids))

    def _own_embeddings(self, ids: mx.array) -> mx.array:
        """Return the scaled embeddings (B, L, M) of those ids whose rows this machine holds, and zeros for others."""
        rows = ids - self._vocabulary.start
        is_own = (rows >= 0) & (rows < len(self._vocabulary))
        embeddings = super().embed(mx.where(is_own, rows, 0))
        return mx.where(is_own[..., None], embeddings, mx.zeros_like(embeddings))

    def encode(
        self, ids: mx.array, cache: PrefixCache, router_log: RouterLog | None = None, soft: SoftTokens | None = None
    ) -> mx.array:
        """Append ids (B, L) to the cache and return their hidden states (B, L, M), evaluated."""
        hidden = super().encode(ids, cache, router_log, soft)
        mx.eval(hidden, cache.state())
        return hidden

    def extend(self, ids: mx.array, cache: PrefixCache, soft: SoftTokens | None = None) -> None:
        """Append ids (B, L) to the cache."""
        super().extend(ids, cache, soft)
        mx.eval(cache.state())

    def conditioning_signal(
        self, self_conditioning: mx.array | Prediction | None, shape: tuple[int, ...]
    ) -> mx.array:
        """Return zeros (B, C, M), which the block makes of the zeros before the first step. Others: ``next_signal``."""
        assert self_conditioning is None, "a slice has the prediction of its own ids only"
        return mx.zeros((*shape, self.config.hidden_size), self.dtype)

    def decoder_input(self, canvas: mx.array, signal: mx.array) -> mx.array:
        """Return the input (B, C, M) of the first layer for canvas ids (B, C) and the machine's own signal."""
        whole = self.collective.sum(self._own_embeddings(canvas) + signal)
        return self.self_conditioning.condition(whole, mx.zeros_like(whole))

    def step(self, canvas: mx.array, signal: mx.array, cache: PrefixCache, started: int = 0) -> mx.array:
        """Return the raw logits (B, C, V') of the machine's own ids, evaluated."""
        raw = DiffusionGemma.project(self, self.decode_layers(self.decoder_input(canvas, signal), cache))
        mx.eval(raw)
        return raw

    def decode(
        self, canvas: mx.array, cache: PrefixCache, self_conditioning: mx.array | None = None,
        router_log: RouterLog | None = None,
    ) -> mx.array:
        """Return the softcapped logits (B, C, V) of the first step, that is, for ``self_conditioning`` None."""
        signal = self.conditioning_signal(self_conditioning, canvas.shape)
        return self.capped(self.whole(self.step(canvas, signal, cache)))

    def project(self, hidden: mx.array) -> mx.array:
        """Return the raw logits (..., V), before the softcap, of hidden states (..., M)."""
        return self._gathered(super().project(hidden))

    def whole(self, raw: mx.array) -> mx.array:
        """Return the logits (B, C, V) of all ids, evaluated, given those of ``step`` on each machine."""
        return self._gathered(raw)

    def _gathered(self, raw: mx.array) -> mx.array:
        """Return the logits (..., V) of all ids, evaluated, from the logits (..., V') of each machine's own ids."""
        most = max(map(len, self._vocabularies))
        padding = [(0, 0)] * (raw.ndim - 1) + [(0, most - raw.shape[-1])]
        gathered = self.collective.gather(mx.pad(raw, padding))
        parts = [part[..., : len(ids)] for part, ids in zip(gathered, self._vocabularies, strict=True)]
        logits = mx.concatenate(parts, axis=-1)
        mx.eval(logits)
        return logits

    def sample(
        self, raw: mx.array, uniforms: mx.array, temperature: float, barred: LogitBias | None = None
    ) -> CanvasSample:
        """Return the statistics of all ids, evaluated, and the sample that one machine would draw with ``uniforms``.

        ``raw`` are the logits (B, C, V') of the machine's own ids. The list of kept tokens holds the two most probable
        ones, in no order and without their ids; the other ones stay on their machines, for ``own_signal``. It is never
        cut off, so that the gap between the two is known where a whole network's list would be too long.
        """
        bias = None
        if barred is not None:
            bias = barred._replace(table=barred.table[:, self._vocabulary.start : self._vocabulary.stop])
        processed = self.processed(raw, temperature, bias)  # (B, C, V') float32
        sizes = self.collective.gather(mx.logsumexp(processed, axis=-1))  # (R, B, C)
        shares = mx.exp(sizes - mx.logsumexp(sizes, axis=0))
        share, before = shares[self.collective.rank], shares[: self.collective.rank].sum(axis=0)
        inside = mx.clip((uniforms - before) / mx.maximum(share, 1e-30), 0, 1 - 2**-24)
        own = canvas_sampler(raw, inside, self.config.final_logit_softcapping, temperature, bias)
        start = self._vocabulary.start
        largest = mx.take_along_axis(processed, own.argmax[..., None], axis=-1)[..., 0]
        two = mx.topk(own.kept_weights, 2, axis=-1) * share[..., None]
        top = mx.exp(largest - mx.logsumexp(sizes, axis=0))  # of a list that is cut off, the second may be as large
        two = mx.where(own.kept_count[..., None] <= MAX_KEPT, two, top[..., None])
        facts = mx.stack([largest, own.entropy, two[..., 0], two[..., 1]])
        ids = mx.stack([own.argmax + start, own.sample + start]).view(mx.float32)
        gathered = self.collective.gather(mx.concatenate([facts, ids]))  # (R, 6, B, C)
        self._sampled = OwnSample(raw, own, share, bias)
        merged = _merged(gathered, shares, uniforms)
        mx.eval(*merged, *own, share)
        return merged

    def processed(self, raw: mx.array, temperature: float, bias: LogitBias | None = None) -> mx.array:
        """Return raw logits (..., V), softcapped, biased, and divided by the temperature: float32."""
        capped = self.capped(raw)
        return (capped if bias is None else capped + bias.table[bias.rows]) / temperature

    def own_signal(self, raw: mx.array, temperature: float, pinned: Mapping[int, int]) -> mx.array:
        """Return the machine's own signal (B, C, M) for the next step, evaluated. Their sum is the network's signal.

        ``raw`` are the logits that were sampled last, at ``temperature``. ``pinned`` gives the ids of pinned positions,
        by their index b * C + c.
        """
        sampled, self._sampled = self._sampled, None
        assert sampled is not None and sampled.raw is raw, "the logits are those that were sampled last"
        soft = self.collective.sum(self._own_expectation(sampled, temperature, pinned))
        signal = self.self_conditioning.signal(soft)
        mx.eval(signal)
        return signal

    def _own_expectation(self, sampled: OwnSample, temperature: float, pinned: Mapping[int, int]) -> mx.array:
        """Return this machine's part of the expected embeddings, (B, C, M).

        A list of kept tokens is complete if what it lacks is too improbable to matter, as in ``least_kept``.
        """
        shape, own = sampled.share.shape, sampled.sample
        share = np.array(sampled.share).reshape(-1)
        is_cut_off = np.array(own.kept_count).reshape(-1) > MAX_KEPT
        mass = np.where(is_cut_off, 0, np.array(own.kept_mass).reshape(-1))
        missing = ~(share * (1 - mass) <= (1 - least_kept(self.dtype)) / self.collective.size)
        places = mx.array(list(pinned), mx.int32)
        share[list(pinned)], missing[list(pinned)] = 0, False
        counts = mx.array(np.where(missing | is_cut_off | (share == 0), 0, np.array(own.kept_count).reshape(-1)))
        weights = own.kept_weights * mx.array(share).reshape(shape)[..., None]
        soft = sparse_soft_embedding(self.embed_tokens, own.kept_ids, weights, counts.reshape(shape).astype(mx.int32))
        soft = soft.astype(self.dtype).reshape(-1, self.config.hidden_size) * math.sqrt(self.config.hidden_size)
        dense = np.flatnonzero(missing)
        if dense.size:
            soft[mx.array(dense)] = self._dense(sampled, mx.array(dense), temperature, mx.array(share[dense]))
        if pinned:
            ids = mx.array([list(pinned.values())], mx.int32)
            soft[places] = self._own_embeddings(ids)[0]
        return soft.reshape(*shape, -1)

    def _dense(self, sampled: OwnSample, places: mx.array, temperature: float, share: mx.array) -> mx.array:
        """Return this machine's part (n, M) of the expected embeddings of ``places`` (n,), from all of its logits."""
        embeddings = self._expected_embeddings(sampled.raw, places, temperature, sampled.bias)
        return embeddings * share[:, None].astype(embeddings.dtype)


def _merged(gathered: mx.array, shares: mx.array, uniforms: mx.array) -> CanvasSample:
    """Merge what the R machines say of their own ids, (R, 6, B, C), into the sample of all ids.

    ``shares`` (R, B, C) are the probabilities of the machines' ids together.
    """
    largest, entropy, *two = (gathered[:, i] for i in range(4))
    argmax, sample = (mx.contiguous(gathered[:, i]).view(mx.int32) for i in (4, 5))
    # The entropy of a choice in two parts: of a machine, and then of one of its ids.
    parts = mx.where(shares == 0, 0, shares * (entropy - mx.log(mx.maximum(shares, 1e-38))))
    ends = mx.cumsum(shares, axis=0)
    best = mx.argmax(largest, axis=0)[None]  # the lowest rank wins ties, and has the lowest ids
    drawn = mx.argmax(ends / ends[-1] > uniforms, axis=0)[None]
    tops = mx.moveaxis(mx.topk(mx.concatenate(two), 2, axis=0), 0, -1)  # (B, C, 2)
    return CanvasSample(
        entropy=parts.sum(axis=0), argmax=mx.take_along_axis(argmax, best, axis=0)[0],
        sample=mx.take_along_axis(sample, drawn, axis=0)[0], kept_count=mx.full(uniforms.shape, 2, mx.int32),
        kept_ids=mx.zeros(tops.shape, mx.int32), kept_weights=tops, kept_mass=tops.sum(axis=-1),
    )  # fmt: skip
