"""Whether a checkpoint fits, and which recipe would."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgemma_convert.plan import make_plan
from dgemma_convert.recipes import RECIPES
from dgemma_convert.source import open_source
from dgemma_mlx.checkpoint.hub import resolve
from dgemma_mlx.cli.verdict import Verdict, fitting_recipe, judge, loaded_bytes
from dgemma_mlx.generation.memory import run_memory


@pytest.mark.parametrize(
    ("memory", "recipe", "sentence"),
    [
        ({8192: 10, 32_768: 12}, None, "fits with 3 bytes to spare at 32,768 tokens of context"),
        ({8192: 14, 32_768: 16}, None, "fits with 1 byte to spare at 8,192 tokens of context"),
        ({8192: 16, 32_768: 18}, "q3",
         "does not fit: use q3, which takes 14 bytes (dgemma-mlx convert some/model --recipe q3)"),
        ({8192: 14_000, 32_768: 16_000}, None, "does not fit, nor would the smallest recipe, which takes 14 bytes"),
        ({8192: 16}, None, "does not fit, nor would the smallest recipe, which takes 14 bytes"),
    ],
)  # fmt: skip
def test_sentences(memory: dict[int, int], recipe: str | None, sentence: str) -> None:
    assert Verdict(15, True, memory, recipe, 14, "some/model").sentence() == sentence


def test_the_most_exact_recipe_that_fits_is_proposed() -> None:
    source = open_source(resolve("demo"))
    q8, q4, small = (make_plan(source, Path("x"), RECIPES[name]).memory_with(4096) for name in ("q8", "q4", "q4-small"))
    assert q8 > q4 > small
    assert fitting_recipe(source, 4096, q8) == ("q8", q8)
    assert fitting_recipe(source, 4096, q8 - 1) == ("q4", q4)
    assert fitting_recipe(source, 4096, small) == ("q4-small", small)
    assert fitting_recipe(source, 4096, small - 1) == (None, small)


def test_contexts_end_where_the_model_ends() -> None:
    source = open_source(resolve("demo"))
    loaded = loaded_bytes(source)
    assert judge(source, loaded).memory == {4096: run_memory(source.config, loaded, 4096)}
    assert make_plan(source, Path("x"), RECIPES["q4"]).context == 4096
