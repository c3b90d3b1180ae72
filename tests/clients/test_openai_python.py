"""OpenAI's library for Python."""

from __future__ import annotations

import pytest

openai = pytest.importorskip("openai")


def test_the_demo_answers(demo: str) -> None:
    client = openai.OpenAI(base_url=f"{demo}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Sort 7 3 5"}], seed=1
    )
    assert answer.choices[0].message.content == "3 5 7"
