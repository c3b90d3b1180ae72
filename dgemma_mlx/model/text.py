"""The text network: one stack of layers that runs as an encoder of the prefix and as a decoder of the canvas.

``encode`` runs the layers causally and appends keys and values to a ``PrefixCache``. ``decode`` runs the same layers
over a canvas, whose positions see the cached prefix and the whole canvas, and returns the logits of one denoising step.

Reference: transformers ``DiffusionGemmaEncoderTextModel``, ``DiffusionGemmaDecoderModel`` and
``DiffusionGemmaForBlockDiffusion``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dgemma_mlx.checkpoint.config import TextConfig
from dgemma_mlx.kernels import (
    CanvasSample,
    LogitBias,
    canvas_sampler,
    references,
    sparse_soft_embedding,
)
from dgemma_mlx.model.cache import Mask, PrefixCache, row_positions
from dgemma_mlx.model.experts import RouterLog
from dgemma_mlx.model.layer import Layer
from dgemma_mlx.model.mlp import SelfConditioning
from dgemma_mlx.model.packed import times_table, weighted_rows
from dgemma_mlx.model.prediction import DenseRows, Prediction, dense_rows, incomplete
from dgemma_mlx.model.soft_tokens import ImageAttention, SoftTokens

# Takes a layer, its index and the cache method that appends keys and values; returns a function to call as the layer.
LayerWrapper = Callable[["Layer", int, Callable[..., Any]], Callable[..., tuple[mx.array, mx.array]]]


class DiffusionGemma(nn.Module):
    """The text network of DiffusionGemma, with random weights until ``load_weights`` is called.

    Softcapped logits are float32. All other activations have the dtype of the weights (see ``dtype``).

    Attributes:
        config: The network's sizes.
        embed_tokens: Embedding table, (V, M). It is also the output projection.
        self_conditioning: Block that adds the previous step's prediction to the canvas embeddings.
        layers: The layers, first to last.
        norm: Final norm.
        image_attention: Which positions of a picture see each other (see ``model.soft_tokens``).
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.image_attention: ImageAttention = "google" if config.use_bidirectional_attention else "causal"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.self_conditioning = SelfConditioning(config)
        self.layers = [Layer(config, kind) for kind in config.layer_types]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._wrapper: LayerWrapper | None = None

    def wrap_layers(self, wrapper: LayerWrapper | None) -> None:
        """Set the function that wraps each layer in training mode, or remove it with None.

        ``wrapper(layer, index, append)`` returns a function that is called in place of the layer, with the same
        arguments. Gradient checkpointing uses this.
        """
        self._wrapper = wrapper

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the activations. Packed weights have other dtypes."""
        return self.norm.weight.dtype

    @property
    def machines(self) -> int:
        """Number of machines over which the network is cut; 1 for a whole one."""
        return 1

    @property
    def is_lazy(self) -> bool:
        """Whether a call only builds a graph. A CPU computes during the call when it multiplies packed weights."""
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        return not (on_cpu and any("scales" in module for module in self.modules()))

    def own_part(self, path: str, name: str, value: mx.array) -> mx.array:
        """Return the part of an adapter's array that this network holds: all of it, unless the network is a slice."""
        return value

    def new_cache(self, left_padding: mx.array | None = None) -> PrefixCache:
        """Return an empty cache for this network.

        ``left_padding`` (B,) int32 is the number of padding positions at the start of each row of a batch.
        """
        return PrefixCache(self.config, left_padding)

    def embed(self, ids: mx.array) -> mx.array:
        """Return the embeddings (B, L, M) of ids (B, L), scaled by sqrt(M)."""
        embeddings: mx.array = self.embed_tokens(ids).astype(self.dtype)  # mxfp4, mxfp8 and nvfp4 unpack to bfloat16
        return embeddings * math.sqrt(self.config.hidden_size)

    def encode(
        self, ids: mx.array, cache: PrefixCache, router_log: RouterLog | None = None, soft: SoftTokens | None = None
    ) -> mx.array:
        """Append ids (B, L) to the cache and return their hidden states (B, L, M) after the final norm.

        Attention is causal, except within the blocks of ``soft`` tokens, which take the places of some ids; there, the
        ids have no meaning. If ``router_log`` is given, each layer appends its router's result to it.
        """
        return self._encode(ids, cache, router_log, soft)

    def extend(self, ids: mx.array, cache: PrefixCache, soft: SoftTokens | None = None) -> None:
        """Append ids (B, L) to the cache, as ``encode`` does, without the hidden states.

        The work ends with the keys and values of the last layer, whose attention and experts nobody reads.
        """
        self._encode(ids, cache, None, soft, only_cache=True)

    def decode(
        self, canvas: mx.array, cache: PrefixCache, self_conditioning: mx.array | None = None,
        router_log: RouterLog | None = None,
    ) -> mx.array:
        """Return the softcapped logits (B, C, V) float32 of canvas ids (B, C) after the cached prefix.

        ``self_conditioning`` holds the previous step's processed logits (B, C, V), that is, after softcap and
        temperature; None in the first step. The cache is not changed.
        """
        return self.logits(self.decode_hidden(canvas, cache, self_conditioning, router_log))

    def decode_hidden(
        self, canvas: mx.array, cache: PrefixCache, self_conditioning: mx.array | Prediction | None = None,
        router_log: RouterLog | None = None,
    ) -> mx.array:
        """Return the hidden states (B, C, M), after the final norm, of canvas ids (B, C) after the cached prefix.

        ``self_conditioning`` is the previous step's ``Prediction`` or its processed logits (B, C, V), that is, after
        softcap and temperature; None in the first step. The cached prefix is not changed. If ``router_log`` is given,
        each layer appends its router's result to it.
        """
        signal = self.conditioning_signal(self_conditioning, canvas.shape)
        return self.decode_layers(self.decoder_input(canvas, signal), cache, router_log)

    def conditioning_signal(
        self, self_conditioning: mx.array | Prediction | None, shape: tuple[int, ...]
    ) -> mx.array:
        """Return the ``SelfConditioning.signal`` (B, C, M) for a canvas of ``shape`` (B, C).

        ``self_conditioning`` is that of ``decode_hidden``.
        """
        return self.self_conditioning.signal(self._soft_embeddings(self_conditioning, shape))

    def decoder_input(self, canvas: mx.array, signal: mx.array) -> mx.array:
        """Return the input (B, C, M) of the first layer for canvas ids (B, C) and a signal (B, C, M)."""
        return self.self_conditioning.condition(self.embed(canvas), signal)

    def decode_layers(
        self, x: mx.array, cache: PrefixCache, router_log: RouterLog | None = None, started: int = 0
    ) -> mx.array:
        """Return the hidden states (B, C, M), after the final norm, for the result (B, C, M) of ``decoder_input``.

        The device starts to compute the first ``started`` layers at once, and the rest when it is evaluated.
        """
        masks, scalars = cache.canvas_masks(x.shape[1]), [layer.layer_scalar for layer in self.layers]
        return self._run_layers(x, cache, masks, cache.with_canvas, scalars, router_log, started)

    def step(self, canvas: mx.array, signal: mx.array, cache: PrefixCache, started: int = 0) -> mx.array:
        """Return the raw logits (B, C, V), before the softcap, of a canvas (B, C), lazily.

        The device starts to compute ``decoder_input`` while Python builds the graph of the layers.
        """
        x = self.decoder_input(canvas, signal)
        mx.async_eval(x)
        return self.project(self.decode_layers(x, cache, started=started))

    def sample(
        self, raw: mx.array, uniforms: mx.array, temperature: float, barred: LogitBias | None = None
    ) -> CanvasSample:
        """Return the ``CanvasSample`` (B, C) of raw logits (B, C, V), lazily. ``uniforms`` (B, C) are in [0, 1)."""
        return canvas_sampler(raw, uniforms, self.config.final_logit_softcapping, temperature, barred)

    def next_signal(
        self, raw: mx.array, sample: CanvasSample, temperature: float, barred: LogitBias | None = None
    ) -> mx.array:
        """Return the signal (B, C, M) with which a step, given as in ``predict``, conditions the next one."""
        return self.conditioning_signal(self.predict(raw, sample, temperature, barred), sample.argmax.shape)

    def whole(self, raw: mx.array) -> mx.array:
        """Return the logits (B, C, V) of all ids, given those of ``step``."""
        return raw

    def _encode(
        self, ids: mx.array, cache: PrefixCache, router_log: RouterLog | None, soft: SoftTokens | None,
        only_cache: bool = False,
    ) -> mx.array:
        """Append ids (B, L) to the cache, and return what ``_run_layers`` returns, (B, L, M)."""
        masks = cache.encode_masks(ids.shape[1], soft, self.image_attention)
        scalars = [layer.encoder_layer_scalar for layer in self.layers]
        x = self.embed(ids) if soft is None else soft.put_into(self.embed(ids))
        hidden = self._run_layers(x, cache, masks, cache.update, scalars, router_log, only_cache=only_cache)
        cache.advance(ids.shape[1])
        return hidden

    def _run_layers(
        self, x: mx.array, cache: PrefixCache, masks: dict[str, Mask],
        append: Callable[[int, mx.array, mx.array], tuple[mx.array, mx.array]], scalars: list[mx.array],
        router_log: RouterLog | None, started: int = 0, only_cache: bool = False,
    ) -> mx.array:
        """Run x (B, L, M) through all layers and the final norm and return (B, L, M).

        ``masks`` gives the mask of each kind of layer, ``append`` is the method of ``cache`` that takes a layer's index
        and its new keys and values, and ``scalars`` holds each layer's output factor. ``started`` is that of
        ``decode_layers``. In training mode only reference operations run, because the kernels have no gradients. With
        ``only_cache``, the last layer only appends its keys and values, and the result is its input.
        """
        norms = [*(layer.input_layernorm for layer in self.layers), self.norm]
        wrapper = self._wrapper if self.training else None
        with references(only=self.training):
            positions = row_positions(cache.rope_offset, *x.shape[:2])
            normed = norms[0](x)
            for i, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
                if only_cache and i + 1 == len(self.layers):
                    _, k, v = layer.self_attn.project(normed, positions)
                    append(i, k, v)
                    break
                run = layer if wrapper is None else wrapper(layer, i, append)
                x, normed = run(
                    x, normed, positions, masks[kind], partial(append, i), scalars[i], norms[i + 1], router_log,
                    cache.score_bytes,
                )  # fmt: skip
                if i + 1 == started:
                    mx.async_eval(x, normed)
        return normed

    def project(self, hidden: mx.array) -> mx.array:
        """Return the raw logits (..., V), before the softcap, of hidden states (..., M), in their dtype."""
        table = self.embed_tokens
        return times_table(hidden, table) if isinstance(table, nn.QuantizedEmbedding) else table.as_linear(hidden)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the softcapped logits (..., V) float32 of hidden states (..., M)."""
        return self.capped(self.project(hidden))

    def predict(
        self, raw: mx.array, sample: CanvasSample, temperature: float, barred: LogitBias | None = None
    ) -> Prediction:
        """Return the ``Prediction`` that conditions the next denoising step.

        ``raw`` (B, C, V) holds the step's raw logits from ``project``. ``sample`` is the ``CanvasSample`` of these
        logits at ``temperature``, with the bias ``barred``, and must be evaluated. For the positions whose token lists
        are incomplete, the expected embeddings are computed from the logits; all but the last block of them is
        evaluated here. The logits can be discarded once the embeddings are evaluated.
        """
        positions = incomplete(sample, self.dtype)
        if positions is None:
            return Prediction(sample)
        embeddings = self._expected_embeddings(raw, positions, temperature, barred)
        return Prediction(sample, DenseRows(positions, embeddings))

    def predicts_at_once(self, sample: CanvasSample) -> bool:
        """Return whether ``predict`` only starts its work for a sample (B, C), which must be evaluated.

        It waits for part of the work when more positions have incomplete token lists than a block of ``dense_rows``.
        """
        positions = incomplete(sample, self.dtype)
        return positions is None or positions.size <= dense_rows(self.config.vocab_size, self.dtype)

    def _expected_embeddings(
        self, raw: mx.array, positions: mx.array, temperature: float, barred: LogitBias | None
    ) -> mx.array:
        """Return the expected embeddings (n, M) of raw logits (B, C, V) at ``positions`` (n,), b * C + c.

        Ids whose bias in ``barred`` is -inf have no share in them.

        The rows are processed in blocks of ``dense_rows``. Each block but the last is evaluated here, because MLX
        allocates ahead of what it has computed: chained by ``mx.depends`` instead, 256 rows of 262,144 values took
        twice the memory of a block in float32, and that of all blocks in bfloat16.
        """
        rows = raw.reshape(-1, raw.shape[-1])
        step = dense_rows(raw.shape[-1], self.dtype)
        blocks: list[mx.array] = []
        for start in range(0, positions.size, step):
            if blocks:
                mx.eval(blocks[-1])
            chosen = positions[start : start + step]
            logits = self.capped(rows[chosen]) / temperature
            if barred is not None:
                is_barred = (barred.table == -mx.inf)[barred.rows.reshape(-1)[chosen]]  # a byte for each logit
                logits = mx.where(is_barred, -mx.inf, logits)
            blocks.append(self._expected_embedding(logits))
        return mx.concatenate(blocks)

    def capped(self, raw: mx.array) -> mx.array:
        """Return cap * tanh(raw / cap) in float32 for raw logits of any shape; cap is ``final_logit_softcapping``."""
        cap = self.config.final_logit_softcapping
        return cap * mx.tanh(raw.astype(mx.float32) / cap)

    def _soft_embeddings(self, conditioning: mx.array | Prediction | None, shape: tuple[int, ...]) -> mx.array:
        """Return the expected embeddings (B, C, M) under a prediction or processed logits (B, C, V); zeros for None.

        ``shape`` is (B, C).
        """
        expected = (*shape, self.config.hidden_size)
        if conditioning is None:
            return mx.zeros(expected, self.dtype)
        if isinstance(conditioning, mx.array):
            return self._expected_embedding(conditioning)
        sample = conditioning.sample
        soft = sparse_soft_embedding(self.embed_tokens, sample.kept_ids, sample.kept_weights, sample.kept_count)
        soft = soft.astype(self.dtype).reshape(-1, expected[-1]) * math.sqrt(self.config.hidden_size)
        if conditioning.dense is not None:
            soft[conditioning.dense.positions] = conditioning.dense.embeddings
        return soft.reshape(expected)

    def _expected_embedding(self, logits: mx.array) -> mx.array:
        """Return softmax(logits) @ embedding table * sqrt(M), (..., M), for processed logits (..., V).

        As in the reference, logits and probabilities are rounded to the activations' dtype; the softmax is float32.
        """
        probabilities = mx.softmax(logits.astype(self.dtype), axis=-1, precise=True)
        table = self.embed_tokens
        if isinstance(table, nn.QuantizedEmbedding):
            soft = weighted_rows(probabilities, table)
        else:
            soft = probabilities @ table.weight
        return soft * math.sqrt(self.config.hidden_size)
