"""From the name of a checkpoint to a loaded ``Model``, on one machine or cut over several."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from dgemma_mlx.checkpoint.config import GenerationConfig, ModelConfig, TextConfig
from dgemma_mlx.checkpoint.hub import full_name, resolve
from dgemma_mlx.checks import reason, shown
from dgemma_mlx.distributed.load import load_slice
from dgemma_mlx.distributed.network import CutNetwork
from dgemma_mlx.distributed.slices import Slice
from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.generation.memory import should_dequantize
from dgemma_mlx.generation.model import Model
from dgemma_mlx.generation.pictures import PictureEncoder
from dgemma_mlx.model.dequantize import dequantize, dequantized_bytes
from dgemma_mlx.model.half_precision import fastest, require_float16
from dgemma_mlx.model.joined import join_projections
from dgemma_mlx.model.load import load_model
from dgemma_mlx.model.soft_tokens import IMAGE_ATTENTION, ImageAttention
from dgemma_mlx.model.text import DiffusionGemma
from dgemma_mlx.text.tokenizer import Tokenizer, load_tokenizer

_DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
FLOAT16 = "float16 is not for a model that is cut over several machines", "Use --dtype bfloat16."  # an error
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded; the fields are the arguments of ``load``.

    Raises ``DgemmaError`` (exit code 2) for a ``dtype`` or an ``image_attention`` that does not exist.
    """

    model: str | None = None
    dtype: mx.Dtype | DtypeName | None = "auto"
    cpu_dequantize: str = "auto"
    adapter: Path | None = None
    image_attention: ImageAttention | None = None

    def __post_init__(self) -> None:
        if self.image_attention is not None and self.image_attention not in IMAGE_ATTENTION:
            raise DgemmaError(
                f"image_attention must be one of {', '.join(IMAGE_ATTENTION)}, not {shown(self.image_attention)}",
                "Leave it out for the checkpoint's own.", exit_code=2,
            )  # fmt: skip
        chosen = self.chosen_dtype
        is_floating = isinstance(chosen, mx.Dtype) and mx.issubdtype(chosen, mx.floating)
        if self.dtype is not None and self.dtype != "auto" and not is_floating:
            raise DgemmaError(
                f"dtype must be a floating dtype, not {self.dtype}", f'Use "auto", {", ".join(_DTYPES)}.', exit_code=2
            )

    @property
    def chosen_dtype(self) -> mx.Dtype | None:
        """The dtype that was chosen; None for the stored one and for "auto"."""
        return _DTYPES.get(self.dtype) if isinstance(self.dtype, str) else self.dtype

    @property
    def is_float16(self) -> bool:
        """Whether float16 was chosen."""
        chosen = self.chosen_dtype
        return isinstance(chosen, mx.Dtype) and chosen == mx.float16  # a Dtype cannot be compared with None

    def as_message(self) -> dict[str, Any]:
        """Return the options as JSON, for other machines. The dtype has a name, and a folder its full path."""
        dtype: Any = self.dtype
        if dtype is not None and not isinstance(dtype, str):
            dtype = str(dtype).removeprefix("mlx.core.")
        adapter = None if self.adapter is None else os.path.abspath(self.adapter)
        return {**asdict(replace(self, dtype=None)), "model": full_name(self.model), "dtype": dtype, "adapter": adapter}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> LoadOptions:
        """Return the options of ``as_message``."""
        return cls(**{**message, "adapter": None if message["adapter"] is None else Path(message["adapter"])})


def load(
    model: str | Path | None = None, *, dtype: mx.Dtype | DtypeName | None = "auto", cpu_dequantize: str = "auto",
    adapter: str | Path | None = None, image_attention: ImageAttention | None = None,
) -> Model:
    """Open a checkpoint and read its weights. Any thread may use the model afterwards, one at a time.

    Args:
        model: A folder, a Hub id ``owner/name[@revision]``, or "demo". None is the environment variable
            ``DGEMMA_MODEL``, else the demo.
        dtype: A floating dtype to convert all weights to, or its name. None keeps them as stored, except on a machine
            without Metal, where they become float32. "auto" is None, except that weights stored in bfloat16 become
            float16 where the GPU has no bfloat16 (M1 and M2) and the model stays within the range of float16.
        cpu_dequantize: Whether packed weights are unpacked where there is no Metal: "on", "off", or "auto", which
            unpacks them when that takes no more than half of the free memory.
        adapter: A folder that ``dgemma-mlx train``, PEFT or mlx_lm has written.
        image_attention: What the positions of a picture see of each other: "google", "transformers" or "causal"; see
            ``dgemma_mlx.model.soft_tokens``. None is "google", or "causal" where config.json says so.

    Raises:
        DgemmaError: When there is no such model or adapter, when its files are incomplete or damaged, when ``dtype``
            is float16 and the model exceeds its range, or for another ``image_attention``.
    """
    return load_as(LoadOptions(
        None if model is None else str(model), dtype, cpu_dequantize,
        None if adapter is None else Path(adapter).expanduser(), image_attention,
    ))  # fmt: skip


def load_as(options: LoadOptions) -> Model:
    """Open a checkpoint as ``load`` does."""
    loading = _Loading(options)
    if isinstance(options.dtype, str) and options.dtype == "auto":  # a Dtype cannot be compared with a text
        architecture = str(mx.device_info()["architecture"])
        network = fastest(loading.whole_network, architecture, loading.config.bos_token_id)
    else:
        network = loading.whole_network(options.chosen_dtype)
    if options.is_float16:
        require_float16(network, loading.config.bos_token_id)
    return loading.model(network)


def load_cut(
    options: LoadOptions, shares: Sequence[float], make: Callable[[TextConfig, list[Slice]], CutNetwork]
) -> Model:
    """Load this machine's slice of a model, with the text network that ``make`` makes; see ``load_slice``.

    Raises ``DgemmaError`` as ``load`` and ``load_slice`` do, and for float16, whose range cannot be checked on a slice.
    """
    loading = _Loading(options)
    if options.is_float16:
        raise DgemmaError(*FLOAT16, exit_code=2)
    return loading.model(loading.slice_of_network(shares, make))


class _Loading:
    """The steps from a checkpoint to a model.

    Attributes:
        config: The checkpoint's configuration.
    """

    def __init__(self, options: LoadOptions) -> None:
        self._options = options
        self._checkpoint = resolve(options.model)
        self.config = ModelConfig.load(self._checkpoint.folder)
        self._canvas_length: int | None = None  # of the adapter
        self._has_tower = False

    def whole_network(self, dtype: mx.Dtype | None) -> DiffusionGemma:
        """Return the whole text network, lazy."""
        network, weights = load_model(self._checkpoint.folder, self.config, dtype)
        self._has_tower = bool(weights.vision)
        return self._prepared(network)

    def slice_of_network(
        self, shares: Sequence[float], make: Callable[[TextConfig, list[Slice]], CutNetwork]
    ) -> CutNetwork:
        """Return this machine's slice of the text network, with its weights read."""
        folder = self._checkpoint.folder
        network, self._has_tower = load_slice(folder, self.config, shares, make, self._options.chosen_dtype)
        self._prepared(network)
        return network

    def _prepared(self, network: DiffusionGemma) -> DiffusionGemma:
        """Unpack the weights where that is faster, and add the adapter."""
        if should_dequantize(dequantized_bytes(network), self._options.cpu_dequantize):
            dequantize(network)
        if self._options.adapter is not None:
            from dgemma_mlx.model.adapter_file import load_adapter

            self._canvas_length = load_adapter(network, self._options.adapter).canvas_length
        return network

    def model(self, network: DiffusionGemma) -> Model:
        """Read what is not read yet, and return the model."""
        config, folder = self.config, self._checkpoint.folder
        if self._canvas_length is not None:
            config = replace(config, canvas_length=self._canvas_length)
        if not self._has_tower:  # some converters leave out the tower's weights, but not its configuration
            config = replace(config, vision=None)
        if mx.metal.is_available():  # a GPU launches less; on a CPU it gains nothing
            join_projections(network)
        if self._options.image_attention is not None:
            network.image_attention = self._options.image_attention
        _evaluate(network)
        generation = GenerationConfig.load(folder, config)
        tokenizer = load_tokenizer(folder, config.text.vocab_size)
        _check_ids(tokenizer, generation, config)
        return Model(
            name=self._checkpoint.name,
            folder=folder,
            config=config,
            generation=generation,
            network=network,
            tokenizer=tokenizer,
            pictures=None if config.vision is None else PictureEncoder(folder, config, network.dtype),
            adapter=self._options.adapter,
        )


def _check_ids(tokenizer: Tokenizer, generation: GenerationConfig, config: ModelConfig) -> None:
    """Raise ``DgemmaError`` when an id that begins, ends or pads a text is not one of the model's."""
    size = config.text.vocab_size
    named = {"end-of-text id": max(generation.eos_token_ids, default=0), "padding id": generation.pad_token_id,
             "tokenizer's bos id": tokenizer.bos_id or 0}  # fmt: skip
    for name, id in named.items():
        if id >= size:
            problem = f"the {name} is {id:,}, but the model has only {size:,} ids"
            raise DgemmaError(problem, "Fetch the checkpoint again.")


def _evaluate(network: DiffusionGemma) -> None:
    """Read and compute all weights, a layer at a time: what is lazy belongs to the thread that made it.

    Raises ``DgemmaError`` when a file cannot be read.
    """
    try:
        for layer in network.layers:
            mx.eval(layer.parameters())
        mx.eval(network.parameters())
    except RuntimeError as error:  # MLX reports a failed read like this
        raise DgemmaError(f"the weights cannot be read: {reason(error)}", "Fetch the checkpoint again.") from None
