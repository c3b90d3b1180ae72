"""DiffusionGemma on Apple silicon: load a checkpoint, generate text, watch the canvas settle.

    import dgemma_mlx

    model = dgemma_mlx.load("demo")
    print(dgemma_mlx.generate(model, "Sort 5 2 9").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dgemma_mlx.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma_mlx.constrain.constraint import Constraint
    from dgemma_mlx.engine import Model, generate, generate_batch, load, stream
    from dgemma_mlx.events import Committed, Done, Draft, Event, Statistics
    from dgemma_mlx.prompt_cache import PromptCache
    from dgemma_mlx.text.parts import ToolCall

__version__ = "0.1.0"

__all__ = [
    "Committed",
    "Constraint",
    "DgemmaError",
    "Done",
    "Draft",
    "Event",
    "Model",
    "PromptCache",
    "Statistics",
    "ToolCall",
    "generate",
    "generate_batch",
    "load",
    "stream",
]

_EVENTS = ("Committed", "Done", "Draft", "Event", "Statistics", "ToolCall")


def __getattr__(name: str) -> Any:
    """Imports on first use: ``dgemma-mlx --help`` needs no mlx."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    # the engine's own, and Constraint and PromptCache, which it imports
    return getattr(import_module("dgemma_mlx.events" if name in _EVENTS else "dgemma_mlx.engine"), name)
