"""What a shell offers after an option when the user presses Tab. Where a function returns nothing, it offers files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dgemma_mlx.cli.settings import SETTINGS
from dgemma_mlx.errors import DgemmaError

Completion = Callable[[str], list[str]]


def one_of(*values: str) -> Completion:
    """Return a completion that offers the values."""

    def complete(incomplete: str) -> list[str]:
        return _beginning(incomplete, values)

    return complete


def values_of(setting: str) -> Completion:
    """Return a completion that offers the values of a setting, as its ``choices`` list them."""
    return one_of(*(SETTINGS[setting].choices or ()))


def models(incomplete: str) -> list[str]:
    """Offer the built-in demo, and the DiffusionGemma checkpoints in the Hub's cache."""
    return _beginning(incomplete, ["demo"]) + cached_models(incomplete)


def cached_models(incomplete: str) -> list[str]:
    """Offer the DiffusionGemma checkpoints in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    names = [
        "/".join(folder.name.split("--", 2)[1:])
        for folder in sorted(Path(HF_HUB_CACHE).glob("models--*--*"))
        if any(_is_ours(path) for path in folder.glob("snapshots/*/config.json"))
    ]
    return _beginning(incomplete, names)


def published_models(incomplete: str) -> list[str]:
    """Offer the published checkpoints, which ``pull`` downloads."""
    from dgemma_mlx.cli.offer import PUBLISHED

    return _beginning(incomplete, PUBLISHED.values())


def recipes(incomplete: str) -> list[str]:
    """Offer the recipes of ``convert``."""
    from dgemma_convert.recipes import RECIPES

    return _beginning(incomplete, RECIPES)


def templates(incomplete: str) -> list[str]:
    """Offer the templates of ``generate --template``."""
    from dgemma_mlx.cli.template import template_names

    try:
        return _beginning(incomplete, template_names())
    except (DgemmaError, OSError):
        return []


def setting_names(incomplete: str) -> list[tuple[str, str]]:
    """Offer the names of the settings, with what they mean."""
    return [(name, SETTINGS[name].meaning) for name in _beginning(incomplete, SETTINGS)]


def setting_values(ctx: Any, incomplete: str) -> list[str]:
    """Offer the values of the setting that the words before name, if they can be listed."""
    name = ctx.params.get("name")
    if name == "model":
        return models(incomplete)
    kind = SETTINGS.get(name)
    values = () if kind is None else ("true", "false") if kind.type is bool else kind.choices or ()
    return _beginning(incomplete, values)


def _beginning(incomplete: str, values: Iterable[str]) -> list[str]:
    """Return the values that begin with what is already typed."""
    return [value for value in values if value.startswith(incomplete)]


def _is_ours(config: Path) -> bool:
    """Return whether a configuration is that of a DiffusionGemma model."""
    try:
        return '"diffusion_gemma"' in config.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
