"""From options and settings to a loaded model and the keyword arguments of the Python functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dgemma_mlx.cli.interrupt import ending_at_once
from dgemma_mlx.cli.machines import MachineOptions, cut_model, invite
from dgemma_mlx.cli.parameters import AnswerOptions, ModelOptions
from dgemma_mlx.cli.settings import Settings
from dgemma_mlx.sizes import parse_size

if TYPE_CHECKING:
    from dgemma_mlx.checkpoint.hub import Checkpoint
    from dgemma_mlx.generation.load import LoadOptions
    from dgemma_mlx.generation.model import Model


def fetch(name: str | None, weights: bool = True) -> Checkpoint:
    """Return the checkpoint with a name as ``resolve`` does; see ``obtain`` for one that must be downloaded."""
    from dgemma_mlx.checkpoint.hub import resolve

    with ending_at_once():
        checkpoint = resolve(name, weights=False)
    if not weights or checkpoint.has_weights:
        return checkpoint
    from dgemma_mlx.cli.downloading import obtain

    return obtain(checkpoint)


def load_model(
    settings: Settings, options: ModelOptions, quiet: bool = False, training: bool = False, checked: bool = False,
    images: bool = False, machines: MachineOptions | None = None, whole: bool = False,
) -> Model:
    """Load the model that the options or the settings name, and set the mode of the Metal kernels.

    Unless ``quiet``, a line on stderr says when the built-in demo answers because no model was chosen. For
    ``training`` the weights keep the dtype in which they are stored, because gradients leave the range of float16.
    Work that takes long has its weights ``checked`` before: one that is NaN or infinite raises `DgemmaError`. A
    model that is to be shown ``images``, and reads none, is refused before its weights are read. With several
    ``machines`` the model is cut over them; or each loads it ``whole``, as ``team_of`` expects it.
    """
    from dgemma_mlx.model.finite import require_finite

    load = model_loader(settings, options, training, machines, quiet, whole)
    if images:
        from dgemma_mlx.checkpoint.config import ModelConfig
        from dgemma_mlx.generation.pictures import require_vision

        checkpoint = fetch(settings.pick("model", options.model))
        require_vision(ModelConfig.load(checkpoint.folder), checkpoint.name)
    loaded = load()
    if checked:
        require_finite(loaded.network)
    if not quiet:
        say_if_demo(settings, options)
    return loaded


def model_loader(
    settings: Settings, options: ModelOptions, training: bool = False, machines: MachineOptions | None = None,
    quiet: bool = False, whole: bool = False,
) -> Callable[[], Model]:
    """Check the options and fetch the checkpoint, and return a function that loads it, which any thread may call."""
    from dgemma_mlx.generation.load import load_as
    from dgemma_mlx.kernels.dispatch import set_mode

    if machines is not None:
        machines.check()
    set_mode(settings.pick("kernels", "off" if options.no_kernels else None))
    loading = load_options(settings, options, training)
    fetch(loading.model)

    def open_model() -> Model:
        if machines is not None:
            if whole:
                invite(machines, loading, quiet)
            elif (cut := cut_model(machines, loading, quiet)) is not None:
                return cut
        return load_as(loading)

    return open_model


def load_options(settings: Settings, options: ModelOptions, training: bool = False) -> LoadOptions:
    """Return how the model is loaded that the options or the settings name."""
    import mlx.core as mx

    from dgemma_mlx.generation.load import LoadOptions

    chosen = settings.pick_checked("dtype", options.dtype)
    dtype: Any = None if training else "auto" if chosen == "auto" else getattr(mx, chosen)
    rule: Any = settings.pick_checked("image_attention", options.image_attention)
    name, dequantize = settings.pick("model", options.model), settings.pick("cpu_dequantize", options.cpu_dequantize)
    return LoadOptions(name, dtype, dequantize, options.adapter, rule)


def say_if_demo(settings: Settings, options: ModelOptions) -> None:
    """Say on stderr that the built-in demo answers, if no model was chosen."""
    if settings.pick("model", options.model) is None:
        print(
            "dgemma-mlx: no model chosen, so the built-in demo answers; for the real one: "
            "-m mlx-community/diffusiongemma-26B-A4B-it-4bit",
            file=sys.stderr,
        )


def answer_arguments(settings: Settings, options: AnswerOptions, raw: bool) -> dict[str, Any]:
    """Return ``seed``, ``system`` and ``memory_limit`` (bytes) from the options, or else from the settings.

    A system prompt from the settings does not apply to ``raw`` prompts, which have no chat template.
    """
    return {
        "seed": settings.pick("seed", options.seed),
        "system": options.system if raw else settings.pick("system", options.system),
        "memory_limit": in_bytes(settings.pick("memory_limit", options.memory_limit)),
    }


def in_bytes(size: str | None) -> int | None:
    """Return a size such as ``20GB`` in bytes. Raises `DgemmaError` (exit code 2) when the text is not a size."""
    return None if size is None else parse_size(size)
