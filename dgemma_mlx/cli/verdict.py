"""Whether a checkpoint fits this machine's memory, and which recipe would if it does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dgemma_mlx.sizes import size

if TYPE_CHECKING:
    from dgemma_convert.source import Source, Weight

ORIGINAL = "google/diffusiongemma-26B-A4B-it"
CONTEXTS = (8192, 32_768)
_RECIPES = ("q8", "q4", "q4-small", "q3")  # what is proposed, the most exact first


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint fits this machine.

    Attributes:
        available: Bytes that this machine gives the model: the limit of its GPU, or the free memory without Metal.
        on_gpu: Whether this is the limit of a GPU.
        memory: Bytes that the model takes, by the number of tokens of context, ascending.
        recipe: The most exact recipe of ``convert`` that would fit, if the model does not fit and one would, else None.
        recipe_memory: Bytes that the model takes after this recipe, or after the smallest recipe if none would fit.
        source: The checkpoint to convert with the recipe.
    """

    available: int
    on_gpu: bool
    memory: dict[int, int]
    recipe: str | None
    recipe_memory: int
    source: str

    @property
    def fits(self) -> bool:
        """Whether the model fits with the shortest context of ``memory``."""
        return min(self.memory.values()) <= self.available

    def needs(self) -> str:
        """Return a line with the memory that is needed and the memory that is there."""
        needed = [f"{size(memory)} with {tokens:,} tokens of context" for tokens, memory in self.memory.items()]
        there = "this Mac gives its GPU" if self.on_gpu else "free on this machine:"
        return f"memory: {', '.join(needed)}; {there} {size(self.available)}"

    def outcome(self) -> str:
        """Return whether the model fits, in a few words."""
        fitting = [tokens for tokens, memory in self.memory.items() if memory <= self.available]
        if not fitting:
            return "does not fit"
        spare = size(self.available - self.memory[fitting[-1]])
        return f"fits with {spare} to spare at {fitting[-1]:,} tokens of context"

    def sentence(self) -> str:
        """Return whether the model fits, and what to do if it does not."""
        if self.fits:
            return self.outcome()
        if self.recipe is not None:
            return (
                f"{self.outcome()}: use {self.recipe}, which takes {size(self.recipe_memory)} "
                f"(dgemma-mlx convert {self.source} --recipe {self.recipe})"
            )
        if self.recipe_memory < min(self.memory.values()):
            return f"{self.outcome()}, nor would the smallest recipe, which takes {size(self.recipe_memory)}"
        return f"{self.outcome()}, and no recipe makes it smaller"


def judge(source: Source, loaded: int, batch_size: int = 1) -> Verdict:
    """Return the verdict on a checkpoint whose weights take ``loaded`` bytes, for ``batch_size`` prompts at a time."""
    import mlx.core as mx

    from dgemma_mlx.generation.memory import Work, device_limit, run_memory

    longest = source.config.text.max_position_embeddings
    contexts = sorted({min(tokens, longest) for tokens in CONTEXTS})
    memory = {tokens: run_memory(source.config, loaded, tokens, work=Work(batch_size)) for tokens in contexts}
    available = device_limit()
    recipe, recipe_memory = None, memory[contexts[0]]
    if memory[contexts[0]] > available:
        recipe, recipe_memory = fitting_recipe(source, contexts[0], available)
    return Verdict(
        available, mx.metal.is_available(), memory, recipe, recipe_memory,
        ORIGINAL if source.is_packed else source.checkpoint.name,
    )  # fmt: skip


def fitting_recipe(source: Source, context: int, available: int) -> tuple[str | None, int]:
    """Return the most exact recipe whose output fits and its memory, or None and the memory of the smallest output."""
    from dgemma_convert.plan import make_plan
    from dgemma_convert.recipes import RECIPES

    memory = {name: make_plan(source, Path(name), RECIPES[name]).memory_with(context) for name in _RECIPES}
    fitting = next((name for name in _RECIPES if memory[name] <= available), None)
    return fitting, min(memory.values()) if fitting is None else memory[fitting]


def loaded_bytes(source: Source, cpu_dequantize: str = "auto") -> int:
    """Return the bytes that the text network's weights take on this machine after ``load``."""
    unpacked = unpacks(source, cpu_dequantize)
    return sum(loaded_weight(weight, unpacked) for weight in source.text.values())


def loaded_weight(weight: Weight, unpacked: bool) -> int:
    """Return the bytes that a weight takes on this machine; ``unpacked`` says whether packed ones become float32."""
    from dgemma_mlx.generation.memory import weight_memory

    return 4 * weight.size if unpacked and weight.format is not None else weight_memory(weight.stored)


def unpacks(source: Source, cpu_dequantize: str) -> bool:
    """Return whether ``load`` would unpack packed weights on this machine."""
    from dgemma_mlx.generation.memory import should_dequantize

    plain = _plain_bytes(source)
    return should_dequantize(plain, cpu_dequantize) and plain > 0


def _plain_bytes(source: Source) -> int:
    """Return the bytes of the packed weights after they are unpacked to float32."""
    return 4 * sum(weight.size for weight in source.text.values() if weight.format is not None)


