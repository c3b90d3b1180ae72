"""DiffusionGemma on Apple silicon: load a checkpoint, generate text, watch the canvas settle.

    import dgemma_mlx

    model = dgemma_mlx.load("demo")
    print(dgemma_mlx.generate(model, "Sort 5 2 9").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dgemma_mlx.errors import DgemmaError
from dgemma_mlx.version import __version__ as __version__

if TYPE_CHECKING:
    from dgemma_mlx.constrain.constraint import Constraint
    from dgemma_mlx.events import Committed, Done, Draft, Event, Statistics
    from dgemma_mlx.generation.api import generate, generate_batch, stream
    from dgemma_mlx.generation.load import load
    from dgemma_mlx.generation.model import Model
    from dgemma_mlx.generation.prompt_cache import PromptCache
    from dgemma_mlx.generation.worker import Worker
    from dgemma_mlx.infill.choose import Choice, choose
    from dgemma_mlx.infill.edit import edit
    from dgemma_mlx.infill.fill import Filled, fill
    from dgemma_mlx.infill.search import Candidate
    from dgemma_mlx.infill.template import Gap
    from dgemma_mlx.text.parts import ToolCall

_MODULES = {
    "Candidate": "infill.search",
    "Choice": "infill.choose",
    "Committed": "events",
    "Constraint": "constrain.constraint",
    "DgemmaError": "errors",
    "Done": "events",
    "Draft": "events",
    "Event": "events",
    "Filled": "infill.fill",
    "Gap": "infill.template",
    "Model": "generation.model",
    "PromptCache": "generation.prompt_cache",
    "Statistics": "events",
    "ToolCall": "text.parts",
    "Worker": "generation.worker",
    "choose": "infill.choose",
    "edit": "infill.edit",
    "fill": "infill.fill",
    "generate": "generation.api",
    "generate_batch": "generation.api",
    "load": "generation.load",
    "stream": "generation.api",
}

__all__ = [
    "Candidate",
    "Choice",
    "Committed",
    "Constraint",
    "DgemmaError",
    "Done",
    "Draft",
    "Event",
    "Filled",
    "Gap",
    "Model",
    "PromptCache",
    "Statistics",
    "ToolCall",
    "Worker",
    "choose",
    "edit",
    "fill",
    "generate",
    "generate_batch",
    "load",
    "stream",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: ``dgemma-mlx --help`` needs no mlx."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"dgemma_mlx.{_MODULES[name]}"), name)
