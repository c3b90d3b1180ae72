"""The table of docs/tool_calls.md, compared with what mlx_lm's parser of Gemma's tool calls returns."""

from __future__ import annotations

import pytest

from tests.text.call_table import Calls, same, table

gemma4 = pytest.importorskip("mlx_lm.tool_parsers.gemma4")
pytestmark = pytest.mark.oracle


@pytest.mark.parametrize(("block", "outcomes"), table())
def test_the_column_of_mlx_lm_is_right(block: str, outcomes: dict[str, Calls]) -> None:
    try:
        found = gemma4.parse_tool_call(block)
    except ValueError:
        found = []
    calls = found if isinstance(found, list) else [found]
    assert same([(call["name"], call["arguments"]) for call in calls], outcomes["mlx_lm"])
