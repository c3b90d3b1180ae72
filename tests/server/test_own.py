"""The server's own endpoints, and those of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import httpx
import pytest

from dgemma_mlx import Gap, choose, edit, fill, load
from dgemma_mlx.infill.fill import prepare_fill
from tests.server.live import serving

RECORD = "Make a JSON object: Simon is 59 years old and lives in Rome."
GAPS = '{"name": "Simon", "age": ___:1___, "city": "Rome"}\n'
QUICK = {"max_denoising_steps": 1}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving() as address:
        yield address


def post(address: str, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{address}{path}", json=body, timeout=60)


def answered(address: str, path: str, body: Any) -> Any:
    answer = post(address, path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare two results without what is measured."""
    for each in (found, expected):
        for name in ("seconds", "peak_memory"):
            each["statistics"].pop(name)
    assert found == {"model": "demo", **json.loads(json.dumps(expected))}


def test_fill_is_the_function_fill(address: str) -> None:
    found = answered(address, "/v1/fill", {"text": GAPS, "prompt": RECORD, "candidates": 1, "seed": 1})
    assert found["doubt"] is None
    same(found, asdict(fill(load("demo"), GAPS, prompt=RECORD, candidates=1, seed=1)))


def test_the_steps_of_fill_are_streamed_before_the_same_result(address: str) -> None:
    body = {"text": GAPS.replace("___:1___", "___"), "prompt": RECORD, "candidates": 2, "seed": 1}
    with httpx.stream("POST", f"{address}/v1/fill", json={**body, "stream": True}, timeout=60) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    *steps, result = map(json.loads, lines[:-1])
    same(result, asdict(fill(load("demo"), **body)))
    drafts = [step["dgemma"] for step in steps]
    whole = [draft for draft in drafts if "at" not in draft]
    assert [draft["canvas"] for draft in whole] == sorted({draft["canvas"] for draft in drafts})
    assert {"p", "t", "e"} == set("".join(draft["kinds"] for draft in drafts))
    pinned = "".join(text for text, kind in zip(whole[0]["tokens"], whole[0]["kinds"], strict=True) if kind == "p")
    assert pinned == ', "city": "Rome"}'


def test_a_stream_of_a_text_without_gaps_is_refused_at_once(address: str) -> None:
    found = post(address, "/v1/fill", {"text": "no gap", "stream": True})
    assert found.status_code == 400 and "no gap" in found.json()["error"]["message"]


def test_a_text_may_be_a_list_with_gaps_and_all_options(address: str) -> None:
    options: dict[str, Any] = {"candidates": 2, "seed": 3, "speed": "reference", "temp": 0.0, "system": "Be brief."}
    body = {"text": ["a ", {"size": 2, "hint": "x"}, " b"], "max_denoising_steps": 2, **options}
    model = load("demo")
    expected = fill(
        model, ["a ", Gap(2, "x"), " b"], generation=model.generation.override(max_denoising_steps=2), **options
    )
    same(answered(address, "/v1/fill", body), asdict(expected))


def test_edit_is_the_function_edit(address: str) -> None:
    text = "one 5\ntwo 6\n"
    options = {"lines": [2, 2], "match": r"\d", "strength": 0.5, "candidates": 1, "seed": 2, "speed": "fast"}
    found = answered(address, "/v1/edit", {"instruction": "Count", "text": text, **options})
    assert found["text"].startswith("one 5\ntwo ")
    arguments: dict[str, Any] = {**options, "lines": (2, 2)}
    same(found, asdict(edit(load("demo"), "Count", text, **arguments)))
    model = load("demo")
    whole = answered(address, "/v1/edit", {"instruction": "Count", "text": text, "seed": 1, **QUICK})
    same(whole, asdict(edit(model, "Count", text, seed=1, generation=model.generation.override(**QUICK))))


def test_choose_is_the_function_choose(address: str) -> None:
    body = {"question": "What is 27 + 45?", "choices": ["71", "72", "82"], "seed": 1}
    found = answered(address, "/v1/choose", body)
    assert found["choices"][0]["text"] == "72"
    expected = choose(load("demo"), "What is 27 + 45?", ["71", "72", "82"], seed=1)
    assert found["choices"] == [asdict(choice) for choice in expected]


@pytest.mark.parametrize(("path", "body", "words"), [
    ("/v1/fill", {"text": "no gap"}, "there is no gap in the text"),
    ("/v1/fill", {}, "missing required field `text`"),
    ("/v1/fill", {"text": ["a", {"size": 0}]}, ">= 1"),
    ("/v1/fill", {"text": "___", "candidates": 65}, "<= 64"),
    ("/v1/fill", {"text": "___", "speed": "warp"}, "speed must be one of"),
    ("/v1/fill", {"text": "___", "seed": -1}, "not a seed"),
    ("/v1/fill", {"text": "___", "seed": 2**64}, "not a seed"),
    ("/v1/fill", {"text": "___", "temp": -1}, "temp must be"),
    ("/v1/fill", {"text": "___", "t_max": -1}, "t_max"),
    ("/v1/fill", {"text": "___", "raw": True, "prompt": "x"}, "raw text takes no prompt"),
    ("/v1/fill", {"text": "word " * 5000 + "___", "prompt": ""}, "the prompt is too long"),
    ("/v1/edit", {"instruction": "x", "text": ""}, "the text is empty"),
    ("/v1/edit", {"instruction": "x", "text": "a", "match": "("}, "not a regular expression"),
    ("/v1/edit", {"instruction": "x", "text": "a", "lines": [3, 4]}, "there are no lines"),
    ("/v1/edit", {"instruction": "x", "text": "a", "lines": [1]}, "length 2"),
    ("/v1/edit", {"instruction": "x", "text": "a", "strength": 0}, "> 0"),
    ("/v1/edit", {"instruction": "x", "text": "word " * 300}, "a canvas holds only"),
    ("/v1/choose", {"question": "x", "choices": ["a"]}, ">= 2"),
    ("/v1/choose", {"question": "x", "choices": ["a", "a "]}, "at least two different answers"),
    ("/v1/choose", {"question": "x", "choices": ["a", "word " * 300]}, "a canvas holds only"),
    ("/infill", {"input_prefix": 3}, "Expected `str`"),
    ("/infill", {"stop": ["a"] * 65}, "at most 64"),
    ("/tokenize", {}, "missing required field `content`"),
    ("/detokenize", {"tokens": [3, 10**9]}, "there is no token 1,000,000,000"),
    ("/detokenize", {"tokens": [-1]}, ">= 0"),
])  # fmt: skip
def test_what_is_at_fault_is_refused(address: str, path: str, body: Any, words: str) -> None:
    answer = post(address, path, body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"


def test_a_gap_between_two_texts_is_filled(address: str) -> None:
    body = {"input_prefix": "Sort 7 3 5\n", "prompt": "3 5", "input_suffix": " 9", "n_predict": 8, "seed": 1}
    found = answered(address, "/infill", {**body, **QUICK, "n_indent": 2})
    model = load("demo")
    generation = model.generation.override(**QUICK)
    expected = fill(model, ["Sort 7 3 5\n3 5", Gap(most=8), " 9"], candidates=4, seed=1, generation=generation)
    assert found["content"] == expected.candidates[0].texts[0]
    assert found["stop"] is True and found["stop_type"] == "eos" and found["truncated"] is False
    assert found["tokens_predicted"] == expected.candidates[0].lengths[0] <= 8
    assert found["timings"]["predicted_n"] == found["tokens_predicted"]


def test_a_gap_has_no_more_tokens_than_asked(address: str) -> None:
    assert answered(address, "/infill", {"input_prefix": "a ", "n_predict": 1, **QUICK})["tokens_predicted"] == 1
    for most in (1, 3, 40):
        prepared = prepare_fill(load("demo"), ["a ", Gap(most=most), " b"], candidates=8)
        assert max(prepared.ladders[0]) <= most


def test_nothing_to_write_is_answered_at_once(address: str) -> None:
    body = {"input_extra": [{"filename": "a", "text": "b" * 1000}], "prompt": "", "n_predict": 0, "samplers": []}
    found = answered(address, "/infill", body)
    assert found["content"] == "" and found["stop"] is True and found["tokens_predicted"] == 0
    assert answered(address, "/infill", {**body, "response_fields": [""]}) == {}


def test_an_editor_gets_the_fields_that_it_asks_for(address: str) -> None:
    fields = ["content", "timings/predicted_n", "truncated", "nothing", "timings/nothing", "content/x"]
    found = answered(address, "/infill", {"input_prefix": "a", "n_predict": 1, "response_fields": fields, **QUICK})
    assert list(found) == ["content", "timings/predicted_n", "truncated"]


def test_a_result_ends_before_a_stop_text(address: str) -> None:
    body: dict[str, Any] = {"input_prefix": "Count from 1 to 9.\n1 2 3", "n_predict": 4, **QUICK}
    whole = answered(address, "/infill", {**body, "seed": 5})["content"]
    end = whole[-1]
    cut = answered(address, "/infill", {**body, "seed": 5, "stop": [end]})
    assert cut["content"] == whole[: whole.index(end)]
    assert (cut["stop_type"], cut["stopping_word"]) == ("word", end)
    assert isinstance(answered(address, "/infill", {**body, "seed": -1})["content"], str)


def test_a_result_may_be_streamed(address: str) -> None:
    body = {"input_prefix": "a", "n_predict": 2, "seed": 1, **QUICK}
    with httpx.stream("POST", f"{address}/infill", json={**body, "stream": True}, timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert [event["stop"] for event in events] == [False, True]
    assert "".join(event["content"] for event in events) == answered(address, "/infill", body)["content"]


def test_texts_become_ids_and_ids_texts(address: str) -> None:
    tokenizer = load("demo").tokenizer
    text = "Sort 7 3 5 <|turn>é"
    ids = answered(address, "/tokenize", {"content": text})["tokens"]
    assert ids == tokenizer.encode_control(text)
    assert answered(address, "/detokenize", {"tokens": ids})["content"] == text
    plain = answered(address, "/tokenize", {"content": text, "parse_special": False, "add_special": True})["tokens"]
    assert plain == [tokenizer.bos_id, *tokenizer.encode(text)]
    pieces = answered(address, "/tokenize", {"content": text, "with_pieces": True})["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    joined = b"".join(bytes(p) if isinstance(p, list) else p.encode() for p in (piece["piece"] for piece in pieces))
    assert joined.decode() == text
    assert answered(address, "/detokenize", {"tokens": []}) == {"content": ""}


def test_props_say_what_is_served(address: str) -> None:
    model = load("demo")
    found = httpx.get(f"{address}/props").json()
    assert found["default_generation_settings"]["n_ctx"] == model.config.text.max_position_embeddings
    assert found["chat_template"] == model.template.templates["default"]
    assert str(model.folder) not in json.dumps(found)
    refused = post(address, "/props", {})
    assert refused.status_code == 501 and refused.json()["error"]["code"] == 501


def test_another_models_name_is_refused_where_the_owner_wants_that() -> None:
    with serving(strict_model=True) as address:
        body = {"question": "What is 2 + 2?", "choices": ["4", "5"]}
        assert post(address, "/v1/choose", {**body, "model": "demo"}).status_code == 200
        fill = {"text": "___"}
        for path, asked in (("/v1/choose", body), ("/v1/fill", fill), ("/v1/fill", {**fill, "stream": True}),
                            ("/infill", {})):
            answer = post(address, path, {**asked, "model": "gpt-4o"})
            assert answer.status_code == 404
            assert "the model 'gpt-4o' does not exist" in answer.json()["error"]["message"]
