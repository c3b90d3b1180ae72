"""Completions, gaps before a suffix, and the list of models, with a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from dgemma_mlx import Gap, fill, generate, load
from tests.server.live import http, serving

START, END = '{"name": "Simon", "age": ', ', "city": "Rome"}'
GREEDY: dict[str, Any] = {"seed": 1, "max_tokens": 2, "temperature": 0, "speed": "fast"}
PATH, FIM = "/v1/completions", "/v1/fim/completions"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as address:
        yield address


def post(address: str, path: str = PATH, **body: Any) -> Any:
    answer = http.post(address + path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(address: str, **body: Any) -> Any:
    answer = http.post(address + PATH, json=body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def streamed(address: str, path: str = PATH, **body: Any) -> list[dict[str, Any]]:
    with http.stream("POST", address + path, json={**body, "stream": True}) as stream:
        lines = [line for line in stream.iter_lines() if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.fixture(scope="module")
def filled() -> str:
    """What ``fill`` writes between ``START`` and ``END`` in at most two tokens."""
    found = fill(load("demo"), [START, Gap(most=2), END], candidates=4, seed=1, temp=0.0, speed="fast")
    assert found.text == START + found.candidates[0].texts[0] + END
    return found.candidates[0].texts[0]


def test_a_text_goes_on_as_with_generate(address: str) -> None:
    model = load("demo")
    prompts = ["3 5", "Rome is"]
    texts = [generate(model, prompt, raw=True, seed=1, max_tokens=2, temp=0.0, speed="fast") for prompt in prompts]
    answer = post(address, prompt=prompts, **GREEDY)
    assert answer["object"] == "text_completion" and answer["model"] == "demo"
    for index, done in enumerate(texts):
        assert answer["choices"][index] == {
            "index": index, "text": done.text, "logprobs": None, "finish_reason": done.finish_reason,
        }  # fmt: skip
    assert answer["usage"]["prompt_tokens"] == sum(done.statistics.prompt_tokens for done in texts)
    chunks = streamed(address, prompt=prompts[0], **GREEDY, stream_options={"include_usage": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == texts[0].text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == texts[0].finish_reason
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["prompt_tokens"] == texts[0].statistics.prompt_tokens


def test_an_echo_begins_with_the_prompt(address: str) -> None:
    plain, echo = (post(address, prompt="3 5", **GREEDY, echo=wanted) for wanted in (False, True))
    assert echo["choices"][0]["text"] == "3 5" + plain["choices"][0]["text"]
    chunks = streamed(address, prompt="3 5", **GREEDY, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == echo["choices"][0]["text"]


def test_the_gap_before_a_suffix_is_filled(address: str, filled: str) -> None:
    [choice] = post(address, prompt=START, suffix=END, **GREEDY)["choices"]
    assert (choice["text"], choice["finish_reason"]) == (filled, "stop")


def test_the_spelling_of_starcoder_is_a_gap_as_well(address: str, filled: str) -> None:
    prompt = f"<fim_prefix>{START}<fim_suffix>{END}<fim_middle>"
    chunks = streamed(address, prompt=prompt, **GREEDY)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [filled]
    assert chunks[0]["choices"][0]["finish_reason"] == "stop"


def test_mistral_has_the_same_as_messages(address: str, filled: str) -> None:
    answer = post(address, FIM, prompt=START, suffix=END, random_seed=1, **{**GREEDY, "seed": None})
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": filled}
    assert answer["usage"]["completion_tokens"] in (1, 2)
    [chunk] = streamed(address, FIM, prompt=START, suffix=END, random_seed=1, **{**GREEDY, "seed": None})
    assert chunk["choices"][0]["delta"]["content"] == filled


def test_a_stop_text_ends_what_fills_a_gap(address: str, filled: str) -> None:
    answer = post(address, prompt=START, suffix=END, **GREEDY, stop=[filled[-1:]])
    assert answer["choices"][0]["text"] == filled[:-1].split(filled[-1:])[0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [1, 2]}, "prompt"), ({"prompt": [[1]]}, "prompt"), ({"prompt": []}, "prompt"),
        ({"prompt": ["a"] * 17}, "prompt"), ({"prompt": "a", "logprobs": 0}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"), ({}, None),
        ({"prompt": "a " * 20_000, "suffix": "b"}, "messages"), ({"prompt": "a " * 20_000}, "messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(address: str, body: dict[str, Any], param: str | None) -> None:
    assert refused(address, **body)["param"] == param


def test_the_list_of_models_has_the_fields_that_clients_look_for(address: str) -> None:
    listed = http.get(f"{address}/v1/models").json()
    [model] = listed["data"]
    context = load("demo").config.text.max_position_embeddings
    assert (model["id"], model["object"], model["type"]) == ("demo", "model", "model")
    assert model["context_length"] == model["max_model_len"] == model["meta"]["n_ctx"] == context
    assert listed["object"] == "list" and listed["has_more"] is False
    for name in ("demo", "gpt-4o", "google/gemma"):
        assert http.get(f"{address}/v1/models/{name}").json()["id"] == "demo"


def test_only_a_strict_server_refuses_other_names() -> None:
    with serving(strict_model=True) as address:
        ask = {"messages": [{"role": "user", "content": "Sort 7 3 5"}], "prompt": "a", **GREEDY}
        for path in ("/v1/chat/completions", PATH, FIM):
            answer = http.post(address + path, json={**ask, "model": "gpt-4o"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
            assert http.post(address + path, json={**ask, "model": "demo"}).status_code == 200
        assert http.get(f"{address}/v1/models/gpt-4o").status_code == 404
        assert http.get(f"{address}/v1/models/demo").status_code == 200
